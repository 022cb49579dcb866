"""Tasks to learn from: wordings, options, limits, clusters, and rows of several tasks mixed."""

import dataclasses
import json
from collections import Counter

import gin
import numpy as np
import pytest

from lmops_jax.data import ImageJsonl, TaskClusters, TaskRecords, task_sets
from lmops_jax.data.multimodal import LeftOut, Picture
from lmops_jax.data.task_records import listing_options, record_of
from lmops_jax.data.tasks import Example, Task, TaskChoice
from lmops_jax.training.sources import Endless


class Letters:
  bos_id, pad_id, eos_id = 0, 1, 2

  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


IDS = Letters()


@pytest.fixture
def folder(tmp_path):
  """CommitmentBank in the form of its dataset, as a folder."""
  for name, num in (("train", 60), ("validation", 4)):
    lines = [json.dumps({"premise": f"P{i} {name}.", "hypothesis": f"h{i}", "label": i % 3})
             for i in range(num)]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  return tmp_path


def _choice(folder, **more):
  return TaskChoice("cb", data=str(folder), num_rows=None, **more)


def test_rows_to_learn_from_in_one_wording(folder):
  left_out = LeftOut()
  records = list(TaskRecords(_choice(folder)).records(left_out))
  assert len(records) == 60 == len({record.id for record in records})
  by_prompt = {record.parts[0]: record for record in records}
  one = by_prompt["P4 train. Question: h4. True, False, or Neither? Answer:"]
  assert one.parts[1:] == (" False",) and one.num_given == 1
  assert not any("validation" in record.parts[0] for record in records)
  fewer = list(TaskRecords(_choice(folder), num_rows=7).records(left_out))
  assert fewer == records[:7] and left_out.counts["over_limit"] == 53
  other = list(TaskRecords(_choice(folder), num_rows=7, seed=1).records())
  assert {r.id for r in other} != {r.id for r in fewer}


def test_each_row_has_one_of_the_wordings(folder):
  corpus = TaskRecords(_choice(folder), other_templates=(1, 2, 3, 4))
  records = list(corpus.records())
  assert len(records) == 60 and records == list(corpus.records())
  ends = Counter(" ".join(record.parts[0].split()[-2:]) for record in records)
  begins = Counter(record.parts[0].split()[0] for record in records)
  assert ends["Neither? Answer:"] >= 3 and ends["or Maybe?"] >= 3
  assert begins["Read"] >= 3 and begins["Can"] >= 3
  one = {record.id for record in TaskRecords(_choice(folder)).records()}
  assert {record.id for record in records} == one  # a row is the same in every wording
  with pytest.raises(ValueError, match="the task cb has no template 9"):
    TaskRecords(_choice(folder), other_templates=(9,))
  assert corpus.fingerprint() != dataclasses.replace(corpus, seed=4).fingerprint()


