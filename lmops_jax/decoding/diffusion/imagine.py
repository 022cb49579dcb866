"""Pictures of prompts with a latent diffusion model, as one program for a batch of pictures.

Texts are encoded, noise follows a sampler's plan to latents, and these are decoded a few at a time
to bytes; nothing but bytes leaves the device. Pictures are split over the mesh's batch axes and
every device has all parameters, so nothing crosses the mesh. The noise of a picture is a function
of its own key: a picture depends neither on its batch nor on the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lmops_jax.decoding.diffusion.guidance import check_guidance, guided
from lmops_jax.decoding.diffusion.plans import Plan, Sampler, follow
from lmops_jax.decoding.results import on_host
from lmops_jax.host.hashing import digest
from lmops_jax.mesh.meshes import Partitioner, activated, shards_of
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion.autoencoder import (
  Autoencoder,
  AutoencoderConfig,
  from_latents,
  to_images,
)
from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.models.diffusion.unet import UNet, UNetConfig
from lmops_jax.models.transformer import Transformer


class DiffusionModels(NamedTuple):
  """The parts of a latent diffusion model; their parameters are a dict with the first three names.

  Attributes:
    text: tokens to the states that the UNet attends to.
    unet: tells the noise.
    autoencoder: latents to pictures; None for a UNet whose latents are the pixels, -1 to 1.
    schedule: the noise that the UNet was trained with.
  """

  text: Transformer
  unet: UNet
  autoencoder: Autoencoder | None
  schedule: NoiseSchedule

  @classmethod
  def of(
    cls, text: TransformerConfig, unet: UNetConfig, autoencoder: AutoencoderConfig | None,
    schedule: NoiseSchedule,
  ) -> DiffusionModels:
    """The parts of these configurations."""
    return cls(
      Transformer(text, with_unembedding=False), UNet(unet),
      None if autoencoder is None else Autoencoder(autoencoder), schedule)

  @property
  def reduction(self) -> int:
    """Pixels of a side of a picture for one of its latents."""
    return 1 if self.autoencoder is None else self.autoencoder.config.reduction

  def states(self, params, tokens: jax.Array) -> jax.Array:
    """What the UNet attends to, `[B,S,X]`, of texts `[B,S] int32`; padding is seen too."""
    return self.text.apply({"params": params["text"]}, tokens)

  def latents(
    self, params, plan: Plan, noise: jax.Array, states: jax.Array, without: jax.Array | None,
    guidance: float,
  ) -> jax.Array:
    """Latents `[B,h,w,C] float32` out of noise like them.

    Args:
      params: of all parts.
      plan: of a sampler for `schedule`.
      noise: `[B,h,w,C] float32`, standard normal.
      states, without, guidance: as in `guidance.guided`.
    """
    predict = lambda *inputs: self.unet.apply({"params": params["unet"]}, *inputs)  # noqa: E731
    return follow(plan, guided(predict, states, without, guidance), noise)

  def pixels(self, params, latents: jax.Array) -> jax.Array:
    """Pictures `[B,H,W,3] float32`, about -1 to 1, of latents `[B,h,w,C]`."""
    if self.autoencoder is None:
      return latents
    unscaled = from_latents(self.autoencoder.config, latents)
    return self.autoencoder.apply(
      {"params": params["autoencoder"]}, unscaled, method=Autoencoder.decode)


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
  """The program that draws a batch of pictures.

  Attributes:
    models: the parts. plan: of a sampler. guidance: see `guidance.guided`.
    shape: height, width and channels of the latents.
    decoded_at_once: most latents that a device decodes at a time.
    partitioner: mesh to run on; None is one device.
  """

  models: DiffusionModels
  plan: Plan
  guidance: float
  shape: tuple[int, int, int]
  decoded_at_once: int
  partitioner: Partitioner | None = None

  def __call__(
    self, impl: str, params, rows: dict[str, jax.Array], without: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Pictures `[B,H,W,3] uint8`, and whether each is finite, `[B] bool`.

    Args:
      impl: the kind of the keys.
      params: of all parts.
      rows: `tokens [B,S] int32` and `key_data [B,...] uint32`, B a multiple of the mesh's shards.
      without: `[S] int32`, the text to lean away from; None if the guidance is 1.
    """
    own = functools.partial(self._own, impl)
    if self.partitioner is None:
      return own(params, rows, without)
    split, whole = PartitionSpec(self.partitioner.batch_axes), PartitionSpec()
    return jax.shard_map(
      own, mesh=self.partitioner.mesh, in_specs=(whole, split, whole), out_specs=split,
      check_vma=False)(params, rows, without)

  def _own(self, impl, params, rows, without):
    """The pictures of one device's rows."""
    models = self.models
    keys = jax.random.wrap_key_data(rows["key_data"], impl=impl)
    noise = jax.vmap(lambda key: jax.random.normal(key, self.shape, jnp.float32))(keys)
    states = models.states(params, rows["tokens"])
    if without is not None:
      empty = models.states(params, without[None])
      without = jnp.broadcast_to(empty, (len(states), *empty.shape[1:]))
    latents = models.latents(params, self.plan, noise, states, without, self.guidance)
    most = min(len(latents), self.decoded_at_once)
    together = next(size for size in range(most, 0, -1) if len(latents) % size == 0)

    def decode(some):
      pixels = models.pixels(params, some)
      return to_images(pixels), jnp.isfinite(pixels).all(axis=(1, 2, 3))

    parts = latents.reshape(-1, together, *latents.shape[1:])
    images, finite = jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(decode, parts))
    return images, finite & jnp.isfinite(latents).all(axis=(1, 2, 3))


