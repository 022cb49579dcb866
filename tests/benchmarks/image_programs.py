"""Drawing pictures with Stable Diffusion 1 as a program, for `aot_table.py`.

Both networks and the text encoder are in bfloat16, pictures are of 512 x 512 pixels, drawn in 20
steps of DPM-Solver++ with guidance; two pictures are decoded at a time. Each device has all
parameters and draws its own pictures, so a slice of any size is that many times one chip.
"""

import functools
import math

import jax
import jax.numpy as jnp

from lmops_jax.decoding.diffusion.imagine import (
  DiffusionModels,
  Drawing,
  cast_params,
  latent_shape,
)
from lmops_jax.decoding.diffusion.samplers import DpmSolver
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion.autoencoder import AutoencoderConfig
from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.models.diffusion.unet import UNetConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.sizing import aot
from lmops_jax.sizing.diffusion import drawing_flops

SIZE, LENGTH, DECODED_AT_ONCE = 512, 77, 2
SAMPLER = DpmSolver(20)
TEXT = TransformerConfig(
  num_layers=12, width=768, num_heads=12, mlp_width=3072, vocab_size=49408, max_length=LENGTH,
  norm="layer", norm_eps=1e-5, activation="quick_gelu", gated_mlp=False, positions="learned",
  qkv_bias=True, out_bias=True, mlp_bias=True, tied_embeddings=True, dtype="bfloat16")
UNET = UNetConfig(dtype="bfloat16")
AUTOENCODER = AutoencoderConfig(dtype="bfloat16")
MODELS = DiffusionModels.of(TEXT, UNET, AUTOENCODER, NoiseSchedule())


@functools.cache
def flops_per_image() -> float:
  plan = SAMPLER.plan(MODELS.schedule)
  return drawing_flops(
    TEXT, UNET, AUTOENCODER, *latent_shape(MODELS, SIZE)[:2], plan.num_evaluations)


def params():
  """Shapes of the parameters as they are held."""
  def shapes(module, *inputs):
    return unboxed(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  side = SIZE // MODELS.reduction
  whole = {
    "text": shapes(MODELS.text, array(1, LENGTH, dtype=jnp.int32)),
    "unet": shapes(
      MODELS.unet, array(1, side, side, UNET.in_channels), array(1),
      array(1, LENGTH, UNET.context_width)),
    "autoencoder": shapes(MODELS.autoencoder, array(1, SIZE, SIZE, 3))}
  return jax.eval_shape(functools.partial(cast_params, MODELS), whole)


def program(num_own: int, partitioner) -> aot.Program:
  """What the devices of a mesh run for so many pictures on each of them."""
  num = num_own * partitioner.num_batch_shards
  split, whole = partitioner.batch_sharding(2), partitioner.replicated
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params())
  rows = {
    "tokens": jax.ShapeDtypeStruct((num, LENGTH), jnp.int32, sharding=split),
    "key_data": jax.ShapeDtypeStruct((num, 2), jnp.uint32, sharding=split)}
  without = jax.ShapeDtypeStruct((LENGTH,), jnp.int32, sharding=whole)
  drawing = Drawing(
    MODELS, SAMPLER.plan(MODELS.schedule), 7.5, latent_shape(MODELS, SIZE), DECODED_AT_ONCE,
    partitioner)
  draw = jax.jit(drawing, static_argnums=0)
  return aot.Program(
    "images", lambda: draw.lower("threefry2x32", placed, rows, without), flops_per_image() * num)


def planned_bytes(num_own: int) -> float:
  """Bytes a device by arithmetic: parameters, and what is alive at the widest place.

  On the UNet's first level on the way up, of each of two rows: the states of the way down, three
  arrays of the joined channels of which one is float32, and the scores of a chunk of queries twice.
  In the decoder, of each picture at a time: two arrays of its last doubling in float32 and two in
  bfloat16.
  """
  held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params()))
  area, first = (SIZE // MODELS.reduction) ** 2, UNET.widths[0]
  passed = sum(
    (width * (UNET.num_residuals + 1) * area) >> (2 * level)
    for level, width in enumerate(UNET.widths))
  joined = area * (first + UNET.widths[1])
  scores = UNET.num_heads[0] * UNET.attention_chunk * area * 4
  row = 2 * passed + (2 + 2 + 4) * joined + 2 * scores
  decoded = SIZE**2 * AUTOENCODER.widths[1] * (2 * 4 + 2 * 2) * min(num_own, DECODED_AT_ONCE)
  return held + max(2 * num_own * row, decoded)
