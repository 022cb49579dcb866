"""Overlap of boxes against cells of a fine grid, and suppression against a loop."""

import numpy as np

from lmops_jax.data.box_overlap import iou, suppressed


def _boxes(rng, num):
  corners = np.sort(rng.uniform(0, 1, (num, 2, 2)), axis=1)
  return corners.reshape(num, 4)


def _overlap_by_cells(first, second, cells=400):
  """Boxes as sets of cells of a fine grid."""
  places = (np.arange(cells) + 0.5) / cells
  inside = [
    np.outer((places > y1) & (places < y2), (places > x1) & (places < x2))
    for x1, y1, x2, y2 in (first, second)]
  return (inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()


def test_overlap_against_cells_of_a_grid():
  boxes = np.round(_boxes(np.random.default_rng(0), 8) * 40) / 40
  boxes[:, 2:] += 1 / 40
  found = iou(boxes[:, None], boxes[None, :5])
  want = [[_overlap_by_cells(a, b, 41 * 4) for b in boxes[:5] / 1.025] for a in boxes / 1.025]
  np.testing.assert_allclose(found, want, atol=1e-9)


def test_suppression_against_a_loop():
  rng = np.random.default_rng(1)
  for max_overlap in (0.0, 0.2, 0.5):
    boxes = _boxes(rng, 40)
    ious, alive = iou(boxes[:, None], boxes[None]), [True] * 40
    for i in range(40):
      for j in range(i + 1, 40):
        if alive[i] and alive[j] and ious[i, j] > max_overlap:
          alive[j] = False
    assert suppressed(boxes, max_overlap) == [i for i in range(40) if alive[i]]
  assert suppressed(np.zeros((0, 4)), 0.5) == []