def test_rows_that_a_wording_cannot_use_are_counted(tmp_path):
  """COPA's template 0 puts choices in lower case, which makes those of 20 of the 30 rows equal."""
  rows = [{"premise": f"P{i}.", "choice1": "I left.", "choice2": "i left." if i % 3 else "No.",
           "question": "cause", "label": 0} for i in range(30)]
  rows += [{"premise": "Q.", "choice1": "A.", "choice2": "A.", "question": "cause", "label": 1}] * 2
  (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
  choice = TaskChoice("copa", data=str(tmp_path), num_rows=4)
  for others, num_known in (((), 10), ((3,), 30), ((3, 2), 30)):
    left_out, corpus = LeftOut(), TaskRecords(choice, other_templates=others)
    records = list(corpus.records(left_out))
    tested = {row.id for t in (0, *others)
              for row in dataclasses.replace(choice, template=t).load().rows}
    assert not {record_of(Example(i, "x", (), -1, ("y",)), "copa").id for i in tested} & {
      record.id for record in records}
    assert left_out.counts["unusable"] == 32 - len(tested) - len(records)
    assert len(records) + len(tested) <= num_known
    assert len(records) + len(tested) > num_known / 2


def test_options_are_listed(folder):
  (first, *_) = TaskRecords(_choice(folder), list_options=True).records()
  lines = first.parts[0].split("\n")
  assert lines[0].endswith("Answer:") and lines[1:] == [
    "OPTIONS:", "True", "False", "Neither", "TARGET:"]
  (row,) = listing_options(Task("t", (Example(1, "Q? ", (" a", " b"), 1),))).rows
  assert (row.prompt, row.options, row.label) == ("Q?\nOPTIONS:\na\nb\nTARGET:", (" a", " b"), 1)
  open_task = Task("t", (Example(1, "Who?", (), -1, ("x",)),), metric="f1")
  assert listing_options(open_task) == open_task


def test_rows_as_records():
  assert record_of(Example(3, "Who?", (), -1, ("x", "y")), "t").parts == ("Who?", " y")
  seen = record_of(Example(3, "<image>What?", (" a", " b"), 0, images=("p.png",)), "t")
  assert seen.parts == (Picture("p.png", "p.png"), "What?", " a") and seen.num_given == 2
  assert record_of(Example(3, "Who?", (" a", " b"), 0), "t").id != (
    record_of(Example(3, "Who?", (" a", " b"), 0), "u").id)
  with pytest.raises(ValueError, match="row 3 of the task t has another prompt for each option"):
    record_of(Example(3, "x", (" a", " b"), 0, prompts=("1", "2")), "t")


def test_tasks_without_rows_to_learn_from_are_refused(folder):
  (folder / "train.jsonl").unlink()
  with pytest.raises(ValueError, match="the task cb has 4 rows to evaluate on and none to learn"):
    list(TaskRecords(_choice(folder)).records())
  held_back = TaskRecords(dataclasses.replace(_choice(folder), num_rows=3))
  assert len(list(held_back.records())) == 1


def _lines(path, num, word):
  path.write_text("\n".join(json.dumps(
    {"prompt": f"{word} {i}?", "completion": f" {i}"}) for i in range(num)))
  return ImageJsonl(str(path))


def test_a_cluster_is_held_out_with_its_relatives(tmp_path):
  tasks = {name: _lines(tmp_path / f"{name}.jsonl", 2, name)
           for name in ("cb", "rte", "mrpc", "sst2", "xsum")}
  clusters = {"nli": {name: tasks[name] for name in ("cb", "rte")},
              "paraphrase": {"mrpc": tasks["mrpc"]}, "sentiment": {"sst2": tasks["sst2"]},
              "summarisation": {"xsum": tasks["xsum"]}}
  related = {"nli": ("paraphrase",), "paraphrase": ("nli",)}

  def learned(held_out, unused=("summarisation",)):
    made = TaskClusters(clusters, held_out, related, unused)
    return list(made.learned()), made.tested()

  assert learned("nli") == (["sst2"], ("cb", "rte"))
  assert learned("paraphrase") == (["sst2"], ("mrpc",))
  assert learned("sentiment") == (["cb", "rte", "mrpc"], ("sst2",))
  assert learned(None, ()) == (["cb", "rte", "mrpc", "sst2", "xsum"], ())
  assert TaskClusters(clusters, "nli").learned().keys() == {"mrpc", "sst2", "xsum"}
  for arguments, fault in [
      ((clusters, "qa"), "held_out names the cluster 'qa'"),
      ((clusters, None, {"nli": ("x",)}), "related names the cluster 'x'"),
      ((clusters, None, {}, ("y",)), "unused names the cluster 'y'"),
      (({"a": {"t": tasks["cb"]}, "b": {"t": tasks["cb"]}},), "the task 't' twice"),
      (({"nli": {"cb": tasks["cb"]}}, "nli"), "no task to learn from when 'nli'")]:
    with pytest.raises(ValueError, match=fault):
      TaskClusters(*arguments)


@pytest.fixture
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def test_clusters_in_a_gin_file(folder, clean_gin):
  gin.parse_config(f"""
    task/tasks.choose.task = 'cb'
    task/tasks.choose.data = '{folder}'
    cb/data.TaskRecords.task = @task/tasks.choose()
    cb/data.TaskRecords.other_templates = (1, 2)
    others/data.ImageJsonl.path = '{folder}/mine.jsonl'
    data.TaskClusters.clusters = {{
      'nli': {{'cb': @cb/data.TaskRecords()}}, 'mine': {{'others': @others/data.ImageJsonl()}}}}
    data.TaskClusters.held_out = 'mine'
    data.TaskClusters.related = {{'nli': ('mine',)}}
  """)
  made = gin.get_configurable("data.TaskClusters")()
  assert made.tested() == ("others",)
  assert made.learned() == {
    "cb": TaskRecords(TaskChoice("cb", data=str(folder)), other_templates=(1, 2))}


def test_rows_of_tasks_mixed(tmp_path):
  corpora = {"many": _lines(tmp_path / "many.jsonl", 90, "many"),
             "few": _lines(tmp_path / "few.jsonl", 30, "few")}
  counts = task_sets.write_tasks(tmp_path / "sets", corpora, IDS, IDS, 16, pack=False)
  assert counts["few"]["rows"] == 30 == counts["few"]["sequences"]
  sets = task_sets.open_tasks(tmp_path / "sets", corpora)
  source, plain = (
    Endless(task_sets.mixed(sets, 3, encoded=encoded).batch, 8) for encoded in (True, False))
  batches = [source.batch(step) for step in range(30)]
  words = Counter(chr(row[1]) for batch in batches for row in batch["tokens"])
  assert words == {"m": 180, "f": 60}  # each example twice
  again = Endless(task_sets.mixed(sets, 3).batch, 8)
  for step in (29, 3):
    bare = plain.batch(step)
    for name, value in again.batch(step).items():
      np.testing.assert_array_equal(value, batches[step][name])
      if name in bare:
        np.testing.assert_array_equal(value, bare[name])
    assert batches[step].keys() - bare.keys() == {
      "encoder_tokens", "encoder_positions", "encoder_segments", "vector_index"}
  batch = batches[0]
  losses = np.random.default_rng(0).random(batch["loss_mask"].shape) * batch["loss_mask"]
  np.testing.assert_allclose(
    (losses.sum(axis=1) / batch["loss_mask"].sum(axis=1) * batch["weight"]).mean(),
    losses.sum() / batch["loss_mask"].sum(), rtol=1e-6)
  with pytest.raises(ValueError, match="^text.jsonl:1 has no prompt for the encoder to read"):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    task_sets.write_tasks(
      tmp_path / "sets", {"t": ImageJsonl(str(tmp_path / "text.jsonl"))}, IDS, IDS, 16)
