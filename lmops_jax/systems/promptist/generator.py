"""Stages `towers` and `unet`: a small text-to-image model, and what tells texts and pictures apart.

The towers are a CLIP-like pair; its text tower is then frozen, and its states are what the UNet
attends to, as in Stable Diffusion. Pictures are so small that the UNet works on their pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax.config.setting_types import Decay, Positive, PositiveInt, component
from lmops_jax.data import batches as batches_lib
from lmops_jax.data.synthetic_pictures.styled_pictures import CONTENTS
from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer
from lmops_jax.decoding.diffusion.plans import Sampler
from lmops_jax.mesh.meshes import single_device
from lmops_jax.models.clip import Clip, ClipConfig
from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.models.diffusion.unet import UNet, UNetConfig
from lmops_jax.models.pixels import normalise
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.vision import NUM_CHANNELS
from lmops_jax.stages import pipeline
from lmops_jax.systems.promptist import fitting
from lmops_jax.systems.promptist.fitting import Fit
from lmops_jax.systems.promptist.world import Prepared
from lmops_jax.text.clip import cleaned, clip_texts
from lmops_jax.training.diffusion import DenoisingLosses
from lmops_jax.training.learner import Learner, supervised
from lmops_jax.training.sources import Ahead, Batches, Epochs

TOWERS, UNET = "towers", "unet"
_ENCODED_AT_ONCE = 256
_POSITIONS = 10.0  # factor of the towers' first position embeddings


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class Generator:
  """A small diffusion model of pixels with the text tower of a small CLIP.

  Attributes:
    towers, unet: the models; the text tower's vocabulary comes from the world.
    towers_fit, unet_fit: how each is trained. A batch of the towers is a group of pictures and
      captions, each of which is told from all others of the group.
    schedule: the noise.
    drop: share of captions that the UNet does not see, so that it can be guided.
    sampler: draws pictures.
    guidance: of drawing; 1 is none.
    batch_size: pictures drawn at a time.
  """

  towers: ClipConfig
  unet: UNetConfig
  towers_fit: Fit
  unet_fit: Fit
  sampler: Sampler
  schedule: NoiseSchedule = NoiseSchedule()
  drop: Decay = 0.1
  guidance: Positive = 2.0
  batch_size: PositiveInt = 64

  def clip(self, vocab_size: int, eos_id: int) -> Clip:
    """The towers for a tokenizer."""
    return _clip(self.towers, vocab_size, eos_id)

  def check(self, side: int) -> None:
    """Refuses models that do not fit together.

    Args:
      side: of the world's pictures.

    Raises:
      ValueError: naming both settings.
    """
    name = "promptist.Generator"
    wrong = {
      "towers.vision.image_size": (self.towers.vision.image_size, side, "the pictures' side"),
      "unet.sample_size": (self.unet.sample_size, side, "the pictures' side"),
      "unet.in_channels": (self.unet.in_channels, NUM_CHANNELS, "the number of colours"),
      "unet.out_channels": (self.unet.out_channels, NUM_CHANNELS, "the number of colours"),
      "unet.context_width": (
        self.unet.context_width, self.towers.text.width, "towers.text.width"),
    }
    for field, (have, want, of) in wrong.items():
      if have != want:
        raise ValueError(f"{name}.{field}={have} and {of} is {want}; make them equal.")


@functools.cache
def _clip(config: ClipConfig, vocab_size: int, eos_id: int) -> Clip:
  text = dataclasses.replace(config.text, vocab_size=vocab_size)
  return Clip(dataclasses.replace(config, text=text, eos_id=eos_id))


# ---------------------------------------------------------------------------------------- towers


@dataclasses.dataclass(frozen=True)
class ContrastiveLosses:
  """How badly pictures and captions of a group find each other (arXiv:2103.00020, figure 3).

  The example of a batch is a group, so that losses depend neither on micro-batches nor on the mesh.
  """

  model: Clip

  def __call__(self, params, batch) -> jax.Array:
    """`[B] float32` of `images [B,n,H,W,3] uint8` and `tokens [B,n,S] int32`."""
    vision = self.model.config.vision

    def of_group(images, tokens):
      pixels = normalise(images, vision.pixel_mean, vision.pixel_std)
      logits = self.model.apply({"params": params}, tokens, pixels)
      right = jnp.arange(len(logits))
      nats = optax.softmax_cross_entropy_with_integer_labels
      return (nats(logits, right).mean() + nats(logits.T, right).mean()) / 2

    return jax.vmap(of_group)(batch["images"], batch["tokens"])


@functools.cache
def towers_init(model: Clip):
  """`key -> parameters`; one object a model."""
  side = model.config.vision.image_size
  return lambda key: model.init(
    key, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, side, side, 3)))["params"]


def towers_learner(config: Generator, model: Clip) -> Learner:
  """What the stage `towers` descends, on one device: a step contrasts one group of pictures."""
  return supervised(
    towers_init(model), ContrastiveLosses(model), config.towers_fit.optimizer,
    partitioner=single_device())


def fit_towers(
  context: pipeline.StageContext, config: Generator, prepared: Prepared, seed: int
) -> None:
  """Stage `towers`."""
  model = config.clip(prepared.tokenizer.vocab_size, prepared.tokenizer.eos_id)
  tokens, cut = clip_texts(prepared.tokenizer, prepared.captions, model.config.text.max_length)
  if any(cut):
    raise ValueError(
      f"{sum(map(bool, cut))} captions are longer than promptist.Generator.towers.text.max_length="
      f"{model.config.text.max_length}, which loses {next(filter(None, cut))!r}; raise it."
    )
  size, num = config.towers_fit.batch_size, prepared.num_train

  def group(index):
    return {"images": prepared.pictures[index][None], "tokens": tokens[index][None]}

  def at(step):
    index = batches_lib.batch_indices(num, size, seed, step)
    return group(np.asarray(index)) | {"example_id": np.array([step])}

  def initial():
    """Positions as large as patches; with small ones shapes, which lie over several, come late."""
    drawn = nn.unbox(jax.jit(towers_init(model))(jax.random.key(seed)))
    drawn["vision"]["position_embedding"] *= _POSITIONS
    return drawn

  params = fitting.fit(
    context, config.towers_fit, towers_learner(config, model), Ahead(Batches(at)), seed,
    single_device(), initial_params=initial)
  context.extra["tested"] = _towers_tested(model, params, prepared)


def _towers_tested(model: Clip, params, prepared: Prepared) -> dict[str, float]:
  """How often a picture's content is the nearest of all contents, and both cosines."""
  pictures = image_features(model, params, prepared.pictures[prepared.num_train:])
  texts = text_features(
    model, params, clip_texts(prepared.tokenizer, [of.said() for of in CONTENTS],
                              model.config.text.max_length).tokens)
  cosine = pictures @ texts.T
  truth = np.array([CONTENTS.index(of) for of in prepared.contents[prepared.num_train:]])
  right = cosine[np.arange(len(truth)), truth]
  others = (cosine.sum(axis=1) - right) / (len(CONTENTS) - 1)
  return {"content_named": float((cosine.argmax(axis=1) == truth).mean()),
          "cosine_of_right": float(right.mean()), "cosine_of_others": float(others.mean())}


