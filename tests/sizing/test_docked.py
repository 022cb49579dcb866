"""Operations and bytes of docked models against what XLA compiles."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import (
  FeedForwardConnectorConfig,
  LinearConnectorConfig,
  ResamplerConfig,
)
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.models.vision import VisionConfig
from lmops_jax.sizing import docked, hlo
from lmops_jax.training import optimizers
from lmops_jax.training.losses import LMExampleLosses

TEXT = TransformerConfig(
  vocab_size=67, num_layers=2, width=16, num_heads=2, mlp_width=40, max_length=32, gated_mlp=False)
TRUNK = TransformerConfig(
  num_layers=3, width=12, num_heads=3, mlp_width=20, max_length=5, norm="layer", positions="none",
  causal=False, final_norm=False, gated_mlp=False)
SHAPE = SimpleNamespace(length=24, pictures=2, rows=3)
FROZEN = ("class_embedding", "patch_embedding", "position_embedding", "pre_norm", "trunk")


def _step_flops(config, num_groups, whole_tower):
  """Products of a gradient of everything, or of all but the frozen part of the tower."""
  model, rows = DockedLM(config), num_groups * SHAPE.rows
  ids = jnp.zeros((rows, SHAPE.length), jnp.int32)
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
  frozen = FROZEN if config.vision.top_layers else (*FROZEN, "post_norm")
  frozen = () if whole_tower else frozen
  still = {name: params["vision"].pop(name) for name in frozen}
  size = config.vision.image_size

  def loss(params, still, images):
    whole = {**params, "vision": {**params["vision"], **still}}
    vectors = model.apply({"params": whole}, images, method="row_vectors")
    batch = dict(tokens=ids, targets=ids, vectors=vectors, vector_index=ids,
                 loss_mask=jnp.ones(ids.shape))
    return LMExampleLosses(model)(whole, batch).sum()

  images = jax.ShapeDtypeStruct((rows, SHAPE.pictures, size, size, 3), jnp.float32)
  return hlo.count(
    jax.jit(jax.grad(loss)).lower(params, still, images).compile().as_text()).product_flops


@pytest.mark.parametrize("connector, top_layers, whole_tower", [
  (ResamplerConfig(num_latents=4), 1, False), (LinearConnectorConfig(), 0, False),
  pytest.param(ResamplerConfig(num_latents=4), 0, True, marks=pytest.mark.slow),
  pytest.param(FeedForwardConnectorConfig(), 1, False, marks=pytest.mark.slow)])
def test_a_group_takes_what_xla_compiles(connector, top_layers, whole_tower):
  """The difference of two sizes, since latents are computed once for all pictures."""
  vision = VisionConfig(TRUNK, image_size=8, patch_size=4, top_layers=top_layers)
  config = DockedConfig(TEXT, vision, connector)
  found = _step_flops(config, 2, whole_tower) - _step_flops(config, 1, whole_tower)
  # XLA computes the scores that causal attention masks, forwards and twice backwards.
  masked = 3 * SHAPE.rows * 2 * TEXT.num_layers * SHAPE.length**2 * TEXT.width
  assert docked.group_flops(config, [SHAPE], whole_tower) + masked == found


def test_pictures_take_memory_by_their_number_and_by_what_is_trained():
  sizes = dict(platform="cpu", num_fsdp=1, num_tensor=1)
  base = DockedConfig(TEXT, VisionConfig(TRUNK, 8, 4), ResamplerConfig(num_latents=4))
  one, many = (docked.picture_bytes(base, num, **sizes) for num in (1, 64))
  assert many == pytest.approx(64 * one)
  top = dataclasses.replace(base, vision=dataclasses.replace(base.vision, top_layers=2))
  assert docked.picture_bytes(top, 64, **sizes) > many
  assert docked.picture_bytes(base, 64, True, **sizes) > docked.picture_bytes(top, 64, **sizes)


def test_an_optimizer_tells_whether_the_whole_tower_is_trained():
  config = DockedConfig(TEXT, VisionConfig(TRUNK, 8, 4, top_layers=1), LinearConnectorConfig())
  ids = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(DockedLM(config).init, jax.random.key(0), ids)["params"]
  assert docked.trains_whole_tower(optimizers.sgd(0.1), params)
  for pattern in ("vision/(?!top/).*", "vision/trunk/.*"):
    frozen = optimizers.partition({pattern: None, ".*": optimizers.sgd(0.1)})
    assert not docked.trains_whole_tower(frozen, params)
