"""Rows of one's own with boxes: units, prompts, grids, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from lmops_jax.data.boxes import encode, words
from lmops_jax.data.tasks import picture_rows_task, read_task, write_task


@pytest.fixture
def folder(tmp_path):
  """Pictures of 40 x 20 pixels, the first of them stored on its side, the second 10 x 30."""
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  Image.fromarray(np.zeros((40, 20, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
  Image.fromarray(np.zeros((30, 10, 3), np.uint8)).save(tmp_path / "b.png")
  return tmp_path


def _task(folder, *rows, **how):
  path = folder / "mine.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  return picture_rows_task(path, **how)


PHRASE = {"images": "a.jpg", "phrase": "the  dog", "target": [10, 5, 20, 20], "box_unit": "pixels"}


def test_pixels_are_those_of_the_picture_as_it_is_seen(folder):
  half = {**PHRASE, "target": [0.25, 0.25, 0.5, 1], "box_unit": "fractions"}
  task = _task(folder, PHRASE, half, {**PHRASE, "target": [[10, 5, 20, 20], [0, 0, 40, 20]]})
  first, second, third = task.rows
  assert first.boxes == second.boxes == ((0.25, 0.25, 0.5, 1),)
  assert third.boxes == (*first.boxes, (0, 0, 1, 1))
  assert first.prompt == "<image> <grounding><phrase> the  dog</phrase>"
  assert first.answers == (words(encode(first.boxes)),) and task.metric == "referring"
  assert _task(folder, PHRASE, metric="phrase_grounding").metric == "phrase_grounding"


def test_boxes_of_several_pictures_are_in_the_last_one_in_front(folder):
  row = {"images": ["a.jpg", "b.png"], "prompt":
         "<image><phrase>it</phrase> and<image><grounding><phrase>this</phrase> and<phrase>that"
         "</phrase>", "boxes": [[0, 0, 20, 10], [5, 15, 10, 30], None], "target": [0, 0, 5, 15],
         "box_unit": "pixels"}
  (example,) = _task(folder, row).rows
  assert example.boxes == ((0, 0, 0.5, 0.5),)
  assert example.prompt == (
    f"<image><phrase>it</phrase>{words(encode([(0, 0, 0.5, 0.5)]))} and<image><grounding>"
    f"<phrase>this</phrase>{words(encode([(0.5, 0.5, 1, 1)]))} and<phrase>that</phrase>")


def test_boxes_are_written_on_the_models_grid_and_kept(folder):
  """A box in a question, and one in a description with options, are no targets."""
  question = {"images": "a.jpg", "question": "What is <phrase>this</phrase>?", "answer": "a dog",
              "boxes": [[0, 0, 0.5, 1]], "box_unit": "fractions"}
  task = _task(folder, question, grid=lambda: 4)
  assert task.rows[0].prompt == (
    "<image> Question: What is <phrase>this</phrase><object><patch_index_0000><patch_index_0013>"
    "</object>? Answer:")
  assert (task.metric, task.grid, task.rows[0].boxes) == ("exact_match", 4, ())
  write_task(folder, task)
  assert read_task(folder) == task
  options = {name: question[name] for name in ("images", "question", "boxes", "box_unit")}
  chosen = _task(folder, options | {"options": ["a dog", "a cat"], "label": 1}, grid=lambda: 4)
  assert chosen.rows[0].prompt == task.rows[0].prompt and chosen.metric == "accuracy"

  def unasked():
    raise AssertionError("a task without boxes needs no model")

  plain = {"images": "a.jpg", "question": "What?", "answer": "a dog"}
  assert _task(folder, plain, grid=unasked).grid == 32


def test_a_row_without_box_is_left_out_and_counted(folder):
  task = _task(folder, {**PHRASE, "target": []}, PHRASE)
  assert len(task.rows) == 1 and task.skipped == 1


@pytest.mark.parametrize("change, message", [
  ({"target": [10, 5, 8, 4]}, "mine.jsonl:1: target: box 0 is .*turn .x, y, width, height. into"),
  ({"target": [30, 5, 45, 20]}, r"target is \[30, 5, 45, 20\], and its picture has 40 x 20 pixels"),
  ({"target": [0.2, 0.2, 0.5, 0.5]}, "target is .*, less than a pixel, and looks like fractions"),
  ({"box_unit": "fractions"}, "target: box 0 is .*, which looks like pixels; divide by the pict"),
  ({"box_unit": None}, "mine.jsonl:1 has target and the box_unit None; boxes need it, one of frac"),
  ({"box_unit": "cells"}, "has target and the box_unit 'cells'; boxes need it, one of fractions,"),
  ({"target": [44, 863]}, "target has a box of 2 numbers, and in pixels it has 4; write x1"),
  ({"target": "left"}, "target is 'left'; give a box .x1, y1, x2, y2., or a list of boxes"),
  ({"target": None}, "mine.jsonl:1 has no boxes and the box_unit 'pixels'"),
  ({"target": [[0, 0, 9, True]]}, "is .*True.*; give rows of 4 numbers each"),
  ({"answer": "x"}, "has a target and answer; the target is the answer, so leave answer out"),
  ({"prompt": "x"}, "has the fields prompt and phrase; give one of them"),
  ({"phrase": "a < b"}, """has the phrase 'a < b'; a "<" in it would begin a tag"""),
  ({"phrase": ""}, "has the phrase ''; expected a text"),
  ({"phrase": None, "prompt": "<phrase>a</phrase> is"}, "does not end with <phrase>...</phrase>, "),
  ({"boxes": [[0, 0, 9, 9]]}, "boxes give the phrase that is to be located away; let the last of"),
  ({"boxes": [None, None]}, "boxes has 2 entries and the text 1 phrases"),
  ({"boxes": "all"}, "has the boxes 'all'; expected a list with an entry for each phrase"),
  ({"phrase": None, "prompt": "<phrase>a</phrase> <image> <phrase>b</phrase>",
    "boxes": [[0, 0, 9, 9], None]}, r"boxes\[0\] is in pixels, and no picture stands in front"),
  ({"images": "c.png"}, "c.png"),
])
def test_bad_boxes_are_told_by_row(folder, change, message):
  row = {k: v for k, v in (PHRASE | change).items() if k == "target" or v is not None}
  with pytest.raises(ValueError, match=message) as error:
    _task(folder, row)
  assert "\n" not in str(error.value)


def test_a_metric_of_texts_does_not_measure_boxes(folder):
  with pytest.raises(ValueError, match="rows with a target, which metric='f1' does not measure; t"):
    _task(folder, PHRASE, metric="f1")
  answer = {"images": "a.jpg", "prompt": "It is", "answer": "red"}
  with pytest.raises(ValueError, match="does not fit metric='referring': it has no box"):
    _task(folder, PHRASE, answer)
