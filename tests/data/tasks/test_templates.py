"""Templates of the user's own, and rows from files."""

import json
import os

import pytest

from lmops_jax.data import tasks

TEMPLATE = "Review: {text}\nSentiment: {label}"


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_a_template_is_filled_up_to_the_label():
  template = tasks.Template("{{{title}}} {text}\nTopic: {label}")
  assert template.fields == ["title", "text"]
  assert template.prompt_and_options({"title": "a", "text": "b {c}"}, ["x", "y"]) == (
    "{a} b {c}\nTopic:", (" x", " y")
  )


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
  assert [row.prompt for row in task.rows] == [f"Review: {t}\nSentiment:" for t in "abc"]
  assert {row.options for row in task.rows} == {(" bad", " good")}
  assert task.words == ("bad", "good") and task.null_prompt == "Review: N/A\nSentiment:"
  assert task.rows[0].demonstration == "Review: a\nSentiment: good"
  assert len({row.id for row in task.rows}) == 3
  part = tasks.jsonl_task(path, TEMPLATE, ["bad", "good"], limit=2, train=path)
  assert len(part.rows) == 2 and part.train == task.rows


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


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path, value):
  """pandas writes a missing text as NaN."""
  path = tmp_path / "t.jsonl"
  path.write_text(f'{{"text": "a", "label": 0}}\n{{"text": {value}, "label": 0}}\n')
  with pytest.raises(ValueError, match=r"t.jsonl:2 has (nan|-?inf) in its field 'text'; expected"):
    tasks.jsonl_task(path, TEMPLATE, ["bad", "good"])


def test_a_file_saved_on_windows_and_one_whose_name_is_not_utf_8(tmp_path):
  place = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")
  with open(place, "wb") as file:
    file.write(b'\xef\xbb\xbf{"text": "a", "label": 0}\r\n{"text": "b", "label": 2}\r\n')
  task = tasks.jsonl_task(os.fsdecode(place), TEMPLATE, ["bad", "good", "fine"])
  assert task.name == "caf\\udce9" and [row.prompt for row in task.rows] == [
    "Review: a\nSentiment:", "Review: b\nSentiment:"]
  with pytest.raises(ValueError, match=r"caf\\udce9.jsonl:2 has the label 2") as found:
    tasks.jsonl_task(os.fsdecode(place), TEMPLATE, ["bad", "good"])
  str(found.value).encode()


def test_lines_that_are_no_json_are_named(tmp_path):
  (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 0}\nnonsense\n')
  with pytest.raises(ValueError, match="t.jsonl:2 is not valid JSON"):
    tasks.jsonl_task(tmp_path / "t.jsonl", TEMPLATE, ["bad", "good"])


def test_negative_numbers_are_refused(tmp_path):
  path = _write(tmp_path / "t.jsonl", [{"text": "a", "label": 0}])
  with pytest.raises(ValueError, match="limit=-1 must be at least 1"):
    tasks.jsonl_task(path, TEMPLATE, ["bad", "good"], limit=-1)


def test_label_words_differ(tmp_path):
  path = _write(tmp_path / "t.jsonl", [{"text": "a", "label": 0}])
  with pytest.raises(ValueError, match="hold an empty word"):
    tasks.jsonl_task(path, TEMPLATE, ("a", ""))
  with pytest.raises(ValueError, match="at least two different words"):
    tasks.jsonl_task(path, TEMPLATE, ("a", "a", "b"))
