"""`lmops generate` with boxes: in prompts, in answers, in files, on pictures."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from lmops_jax import cli
from lmops_jax.commands import grounding, prompts
from lmops_jax.data.boxes import box_tokens, decode, grounding_words
from lmops_jax.pretrained import model as model_lib
from lmops_jax.text.tokenizer import load_tokenizer
from tests import model_folders

SIDE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(model_folders.write_docked(
    tmp_path_factory.mktemp("grounding"), max_length=96, words=grounding_words(SIDE)))


@pytest.fixture(scope="module")
def words(folder):
  tokenizer = load_tokenizer(folder)
  return grounding.BoxWords(tokenizer, *box_tokens(tokenizer.token_id))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A picture of 40 x 20 pixels that is stored on its side, and one of 10 x 30."""
  path = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  Image.fromarray(rng.integers(0, 256, (40, 20, 3), np.uint8)).save(path / "a.png", exif=exif)
  Image.fromarray(rng.integers(0, 256, (30, 10, 3), np.uint8)).save(path / "b.png")
  return [str(path / "a.png"), str(path / "b.png")]


@pytest.fixture
def lmops(capsys):
  def run(*arguments, fails=False):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (code != 0) == fails, err
    return err if fails else (out, err)

  return run


def _rows(path, *rows):
  path.write_text("\n".join(json.dumps(row) for row in rows))
  return path


def _prompts(pictures):
  """Prompts of different lengths that end in different places of the grammar."""
  a, b = pictures
  return [
    {"prompt": "<grounding> An image of", "images": [a]},
    {"prompt": "<grounding><phrase> It</phrase> is<phrase> a dog</phrase>", "images": [b],
     "boxes": [[5, 10, 10, 20], None], "box_unit": "pixels"},
    {"prompt": "<image>x<image><grounding><phrase> it</phrase>", "images": [a, b]},
    {"prompt": "<grounding> no picture<object><patch_index_0005>"},
  ]


def test_captions_entities_and_drawings(lmops, folder, words, pictures, tmp_path):
  boxes, drawn = tmp_path / "found.json", tmp_path / "drawn.png"
  rows = _rows(tmp_path / "rows.jsonl", *_prompts(pictures)[:2])
  out, err = lmops(
    "generate", "--model", folder, "--prompts", rows, "--grammar", "--json", "--max-new-tokens", 5,
    "--boxes", boxes, "--draw", drawn)
  assert "2 pictures in" in err and "pictures/s" in err and "warning" not in err
  records = [json.loads(line) for line in out.splitlines()]
  written = json.loads(boxes.read_text())
  assert [r["width"] for r in written] == [40, 10]
  assert [r["height"] for r in written] == [20, 30]
  for record, own in zip(records, written, strict=True):
    assert own.items() <= record.items()
    for entity in own["entities"]:
      assert own["caption"][entity["start"] : entity["end"]] == entity["name"] or (
        entity["start"] == entity["end"])
      size = np.array([own["width"], own["height"]] * 2)
      np.testing.assert_array_equal(entity["pixels"], np.array(entity["boxes"]) * size)
  # Behind a phrase the grammar wants <object>, two cells in order, and more or the end.
  t = words.tokens
  tag, first, last, after, _ = records[1]["ids"]
  first, last = first - t.first_location, last - t.first_location
  assert tag == t.object and after in (t.delimiter, t.object_end)
  assert 0 <= first % SIDE <= last % SIDE and 0 <= first // SIDE <= last // SIDE < SIDE
  if after == t.object_end:
    assert records[1]["entities"][1]["name"] == "a dog"
    np.testing.assert_array_equal(
      records[1]["entities"][1]["boxes"], decode([[first, last]], SIDE))
  # The box of the prompt, 5 to 10 of 10 and 10 to 20 of 30 pixels of the last picture, is there.
  assert "<phrase> It</phrase><object><patch_index_0006><patch_index_0011></object> is" in (
    records[1]["prompt"])
  assert records[1]["entities"][0]["boxes"] == [[0.625, 0.375, 0.875, 0.625]]
  assert Image.open(tmp_path / "drawn-0.png").size == (40, 20)
  picture = np.asarray(Image.open(pictures[1]))
  assert (np.asarray(Image.open(tmp_path / "drawn-1.png")) != picture).any()


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--grammar",), ("--grammar", "--temperature", 1, "--seed", 3)])
def test_ragged_rows_answer_as_alone(lmops, folder, pictures, tmp_path, how):
  given = _prompts(pictures)
  base = ("generate", "--model", folder, "--json", "--max-new-tokens", 6, *how, "--prompts")
  out, _ = lmops(*base, _rows(tmp_path / "all.jsonl", *given))
  together = [json.loads(line) for line in out.splitlines()]
  assert together[3]["ids"][0] >= load_tokenizer(folder).token_id("<patch_index_0005>")
  for i, (row, want) in enumerate(zip(given, together, strict=True)):
    if i and "--temperature" in how:
      continue  # random numbers go with the row's number
    out, _ = lmops(*base, _rows(tmp_path / "one.jsonl", row))
    got = json.loads(out)
    np.testing.assert_allclose(got.pop("logprobs"), want.pop("logprobs"), rtol=1e-4, atol=1e-4)
    assert got == want