def _in_parts(function, rows: np.ndarray) -> np.ndarray:
  """A function of rows, asked for a few at a time; the last ones are filled up."""
  found = []
  for start in range(0, len(rows), _ENCODED_AT_ONCE):
    part = np.asarray(rows[start : start + _ENCODED_AT_ONCE])
    filled = np.concatenate([part, np.repeat(part[-1:], _ENCODED_AT_ONCE - len(part), axis=0)])
    found.append(np.asarray(function(filled))[: len(part)])
  return np.concatenate(found)


def image_features(model: Clip, params, pictures: np.ndarray) -> np.ndarray:
  """Unit vectors of pictures `[N,H,W,3] uint8`."""
  vision = model.config.vision
  features = jax.jit(lambda params, images: model.apply(
    {"params": params}, normalise(images, vision.pixel_mean, vision.pixel_std),
    method=Clip.image_features))
  return _in_parts(lambda images: features(params, images), pictures)


def text_features(model: Clip, params, tokens: np.ndarray) -> np.ndarray:
  """Unit vectors of texts `[N,S] int32`."""
  features = jax.jit(functools.partial(model.apply, method=Clip.text_features))
  return np.asarray(features({"params": params}, tokens))


# ------------------------------------------------------------------------------------------ unet


class Parts:
  """The towers of a finished stage, on the mesh.

  Attributes:
    prepared: of the world.
    clip, clip_params: model and parameters.
  """

  def __init__(self, towers: Path, config: Generator, prepared: Prepared, partitioner):
    """
    Args:
      towers: the finished stage's folder.
      config, prepared: settings, and the world.
      partitioner: where parameters are placed.
    """
    self.prepared, self.config = prepared, config
    self.clip = config.clip(prepared.tokenizer.vocab_size, prepared.tokenizer.eos_id)
    self.clip_params = fitting.fitted(
      towers, config.towers_fit, towers_init(self.clip), partitioner)

  @property
  def length(self) -> int:
    """Tokens of a text."""
    return self.clip.config.text.max_length

  @property
  def text(self) -> Transformer:
    """The text tower alone."""
    return Transformer(self.clip.config.text, with_unembedding=False)

  def rows(self, texts) -> np.ndarray:
    """Texts as the towers read them, `[N,S] int32`."""
    return clip_texts(self.prepared.tokenizer, [*map(cleaned, texts)], self.length).tokens

  def states(self, tokens: np.ndarray) -> np.ndarray:
    """What the UNet attends to, `[N,S,X] float32`."""
    apply = jax.jit(self.text.apply)
    return _in_parts(lambda rows: apply({"params": self.clip_params["text"]}, rows), tokens)


