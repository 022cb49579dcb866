"""Overlap (temporary)."""
import numpy as np


def overlaps(one, other):
  one, other = one[:, None], other[None]
  sides = np.minimum(one, other)[..., 2:] - np.maximum(one, other)[..., :2]
  both = np.clip(sides, 0, None).prod(-1)
  area, other_area = (np.clip(b[..., 2:] - b[..., :2], 0, None).prod(-1) for b in (one, other))
  return both / np.maximum(area + other_area - both, 1e-12)