def test_without_options_the_caption_and_a_line_for_each_entity_are_printed(
  lmops, folder, pictures
):
  out, err = lmops(
    "generate", "--model", folder, "--image", pictures[0], "--max-new-tokens", 1, "--prompt",
    "<grounding><phrase> A dog</phrase> and<phrase> two cats</phrase> x", "--box", "none", "--box",
    "0,0,0.25,0.25;0.3,0.3,0.9,0.9", "--box-unit", "fractions")
  first, *lines = out.splitlines()
  assert first.startswith("A dog and two cats x")
  assert lines[-1] == "  two cats  (0.000, 0.000, 0.250, 0.250)  (0.375, 0.375, 0.875, 0.875)"
  assert "warning" not in err


def test_a_prompt_without_grounding_is_warned_of(capsys, tmp_path):
  arguments = types.SimpleNamespace(boxes=None, draw=None, grammar=False, count_padding=False)
  rows = [prompts.PromptRow("An image of"), prompts.PromptRow("<phrase> It</phrase> is")]
  grounding.check(arguments, rows)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("lmops: warning: prompt 1 has no <grounding>")
  arguments.boxes = str(tmp_path / "x.json")
  grounding.check(arguments, rows)
  assert capsys.readouterr().err.count("has no <grounding>") == 2


def test_units_say_the_same(words, pictures):
  text = "<image>one<phrase>a</phrase> <image>two<phrase>b</phrase><phrase>c</phrase>"
  (row,) = prompts.given([text.replace("one", "")], pictures, None, ["none"] * 3, "cells")
  sizes = grounding.sizes(row.pictures)
  assert list(map(sizes.get, row.pictures)) == [(40, 20), (10, 30)]
  found = []
  for unit, boxes in {
    "fractions": [[0.25, 0.5, 0.5, 1], [[0, 0, 1, 1], [0.5, 0.5, 1, 1]], None],
    "pixels": [[10, 10, 20, 20], [[0, 0, 10, 30], [5, 15, 10, 30]], None],
    "cells": [[9, 13], [[0, 15], [10, 15]], []],
  }.items():
    own = row._replace(text=text, boxes=boxes, box_unit=unit, where="rows:1: boxes")
    (new,) = grounding.inserted([own], words, sizes)
    assert new.boxes is None
    found.append(new.text)
  assert found[0] == found[1] == found[2] != text
  with pytest.raises(ValueError, match=r"rows:1: boxes\[0\] is in pixels, and no picture stands"):
    grounding.inserted([own._replace(
      text="<phrase>a</phrase><image>", pictures=row.pictures[:1], boxes=[[1, 2, 3, 4]],
      box_unit="pixels")], words, sizes)


@pytest.fixture
def unread(monkeypatch):
  """Fails where the weights of a model are read."""
  def params(*_):
    raise AssertionError("the model is read")

  monkeypatch.setattr(model_lib.PretrainedModel, "params", params)


