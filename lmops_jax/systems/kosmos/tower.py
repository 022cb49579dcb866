"""Stage `vision`: the tower learns what stands at each patch, and where, before it is frozen.

It takes the place of CLIP, which Kosmos-1 freezes but for its last layer. A linear head tells, of
each patch's vector, the shape over the patch's middle or that there is none, its colour, and its
box; another one tells, of each patch with ink of a word, which word it is part of, but not its
sentiment. A tower that is trained with the decoder from the start learns neither at this size, and
one that has learned names alone leads no places past the resampler.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.config.setting_types import Count, PositiveInt, Probability, component
from lmops_jax.data.box_overlap import iou
from lmops_jax.data.synthetic_pictures import RenderedText, RenderedTexts, Scene, Scenes
from lmops_jax.data.synthetic_pictures.pictographs import COLORS, SHAPES
from lmops_jax.data.synthetic_pictures.rendered_text import WORDS
from lmops_jax.models.layers import Projection
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig, VisionTransformer
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.training import language_models, loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Ahead, Batches

STAGE = "vision"
_NONE = len(SHAPES)  # the class of a patch without a shape
_NO_WORD = -1  # the word of a scene
_DARK = 128  # grey levels of ink are below
_OUTPUTS = (len(SHAPES) + 1, len(COLORS), 4)
_AMPLITUDE = 0.1  # of positions in the beginning
_ORDERS = tuple(itertools.permutations(range(NUM_CHANNELS)))[1:]  # of channels, all but their own
_BOX_WEIGHT = 4.0  # of the error of a box's four fractions beside two cross-entropies


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class TowerTraining:
  """How the tower is taught.

  Attributes:
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: scenes of a step, each of them seen once.
    num_words: pictures of words of a step, likewise.
    recolored_share: of the scenes, those whose red, green and blue are exchanged and of which no
      colour is asked: a shape then counts as the same in any colour.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
  """

  optimizer: optax.GradientTransformation
  num_steps: PositiveInt = 1000
  batch_size: PositiveInt = 64
  num_words: Count = 32
  recolored_share: Probability = 0.0
  checkpoint_every: PositiveInt | None = 100


class Seen(NamedTuple):
  """What heads tell of each patch: logits of shapes, colours and words, and boxes, `[B,P,...]`."""

  shapes: jax.Array
  colors: jax.Array
  boxes: jax.Array
  words: jax.Array


class TaughtTower(nn.Module):
  """A vision tower, `vision`, and two linear heads, `head` of patches and `word_head`."""

  config: VisionConfig

  def setup(self):
    trunk = self.config.trunk
    self.vision = VisionTransformer(self.config)
    self.head = Projection(trunk, (trunk.width,), (sum(_OUTPUTS),), ("embed", None), True)
    self.word_head = Projection(trunk, (trunk.width,), (len(WORDS),), ("embed", None), True)

  def __call__(self, images: jax.Array) -> Seen:
    """Of images `[B,height,width,3] uint8`."""
    features = self.vision.features(images)[:, 1:]
    found = self.head(features).astype(jnp.float32)
    words = self.word_head(features).astype(jnp.float32)
    return Seen(*jnp.split(found, np.cumsum(_OUTPUTS)[:-1], axis=-1), words)


@dataclasses.dataclass(frozen=True)
class TowerLosses:
  """`(params, batch) -> [B] float32` of a `TaughtTower` for batches of `batch_of`."""

  model: TaughtTower

  def __call__(self, params, batch) -> jax.Array:
    seen = self.model.apply({"params": params}, batch["images"])
    there = batch["shapes"] != _NONE
    named = there & batch["colored"][:, None]
    nats = optax.softmax_cross_entropy_with_integer_labels
    shapes, colors = nats(seen.shapes, batch["shapes"]), nats(seen.colors, batch["colors"])
    boxes = _BOX_WEIGHT * jnp.abs(seen.boxes - batch["boxes"]).sum(axis=-1)
    # Apart, since far fewer patches have a shape.
    of_scenes = (
      _mean(shapes, ~there) + _mean(shapes + boxes, there) + _mean(colors, named))
    words = nats(seen.words, jnp.maximum(batch["words"], 0)[:, None])
    return jnp.where(batch["words"] == _NO_WORD, of_scenes, _mean(words, batch["ink"]))


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


def batch_of(
  scenes: Sequence[Scene], texts: Sequence[RenderedText], per_side: int, num_recolored: int = 0
) -> dict[str, np.ndarray]:
  """Scenes, the first `num_recolored` of them in other colours, and behind them pictures of words.

  Returns:
    `images [B,side,side,3]`, the labels of `patch_labels`, which mean nothing for words, `colored
    [B] bool`, whether colours can be told, `words [B]`, the number of a word, `_NO_WORD` for a
    scene, and `ink [B,P] bool`, where a patch has some that is dark.
  """
  labels = [patch_labels(scene, per_side) for scene in scenes]
  missing = ((0, len(texts)),)
  stacked = {name: np.stack([of[name] for of in labels]) for name in labels[0]}
  images = np.stack([one.picture for one in (*scenes, *texts)])
  for i in range(num_recolored):
    images[i] = images[i][..., _ORDERS[i % len(_ORDERS)]]
  size = images.shape[1] // per_side
  in_patches = images[..., 0].reshape(-1, per_side, size, per_side, size)
  return {
    "images": images,
    "colored": np.arange(len(images)) >= num_recolored,
    "ink": (in_patches.min(axis=(2, 4)) < _DARK).reshape(len(images), -1),
    "words": np.array([_NO_WORD] * len(scenes) + [WORDS.index(word_of(one)) for one in texts]),
    **{name: np.pad(x, missing + ((0, 0),) * (x.ndim - 1)) for name, x in stacked.items()},
  }


def word_of(text: RenderedText) -> str:
  """The word of a text that has a sentiment."""
  return next(word for word in text.text.split() if word in WORDS)


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
  rendered: RenderedTexts, seed: int, init_seed: int, num_tested: int, partitioner,
) -> None:
  """Trains the tower, and tests it on pictures that it has not seen.

  Args:
    seed: of the pictures to train on; those of the next one test it.
    init_seed: of the initial numbers.
  """
  model, per_side = TaughtTower(vision), vision.image_size // vision.patch_size
  size, num_words = config.batch_size, config.num_words

  def texts(seed, start, num):
    return [rendered.item(seed, i, told_of_pictures=bool(i % 2)) for i in range(start, start + num)]

  def at(step):
    found = batch_of(
      [scenes.scene(seed, i) for i in range(step * size, (step + 1) * size)],
      texts(seed, step * num_words, num_words), per_side, round(config.recolored_share * size))
    return found | {"example_id": np.arange(size + num_words) + step * (size + num_words)}

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
  num_tokens = config.num_steps * (size + num_words) * (1 + vision.num_patches)
  context.flops += 3 * num_tokens * flops.forward_flops_per_token(
    vision.trunk, 1 + vision.num_patches, unembedding=False)
  apply = jax.jit(model.apply)

  def tested(of_scenes):
    batch = batch_of(of_scenes, texts(seed + 1, 0, num_tested if num_words else 0), per_side)
    with partitioner.activate():
      seen = jax.device_get(apply({"params": state.params}, batch["images"]))
    return figures(Seen(*seen), batch)

  context.extra["tested"] = {
    group: tested([scenes.scene(seed + 1, i, held_out) for i in range(num_tested)])
    for group, held_out in (("seen", False), ("held_out", True))}


def figures(seen: Seen, batch: dict[str, np.ndarray]) -> dict[str, float]:
  """Shares of patches and words told right, and the mean overlap of boxes.

  Colours and boxes are those of patches where a shape is; words are left out if there are none.
  """
  scene = batch["words"] == _NO_WORD
  there = (batch["shapes"] != _NONE) & scene[:, None]
  right = seen.shapes.argmax(-1) == batch["shapes"]
  found = {
    "shape": float(right[scene].mean()),
    "shape_where_there": float(right[there].mean()),
    "color": float((seen.colors.argmax(-1) == batch["colors"])[there].mean()),
    "box_overlap": float(iou(seen.boxes[there], batch["boxes"][there]).mean()),
  }
  if not scene.all():
    votes = (seen.words * batch["ink"][..., None]).sum(axis=1)
    found["word"] = float((votes.argmax(-1) == batch["words"])[~scene].mean())
  return found


def load(folder, step: int, vision: VisionConfig, partitioner):
  """The parameters of the tower alone, as a `DockedLM` has them under `vision`."""
  model = TaughtTower(vision)
  abstract = language_models.abstract_params(initializer(model), partitioner)
  return loop.load_kept_params(folder, step, abstract)["vision"]
