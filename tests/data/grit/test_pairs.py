"""Rows of GrIT as pairs to train on: which stretches have boxes, and how often."""

import numpy as np
import pytest

from lmops_jax.data import GritJsonl, GroundedPairs, ImageSettings
from lmops_jax.data.boxes import grounding_words
from lmops_jax.data.grit.records import Region
from lmops_jax.data.grit.spans import merged, outermost
from lmops_jax.data.grounded_crops import fitted
from lmops_jax.data.grounded_text import GroundedText, Located, box_words
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import KOSMOS_WORDS, ImageTokens, encode_records
from lmops_jax.data.multimodal import LeftOut

A, B, C = (0.0, 0.0, 0.5, 0.5), (0.1, 0.1, 0.9, 0.9), (0.5, 0.5, 1.0, 1.0)


def _regions(*ends):
  return [Region(start, end, A, 0.9) for start, end in ends]


def _contained_by_force(regions):
  """Every pair of stretches, character by character."""
  sets = [set(range(r.start, r.end)) for r in regions]
  return [r for r, mine in zip(regions, sets) if not any(mine < other for other in sets)]


def test_outermost_against_sets_of_characters():
  rng = np.random.default_rng(0)
  for _ in range(200):
    ends = np.sort(rng.integers(0, 8, (5, 2)), axis=1) + [0, 1]
    regions = _regions(*map(tuple, ends.tolist()))
    assert outermost(regions) == _contained_by_force(regions)


def test_equal_ends_are_one_stretch_with_several_boxes():
  regions = [Region(9, 16, A, 0.7), Region(0, 5, B, 0.8), Region(9, 16, C, 0.9)]
  assert merged(regions) == ([Located(0, 5, (B,)), Located(9, 16, (A, C))], 0)


def test_of_crossing_stretches_the_first_and_longest_stays():
  spans, num_crossing = merged(_regions((0, 5), (3, 9), (0, 3), (5, 7)))
  assert [(s.start, s.end) for s in spans] == [(0, 5), (5, 7)] and num_crossing == 2


@pytest.fixture
def pairs(folder, row, write):
  def made(rows, **settings):
    return GroundedPairs(
      GritJsonl(write(rows), pictures=str(folder)), **{"probability": 1.0, **settings})
  return made


def _texts(pairs):
  left_out = LeftOut()
  return [record.parts[1] for record in pairs.records(left_out)], left_out


def _row(row, identifier, **more):
  return row(identifier, noun_chunks=[[0, 5, *A, 0.9], [9, 16, *B, 0.7]],
             ref_exps=[[0, 27, *A, 0.9], [9, 27, *B, 0.7]], **more)


def test_expressions_and_phrases(pairs, row):
  (text,), left_out = _texts(pairs([_row(row, 1)]))
  assert text.spans == (Located(0, 27, (A,)),) and left_out.counts == {"inside": 1}
  (text,), left_out = _texts(pairs([_row(row, 1)], mode="phrase"))
  assert text.spans == (Located(0, 5, (A,)), Located(9, 16, (B,))) and not left_out.counts


def test_unsure_regions_hide_no_other_ones(pairs, row):
  rows = [row(1, ref_exps=[[0, 27, *A, 0.65], [9, 27, *B, 0.7]])]
  (text,), left_out = _texts(pairs(rows))
  assert text.spans == (Located(9, 27, (B,)),) and left_out.counts == {"low_score": 1}
  (text,), left_out = _texts(pairs(rows, min_score=0.7))
  assert type(text) is str and left_out.counts == {"low_score": 2, "without_region": 1}


def test_captions_are_trimmed_and_blank_ones_left_out(pairs, row):
  rows = [row(1, "  a dog ", ref_exps=[[2, 7, *A, 0.9]]), row(2, "  ")]
  (text,), left_out = _texts(pairs(rows))
  assert text == "a dog" and text.spans == (Located(0, 5, (A,)),)
  assert left_out.counts["empty"] == 1


def test_boxes_are_drawn_by_seed_and_id(pairs, row):
  rows = [_row(row, i, image="1.png") for i in range(200)]

  def drawn(rows, **settings):
    found, left_out = [], LeftOut()
    for record in pairs(rows, **settings).records(left_out):
      if isinstance(record.parts[1], GroundedText):
        found.append(record.id)
    assert left_out.counts["drawn_plain"] == len(rows) - len(found)
    return found

  half = drawn(rows, probability=0.5)
  assert 70 < len(half) < 130
  assert drawn(rows[::-1][:50], probability=0.5) == [i for i in half[::-1] if i >= 150]
  assert drawn(rows, probability=0.5, seed=1) != half
  assert set(drawn(rows, probability=0.25)) < set(half) and not drawn(rows, probability=0.0)
  assert pairs(rows).fingerprint() != pairs(rows, seed=1).fingerprint()


class _Letters:
  """A token a letter."""

  def encode_batch(self, texts):
    return [[ord(letter) % 30 + 10 for letter in text] for text in texts]


def test_rows_for_training_hold_them(pairs, row, tmp_path):
  """From files to a batch: pictures as bytes, boxes through the crop, the mask from <grounding>."""
  words = {word: 50 + i for i, word in enumerate((*KOSMOS_WORDS, *grounding_words(4)))}
  ids = ImageTokens(
    vocab_size=50 + len(words), image_id=words["<image>"], image_end_id=words["</image>"],
    line_end_id=words["</line>"], num_slots=2)
  # 60 x 40 becomes 48 x 32: the square is the middle, from 1/6 to 5/6.
  rows = [row(1, "a dog", ref_exps=[[0, 5, 1 / 6, 0, 5 / 6, 0.5, 0.9]]),
          row(2, "a dog", ref_exps=[[0, 5, 0, 0, 0.1, 1, 0.9]])]
  left_out, crop = LeftOut(), ImageSettings(32, 32, fit="crop")
  records = fitted(pairs(rows).records(left_out), crop, left_out)
  counts = write_rows(tmp_path / "out", encode_records(
    records, _Letters(), ids, words=box_words(words.get), left_out=left_out), ids, length=40,
    pictures_per_row=1, pictures_per_example=1)
  assert counts["rows"] == 2 and left_out.counts == {"lost_box": 1, "plain": 1}
  batch = ImageRows(tmp_path / "out", crop).batch([0, 1])
  assert batch["images"].dtype == np.uint8 and batch["images"].shape == (2, 1, 32, 32, 3)
  dog = _Letters().encode_batch(["a dog"])[0]
  cells = [words["<patch_index_0000>"], words["<patch_index_0007>"]]
  grounded = [words["<grounding>"], words["<phrase>"], *dog, words["</phrase>"],
              words["<object>"], *cells, words["</object>"], ids.eos_id]
  learned = [row[mask > 0].tolist() for row, mask in zip(batch["targets"], batch["loss_mask"])]
  assert learned == [grounded, [*dog, ids.eos_id]]
