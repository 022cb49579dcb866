"""Stage `vision`: the tower learns what stands at each patch, and where, before it is frozen.

It takes the place of CLIP, which Kosmos-1 freezes but for its last layer. A linear head tells, of
each patch's vector, the shape over the patch's middle or that there is none, its colour, and its
box. A tower that is trained with the decoder from the start learns neither at this size, and one
that has learned names alone leads no places past the resampler.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data.synthetic_pictures import Scene, Scenes
from lmops_jax.data.synthetic_pictures.pictographs import COLORS, SHAPES
from lmops_jax.models.layers import Projection
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig, VisionTransformer
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.training import language_models, loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Ahead, Batches

STAGE = "vision"
_NONE = len(SHAPES)  # the class of a patch without a shape
_OUTPUTS = (len(SHAPES) + 1, len(COLORS), 4)
_AMPLITUDE = 0.1  # of positions in the beginning
_BOX_WEIGHT = 4.0  # of the error of a box's four fractions beside two cross-entropies


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class TowerTraining:
  """How the tower is taught.

  Attributes:
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: scenes of a step, each of them seen once.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
  """

  optimizer: optax.GradientTransformation
  num_steps: PositiveInt = 1000
  batch_size: PositiveInt = 64
  checkpoint_every: PositiveInt | None = 100


class Seen(NamedTuple):
  """What a head tells of each patch: logits of shapes and colours, and boxes, `[B,P,...]`."""

  shapes: jax.Array
  colors: jax.Array
  boxes: jax.Array


class TaughtTower(nn.Module):
  """A vision tower, `vision`, and a linear head, `head`."""

  config: VisionConfig

  def setup(self):
    trunk = self.config.trunk
    self.vision = VisionTransformer(self.config)
    self.head = Projection(trunk, (trunk.width,), (sum(_OUTPUTS),), ("embed", None), True)

  def __call__(self, images: jax.Array) -> Seen:
    """Of images `[B,height,width,3] uint8`."""
    found = self.head(self.vision.features(images)[:, 1:]).astype(jnp.float32)
    return Seen(*jnp.split(found, np.cumsum(_OUTPUTS)[:-1], axis=-1))


@dataclasses.dataclass(frozen=True)
class TowerLosses:
  """`(params, batch) -> [B] float32` of a `TaughtTower` for batches of `patch_labels`."""

  model: TaughtTower

  def __call__(self, params, batch) -> jax.Array:
    seen = self.model.apply({"params": params}, batch["images"])
    there = batch["shapes"] != _NONE
    nats = optax.softmax_cross_entropy_with_integer_labels
    shapes, colors = nats(seen.shapes, batch["shapes"]), nats(seen.colors, batch["colors"])
    boxes = _BOX_WEIGHT * jnp.abs(seen.boxes - batch["boxes"]).sum(axis=-1)
    # Apart, since far fewer patches have a shape.
    return _mean(shapes, ~there) + _mean(shapes + colors + boxes, there)


def _mean(values: jax.Array, chosen: jax.Array) -> jax.Array:
  """The mean of the chosen values of each row, `[B,P]` to `[B]`."""
  return jnp.sum(values * chosen, axis=1) / jnp.maximum(chosen.sum(axis=1), 1)


def patch_labels(scene: Scene, per_side: int) -> dict[str, np.ndarray]:
  """What stands over the middle of each patch, row by row.

  Args:
    scene: whose boxes do not overlap.
    per_side: patches of a row.

  Returns:
    `shapes [P]`, the number behind the last one for none; `colors [P]`, `boxes [P,4]`, 0 for none.
  """
  middles = (np.arange(per_side) + 0.5) / per_side
  shapes = np.full((per_side, per_side), _NONE, np.int32)
  colors, boxes = np.zeros_like(shapes), np.zeros((per_side, per_side, 4), np.float32)
  for one in scene.pictographs:
    left, top, right, bottom = one.box
    over = np.ix_((top <= middles) & (middles < bottom), (left <= middles) & (middles < right))
    shapes[over], colors[over] = SHAPES.index(one.shape), COLORS.index(one.color)
    boxes[over] = one.box
  return {"shapes": shapes.ravel(), "colors": colors.ravel(), "boxes": boxes.reshape(-1, 4)}


def batch_of(scenes: Scenes, per_side: int, seed: int, numbers) -> dict[str, np.ndarray]:
  """The scenes of some numbers with the labels of their patches."""
  found = [scenes.scene(seed, int(number)) for number in numbers]
  labels = [patch_labels(scene, per_side) for scene in found]
  return {"images": np.stack([scene.picture for scene in found]),
          "example_id": np.asarray(numbers, np.int64),
          **{name: np.stack([of[name] for of in labels]) for name in labels[0]}}


@functools.lru_cache
def initializer(model: TaughtTower):
  """`key -> parameters` with their logical axes; one object a model."""
  size = model.config.image_size
  return lambda key: model.init(key, np.zeros((1, size, size, NUM_CHANNELS), np.uint8))["params"]


def waves(per_side: int, width: int) -> np.ndarray:
  """Sines and cosines of a patch's row and column, `[1+P,width] float32`, row by row.

  Position embeddings start as these: beside patches of these pictures the usual small random ones
  hardly count, and shapes, which lie over several patches, are learned late.
  """
  at = (np.arange(per_side) + 0.5) / per_side
  angles = at[:, None] * np.pi * 2.0 ** np.linspace(-1, 3, width // 4)
  of_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  found = np.zeros((1 + per_side**2, width), np.float32)
  found[1:, : width // 4 * 4] = _AMPLITUDE * np.concatenate(
    [np.repeat(of_axis, per_side, axis=0), np.tile(of_axis, (per_side, 1))], axis=1)
  return found


def run(
  context: pipeline.StageContext, *, config: TowerTraining, vision: VisionConfig, scenes: Scenes,
  seed: int, init_seed: int, num_tested: int, partitioner,
) -> None:
  """Trains the tower, and tests it on scenes that it has not seen.

  Args:
    seed: of the scenes to train on; those of the next one test it.
    init_seed: of the initial numbers.
  """
  model, per_side = TaughtTower(vision), vision.image_size // vision.patch_size
  size = config.batch_size

  def at(step):
    return batch_of(scenes, per_side, seed, np.arange(step * size, (step + 1) * size))

  def initial():
    params = nn.unbox(jax.jit(initializer(model))(jax.random.key(init_seed)))
    params["vision"]["position_embedding"] = waves(per_side, vision.trunk.width)
    return params

  losses = TowerLosses(model)
  state = loop.train(
    supervised(initializer(model), losses, config.optimizer, partitioner=partitioner),
    Ahead(Batches(at)), config.num_steps, init_seed, context.directory, partitioner,
    initial_params=initial, records=loop.Records(
      checkpoint_every=config.checkpoint_every, params_at=(config.num_steps,),
      description=context.name, progress=context.progress),
  ).state
  num_tokens = config.num_steps * size * (1 + vision.num_patches)
  context.flops += 3 * num_tokens * flops.forward_flops_per_token(
    vision.trunk, 1 + vision.num_patches, unembedding=False)
  tested = batch_of(scenes, per_side, seed + 1, np.arange(num_tested))
  with partitioner.activate():
    seen = jax.device_get(jax.jit(model.apply)({"params": state.params}, tested["images"]))
  context.extra["tested"] = figures(Seen(*seen), tested)


def figures(seen: Seen, batch: dict[str, np.ndarray]) -> dict[str, float]:
  """Shares of patches told right, and the mean overlap of boxes; the last two where a shape is."""
  there = batch["shapes"] != _NONE
  return {
    "shape": float((seen.shapes.argmax(-1) == batch["shapes"]).mean()),
    "shape_where_there": float((seen.shapes.argmax(-1) == batch["shapes"])[there].mean()),
    "color": float((seen.colors.argmax(-1) == batch["colors"])[there].mean()),
    "box_overlap": float(_overlap(seen.boxes[there], batch["boxes"][there]).mean()),
  }


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Intersection over union of boxes `[n,4]`."""
  both = np.minimum(one, other)[:, 2:] - np.maximum(one, other)[:, :2]
  both = np.clip(both, 0, None).prod(axis=1)
  area, other_area = (np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1) for b in (one, other))
  return both / np.maximum(area + other_area - both, 1e-9)


def load(folder, step: int, vision: VisionConfig, partitioner):
  """The parameters of the tower alone, as a `DockedLM` has them under `vision`."""
  model = TaughtTower(vision)
  abstract = language_models.abstract_params(initializer(model), partitioner)
  return loop.load_kept_params(folder, step, abstract)["vision"]
