"""What an encoder of pictures and words reads, against the packed rows that it comes from."""

import numpy as np
import pytest

from lmops_jax.data import ImageRows, ImageSettings, PrefixRows, PromptPrefix, RandomPrefix
from lmops_jax.data.fused_rows import FusedRows, beside_pictures, fused
from lmops_jax.data.image_rows import write_rows
from lmops_jax.data.image_tokens import ImageTokens, encode_records
from lmops_jax.data.multimodal import Record, drawn

IDS = ImageTokens(
  vocab_size=300, bos_id=0, pad_id=1, eos_id=2, image_id=290, image_end_id=291, line_end_id=292,
  num_slots=3)
WORDS = 7  # the most beside a picture, `<s>` among them


class Letters:
  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


def _rows(folder, pictured, per_row, prompt=()):
  draws = np.random.default_rng(0)
  records = []
  for i in range(24):
    text = "".join(chr(97 + c) for c in draws.integers(0, 26, draws.integers(3, 12)))
    picture = (drawn(np.full((4, 4, 3), i, np.uint8), f"picture {i}"),) * pictured
    records.append(Record(i, (*picture, *prompt, text), len(picture + prompt) if prompt else 0, ""))
  write_rows(folder, encode_records(records, Letters(), IDS), IDS, length=40,
             pictures_per_row=per_row, pictures_per_example=min(1, per_row), share=per_row > 1)
  prefix = PromptPrefix() if prompt else RandomPrefix()
  return PrefixRows(ImageRows(folder, ImageSettings(4, 4)), prefix, 3, encoder_positions=WORDS)


def _vectors(batch, num_slots):
  """For each vector by its number what it stands for, of a text encoder's rows or of fused ones."""
  found = {}
  for row in range(len(batch["tokens"])):
    if "encoder_tokens" in batch:
      e = batch["encoder_tokens"].shape[1]
      for place in range(e):
        segment = batch["encoder_segments"][row, place]
        if segment:
          of_images = batch["image_segments"][row].tolist() if num_slots else [1]
          found[row, place] = (
            of_images.index(segment), int(batch["encoder_positions"][row, place]),
            int(batch["encoder_tokens"][row, place]))
    else:
      texts, size = batch["image_tokens"][row], num_slots + WORDS
      for image, of_image in enumerate(texts):
        for word, token in enumerate(of_image):
          found[row, image * size + num_slots + word] = image, word, int(token)
  return found


@pytest.mark.parametrize("pictured, per_row", [(1, 1), (1, 2), (0, 0)])
def test_each_place_points_at_the_vector_of_the_same_word_or_picture(tmp_path, pictured, per_row):
  packed = _rows(tmp_path, pictured, per_row)
  rows = FusedRows(packed, IDS.num_slots, WORDS)
  indices = np.arange(len(rows))
  old, new = packed.batch(indices, 2), rows.batch(indices, epoch=2)
  num_slots, e = IDS.num_slots * pictured, old["encoder_tokens"].shape[1]
  assert new["image_tokens"].shape == (len(rows), per_row or 1, WORDS)
  assert ("images" in new) == bool(pictured) and not any(n.startswith("encoder_") for n in new)
  for name in ("tokens", "targets", "loss_mask", "positions", "segment_ids", "example_id"):
    np.testing.assert_array_equal(old[name], new[name])
  np.testing.assert_array_equal(rows.num_learned(indices, epoch=2), packed.num_learned(indices, 2))
  before, after = _vectors(old, num_slots), _vectors(new, num_slots)
  num_words = 0
  for row, place in zip(*np.nonzero(old["vector_index"] >= 0)):
    one, other = old["vector_index"][row, place], new["vector_index"][row, place]
    if one < e:
      assert before[row, one] == after[row, other]
      assert after[row, other][2] == old["tokens"][row, place]
      num_words += 1
    else:
      image, vector = divmod(one - e, num_slots)
      assert other == image * (num_slots + WORDS) + vector
  assert num_words > 20
  np.testing.assert_array_equal(new["vector_index"] < 0, old["vector_index"] < 0)
  # What is marked as read is what the packed rows have, start tokens included, and nothing else.
  assert new["image_segments"].sum() == (old["encoder_segments"] > 0).sum()
  assert set(np.unique(new["image_segments"])) <= {0, 1}
  used = np.zeros(new["image_tokens"].shape, bool)
  for (row, _), (image, word, _) in before.items():
    used[row, image, word] = True
  np.testing.assert_array_equal(used, new["image_segments"] > 0)


def test_texts_that_no_picture_or_position_is_there_for_are_refused(tmp_path):
  batch = _rows(tmp_path / "a", 1, 1, ("which?",)).batch(np.arange(3))
  assert fused(batch, 3, WORDS)["image_tokens"].shape == (3, 1, WORDS)
  with pytest.raises(ValueError, match="row 0 .* text of 6 tokens .* reads 5 behind"):
    fused(batch, 3, WORDS - 1)
  batch["image_segments"][1] = 0
  with pytest.raises(ValueError, match="row 1 of a batch has 1 texts .* and 0 places"):
    fused(batch, 3, WORDS)
  row = np.array([[5, 6, 5, 7]])
  inputs = {"encoder_tokens": row, "encoder_positions": np.array([[0, 1, 0, 1]]),
            "encoder_segments": np.array([[1, 1, 2, 2]])}
  with pytest.raises(ValueError, match="row 0 of a batch has 2 texts .* and 1 places"):
    beside_pictures(inputs, None, 0, 4)
  assert beside_pictures(inputs, None, 0, 4, num_texts=2).tokens.tolist() == [
    [[5, 6, 0, 0], [5, 7, 0, 0]]]
