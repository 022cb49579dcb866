"""Boxes in texts: the published vectors, closed forms, and transformers' own helpers."""

import random
import re

import numpy as np
import pytest

from lmops_jax.data import boxes
from lmops_jax.data.boxes import DELIMITER, decode, encode, extract, insert, words
from lmops_jax.data.image_tokens import KOSMOS_WORDS, appended

SNOWMAN = (
  "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044>"
  "<patch_index_0863></object> warming himself by<phrase> a fire</phrase><object>"
  "<patch_index_0005><patch_index_0911></object>.")


def _all_pairs(grid):
  """Every upper left cell with every lower right one."""
  cells = np.arange(grid * grid)
  a, b = np.meshgrid(cells, cells, indexing="ij")
  valid = (b % grid >= a % grid) & (b // grid >= a // grid)
  return np.stack([a[valid], b[valid]], axis=1)


def test_the_published_boxes():
  found = decode([(44, 863), (5, 911), (0, 1023)])
  np.testing.assert_array_equal(found, [
    (0.390625, 0.046875, 0.984375, 0.828125), (0.171875, 0.015625, 0.484375, 0.890625),
    (0.015625, 0.015625, 0.984375, 0.984375)])
  # Outer edges for one cell, one row, one column.
  np.testing.assert_array_equal(
    decode([(33, 33), (33, 35), (33, 97)]) * 32, [(1, 1, 2, 2), (1, 1, 4, 2), (1, 1, 2, 4)])


@pytest.mark.parametrize("grid", [1, 7, 12, 32])
def test_a_decoded_box_is_encoded_as_the_same_cells(grid):
  pairs = _all_pairs(grid)
  found = decode(pairs, grid)
  np.testing.assert_array_equal(encode(found, grid), pairs)
  # The centres of both cells are in the box.
  cells = np.stack([pairs % grid, pairs // grid], axis=-1)
  centres = ((cells + 0.5) / grid).reshape(-1, 4)
  assert (found[:, :2] <= centres[:, :2]).all() and (found[:, 2:] >= centres[:, 2:]).all()


def test_the_rules_differ_where_an_edge_lies_between_cells_only():
  edges = [(0, 0, k / 32, 1 / 32) for k in range(1, 33)]
  port, trained = encode(edges), encode(edges, rule="training")
  np.testing.assert_array_equal(port, [(0, k) for k in range(32)])
  np.testing.assert_array_equal(trained, [(0, 32 + min(k, 31)) for k in range(1, 33)])
  rng = np.random.default_rng(0)
  corners = np.sort(rng.uniform(0, 0.9999, (500, 2, 2)), axis=1).reshape(500, 4)
  np.testing.assert_array_equal(encode(corners), encode(corners, rule="training"))
  # By hand, from the corner's cells.
  x1, y1, x2, y2 = corners.T
  want = [(int(32 * b) * 32 + int(32 * a), int(32 * d) * 32 + int(32 * c))
          for a, b, c, d in zip(x1, y1, x2, y2)]
  np.testing.assert_array_equal(encode(corners), want)


@pytest.mark.parametrize("grid", [32, 12, 7, 1])
@pytest.mark.parametrize("rule", ["port", "training"])
def test_cells_are_in_the_grid_and_in_order(grid, rule):
  tiny = np.nextafter(0, 1)
  rows = [(0, 0, tiny, tiny), (1 - 1e-12, 0, 1, 1), (0, 0, 1, 1), (0, 0, 1 + 5e-7, 1)]
  rows += [(0, -5e-7, 1, 1)]
  rows += [(k / grid, k / grid, np.nextafter(k / grid, 1), 1) for k in range(grid)]
  first, last = encode(rows, grid, rule).T
  assert (first >= 0).all() and (last < grid * grid).all()
  assert (last % grid >= first % grid).all() and (last // grid >= first // grid).all()


def test_other_forms_of_boxes():
  want = np.array([[0.25, 0.5, 0.75, 1.0]])
  np.testing.assert_array_equal(boxes.from_pixels([(10, 10, 30, 20)], 40, 20), want)
  np.testing.assert_array_equal(boxes.from_corner_and_size([(0.25, 0.5, 0.5, 0.5)]), want)
  assert encode([], 32).shape == (0, 2) and decode(np.zeros((0, 2), int)).shape == (0, 4)
  np.testing.assert_array_equal(encode([(0, 0, 1, 1)]), encode(np.array([[0, 0, 1, 1.0]], "f4")))


@pytest.mark.parametrize(("box", "said"), [
  ((0.1, 0.1, float("nan"), 0.5), "not finite"),
  ((0.5, 0.1, 0.5, 0.5), r"x, y, width, height"),
  ((0.6, 0.6, 0.3, 0.3), r"x, y, width, height"),
  ((0.1, 0.1, 1.2, 0.5), "not all in the picture"),
  ((-0.1, 0.1, 0.2, 0.5), "not all in the picture"),
  ((10, 20, 200, 150), "looks like pixels"),
  ((True, 0.1, 0.2, 0.5), "rows of 4 numbers"),
  ((0.1, 0.2, 0.3), "rows of 4 numbers"),
  (("a", "b", "c", "d"), "rows of 4 numbers"),
])
def test_what_is_no_box_is_refused(box, said):
  with pytest.raises(ValueError, match=said):
    encode([(0.1, 0.1, 0.2, 0.2), box])
  if len(box) == 4:
    with pytest.raises(ValueError, match=rf"row 3\[1\].*{said}"):
      insert("<phrase>a</phrase><phrase>b</phrase>", [None, box], where="row 3")


@pytest.mark.parametrize(
  "pair", [(-1, 3), (0, 1024), (0.5, 3), (True, 3), (0, float("nan")), (1, 2, 3)])
def test_what_is_no_cell_is_refused(pair):
  with pytest.raises(ValueError, match="whole number from 0 to 1023|rows of 2|two cells"):
    insert("<phrase>a</phrase>", [pair])
  if len(pair) == 2:
    with pytest.raises(ValueError):
      decode([pair])


def test_other_refusals():
  with pytest.raises(ValueError, match="above or to the left"):
    words([(863, 44)])
  with pytest.raises(ValueError, match="no box to write"):
    words([])
  with pytest.raises(ValueError, match="rounding 'up'"):
    encode([(0, 0, 1, 1)], rule="up")
  with pytest.raises(ValueError, match="side 0"):
    decode([(0, 0)], 0)
  with pytest.raises(ValueError, match="0 x 5 pixels"):
    boxes.from_pixels([(0, 0, 1, 1)], 0, 5)
  for text, number in [("no phrase", 0), ("<phrase></phrase>", 0), ("<phrase>a\nb</phrase>", 0),
                       ("<phrase>a</phrase> <phrase>b</phrase>", 2)]:
    with pytest.raises(ValueError, match=f"boxes has 1 entries and the text {number} phrases"):
      insert(text, [None])


def test_boxes_stand_behind_their_phrases():
  text = "<grounding><phrase> a dog</phrase> and<phrase> cats</phrase> on<phrase> grass</phrase>"
  two = [(0, 0), (1, 34)]
  got = insert(text, [(44, 863), two, None])
  want = text.replace(" a dog</phrase>", " a dog</phrase>" + words([(44, 863)]))
  want = want.replace(" cats</phrase>", " cats</phrase>" + words(two))
  assert got == want and words(two).count(DELIMITER) == 1
  assert insert(text, None) == insert(text, []) == insert(text, [None, [], ()]) == text
  box = (0.25, 0.25, 0.5, 0.5)
  for form in (box, [box], list(box), np.array(box), np.array([box], "f4"), encode([box])[0]):
    assert insert("<phrase>a</phrase>", [form]) == (
      "<phrase>a</phrase><object><patch_index_0264><patch_index_0495></object>")


def test_a_text_says_what_it_locates():
  text, (man, fire), malformed = extract(SNOWMAN)
  assert text == "An image of a snowman warming himself by a fire." and malformed == 0
  assert man == ("a snowman", 12, 21, ((0.390625, 0.046875, 0.984375, 0.828125),))
  assert fire == ("a fire", 41, 47, ((0.171875, 0.015625, 0.484375, 0.890625),))
  pairs = [(3, 70), (0, 1023)]
  again = extract(insert("<phrase> a dog</phrase>", [pairs]))
  np.testing.assert_array_equal(again.entities[0].boxes, decode(pairs))
  assert extract("x</image>" + SNOWMAN) == extract(SNOWMAN)


def test_a_box_without_phrase_among_cut_blanks_keeps_its_place():
  """That of transformers, which the parity test holds; `pieces` of the demo takes the ends."""
  group = "<object><patch_index_0001><patch_index_0070></object>"
  text, (before, after), _ = extract(f" {group} a dog  {group} ")
  assert text == "a dog" and before.name == "<patch_index_1><patch_index_70>"
  assert (before.start, before.end) == (-1, -1) and (after.start, after.end) == (7, 7)


@pytest.mark.parametrize("text", [
  "<object></object>", "<object><patch_index_0001></object>", "<object> <patch_index_1></object>",
  "<object><patch_index_0001><patch_index_0002><patch_index_0003></object>",
  "<object><patch_index_0001><patch_index_0002>",
  "<object><patch_index_0001><patch_index_1024></object>",
  f"<object><patch_index_0001><patch_index_{'9' * 5000}></object>",
])
def test_malformed_groups_are_counted_and_give_nothing(text):
  assert extract(f"a {text}") == ("a", (), 1)


def test_the_words_have_the_published_ids():
  class Published:
    vocab_size, bos_id, pad_id, eos_id = 64001, 0, 1, 2

  every = (*KOSMOS_WORDS, *boxes.grounding_words())
  ids = {word: 64001 + i for i, word in enumerate(every)}
  assert appended(Published, 64, every).vocab_size == 65037
  tokens, grid = boxes.box_tokens(ids.get)
  assert tokens == (64007, 64008, 64009, 64010, 64011, 64013) and grid == 32
  assert ids["<grounding>"] == 64012 and max(ids.values()) == 65036
  with pytest.raises(ValueError, match="no word <object>"):
    boxes.box_tokens({k: v for k, v in ids.items() if k != "<object>"}.get)
  with pytest.raises(ValueError, match="1023 words of cells"):
    boxes.box_tokens({k: v for k, v in ids.items() if v != 65036}.get)
  with pytest.raises(ValueError, match="ids in order"):
    boxes.box_tokens((ids | {"<patch_index_0003>": 5}).get)


_PIECES = (
  "<phrase>", "</phrase>", "<object>", "</object>", DELIMITER, "<grounding>", "<patch_index_0044>",
  "<patch_index_0863>", "<patch_index_5>", " a dog", "cat ", " ", ".", "<", ">", "\n", "</image>",
  "<phrase> a dog</phrase>", "<object><patch_index_0001><patch_index_0070></object>")


@pytest.mark.parity
def test_texts_and_boxes_are_those_of_transformers():
  pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  from transformers.models.kosmos2 import processing_kosmos2 as theirs

  rng = random.Random(0)
  texts = [SNOWMAN] + ["".join(rng.choices(_PIECES, k=rng.randint(0, 14))) for _ in range(4000)]
  num_entities = 0
  for text in texts:
    want = theirs.clean_text_and_extract_entities_with_bboxes(text.split("</image>")[-1])
    got = extract(text)
    assert got.text == want[0], text
    assert [(e.name, (e.start, e.end), list(e.boxes)) for e in got.entities] == want[1], text
    num_entities += len(got.entities)
  assert num_entities > 500
  corners = np.sort(np.random.default_rng(1).integers(0, 97, (500, 2, 2)) / 96, axis=1)
  corners = corners[(corners[:, 1] > corners[:, 0]).all(axis=1)].reshape(-1, 4)
  want = [theirs.coordinate_to_patch_index(tuple(box), 32) for box in corners.tolist()]
  np.testing.assert_array_equal(encode(corners), want)
  pairs = np.random.default_rng(2).integers(0, 1024, (500, 2))  # of which many are reversed
  want = [theirs.patch_index_to_coordinate(*pair, 32) for pair in pairs.tolist()]
  np.testing.assert_array_equal(decode(pairs), want)


@pytest.mark.parity
def test_insertion_is_that_of_transformers():
  pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  from transformers import Kosmos2Processor

  class Theirs(Kosmos2Processor):  # what inserts boxes needs no tokenizer
    def __init__(self):
      self.num_patch_index_tokens = 1024

  pieces = ("<phrase> a dog</phrase>", "<phrase></phrase>", "<phrase>b\n</phrase>", " and ",
            "<phrase>", "</phrase>")
  values = (None, (44, 863), (0.25, 0.5, 0.75, 1.0), [(3, 3), (0.1, 0.2, 0.3, 0.4)], [])
  rng, inserted = random.Random(0), 0
  for _ in range(2000):
    text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
    entries = rng.choices(values, k=rng.randint(0, 3))
    try:
      want = Theirs()._insert_patch_index_tokens(text, entries)
    except ValueError:
      with pytest.raises(ValueError, match="entries and the text"):
        insert(text, entries)
      continue
    # Tags swallow the blanks on their left, so theirs around the tags change no token.
    want = re.sub(r"> (<patch|</object|</delimiter)", r">\1", want)
    assert insert(text, entries) == want
    inserted += want != text
  assert inserted > 150
