"""Boxes of generated texts against those that are true."""

import numpy as np
import pytest

from lmops_jax.data import boxes
from lmops_jax.data.tasks.task import Example
from lmops_jax.evaluation import grounding
from lmops_jax.evaluation.estimates import by_category, estimate
from lmops_jax.evaluation.intervals import of_proportion

PROMPT = "<image><grounding> A man in<phrase> a shirt</phrase>"


def _brute(one, other):
  """The share of 64 x 64 cells, exact for corners on cells."""
  x, y = np.meshgrid(np.arange(64), np.arange(64))

  def inside(b):
    return (x >= b[0] * 64) & (x < b[2] * 64) & (y >= b[1] * 64) & (y < b[3] * 64)

  both, any_ = inside(one) & inside(other), inside(one) | inside(other)
  return both.sum() / any_.sum() if any_.any() else 0.0


def test_iou_is_the_share_of_cells():
  rng = np.random.default_rng(0)
  corners = np.sort(rng.integers(0, 65, (2, 12, 2, 2)), axis=2) / 64
  one, other = corners.reshape(2, 12, 4)
  assert (one[:, :2] < one[:, 2:]).all()
  got = grounding.iou(one[:, None], other[None])
  want = [[_brute(a, b) for b in other] for a in one]
  np.testing.assert_allclose(got, want, rtol=1e-12)
  assert (got == 0).any() and (got > 0.3).any()


def test_a_box_without_area_meets_nothing():
  whole = (0, 0, 1, 1)
  for none in ((0, 0, 0, 0), (0.5, 0.5, 0.2, 0.9), (0.9, 0.9, 0.1, 0.1)):
    assert grounding.iou(none, whole) == 0 and grounding.iou(none, none) == 0
  assert grounding.iou(whole, whole) == 1


def _group(*pairs):
  return boxes.words(np.array(pairs))


def test_boxes_are_those_of_the_prompts_phrase_in_their_order():
  answer = (
    f"{_group((0, 33), (5, 911))} with<phrase> a dog</phrase>{_group((7, 40))} and"
    f"<phrase>a shirt</phrase>{_group((44, 863))}")
  found = grounding.located(PROMPT, answer)
  np.testing.assert_allclose(found.boxes, boxes.decode([(0, 33), (5, 911), (44, 863)]))
  assert found.num_malformed == 0
  assert grounding.located(PROMPT, " " + answer).boxes.shape == (3, 4)  # tags swallow blanks
  other = grounding.located(PROMPT, f" and<phrase> a dog</phrase>{_group((7, 40))}")
  assert other.boxes.shape == (0, 4)
  broken = grounding.located(PROMPT, "<object><patch_index_0001></object>")
  assert broken.boxes.shape == (0, 4) and broken.num_malformed == 1
  assert len(grounding.located(PROMPT, _group((0, 1)), grid=12).boxes) == 1
  # a prompt's earlier phrases are no answer
  twice = f"<phrase> a shirt</phrase>{_group((0, 1))} and<phrase> a shirt</phrase>"
  assert not len(grounding.located(twice, " and").boxes)
  with pytest.raises(ValueError, match="does not end with <phrase>...</phrase>, so that"):
    grounding.located("<grounding> An image of", answer)


def test_recall_of_phrases_counts_any_box_of_the_truth():
  left, right, far = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 0.1, 0.1)
  found = [np.array([left]), np.array([far] * 4 + [left]), np.array([far] * 5 + [right]),
           np.array([far] * 10 + [right]), np.zeros((0, 4))]
  scores = grounding.phrase_scores(found, [[right, left], [left], [left, right], [right], [left]])
  assert scores["R@1"].tolist() == [1, 0, 0, 0, 0]
  assert scores["R@5"].tolist() == [1, 1, 0, 0, 0]
  assert scores["R@10"].tolist() == [1, 1, 1, 0, 0]
  assert scores["R@all"].tolist() == [1, 1, 1, 1, 0]