class Imagined(NamedTuple):
  """Pictures.

  Attributes:
    images: `[n,H,W,3] uint8`.
    finite: `[n] bool`; a picture whose latents or pixels are not finite holds nothing of use, and
      is to be left out and counted.
  """

  images: np.ndarray
  finite: np.ndarray


class Imaginer:
  """Draws pictures of prompts. Programs are compiled when first needed and kept.

  A program serves all numbers of pictures of a bucket (powers of two for each device).
  """

  def __init__(
    self,
    models: DiffusionModels,
    params: dict[str, Any],
    sampler: Sampler,
    guidance: float = 7.5,
    size: int | tuple[int, int] = 512,
    partitioner: Partitioner | None = None,
    *,
    batch_size: int = 8,
    decoded_at_once: int = 2,
  ):
    """
    Args:
      models: the parts.
      params: their parameters by name, boxed or not. Each device gets all of them, matrices in the
        type of the products.
      sampler: one of `decoding.diffusion.samplers`.
      guidance: see `guidance.guided`.
      size: height and width of the pictures in pixels, or both in one.
      partitioner: mesh to run on; None is the default device.
      batch_size: most pictures at a time on each device. The UNet sees twice as many rows.
      decoded_at_once: most latents that a device decodes at a time.

    Raises:
      ValueError: for a size that the models have no latents for, a guidance that is not positive,
        or a sampler with more steps than the schedule has times.
    """
    check_guidance(guidance)
    for name, value in (("batch_size", batch_size), ("decoded_at_once", decoded_at_once)):
      if value < 1:
        raise ValueError(f"Imaginer has {name}={value}, which must be at least 1.")
    self._models, self._guidance, self._partitioner = models, guidance, partitioner
    self._batch_size = batch_size
    drawing = Drawing(
      models, sampler.plan(models.schedule), guidance, latent_shape(models, size), decoded_at_once,
      partitioner)
    self.params = cast_params(models, nn.unbox(params))
    if partitioner is not None:
      self.params = jax.device_put(self.params, partitioner.replicated)
    self._draw = jax.jit(drawing, static_argnums=0)

  @property
  def batch_size(self) -> int:
    """Most pictures at a time, on all devices together."""
    return self._batch_size * shards_of(self._partitioner)

  @property
  def num_programs(self) -> int:
    """Programs compiled so far."""
    return self._draw._cache_size()

  def __call__(
    self, tokens: np.ndarray, keys: jax.Array, negative: Sequence[int] | None = None
  ) -> Imagined:
    """All pictures of `batches` together."""
    parts = zip(*self.batches(tokens, keys, negative), strict=True)
    return Imagined(*map(np.concatenate, parts))

  def batches(
    self, tokens: np.ndarray, keys: jax.Array, negative: Sequence[int] | None = None
  ) -> Iterator[Imagined]:
    """A picture for each row of tokens and its key, some at a time and in order.

    Args:
      tokens: `[n,S] int32`, S being 77 for CLIP, padded as the model was trained with.
      keys: `[n]` typed keys, see `image_keys`.
      negative: `[S]` tokens of the text that pictures lean away from, usually the empty one; needed
        unless the guidance is 1.

    Raises:
      ValueError: at once, for tokens that are not rows, ids that the model does not have, another
        number of keys, or guidance without negative text.
    """
    tokens = np.asarray(tokens)
    self._check(tokens, keys, negative)
    without = None if negative is None or self._guidance == 1 else np.asarray(negative, np.int32)
    shards = shards_of(self._partitioner)
    size = shards * min(self._batch_size, 1 << (-(-len(tokens) // shards) - 1).bit_length())
    return (self._batch(tokens[first : first + size], keys[first : first + size], without, size)
            for first in range(0, len(tokens), size))

  def _check(self, tokens, keys, negative):
    rows = [("tokens", tokens)] + [("negative", np.asarray(negative)[None])] * (
      negative is not None)
    length = self._models.text.config.max_length
    for name, array in rows:
      if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
          f"{name} is {array.dtype} {list(array.shape)} and should be whole numbers, a row of "
          "tokens for each picture."
        )
      if array.shape[1] > length or array.shape[1] != tokens.shape[1]:
        raise ValueError(
          f"{name} has rows of {array.shape[1]} tokens; the text encoder reads {length}, and all "
          "texts of a call are padded to one length."
        )
      worst = array.max() if array.min() >= 0 else array.min()
      if not 0 <= worst < self._models.text.config.vocab_size:
        raise ValueError(
          f"{name} has the id {worst}, which is not among the text encoder's "
          f"{self._models.text.config.vocab_size}; use the model's own tokenizer."
        )
    if keys.shape != tokens.shape[:1]:
      raise ValueError(f"{len(tokens)} rows of tokens have keys {list(keys.shape)}; give one each.")
    if negative is None and self._guidance != 1:
      raise ValueError(
        f"guidance={self._guidance} leans away from a text and there is none; give the tokens of "
        "the empty text as negative, or take guidance 1."
      )

  def _batch(self, tokens, keys, without, size) -> Imagined:
    """Pictures of at most `size` rows; the first one is drawn in the place of those that lack."""
    num = len(tokens)
    places = np.where(np.arange(size) < num, np.arange(size), 0)
    rows = {"tokens": tokens[places].astype(np.int32),
            "key_data": np.asarray(jax.random.key_data(keys))[places]}
    with activated(self._partitioner):
      if self._partitioner is not None:
        rows = self._partitioner.place_rows(rows)
      drawn = self._draw(jax.random.key_impl(keys), self.params, rows, without)
    return Imagined(*(on_host(array)[:num] for array in drawn))


def latent_shape(models: DiffusionModels, size: int | tuple[int, int]) -> tuple[int, int, int]:
  """Height, width and channels of the latents of pictures.

  Args:
    size: height and width of the pictures, or both in one.

  Raises:
    ValueError: for a side that is not a positive multiple of what the autoencoder makes one latent.
  """
  height, width = (size, size) if isinstance(size, int) else size
  unit = models.reduction
  for side in (height, width):
    if side < unit or side % unit:
      raise ValueError(
        f"a picture of {height} x {width} pixels cannot be drawn; take sides that are multiples of "
        f"{unit}, such as {max(unit, round(side / unit) * unit)}."
      )
  return height // unit, width // unit, models.unet.config.in_channels


def image_keys(prompts: Sequence[str], num_images: int, seed: int = 0) -> jax.Array:
  """The keys of several pictures of each prompt, `[P * num_images]`, those of a prompt together.

  A key is a function of the prompt's text, the seed and the picture's number alone: with h the
  first 64 bits of the BLAKE2b digest (`host.hashing.digest`) of the text in UTF-8, it is
  `fold_in(fold_in(fold_in(key(seed), h >> 32), h & 0xFFFFFFFF), number)`.

  Args:
    prompts: texts. num_images: pictures of each. seed: 0 .. 2**32 - 1.
  """
  hashes = np.array([int(digest([text])[:16], 16) for text in prompts], np.uint64)
  halves = np.stack([hashes >> np.uint64(32), hashes & np.uint64(0xFFFFFFFF)]).astype(np.uint32)
  return _folded(jax.random.key(seed), *halves, num_images).reshape(-1)


@functools.partial(jax.jit, static_argnums=3)
def _folded(key, high, low, num_images):
  def of_prompt(high, low):
    own = jax.random.fold_in(jax.random.fold_in(key, high), low)
    return jax.vmap(lambda number: jax.random.fold_in(own, number))(
      jnp.arange(num_images, dtype=jnp.uint32))

  return jax.vmap(of_prompt)(high, low)


def cast_params(models: DiffusionModels, params: dict[str, Any]) -> dict[str, Any]:
  """The parameters that drawing needs, matrices in the type of the products that use them."""
  dtypes = {"text": models.text.config.dtype, "unet": models.unet.config.dtype}
  if models.autoencoder is not None:
    dtypes["autoencoder"] = models.autoencoder.config.dtype

  def cast(dtype, leaf):
    leaf = jnp.asarray(leaf)
    return leaf.astype(dtype) if leaf.ndim > 1 and leaf.dtype != dtype else leaf

  params = {name: params[name] for name in dtypes}
  if models.autoencoder is not None:
    params["autoencoder"] = {name: params["autoencoder"][name] for name in ("latents", "decoder")}
  return {
    name: jax.tree.map(functools.partial(cast, jnp.dtype(dtype)), params[name])
    for name, dtype in dtypes.items()}
