"""`lmops imagine` on a tiny random model folder."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from lmops_jax import cli
from lmops_jax.commands import imagine
from lmops_jax.decoding.diffusion.imagine import Imagined
from lmops_jax.pretrained.pipelines import load_pipeline
from lmops_jax.text.clip import clip_texts
from lmops_jax.text.tokenizer import load_tokenizer
from tests.decoding.diffusion import tiny_models

LONG = "A quick brown FOX and the lazy dog " * 3 + "Painted by N. Rosé"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder as diffusers writes it."""
  return tiny_models.write(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def lmops(capsys):
  def run(*arguments, fails=False):
    code = cli.main(["imagine", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (code != 0) == fails, captured.err
    return captured

  return run


SETTINGS = ("--size", "8x16", "--steps", 2, "--batch-size", 2)


@pytest.fixture(scope="module")
def drawn(folder, tmp_path_factory):
  """The folder with two pictures of each of two prompts, of which one is given twice."""
  to = tmp_path_factory.mktemp("drawn") / "pictures"
  prompts = to.parent / "prompts.jsonl"
  prompts.write_text(json.dumps({"prompt": LONG}) + '\n{"prompt": "a fox"}\n')
  code = cli.main([str(x) for x in (
    "imagine", "--model", folder, "--prompt", "a fox", "--prompts", prompts, "--images", 2,
    "--seed", 3, *SETTINGS, "--to", to)])
  assert code == 0
  return to


def records(folder):
  return [json.loads(line) for line in (folder / imagine.RECORDS).read_text().splitlines()]


def test_pictures_are_named_and_described(drawn, folder):
  rows = records(drawn)
  assert [(row["prompt"], row["image"]) for row in rows] == [
    ("a fox", 0), ("a fox", 1), (LONG, 0), (LONG, 1)]
  assert sorted(path.name for path in drawn.iterdir()) == sorted(
    [imagine.RECORDS, *(row["file"] for row in rows)])
  assert rows[0]["file"].startswith("a-fox-") and rows[0]["file"].endswith("-seed3-0.png")
  for row in rows:
    with Image.open(drawn / row["file"]) as image:
      assert image.size == (16, 8) and image.mode == "RGB"
      assert image.text["Description"] == row["prompt"]
      assert json.loads(image.text["Comment"]) == row
    assert row | {"sampler": "dpmpp2m", "steps": 2, "guidance": 7.5, "negative": "", "seed": 3,
                  "height": 8, "width": 16, "model": str(folder)} == row
  assert LONG.endswith(rows[2]["cut"]) and rows[2]["cut"] and "cut" not in rows[0]


def test_pixels_are_those_of_the_imaginer(drawn, folder):
  """The command's picture is drawn from the prompt's tokens and key with the folder's model."""
  from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer, image_keys
  from lmops_jax.decoding.diffusion.samplers import DpmSolver

  loaded = load_pipeline(folder)
  parts = DiffusionModels.of(loaded.text, loaded.unet, loaded.autoencoder, loaded.schedule)
  draws = Imaginer(parts, loaded.params, DpmSolver(2), size=(8, 16), batch_size=2)
  read = clip_texts(loaded.tokenizer, ["", LONG], 24)
  found = draws(
    read.tokens[[1, 1]], image_keys([LONG], 2, seed=3), read.tokens[0])
  for number, pixels in enumerate(found.images):
    name = imagine.file_name(LONG, 3, number)
    np.testing.assert_array_equal(np.asarray(Image.open(drawn / name)), pixels)


def test_the_same_command_gives_the_same_bytes(drawn, folder, lmops, tmp_path):
  to = tmp_path / "again"
  lmops("--model", folder, "--prompt", "a fox", "--images", 2, "--seed", 3, *SETTINGS, "--to", to)
  for row in records(to):
    assert (to / row["file"]).read_bytes() == (drawn / row["file"]).read_bytes()
  assert len(records(to)) == 2


class Draws:
  """An imaginer whose pictures are black, and finite or not."""

  def __init__(self, is_finite):
    self.is_finite = is_finite

  def __call__(self, *settings, **options):
    return self

  def batches(self, tokens, keys, negative):
    size = len(tokens), 8, 16, 3
    yield Imagined(np.zeros(size, np.uint8), np.full(len(tokens), self.is_finite))


def test_what_is_cut_is_shown_exactly(folder, lmops, tmp_path, monkeypatch):
  monkeypatch.setattr("lmops_jax.decoding.diffusion.imagine.Imaginer", Draws(True))
  captured = lmops("--model", folder, "--prompt", LONG, "--images", 2, *SETTINGS,
                   "--to", tmp_path / "to", "--negative", LONG)
  cut = clip_texts(load_tokenizer(folder / "tokenizer"), [LONG], 24).cut[0]
  assert f"this end of it is not read: {cut!r}" in captured.err
  assert "prompt 0 ('A quick brown FOX" in captured.err
  assert "warning: --negative is longer than the 24 tokens" in captured.err
  assert "2 pictures of 1 prompts" in captured.out


def test_pictures_that_are_not_finite_end_the_run_by_name(folder, lmops, tmp_path, monkeypatch):
  monkeypatch.setattr("lmops_jax.decoding.diffusion.imagine.Imaginer", Draws(False))
  captured = lmops("--model", folder, "--prompt", "a fox", "--images", 2, *SETTINGS,
                   "--to", tmp_path / "to", fails=True)
  assert "image 0 of prompt 0, image 1 of prompt 0 with seed 0 came out with" in captured.err
  assert "2 of 2 in a batch" in captured.err
  assert [row["file"] for row in records(tmp_path / "to")] == [None, None]


def test_few_lost_pictures_are_counted_and_left_out(capsys):
  batch = [imagine.Picture("a", 0, i) for i in range(200)]
  finite = np.arange(200) != 7
  arguments = type("Arguments", (), {"seed": 5})
  assert imagine._check_finite(batch, finite, arguments) == 1
  assert "image 7 of prompt 0 with seed 5" in capsys.readouterr().err


def test_help_says_that_nothing_is_checked(capsys):
  with pytest.raises(SystemExit):
    cli.main(["imagine", "--help"])
  assert "There is no safety checker" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
  ((), "there is nothing to draw; give --prompt TEXT or --prompts FILE"),
  (("--prompt", "a", "--prompt", " \n"), "prompt 1 is empty"),
  (("--prompt", "a\0b"), "prompt 0 holds a NUL character"),
  (("--prompt", "a\ud800"), "prompt 0 holds .* half a character"),
  (("--prompt", "a", "--negative", "\0"), "--negative holds a NUL character"),
  (("--prompt", "a", "--size", "500"), "--size 500 has a side that is not a multiple of 8 pixels;"
   " take for example 496x496"),
  (("--prompt", "a", "--size", "512x"), "--size 512x is neither a side nor HEIGHTxWIDTH"),
  (("--prompt", "a", "--size", "0"), "--size 0 has a side"),
  (("--prompt", "a", "--steps", 0), "--steps 0 should be 1 to 1000"),
  (("--prompt", "a", "--steps", 1001), "--steps 1001 should be 1 to 1000"),
  (("--prompt", "a", "--steps", 1000), "num_steps=1000 is more than"),
  (("--prompt", "a", "--guidance", 0), "--guidance 0.0 should be a number above 0"),
  (("--prompt", "a", "--guidance", "nan"), "--guidance nan should be"),
  (("--prompt", "a", "--guidance", 1, "--negative", "b"), "--guidance 1 does not read --negative"),
  (("--prompt", "a", "--images", 0), "--images 0 should be 1 to"),
  (("--prompt", "a", "--batch-size", 0), "--batch-size 0 should be 1 to"),
  (("--prompt", "a", "--seed", -1), "--seed -1 should be 0 to 4294967295"),
  (("--prompt", "a", "--to", "."), "--to . exists and is not empty"),
  (("--prompt", "a", "--sampler", "euler"), "invalid choice: 'euler'"),
])
def test_bad_input_is_one_sentence_before_anything_is_loaded(
  arguments, message, lmops, tmp_path, monkeypatch):
  def loads(*args, **kwargs):
    raise AssertionError("a model was loaded")

  monkeypatch.setattr("lmops_jax.pretrained.pipelines.load_pipeline", loads)
  own = () if "--to" in arguments else ("--to", tmp_path / "to")
  error = lmops("--model", "nowhere", *own, *arguments, fails=True).err
  assert re.search(message, error), error
  assert not (tmp_path / "to").exists()


def test_a_model_that_is_not_there_is_named(lmops, tmp_path):
  error = lmops("--model", tmp_path / "nowhere", "--prompt", "a", "--to", tmp_path / "to",
                fails=True).err
  assert "nowhere" in error and len(error.strip().splitlines()) == 1


def test_rows_with_pictures_are_refused(lmops, tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
  (tmp_path / "rows.jsonl").write_text('{"prompt": "a <image>", "images": ["p.png"]}\n')
  error = lmops("--model", "nowhere", "--prompts", tmp_path / "rows.jsonl", "--to",
                tmp_path / "to", fails=True).err
  assert "prompt 0 has pictures or boxes, and lmops imagine draws from texts alone" in error