@functools.cache
def unet_init(model: UNet, length: int):
  """`key -> parameters`; one object a model."""
  c = model.config
  return lambda key: model.init(
    key, jnp.zeros((1, c.sample_size, c.sample_size, c.in_channels)), jnp.zeros((1,), jnp.int32),
    jnp.zeros((1, length, c.context_width)))["params"]


def unet_losses(config: Generator, empty: np.ndarray) -> DenoisingLosses:
  """What the stage `unet` descends.

  Args:
    empty: states of the text that says nothing, `[S,X]`.
  """
  model = UNet(config.unet)

  def predict(params, noised, times, condition):
    return model.apply({"params": params}, noised, times, condition)

  return DenoisingLosses(predict, config.schedule, config.drop, empty)


def unet_learner(config: Generator, losses: DenoisingLosses, length: int, partitioner) -> Learner:
  """The learner of the stage `unet`; `length` is that of texts in tokens."""
  return supervised(
    unet_init(UNet(config.unet), length), losses, config.unet_fit.optimizer, keyed=True,
    partitioner=partitioner)


def fit_unet(
  context: pipeline.StageContext, config: Generator, prepared: Prepared, seed: int, partitioner
) -> None:
  """Stage `unet`."""
  parts = Parts(context.input(TOWERS), config, prepared, partitioner)
  num = prepared.num_train
  # Every different caption once.
  distinct, which = np.unique(np.array(prepared.captions[:num]), return_inverse=True)
  states = parts.states(parts.rows(distinct.tolist()))
  losses = unet_losses(config, parts.states(parts.rows([""]))[0])

  def rows(index):
    clean = prepared.pictures[index].astype(np.float32) / 127.5 - 1
    return {"clean": clean, "condition": states[which[index]], "example_id": index}

  fitting.fit(
    context, config.unet_fit,
    unet_learner(config, losses, parts.length, partitioner),
    Ahead(Epochs(rows, num, config.unet_fit.batch_size, seed)), seed, partitioner)


def imaginer(parts: Parts, unet_folder: Path, partitioner) -> Imaginer:
  """Draws with the finished models."""
  config, model = parts.config, UNet(parts.config.unet)
  params: dict[str, Any] = {
    "text": parts.clip_params["text"], "unet": fitting.fitted(
      unet_folder, config.unet_fit, unet_init(model, parts.length), partitioner)}
  return Imaginer(
    DiffusionModels(parts.text, model, None, config.schedule), params, config.sampler,
    config.guidance, config.unet.sample_size, partitioner, batch_size=config.batch_size,
    decoded_at_once=config.batch_size)
