"""The aesthetic predictor of LAION: how much people like a picture, from its CLIP vector.

Five linear layers with nothing between them (the activations are commented out in the published
code, and dropout is off), so the whole is affine and folds to one vector and one number. For the
published weights, `sac+logos+ava1-l14-linearMSE`, folded from their float32 numbers in float64: a
vector of length 17.9956 and a bias of 5.236646, so ratings of unit vectors lie in -12.8 .. 23.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

HIDDEN = (1024, 128, 64, 16)
LAYERS = tuple(f"layers_{i}" for i in (0, 2, 4, 6, 7))  # 1, 3 and 5 were dropout
_SLACK = 1e-3  # of a vector's length around 1


class AestheticPredictor(nn.Module):
  """The layered form: `[B,D]` unit vectors of pictures to `[B] float32` ratings, 1 to 10 in data.

  Attributes:
    hidden: widths of the four hidden layers.
  """

  hidden: tuple[int, int, int, int] = HIDDEN

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    last = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
    x = features.astype(jnp.float32)
    for name, width in zip(LAYERS, (*self.hidden, 1)):
      x = nn.Dense(
        width, name=name, kernel_init=last if width == 1 else init,
        precision=jax.lax.Precision.HIGHEST)(x)
    return x[:, 0]


class Folded(NamedTuple):
  """The folded form.

  Attributes:
    kernel: `[D] float32`.
    bias: `[] float32`.
  """

  kernel: np.ndarray | jax.Array
  bias: np.ndarray | jax.Array


def fold(params: Mapping) -> Folded:
  """One vector and one number for the parameters of `AestheticPredictor`, multiplied in float64."""
  kernel, bias = np.ones((1, 1)), np.zeros(1)
  for name in reversed(LAYERS):
    own = {part: np.asarray(params[name][part], np.float64) for part in ("kernel", "bias")}
    bias = own["bias"] @ kernel + bias
    kernel = own["kernel"] @ kernel
  return Folded(kernel[:, 0].astype(np.float32), bias[0].astype(np.float32))


def rate(head: Folded, features: jax.Array) -> jax.Array:
  """Ratings `[B] float32` of pictures by the folded form.

  Args:
    head: of `fold`.
    features: `[B,D]` vectors of length 1, as `Clip.image_features` gives them; zeros get the bias.

  Raises:
    ValueError: vectors of another width than the predictor's.
  """
  width, = head.kernel.shape
  if features.shape[-1] != width:
    raise ValueError(
      f"the pictures' vectors have {features.shape[-1]} numbers and the aesthetic predictor takes "
      f"{width}; give it those of the CLIP model that it was trained on (ViT-L/14 has 768)."
    )
  return jnp.dot(
    features.astype(jnp.float32), head.kernel, precision=jax.lax.Precision.HIGHEST) + head.bias


def check_unit(features: np.ndarray) -> None:
  """Refuses vectors that were not normalised, of which ratings would mean nothing.

  Args:
    features: `[B,D]`, on the host; a vector of zeros is let through.

  Raises:
    ValueError: naming the first vector whose length is not 1 within 0.001.
  """
  lengths = np.linalg.norm(np.asarray(features, np.float64), axis=-1)
  wrong = np.flatnonzero(~((np.abs(lengths - 1) <= _SLACK) | (lengths == 0)))
  if wrong.size:
    raise ValueError(
      f"vector {wrong[0]} of the pictures has length {lengths[wrong[0]]:.6g} instead of 1; divide "
      "CLIP's image vectors by their lengths before they are rated."
    )
