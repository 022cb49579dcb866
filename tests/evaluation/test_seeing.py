"""Contexts with pictures: their tokens, pictures that differ by option, and blocks of rows."""

import dataclasses

import numpy as np
import pytest

from lmops_jax.data.images import ImageSettings, as_png
from lmops_jax.data.tasks import Example, Task
from lmops_jax.decoding.image_prompts import PictureEncoder, image_tokens
from lmops_jax.decoding.scoring import OptionScorer
from lmops_jax.evaluation import in_context
from lmops_jax.evaluation.seeing import SeeingEncoder
from lmops_jax.pretrained import model as model_lib
from tests import model_folders


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """Tokenizer, scorer, ids and a new encoder of a tiny model that sees."""
  source = model_lib.load(str(model_folders.write_docked(tmp_path_factory.mktemp("docked"))))
  params, tokenizer = source.params(), source.tokenizer()
  ids = image_tokens(tokenizer, source.config.vectors_per_image)
  scorer = OptionScorer(source.decoder, source.of_decoder(params))

  def encoder(max_length=64):
    pictures = PictureEncoder(source.model, params, ImageSettings(8, 8))
    return SeeingEncoder(tokenizer, ids, pictures, max_length), pictures

  return tokenizer, scorer, ids, encoder


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
  found = [folder / f"{i}.png" for i in range(4)]
  for path in found:
    path.write_bytes(as_png(rng.integers(0, 256, (8, 8, 3), np.uint8)))
  return [str(path) for path in found]


def test_a_context_is_the_prompt_and_options_follow_its_last_text(loaded, paths):
  tokenizer, _, ids, new = loaded
  encoder, _ = new()
  request = encoder.split("one <image> two <image>\n it ", [" x", "yy"], paths[:2])
  block, text = ids.block, lambda words: tokenizer.encode(words, False)
  assert list(request.context.ids) == [0, *text("one"), *block, *text("two"), *block, *text("it")]
  assert request.options == [text("  x"), text(" yy")]
  slots = request.context.index[request.context.slots]
  np.testing.assert_array_equal(slots, np.arange(8))
  behind = encoder.split("one<image>", ["x"], paths[:1])
  assert list(behind.context.ids) == [0, *text("one"), *block] and behind.options == [text("x")]
  alone = in_context.Encoder(tokenizer).split("one two", [" x"])
  assert encoder.split("one two", [" x"]) == alone


def test_pictures_that_differ_by_option_score_as_rows_of_their_own(loaded, paths):
  tokenizer, scorer, _, new = loaded
  a, b, c, d = paths
  answers = (" Yes", " Yes")
  raven = Example(
    1, "these:<image> then:<image> right?", answers, 1, images=(a,), option_images=(b, c))
  encoder, pictures = new()
  task = Task("raven", (raven,))
  result = in_context.evaluate(scorer, tokenizer, task, encoder=encoder)
  apart = [
    scorer.score([encoder.split(raven.prompt, [" Yes"], (a, path))])[0][0].sum()
    for path in (b, c)]
  np.testing.assert_allclose(result.scores[0], apart, rtol=1e-5, atol=1e-5)
  assert abs(apart[0] - apart[1]) > 1e-3  # else the test could not tell
  assert pictures.num_encoded == 3
  shown = dataclasses.replace(task, train=(raven._replace(id=2, option_images=(d, b)),))
  rows, front = in_context.rows_and_front(shown, shots=1, sees=True)
  assert rows == [raven] and front.images == (a, b)
  assert front.text == "these:<image> then:<image> right? Yes\n\n"


def test_blocks_of_rows_and_a_small_cache_change_nothing(loaded, paths, monkeypatch):
  tokenizer, scorer, _, new = loaded
  rows = tuple(
    Example(i, f"<image>{i} is", (" x", " yy"), 0, images=(paths[i % 3],)) for i in range(5))
  task = Task("vqa", rows, words=("x", "yy"))
  whole, pictures = new()
  want = in_context.evaluate(scorer, tokenizer, task, encoder=whole)
  assert pictures.num_encoded == 3
  assert len(np.unique(want.scores)) == 10
  blocks, pictures = new()
  monkeypatch.setattr(SeeingEncoder, "rows_at_once", 2)
  monkeypatch.setattr(pictures, "_cache_bytes", 1)
  got = in_context.evaluate(scorer, tokenizer, task, encoder=blocks)
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5, atol=1e-5)
  assert got.num_tokens == want.num_tokens


def test_what_has_no_room_or_place_is_refused(loaded, paths):
  encoder, _ = loaded[-1](max_length=12)
  with pytest.raises(ValueError, match="has 2 pictures of 6 tokens .* give at most 1 pictures"):
    encoder.split("<image><image>it", [" x"], paths[:2])
  with pytest.raises(ValueError, match="has 2 pictures and its text 1 places"):
    encoder.split("<image>it", [" x"], paths[:2])


def test_options_that_tokenise_alike_are_refused(loaded, paths, monkeypatch):
  tokenizer, scorer, _, new = loaded
  encoder, _ = new()
  encode = type(tokenizer).encode
  monkeypatch.setattr(type(tokenizer), "encode", lambda self, text, add_special=True: encode(
    self, text.replace("é", "e"), add_special))
  row = Example(1, "<image>it is", (" cafe", " tea", " café"), 0, images=(paths[0],))
  with pytest.raises(ValueError, match="the options ' cafe' and ' café' have the same tokens"):
    in_context.evaluate(scorer, tokenizer, Task("vqa", (row,)), encoder=encoder)


def test_demonstrations_without_room_are_dropped_and_never_the_question(loaded, paths):
  """By tokens or by pictures; the rest scores as if it were all that was asked for."""
  tokenizer, scorer, _, new = loaded
  train = tuple(
    Example(i, f"<image>q{i}", (" x", " yy"), 1, images=(paths[i % 4],)) for i in range(9))
  row = Example(50, "<image>and now is", (" x", " yy"), 0, images=(paths[0],))
  task = Task("vqa", (row, row._replace(id=51, prompt="<image>" + "n" * 53)), train)
  encoder, _ = new()
  result = in_context.evaluate(scorer, tokenizer, task, encoder=encoder, shots=6)
  # <s>, then blocks of 6 tokens, "qN", " yy" and two line ends each, of which pictures swallow two
  assert result.num_shots == 6 and result.num_dropped.tolist() == [2, 6]
  _, front = in_context.rows_and_front(task, shots=6, sees=True)
  kept = front.shots[2:]
  text, images = "".join(shot.text for shot in kept), [path for s in kept for path in s.images]
  for i, (prompt, pictures) in enumerate([(text + row.prompt, images), (task.rows[1].prompt, [])]):
    request = encoder.split(prompt, row.options, [*pictures, paths[0]])
    assert len(request.context) + 2 <= 64
    want = [scores.sum() for scores in scorer.score([request])[0]]
    np.testing.assert_allclose(result.scores[i], want, rtol=1e-5, atol=1e-5)
  long = dataclasses.replace(task, rows=(row._replace(prompt="<image>" + "n" * 60),))
  with pytest.raises(ValueError, match="request 0 has .* tokens with its longest option"):
    in_context.evaluate(scorer, tokenizer, long, encoder=encoder, shots=6)
