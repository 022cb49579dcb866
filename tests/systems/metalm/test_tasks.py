"""Tasks from unseen documents: functions of seed and index, whose right answer is right."""

import pytest

from lmops_jax.data.documents import Document
from lmops_jax.systems.metalm import tasks

KINDS = ("code", "prose")


def _document(number, num_words=300):
  kind = KINDS[number % 2]
  text = "\n".join(
    " ".join(f"{kind}{number}w{line}x{i}" for i in range(8)) for line in range(num_words // 8))
  return Document(number, text, kind, f"doc{number}")


DOCUMENTS = [_document(number) for number in range(1, 41)]
CONFIG = tasks.Tasks(num_rows=30, num_train=20, num_kinds=2)


@pytest.fixture(scope="module")
def made():
  return tasks.tasks(DOCUMENTS, CONFIG)


def _owner(text):
  """The number of the document that a passage is from."""
  word = text.split()[0]
  return int(word.split("w")[0].removeprefix("code").removeprefix("prose"))


def _kind(text):
  """The kind of the document that a passage is from."""
  return next(kind for kind in KINDS if text.startswith(kind))


def test_the_right_passage_continues_the_text_and_no_other_does(made):
  by_id = {document.id: document for document in DOCUMENTS}
  labels = set()
  for row in made[tasks.NEXT_PASSAGE].rows:
    own = by_id[_owner(row.prompt.split(maxsplit=1)[1])]
    for number, option in enumerate(row.options):
      assert (row.prompt + option in own.text) == (number == row.label)
      assert len(option) <= CONFIG.option_chars and option[0].isspace()
      assert by_id[_owner(option)].kind == own.kind
    assert len(row.prompt) <= CONFIG.context_chars and len(row.options) == 4
    labels.add(row.label)
  assert labels == {0, 1, 2, 3}


def test_pairs_are_of_one_document_or_of_two(made):
  task = made[tasks.SAME_DOCUMENT]
  assert task.words == ("no", "yes")
  for row in (*task.rows, *task.train):
    first, second = row.prompt.removeprefix("First: ").removesuffix(" Same:").split(" Second: ")
    assert (_owner(first) == _owner(second)) == (row.label == 1)
    assert (_kind(first) == _kind(second)) == (row.label == 1)
    assert first != second and max(len(first), len(second)) <= CONFIG.pair_chars
  assert sum(row.label for row in task.rows) == len(task.rows) // 2


def test_kinds_are_asked_in_turn_of_excerpts_of_such_documents(made):
  task = made[tasks.FILE_KIND]
  assert task.words == KINDS and len(task.rows) == CONFIG.num_rows
  for row in (*task.rows, *task.train):
    text = row.prompt.removeprefix("Text: ").removesuffix(" Type:")
    assert _kind(text) == KINDS[row.label] and len(text) <= CONFIG.kind_chars
    assert row.options == (" code", " prose")
  assert sum(row.label for row in task.rows) == len(task.rows) // 2


def test_rows_to_train_on_are_of_other_documents_than_those_to_evaluate_on(made):
  def owners(rows):
    return {_owner(part) for row in rows
            for part in row.prompt.split(": ", 1)[1].split(" Second: ")}

  for name in tasks.TUNED:
    assert not owners(made[name].rows) & owners(made[name].train)


def test_rows_depend_on_seed_and_index_alone(made):
  again = tasks.tasks(list(reversed(DOCUMENTS)), CONFIG)
  assert again == made
  other = tasks.tasks(DOCUMENTS, tasks.Tasks(
    num_rows=30, num_train=20, num_kinds=2, seed=1))
  assert other[tasks.NEXT_PASSAGE].rows != made[tasks.NEXT_PASSAGE].rows


def test_other_words_change_nothing_but_the_options(made):
  task = tasks.with_words(made[tasks.SAME_DOCUMENT], ("left", "right"))
  assert task.words == ("left", "right")
  for row, was in zip(task.train, made[tasks.SAME_DOCUMENT].train, strict=True):
    assert row.options == (" left", " right")
    assert row._replace(options=was.options) == was


def test_too_few_kinds_are_refused():
  with pytest.raises(ValueError, match=r"are of 2 kinds \(code, prose\) and .*num_kinds=3; give"):
    tasks.tasks(DOCUMENTS, tasks.Tasks(num_rows=4, num_train=4, num_kinds=3))


def test_too_little_text_is_refused():
  short = [document._replace(text=document.text[:700]) for document in DOCUMENTS]
  with pytest.raises(ValueError, match="documents are longer than 560 characters, and the task"):
    tasks.tasks([one._replace(text=one.text[:500]) for one in short], CONFIG)
  blank = [document._replace(text=" \n" * 400) for document in DOCUMENTS]
  with pytest.raises(ValueError, match="passages are blank or equal"):
    tasks.next_passage(blank, CONFIG, 0, 0)
