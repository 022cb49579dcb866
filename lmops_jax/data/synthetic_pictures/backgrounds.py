"""Muted crops of real photographs, which installed packages carry, as backgrounds of scenes."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

_LEAST_CROP = 48  # pixels of a photograph; a scene's own side at least
_GREY_SHARE, _CONTRAST, _BRIGHTNESS = 0.5, 0.45, 64  # so that all colours of pictographs stand out


@functools.cache
def photographs() -> tuple[np.ndarray, ...]:
  """Scikit-learn's two sample images and Matplotlib's portrait, muted, each `[h,w,3] uint8`.

  Raises:
    ValueError: a package was installed without its sample data.
  """
  from matplotlib import cbook
  from sklearn.datasets import load_sample_image

  try:
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as portrait:
      found = [np.asarray(portrait.convert("RGB"))]
    found += [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
  except (OSError, AttributeError) as error:
    raise ValueError(
      f"the sample photographs of scikit-learn or Matplotlib cannot be read ({error}); install "
      "these packages from PyPI, with their data."
    ) from error
  return tuple(map(_muted, found))


def background(draws: np.random.Generator, side: int) -> np.ndarray:
  """A random square of a random photograph, `[side,side,3] uint8`."""
  whole = photographs()
  photograph = whole[draws.integers(len(whole))]
  height, width = photograph.shape[:2]
  shortest = min(height, width)
  crop = int(draws.integers(min(max(_LEAST_CROP, side), shortest), shortest + 1))
  top, left = draws.integers([height - crop + 1, width - crop + 1])
  square = Image.fromarray(photograph[top : top + crop, left : left + crop])
  return np.asarray(square.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0))


def _muted(photograph: np.ndarray) -> np.ndarray:
  grey = photograph.mean(axis=-1, keepdims=True)
  soft = _GREY_SHARE * grey + (1 - _GREY_SHARE) * photograph
  return (_BRIGHTNESS + _CONTRAST * soft).astype(np.uint8)
