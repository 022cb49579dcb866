"""MetaLM's clusters and tasks in context: what is left out, and options listed behind a prompt."""

import json

import pytest

from lmops_jax.data.task_records import listing_options, record_of
from lmops_jax.data.tasks import ENTRIES, named_task
from lmops_jax.data.tasks.asked import CLUSTERS, IN_CONTEXT
from lmops_jax.evaluation.in_context import NORMALISATIONS
from tests.data.tasks import asked_rows


def _task(folder, name, *rows, **more):
  text = "".join(json.dumps({**asked_rows.ROWS.get(name, {}), **row}) + "\n" for row in rows)
  (folder / "test.jsonl").write_text(text)
  return named_task(name, data=folder, **more)


def test_every_task_of_a_cluster_is_asked_with_one_prompt():
  names = [name for cluster in CLUSTERS.values() for name in cluster]
  assert len(CLUSTERS) == 10 and len(set(names)) == len(names)
  for name in names:
    assert not ENTRIES[name].flavours["ask"][0].prompts, name
  for name, normalisation in IN_CONTEXT.items():
    assert 0 in ENTRIES[name].flavours["gpt3"] and normalisation in NORMALISATIONS


def test_rows_without_an_agreed_label_are_counted(tmp_path):
  snli = _task(tmp_path, "snli", {"label": -1}, {"label": 0}, {"label": "-"}, {"label": "neutral"})
  assert [row.label for row in snli.rows] == [0, 1] and snli.skipped == 2
  moods = _task(tmp_path, "sentiment140", {"polarity": 2}, {"polarity": 0}, {"polarity": 4})
  assert [row.label for row in moods.rows] == [0, 1] and moods.skipped == 1
  with pytest.raises(ValueError, match="has the label 3; the labels are negative, positive"):
    _task(tmp_path, "sentiment140", {"polarity": 3})


def test_labels_may_be_named_as_the_data_sets_do(tmp_path):
  anli = _task(tmp_path, "anli-r2", {"label": "e"}, {"label": "contradiction"}, {"label": "n"})
  assert [row.label for row in anli.rows] == [0, 2, 1]
  qnli = _task(tmp_path, "qnli", {"label": "entailment"})
  assert qnli.rows[0].demonstration.endswith("Yes")
  mnli = _task(tmp_path, "mnli", {"label": "entailment"}, flavour="ask")
  assert mnli.rows[0].options[mnli.rows[0].label] == " Yes"


def test_an_activity_is_told_in_front_where_the_row_has_one(tmp_path):
  row = {"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 1, "activity_label": "Baking"}
  told = _task(tmp_path, "hellaswag", row, flavour="gpt3").rows[0]
  assert told.demonstration == "Baking: A man b"
  assert named_task("hellaswag", data=tmp_path).rows[0].demonstration == "A man b"


def test_all_answers_that_people_gave_are_right(tmp_path):
  more = [{}, {"validated_answers": []}, {"answers": ["x", "y"]}]
  answers = [row.answers for row in _task(tmp_path, "drop", *more).rows]
  assert answers == [("four", "4"), ("4",), ("x", "y")]


@pytest.mark.parametrize("name,prompt,completion", [
  ("sst2", "Would the following phrase be considered positive or negative?\nfine\nOPTIONS:\n"
   "negative\npositive\nTARGET:", " positive"),
  ("dpr", "Ann met Bo. She ran.\nWho or what is meant by \"She\"?\nOPTIONS:\nBo\nAnn\nTARGET:",
   " Ann"),
  ("winogrande", "Ann saw Bo as _ hid.\nWho or what belongs in the place of _?\nOPTIONS:\nAnn\nBo\n"
   "TARGET:", " Bo"),
  ("xsum", "Sum this article up in a sentence:\nIt rained.", " Rain."),
])
def test_options_are_listed_and_the_right_one_is_the_target(tmp_path, name, prompt, completion):
  rows = {
    "sst2": {"sentence": "fine", "label": 1},
    "winogrande": {"sentence": "Ann saw Bo as _ hid.", "option1": "Ann", "option2": "Bo",
                   "answer": "2"}}
  task = listing_options(_task(tmp_path, name, rows.get(name, {}), flavour="ask"))
  record = record_of(task.rows[0], name)
  assert "".join(record.parts[: record.num_given]) == prompt
  assert "".join(record.parts[record.num_given :]) == completion
