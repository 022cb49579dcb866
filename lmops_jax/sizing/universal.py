"""Operations of a training step of a decoder with encoders docked to it (`models.universal`).

They are counted from shapes, as in `flops` and `encoders`: packed spans and packed documents count
as one sequence, and padding counts too. Encoders are those in stacks (`models.stacks`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.universal import UniversalConfig
from lmops_jax.sizing import encoders, flops
from lmops_jax.sizing.encoders import Depth


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Shape of a row of a batch.

  Attributes:
    length: S, positions of the decoder.
    encoder_length: E, positions of the encoder of spans; 0 for none.
    images: I.
    image_words: T, words that are encoded with each image.
    image_features: vectors of each image, None for one of the encoder's own size; 0 for words that
      are encoded as with an image, and without one.
  """

  length: int
  encoder_length: int = 0
  images: int = 0
  image_words: int = 0
  image_features: int | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
  """What is trained; connectors are in any case.

  Attributes:
    text: whether the decoder is.
    reader, vision: how much of the encoders is.
  """

  text: bool = True
  reader: Depth = Depth.TOP
  vision: Depth = Depth.TOP


def trained_by(optimizer: optax.GradientTransformation, params: Any) -> Trained:
  """What an optimizer trains; a part counts as trained from its first trained layer on.

  Args:
    params: those of a `UniversalLM`, or their shapes.
  """
  read = encoders.gradients_read(optimizer, params)

  def depth(encoder):
    behind = {"top", "post_norm"}  # of the lower layers
    if any(jax.tree.leaves({name: x for name, x in encoder.items() if name not in behind})):
      return Depth.WHOLE
    return Depth.TOP if any(jax.tree.leaves(encoder.get("top", {}))) else Depth.FROZEN

  parts = {name: depth(read[name]) for name in ("reader", "vision") if name in read}
  return Trained(any(jax.tree.leaves(read["text"])), **parts)


def row_flops(config: UniversalConfig, shape: RowShape, trained: Trained = Trained()) -> float:
  """Operations of a training step for each row.

  What a connector computes once for all rows, such as its latents' keys, is left out.

  Raises:
    ValueError: for spans or images without an encoder for them.
  """
  text = config.text
  if trained.text:
    total = 3 * shape.length * flops.forward_flops_per_token(text, shape.length)
  else:
    total = _frozen_flops(text, shape.length)
  for part, (docking, num, rows, in_front) in _encoded(config, shape).items():
    total += rows * encoders.step_flops(
      docking.encoder, docking.connector, text, num, getattr(trained, part), in_front)
  return total


def encoding_flops(config: UniversalConfig, shape: RowShape) -> float:
  """Operations of making a row's vectors, without a gradient; raises as `row_flops` does."""
  return sum(
    rows * encoders.encoding_flops(docking.encoder, docking.connector, config.text, num, in_front)
    for docking, num, rows, in_front in _encoded(config, shape).values())


def _frozen_flops(text: TransformerConfig, length: int) -> float:
  """A forward pass, and gradients that only pass through: none is computed for a weight."""
  forward = flops.forward_flops_per_token(text, length)
  weights = 2.0 * flops.matmul_params(text)
  return length * (2 * weights + 3 * (forward - weights))


def _encoded(config: UniversalConfig, shape: RowShape) -> dict[str, tuple[Any, int, int, float]]:
  """By part: docking, vectors of a sequence, sequences of a row, operations in front of blocks."""
  found = {}
  for part, docking, is_used in (
    ("reader", config.reader, shape.encoder_length), ("vision", config.vision, shape.images)):
    if is_used and docking is None:
      raise ValueError(
        f"{shape} has something for models.UniversalConfig.{part}, which is None; dock an encoder, "
        "or leave it out."
      )
  if shape.encoder_length:
    found["reader"] = config.reader, shape.encoder_length, 1, 0.0
  if shape.images:
    encoder = config.vision.encoder
    own = encoder.num_features()
    features = own if shape.image_features is None else shape.image_features
    in_front = encoders.patch_flops(encoder) * max(features - 1, 0) / (own - 1)
    found["vision"] = config.vision, features + shape.image_words, shape.images, in_front
  return found
