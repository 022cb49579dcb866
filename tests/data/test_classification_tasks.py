"""Templates, rows from files, demonstrations by (seed, id), and the tasks that tfds has."""

import collections
import json

import pytest

from lmops_jax.data import classification_tasks as tasks

TEMPLATE = "Review: {text}\nSentiment: {label}"


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _rows(n=30):
  return tuple(tasks.Row(i * 7919, {"text": f"text {i}"}, i % 3) for i in range(n))


def test_a_template_is_filled_up_to_the_label():
  template = tasks.Template("{{{title}}} {text}\nTopic: {label}")
  assert template.fields == ["title", "text"]
  assert template.context({"title": "a", "text": "b {c}"}) == "{a} b {c}\nTopic: "
  assert template.filled({"title": "a", "text": "b"}, "x") == "{a} b\nTopic: x"


@pytest.mark.parametrize(
  "text,message",
  [
    ("Review: {text}", "must end with {label}"),
    ("{label}: {text}", "must end with {label}"),
    ("{text} {label}.", "must end with {label}"),
    ("{text} {label} {label}", "must end with {label}"),
    ("Sentiment: {label}", "names no field of the row"),
    ("{text {label}", "braces|must end"),
    ("{text!r} {label}", "formats its field 'text'"),
    ("{text:>9} {label}", "formats its field 'text'"),
  ],
)
def test_impossible_templates_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    tasks.Template(text)


def test_labels_are_numbers_or_words(tmp_path):
  path = _write(tmp_path / "t.jsonl", [
    {"text": "a", "label": 1}, {"text": "b", "label": "bad"}, {"text": "c", "label": True},
  ])
  task = tasks.jsonl_task(path, TEMPLATE, ["bad", "good"])
  assert task.name == "t" and [row.label for row in task.rows] == [1, 0, 1]
  assert [row.fields for row in task.rows] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
  assert len({row.id for row in task.rows}) == 3
  assert len(tasks.jsonl_task(path, TEMPLATE, ["bad", "good"], limit=2).rows) == 2


@pytest.mark.parametrize(
  "rows,message",
  [
    ([{"text": "a", "label": 2}], r"t.jsonl:1 has the label 2; the labels are bad, good or"),
    ([{"text": "a", "label": "ugly"}], "has the label 'ugly'"),
    ([{"text": "a"}], r"t.jsonl:1 has no field 'label' \(it has text\)"),
    ([{"sentence": "a", "label": 0}], "has no field 'text'"),
    ([{"text": None, "label": 0}], "t.jsonl:1 has None in its field 'text'"),
    ([{"text": ["a"], "label": 0}], "expected a text or a number"),
    ([], "the task t has no rows"),
  ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
  with pytest.raises(ValueError, match=message):
    tasks.jsonl_task(_write(tmp_path / "t.jsonl", rows), TEMPLATE, ["bad", "good"])


def test_lines_that_are_no_json_are_named(tmp_path):
  (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 0}\nnonsense\n')
  with pytest.raises(ValueError, match="t.jsonl:2 is not valid JSON"):
    tasks.jsonl_task(tmp_path / "t.jsonl", TEMPLATE, ["bad", "good"])


def test_negative_numbers_are_refused(tmp_path):
  path = _write(tmp_path / "t.jsonl", [{"text": "a", "label": 0}])
  with pytest.raises(ValueError, match="limit=-1 must be at least 1"):
    tasks.jsonl_task(path, TEMPLATE, ["bad", "good"], limit=-1)
  with pytest.raises(ValueError, match="-1 demonstrations are asked for"):
    tasks.demonstrations(_rows(), -1, seed=0)


def test_label_words_differ():
  with pytest.raises(ValueError, match="hold an empty word"):
    tasks.Task("t", _rows(), ("a", ""), tasks.Template(TEMPLATE))
  with pytest.raises(ValueError, match="at least two different words"):
    tasks.Task("t", _rows(), ("a", "a", "b"), tasks.Template(TEMPLATE))


def test_demonstrations_depend_on_seed_and_id_alone():
  rows = _rows()
  first = tasks.demonstrations(rows, 6, seed=0)
  assert first == tasks.demonstrations(rows[::-1], 6, seed=0)
  assert first == tasks.demonstrations(rows, 9, seed=0)[:6]
  assert first != tasks.demonstrations(rows, 6, seed=1)
  without = [row for row in rows if row not in first[:1]]
  assert tasks.demonstrations(without, 5, seed=0) == first[1:]


def test_balanced_demonstrations_hold_each_label_alike():
  for count, each in ((6, {2}), (7, {2, 3}), (2, {1})):
    drawn = tasks.demonstrations(_rows(), count, seed=3, balanced=True)
    assert set(collections.Counter(row.label for row in drawn).values()) == each
    assert len(drawn) == count
  with pytest.raises(ValueError, match="31 demonstrations are asked for and there are 30 rows"):
    tasks.demonstrations(_rows(), 31, seed=0)
  rare = [row for row in _rows() if row.label] + [_rows()[0]]
  with pytest.raises(ValueError, match="more rows of label 0"):
    tasks.demonstrations(rare, 9, seed=0, balanced=True)


@pytest.mark.parametrize("name", tasks.NAMED)
def test_templates_of_named_tasks_fit_their_labels(name):
  named = tasks.NAMED[name]
  assert tasks.Template(named.template).fields and len(set(named.words)) == len(named.words)


def test_unknown_task_names_the_nearest():
  with pytest.raises(ValueError, match="no task 'sst'.*sst2"):
    tasks.tfds_task("sst")


@pytest.mark.slow
def test_named_tasks_are_read_through_tfds_and_seqio():
  import seqio
  import tensorflow_datasets as tfds

  with tfds.testing.mock_data(num_examples=5):
    builder = tfds.builder("glue/sst2")
    assert set(tasks.Template(tasks.NAMED["sst2"].template).fields) <= set(builder.info.features)
    names = tasks.register_seqio_tasks()
    assert names == tasks.register_seqio_tasks()
    assert "lmops_ag_news" in seqio.TaskRegistry.names()
    for name in ("lmops_sst2", "lmops_trec"):
      task = seqio.get_mixture_or_task(name)
      example = next(task.source.get_dataset("train").as_numpy_iterator())
      assert example
      filled = next(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
      named = tasks.NAMED[name.removeprefix("lmops_")]
      assert filled["targets"].decode() in named.words
      assert filled["inputs"].decode().startswith(named.template[:6])
