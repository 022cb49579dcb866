"""Bytes to floats with CLIP's constants, against float64."""

import jax
import numpy as np
import pytest

from lmops_jax.models.pixels import normalise


def test_normalised_pixels_have_clips_mean_and_deviation():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
  share = levels.astype(np.float64) / 255
  want = (share - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
  for function in (normalise, jax.jit(normalise)):
    got = function(levels)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1.2e-7, rtol=0)
  np.testing.assert_allclose(got[0, 0], [-1.7922625, -1.7520971, -1.4802198], rtol=1e-6)
  for wrong in (levels.astype(np.float32), levels[..., :1]):
    with pytest.raises(ValueError, match="normalise wants uint8"):
      normalise(wrong)
