"""Labelled rows: files of one's own, installed packages, and nested subsets of them."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from lmops_jax.data.documents import Corpus, Document
from lmops_jax.systems.prototypes import rows
from lmops_jax.systems.prototypes.rows import InstalledPackages, LabelledFile


def write(path, *lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def test_rows_of_a_file(tmp_path):
  train = write(tmp_path / "own.jsonl", *(
    {"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(50)))
  source = LabelledFile(train)
  some, held = source.read()
  assert source.name == "own" and some.names == ("no", "yes")
  assert len(some.texts) + len(held.texts) == 50 and 3 <= len(held.texts) <= 20
  assert not set(some.ids) & set(held.ids)
  assert all(some.names[t] == ["no", "yes"][int(text.split()[1]) % 2]
             for text, t in zip(some.texts, some.targets))
  (tmp_path / "moved").mkdir()
  moved = shutil.copy(train, tmp_path / "moved" / "train.jsonl")
  assert LabelledFile(str(moved)).read()[0].ids == some.ids, "subsets are those of any place"
  rows.write_rows(tmp_path, some, held)
  assert rows.read_rows(tmp_path) == (some, held)


def test_pairs_numbers_and_a_file_to_test_on(tmp_path):
  train = write(tmp_path / "train.jsonl", *(
    {"a": f"a {i}", "b": f"b {i}", "score": i / 2} for i in range(8)))
  test = write(tmp_path / "test.jsonl", {"a": "", "b": "b", "score": -1},
               {"a": "x", "b": "y", "score": 3})
  source = LabelledFile(
    train, test, text="a", other="b", label="score", numbers=True, num_test=1)
  some, held = source.read()
  assert source.name == tmp_path.name
  assert some.others[3] == "b 3" and some.targets[3] == 1.5 and some.names == ()
  assert len(held.texts) == 1
  assert some.taken([2, 0]).inputs == (("a 2", "b 2"), ("a 0", "b 0"))


@pytest.mark.parametrize("lines, settings, says", [
  ([{"text": "a", "label": 0}], {}, "has 1 different labels to learn from"),
  ([{"words": "a", "label": 0}], {}, r"own.jsonl:1 has no text in the field 'text'; it has words"),
  ([{"text": "a", "class": 0}], {}, r"own.jsonl:1 has no field 'label'"),
  ([{"text": "a", "label": 0.5}], {}, r"label 0.5; a class is a text or a whole number"),
  ([{"text": "a", "label": "x"}], {"numbers": True}, "label 'x', and numbers=True wants"),
])
def test_bad_rows_are_named(tmp_path, lines, settings, says):
  path = write(tmp_path / "own.jsonl", *lines)
  with pytest.raises(ValueError, match=says):
    LabelledFile(path, path, **settings).read()


def test_an_unknown_label_to_test_on_is_named(tmp_path):
  train = write(tmp_path / "a.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 1})
  test = write(tmp_path / "b.jsonl", {"text": "a", "label": 7})
  with pytest.raises(ValueError, match=re.escape("b.jsonl:1 has the label 7, which no row")):
    LabelledFile(train, test).read()


@dataclasses.dataclass(frozen=True)
class Made(Corpus):
  """Documents of three packages, one of them small."""

  def read(self, counts):
    for package, number in (("big", 40), ("mid", 30), ("small", 5)):
      for i in range(number):
        source = f"{package}/{i}.py"
        yield Document(len(source) * 1000 + i * 7 + number, f"{package} words {i}", "code", source)

  def fingerprint(self):
    return "made"


def test_packages_are_classes_of_equal_size():
  some, held = InstalledPackages(Made(), 2, num_train=20, num_test=5).read()
  assert some.names == ("big", "mid")
  for part, number in ((some, 20), (held, 5)):
    assert np.bincount(part.targets).tolist() == [number, number]
    assert all(text.startswith(part.names[t]) for text, t in zip(part.texts, part.targets))
  assert not set(some.texts) & set(held.texts)
  few, rest = InstalledPackages(Made(), 3, num_train=20, num_test=5).read()
  assert np.bincount(few.targets).tolist() == [4, 4, 4] and len(rest.texts) == 3
  with pytest.raises(ValueError, match="num_packages=4 and the corpus has documents of 3"):
    InstalledPackages(Made(), 4).read()


def test_subsets_are_nested_and_keep_the_classes_proportions():
  rng = np.random.default_rng(0)
  targets = rng.choice(3, size=400, p=[0.6, 0.3, 0.1])
  ids = rng.choice(10**9, size=400, replace=False)
  order = rows.nested_order(targets, ids, 0, True)
  assert sorted(order) == list(range(400))
  share = np.bincount(targets) / 400
  for size in (20, 50, 133, 400):
    found = np.bincount(targets[order[:size]], minlength=3)
    assert np.abs(found - share * size).max() <= 1
  assert list(rows.nested_order(targets, ids, 1, True)) != list(order)
  assert sorted(rows.nested_order(targets, ids, 0, False)) == list(range(400))
