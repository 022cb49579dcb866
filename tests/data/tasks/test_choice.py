"""Tasks as gin names them, and the file that keeps one between stages."""

import dataclasses
import json
import os
import random

import pytest

from lmops_jax.data.tasks import Example, Task, TaskChoice, read_task, write_task

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(30)]


def _file(path, rows=ROWS):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _choice(path, **changes):
  return TaskChoice(**{
    **dict(task=path, template="{text} is {label}", labels=("even", "odd")), **changes})


def test_a_file_with_a_template(tmp_path):
  choice = _choice(_file(tmp_path / "numbers.small.jsonl"), num_rows=None)
  assert choice.is_file and choice.name == "numbers"
  task = choice.load()
  assert (task.name, len(task.rows), task.train) == ("numbers", 30, ())
  assert task.words == ("even", "odd") and task.rows[1].prompt == "text 1 is"
  assert task.rows[1].options == (" even", " odd") and task.rows[1].label == 1
  assert dataclasses.replace(choice, label="mine").load().name == "mine"


def test_the_chosen_rows_are_those_of_smallest_keys_and_the_others_are_drawn_from(tmp_path):
  path = _file(tmp_path / "n.jsonl")
  whole = _choice(path, num_rows=None).load()
  few, more = (_choice(path, num_rows=n).load() for n in (8, 20))
  assert (len(few.rows), len(few.train)) == (8, 22)
  assert {r.id for r in few.rows} < {r.id for r in more.rows}
  assert not {r.id for r in few.rows} & {r.id for r in few.train}
  places = {row.id: i for i, row in enumerate(whole.rows)}
  for part in (few.rows, few.train):
    assert [places[r.id] for r in part] == sorted(places[r.id] for r in part)
  assert {r.id for r in _choice(path, num_rows=8, rows_seed=2).load().rows} != {
    r.id for r in few.rows}
  for num_rows in (30, 31):
    assert _choice(path, num_rows=num_rows).load() == whole


def _hashes(choice):
  return dict(part.split(" ") for part in choice.fingerprint().split(", "))


def test_a_folder_keeps_its_own_rows_to_draw_from(tmp_path):
  rows = [{"sentence": f"it is {i}", "label": i % 2, "idx": i} for i in range(30)]
  folder = tmp_path / "sst2"
  folder.mkdir()
  _file(folder / "train.jsonl", rows[:10])
  _file(folder / "validation.jsonl", rows[10:])
  choice = TaskChoice("sst2", data=str(folder), num_rows=5)
  assert choice.name == "sst2" and not choice.is_file
  task = choice.load()
  assert (len(task.rows), len(task.train)) == (5, 10)
  found = _hashes(choice)
  assert set(found) == {"train.jsonl", "validation.jsonl"}
  random.Random(0).shuffle(rows)
  _file(folder / "train.jsonl", rows)
  changed = _hashes(choice)
  assert changed["train.jsonl"] != found["train.jsonl"]
  assert changed["validation.jsonl"] == found["validation.jsonl"]
  assert TaskChoice("sst2").fingerprint() == ""


def test_a_files_fingerprint_is_its_contents(tmp_path):
  choice = _choice(_file(tmp_path / "n.jsonl"))
  before = choice.fingerprint()
  assert list(_hashes(choice)) == ["n.jsonl"] and choice.fingerprint() == before
  _file(tmp_path / "n.jsonl", ROWS[:-1])
  assert choice.fingerprint() != before


@pytest.mark.parametrize("changes, match", [
  (dict(num_rows=0), "num_rows=0 must be an integer of at least 1"),
  (dict(template=0), "is a file, so it needs tasks.choose.template"),
  (dict(labels=None), "is a file, so it needs tasks.choose.template"),
  (dict(task="sst2"), "is text and 'sst2' no .jsonl file"),
])
def test_refuses_what_does_not_fit_together(tmp_path, changes, match):
  with pytest.raises(ValueError, match=match):
    _choice(_file(tmp_path / "n.jsonl"), **changes)


@pytest.mark.parametrize("changes, match", [
  (dict(template="{txt} is {label}"), "n.jsonl:1 has no field 'txt'"),
  (dict(template="{text}"), "must end with {label}"),
  (dict(labels=("even", "even")), "must be a list of 2 or more different"),
  (dict(task="absent.jsonl"), "absent.jsonl"),
  (dict(task="nothing", template=0), "nothing"),
])
def test_refuses_while_loading(tmp_path, changes, match):
  path = _file(tmp_path / "n.jsonl")
  with pytest.raises((ValueError, FileNotFoundError), match=match):
    _choice(path, **changes).load()
  with pytest.raises(ValueError, match="has the label -1"):
    _choice(_file(tmp_path / "m.jsonl", [{"text": "a", "label": -1}])).load()
  with pytest.raises(ValueError, match="has no rows"):
    _choice(_file(tmp_path / "none.jsonl", [])).load()


@pytest.mark.parametrize("task", [
  Task("words", (Example(1, "a\n\u2028ü", (" x", " y"), 1),), (Example(2, "b", (" x", " y"), 0),),
       ("x", "y"), "N/A", skipped=3),
  Task("open", (Example(2**63, "q", (), -1, ("one", "two")),), metric="f1"),
  Task("prompts", (Example(3, "the", ("s", "s"), 0, (), ("the a", "the b")),)),
])
def test_a_written_task_is_read_back(tmp_path, task):
  write_task(tmp_path, task)
  assert read_task(tmp_path) == task


def test_what_cannot_be_read_is_refused_before_the_stage(tmp_path):
  os.mkfifo(tmp_path / "fifo.jsonl")
  (tmp_path / "gone.jsonl").symlink_to("/nowhere/x")
  for name, message in (("fifo", "is a FIFO"), ("gone", "is a link to /nowhere/x")):
    with pytest.raises(ValueError, match=message):
      _choice(str(tmp_path / f"{name}.jsonl")).fingerprint()
