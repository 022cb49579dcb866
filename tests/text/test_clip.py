"""CLIP's tokenizer out of vocab.json and merges.txt, and its rows."""

import json

import numpy as np
import pytest

from lmops_jax.systems.promptist.world import write_tokenizer
from lmops_jax.text import clip
from lmops_jax.text.tokenizer import load_tokenizer
from tests.systems.promptist import tiny_clip
from tests.text import tiny_tokenizers as tiny

END = "<|endoftext|>"
LONG = "The quick brown FOX, painted by N. Rosé (oil, 8k) in the style of a naïve café"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.clip(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parity
def test_ids_are_those_of_transformers(folder):
  transformers = pytest.importorskip("transformers")
  theirs, ours = transformers.CLIPTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
  texts = [*tiny.TEXTS, *tiny.sentences()[:40], LONG, "two  lines\nof\ttext", "we'LL", "a" + END]
  for text in texts:
    assert ours.encode(text) == theirs(text).input_ids, text
    assert ours.decode(ours.encode(text)) == theirs.decode(
      theirs(text).input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), text
  padded = theirs(texts, padding="max_length", truncation=True, max_length=20).input_ids
  np.testing.assert_array_equal(clip.clip_texts(ours, texts, 20).tokens, padded)


def test_what_does_not_fit_is_told_as_it_was_written(folder):
  tokenizer = load_tokenizer(folder)
  ids = tokenizer.encode(LONG)
  found = clip.clip_texts(tokenizer, [LONG, "a fox", ""], 12)
  assert found.tokens[0].tolist() == [*ids[:11], tokenizer.eos_id]
  assert LONG.endswith(found.cut[0]) and 0 < len(found.cut[0]) < len(LONG)
  kept = tokenizer.encode(LONG.removesuffix(found.cut[0]), add_special=False)
  assert kept == ids[1:11]
  assert found.cut[1:] == ["", ""]
  assert found.tokens[2].tolist() == [tokenizer.bos_id] + [tokenizer.eos_id] * 11
  exact = clip.clip_texts(tokenizer, [LONG], len(ids))
  assert exact.tokens[0].tolist() == ids and exact.cut == [""]


def test_padding_is_the_folders(folder, tmp_path):
  config = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "!"}
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  tiny.write(tmp_path, {"tokenizer_config.json": config})
  tokenizer = load_tokenizer(tmp_path)
  row = clip.clip_texts(tokenizer, ["a"], 5).tokens[0]
  assert row[-2:].tolist() == [tokenizer.token_id("!")] * 2 != [tokenizer.eos_id] * 2


def test_a_text_is_cut_before_its_end_token(tmp_path):
  tokenizer = load_tokenizer(tiny_clip.write(tmp_path / "model"))
  tokens, cut = clip.clip_texts(tokenizer, ["a cat", "x" * 40, ""], 20)
  assert tokens.shape == (3, 20) and cut == ["", "x" * 22, ""]
  assert tokens[1].tolist() == [*tokenizer.encode("x" * 18), 1][:19] + [1]
  assert (tokens[:, 0] == 0).all() and (tokens[:, -1] == 1).all()
  assert tokens[2].tolist() == [0] + [1] * 19


def test_a_token_that_begins_and_ends_stands_behind_a_text_alone(tmp_path):
  tokenizer = write_tokenizer(tmp_path, ["a cat"])
  a, end = tokenizer.encode("a")
  assert end == tokenizer.bos_id == tokenizer.eos_id
  found = clip.clip_texts(tokenizer, ["a", "a" * 6], 4)
  assert found.tokens.tolist() == [[a, end, end, end], [a, a, a, end]] and found.cut == ["", "aaa"]


def test_cleaning_resolves_twice_and_collapses_blanks():
  assert clip.cleaned(" Tom &amp;amp; Jerry\n  at\tsea &amp;quot;") == 'Tom & Jerry at sea "'
  assert clip.cleaned(" ") == ""


def test_another_tokenizer_is_refused(tmp_path):
  tiny.write(tmp_path, {"tokenizer.json": json.loads(tiny.byte_level([END]).to_str())})
  with pytest.raises(ValueError, match="does not put a BOS and an EOS token around a text"):
    clip.clip_texts(load_tokenizer(tmp_path), ["a"])