def test_half_is_enough():
  half = [np.array([(0, 0, 0.5, 1.0)])]
  assert grounding.phrase_scores(half, [[(0, 0, 1, 1)]])["R@1"] == 1
  less = [np.array([(0, 0, 0.499, 1.0)])]
  assert grounding.phrase_scores(less, [[(0, 0, 1, 1)]])["R@1"] == 0


def test_referring_takes_the_first_box():
  left, right, whole, dot = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1), (0.4, 0.4, 0.41, 0.41)
  found = [np.array([left, right]), np.array([right, left]), np.array([right, left]),
           np.zeros((0, 4))]
  scores = grounding.referring_scores(found, [[left], [left], [(0.25, 0, 0.75, 1)], [dot]])
  assert scores["P@1"].tolist() == [1, 0, 0, 0]
  assert scores["upper bound"].tolist() == [1, 1, 0, 0]
  assert scores["mean"].tolist() == [0, 0, 1, 0]  # of both it is the middle
  np.testing.assert_allclose(scores["IoU"], [1, 0, 1 / 3, 0])
  assert scores["grid"].tolist() == [1, 1, 1, 0]  # a hundredth of the side has no cell of its own
  coarse = grounding.referring_scores([np.zeros((0, 4))], [[whole]], grid=2)
  assert coarse["grid"].tolist() == [0]  # from centre to centre a fourth


@pytest.mark.parametrize("found,truths,message", [
  ([], [], "boxes of 0 answers and truths of 0 rows"),
  ([np.zeros((0, 4))], [[]], "row 0 has no box as its truth; leave it out"),
  ([np.zeros((0, 4))], [[(0.2, 0.2, 0.1, 0.1)]], "the truth of row 0: box 0 is .* is not behind"),
])
def test_truths_are_boxes(found, truths, message):
  with pytest.raises(ValueError, match=message):
    grounding.phrase_scores(found, truths)


def _row(i, name, box, categories=(), picture="a.png"):
  return Example(
    i, f"<image><grounding><phrase> {name}</phrase>", (), -1, ("x",), images=(picture,),
    boxes=(box,), categories=categories)


def test_a_task_is_measured_with_intervals():
  rows = [_row(i, "a dog", (0, 0, 1, 1), picture=f"{i}.png") for i in range(4)]
  whole = boxes.words(boxes.encode([(0, 0, 1, 1)]))
  found = grounding.measure("referring", rows, [whole, "", whole, whole])
  first, *others = found.estimates
  low, high = of_proportion(3, 4)
  assert first == ("P@1", 0.75, low, high, 4)
  assert [other.name for other in others] == ["mean", "upper bound", "grid", "IoU"]
  cell = (31 / 32) ** 2  # from the first cell's centre to the last one's
  assert others[-1].value == pytest.approx(0.75 * cell)
  with pytest.raises(ValueError, match="no metric 'cider' of boxes; give one of phrase_grounding"):
    grounding.measure("cider", rows, [""] * 4)


def test_rows_of_one_picture_are_drawn_together():
  values = np.repeat([0.0, 1.0] * 200, 5)
  alone = estimate("R@1", values)
  together = estimate("R@1", values, np.repeat(np.arange(400), 5))
  assert alone[:4] == ("R@1", 0.5, *of_proportion(1000, 2000))
  # 400 coins: the deviation of their mean is sqrt(0.25 / 400), of 2000 it would be less
  half = (together.high - together.low) / 2
  assert half == pytest.approx(1.96 * np.sqrt(0.25 / 400), rel=0.1)
  assert together.num_rows == 2000
  assert estimate("x", np.ones(6), list("aabbcc"))[1:4] == (1, *of_proportion(3, 3))
  with pytest.raises(ValueError, match="no rows to estimate x over"):
    estimate("x", [])


def test_a_row_counts_in_each_of_its_categories():
  rows = [_row(0, "a", (0, 0, 1, 1), ("people", "other")), _row(1, "b", (0, 0, 1, 1), ("people",))]
  found = by_category(rows, np.array([1, 0]))
  assert [(of.name, of.value, of.num_rows) for of in found] == [
    ("other", 1, 1), ("people", 0.5, 2)]
  assert by_category([row._replace(categories=()) for row in rows], np.ones(2)) == []