_ONE = ("--prompt", "<grounding><phrase>a</phrase>")


@pytest.mark.parametrize("arguments, message", [
  ((*_ONE, "--box", "0,0,1,1"), "--box and --box-unit belong together"),
  ((*_ONE, "--box-unit", "pixels"), "--box and --box-unit belong together"),
  ((*_ONE, "--box", "0,0,x,1", "--box-unit", "cells"), "--box 0,0,x,1: 'x' is no number"),
  ((*_ONE, "--box", "0,0,30,20", "--box-unit", "fractions"), "looks like pixels"),
  ((*_ONE, "--box", "0,0,0.5,0.5", "--box-unit", "pixels"), "looks like fractions"),
  ((*_ONE, "--box", "30,0,20,10", "--box-unit", "pixels"), "turn (x, y, width, height) into"),
  ((*_ONE, "--box", "30,0,50,10", "--box-unit", "pixels"), "has 40 x 20 pixels; give a box"),
  ((*_ONE, "--box", "0,-1,5,9", "--box-unit", "pixels"), "not all in the picture"),
  ((*_ONE, "--box", "0,16", "--box-unit", "cells"), "whole number from 0 to 15"),
  ((*_ONE, "--box", "0,15", "--box-unit", "fractions"), "box of 2 numbers, and in fractions"),
  ((*_ONE, "--box", "0,15", "--box", "none", "--box-unit", "cells"),
   "--box of prompt 0 has 2 entries and the text 1 phrases"),
  (("--prompts", "ROW", "--box", "0,15", "--box-unit", "cells"), "--box belongs to --prompt TEXT"),
  (("--prompts", "ROW"), 'row.jsonl:1 has "boxes" [[0, 1, 2, 3]] and "box_unit" None'),
  (("--prompts", "BAD"), "bad.jsonl:1: boxes[0] is 'x'; a box is four fractions"),
  ((*_ONE, "--grammar", "--count-padding"), "--count-padding repeats what the port writes"),
  ((*_ONE, "--draw", "x.txt"), "--draw x.txt names no picture"),
  ((*_ONE, "--draw", "absent/x.png"), "lies in a folder that does not exist"),
  ((*_ONE, "--boxes", "absent/x.json"), "--boxes absent/x.json lies in a folder"),
  ((*_ONE, "--box", ";".join(["0,15"] * 29), "--box-unit", "cells", "--max-new-tokens", 1),
   "prompt 0 has 99 tokens, and the model's context is 96"),
])
def test_what_cannot_be_is_refused_before_a_model_is_read(
  lmops, folder, pictures, unread, tmp_path, arguments, message
):
  row = _rows(tmp_path / "row.jsonl", {"prompt": "<phrase>a</phrase>", "boxes": [[0, 1, 2, 3]]})
  bad = _rows(tmp_path / "bad.jsonl", {
    "prompt": "<phrase>a</phrase>", "images": pictures[0], "boxes": ["x"], "box_unit": "pixels"})
  arguments = [{"ROW": row, "BAD": bad}.get(argument, argument) for argument in arguments]
  images = ("--image", pictures[0]) if "--prompt" in arguments else ()
  error = lmops("generate", "--model", folder, *images, *arguments, fails=True)
  last = error.splitlines()[-1]
  assert last.startswith("lmops: error: ") and message in last, error


def test_nothing_to_draw_on_and_a_tokenizer_without_boxes(lmops, folder, unread, tmp_path):
  error = lmops("generate", "--model", folder, *_ONE, "--draw", tmp_path / "x.png", fails=True)
  assert "--draw needs a picture, and prompt 0 has none" in error
  plain = model_folders.write(tmp_path / "plain")
  for option in (("--boxes", tmp_path / "x.json"), ("--grammar",),
                 ("--box", "0,1", "--box-unit", "cells")):
    error = lmops("generate", "--model", plain, *_ONE, *option, fails=True)
    assert "has no word <phrase>, which texts with boxes need" in error
