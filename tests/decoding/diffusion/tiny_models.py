"""A tiny latent diffusion model with random parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding.diffusion.imagine import DiffusionModels
from lmops_jax.models.diffusion.autoencoder import AutoencoderConfig
from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.models.diffusion.unet import UNetConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.pretrained.pipelines import Pipeline, export_pipeline
from lmops_jax.text.tokenizer import load_tokenizer
from tests.text import tiny_tokenizers

TEXT = TransformerConfig(
  num_layers=1, width=16, num_heads=2, mlp_width=32, vocab_size=50, max_length=7, norm="layer",
  activation="quick_gelu", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True,
  positions="learned", tied_embeddings=True)
UNET = UNetConfig(
  sample_size=8, widths=(8, 16), with_attention=(False, False), num_heads=(2, 2), num_residuals=1,
  context_width=16, norm_groups=4)
AUTOENCODER = AutoencoderConfig(sample_size=16, widths=(8, 16), num_residuals=1, norm_groups=4)


def models(dtype="float32", text=TEXT):
  """The parts."""
  return DiffusionModels.of(
    *(dataclasses.replace(config, dtype=dtype) for config in (text, UNET, AUTOENCODER)),
    NoiseSchedule())


def random_params(module, *inputs):
  """Parameters that leave no part without effect, drawn without compiling anything."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)

  def draw(leaf):
    fan_in = max(np.prod(leaf.shape[:-1]), 1)
    drawn = rng.normal(size=leaf.shape) * 1.2 / np.sqrt(fan_in if leaf.ndim > 1 else 30)
    return jnp.asarray(drawn + (leaf.ndim == 1), jnp.float32)

  return jax.tree.map(draw, unboxed(shapes))


def params(text=TEXT):
  """Parameters of `models`."""
  parts, length = models(text=text), text.max_length
  times, states = jnp.zeros(1, jnp.int32), jnp.zeros((1, length, 16))
  return {
    "text": random_params(parts.text, jnp.zeros((1, length), jnp.int32)),
    "unet": random_params(parts.unet, jnp.zeros((1, 4, 4, 4)), times, states),
    "autoencoder": random_params(parts.autoencoder, jnp.zeros((1, 8, 8, 3)))}


def write(folder):
  """A folder as diffusers writes it, of a model whose texts have 24 tokens at most."""
  (folder / "tokenizer").mkdir()
  tokenizer = load_tokenizer(tiny_tokenizers.clip(folder / "tokenizer"))
  text = dataclasses.replace(TEXT, vocab_size=tokenizer.vocab_size, max_length=24)
  export_pipeline(folder / "model", Pipeline(
    unet=UNET, autoencoder=AUTOENCODER, text=text, params=params(text), tokenizer=tokenizer,
    schedule=NoiseSchedule()))
  return folder / "model"
