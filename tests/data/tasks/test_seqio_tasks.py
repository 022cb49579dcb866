"""The tasks through seqio, from a tiny fake tfds dataset and from JSON lines."""

import json

import pytest

from lmops_jax.data import tasks


@pytest.mark.slow
def test_named_tasks_are_read_through_tfds_and_seqio(monkeypatch):
  import seqio
  import tensorflow_datasets as tfds

  with pytest.raises(ValueError, match="tfds dataset 'glue/sst2' of task sst2 is not prepared in"):
    tasks.named_task("sst2", data_dir="/nowhere")
  monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda builder: True)
  with tfds.testing.mock_data(num_examples=5):
    names = tasks.register_seqio_tasks()
    assert names == tasks.register_seqio_tasks()
    assert {"lmops_agnews", "lmops_hf_sst2", "lmops_plain_yelp", "lmops_race_m"} <= set(names)
    assert set(names) <= set(seqio.TaskRegistry.names()) and "lmops_sst5" not in names
    for name, flavour in (("sst2", "fs"), ("trec", "hf"), ("cb", "fs"), ("agnews", "plain")):
      task = tasks.named_task(name, flavour=flavour)
      assert len(task.rows) == len(task.train) == 5
      registered = f"lmops_{'' if flavour == 'fs' else flavour + '_'}{name}"
      dataset = seqio.get_mixture_or_task(registered).get_dataset(None, "train", shuffle=False)
      found = list(dataset.as_numpy_iterator())
      assert [(x["inputs"].decode(), x["targets"].decode()) for x in found] == [
        (row.prompt, row.options[row.label]) for row in task.train
      ]


@pytest.mark.slow
def test_files_are_read_through_seqio(tmp_path):
  import seqio

  path = tmp_path / "t.jsonl"
  path.write_text(json.dumps({"text": "a", "label": 1}) + "\n")
  arguments = {"train": path}, "Review: {text} Sentiment: {label}", ("bad", "good")
  name = tasks.register_jsonl_seqio_task("lmops_test_mine", *arguments)
  dataset = seqio.get_mixture_or_task(name).get_dataset(None, "train", shuffle=False)
  assert list(dataset.as_numpy_iterator()) == [
    {"inputs": b"Review: a Sentiment:", "targets": b" good"}
  ]
  with pytest.raises(ValueError, match="has a task 'lmops_test_mine' already"):
    tasks.register_jsonl_seqio_task("lmops_test_mine", *arguments)
  with pytest.raises(ValueError, match="has no files"):
    tasks.register_jsonl_seqio_task("lmops_test_none", {}, *arguments[1:])
