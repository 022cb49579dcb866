"""Operations of decoders with docked encoders against what XLA compiles."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import FeedForwardConnectorConfig, LinearConnectorConfig
from lmops_jax.models.encoders import TextEncoderConfig
from lmops_jax.models.fused_encoder import FusedEncoderConfig
from lmops_jax.models.universal import (
  ENCODER_INPUTS,
  Docking,
  ImageDocking,
  UniversalConfig,
  UniversalLM,
)
from lmops_jax.sizing import hlo, universal
from lmops_jax.sizing.encoders import Depth
from lmops_jax.sizing.universal import RowShape, Trained
from lmops_jax.training import loop, optimizers
from lmops_jax.training.losses import LMExampleLosses

TEXT = TransformerConfig(
  vocab_size=67, num_layers=2, width=16, num_heads=2, mlp_width=40, max_length=32, gated_mlp=False,
  tied_embeddings=True)
TRUNK = TransformerConfig(
  vocab_size=67, num_layers=4, width=12, num_heads=3, mlp_width=20, max_length=20, norm="layer",
  norm_placement="post", final_norm=False, residual_scale="deepnorm", positions="learned",
  relative_buckets=8, relative_distance=10, causal=False, gated_mlp=False)
READING = UniversalConfig(
  TEXT, Docking(TextEncoderConfig(TRUNK, top_layers=2), LinearConnectorConfig()))
FUSED = FusedEncoderConfig(
  TransformerConfig(
    vocab_size=67, num_layers=4, width=12, num_heads=3, mlp_width=20, max_length=12, norm="layer",
    positions="none", final_norm=False, causal=False, gated_mlp=False),
  image_size=8, patch_size=4, top_layers=2, max_words=7)
SEEING = UniversalConfig(TEXT, vision=ImageDocking(FUSED, FeedForwardConnectorConfig(3)))
SPANS, PICTURES = RowShape(24, encoder_length=18), RowShape(24, images=2, image_words=6)
ROWS = 3


def _names(params):
  return {"/".join(part.key for part in path): x
          for path, x in jax.tree_util.tree_leaves_with_path(params)}


def _params(config):
  return nn.unbox(jax.eval_shape(loop.initializer(UniversalLM(config)), jax.random.key(0)))


def _batch(shape):
  def ids(*sizes):
    return jnp.zeros((ROWS, *sizes), jnp.int32)

  row = ids(shape.length)
  batch = dict(tokens=row, targets=row, vector_index=row, loss_mask=jnp.ones(row.shape))
  if shape.encoder_length:
    batch |= {name: ids(shape.encoder_length) for name in ENCODER_INPUTS[:3]}
  if shape.images:
    words = ids(shape.images, shape.image_words)
    batch |= dict(images=jnp.zeros((ROWS, shape.images, 8, 8, 3)), image_tokens=words,
                  image_segments=words)
  return batch


def _step_flops(config, shape, frozen):
  """Products of a gradient of all parameters but those whose names match."""
  model, params, batch = UniversalLM(config), _params(config), _batch(shape)
  given = {name: x for name, x in batch.items() if name in ENCODER_INPUTS}
  rest = {name: x for name, x in batch.items() if name not in given}
  learned, still = {}, {}
  for name, x in _names(params).items():
    (still if re.fullmatch(frozen, name) else learned)[name] = x

  def loss(learned, still, given):
    both = learned | still
    whole = jax.tree_util.tree_map_with_path(
      lambda path, x: both["/".join(part.key for part in path)], params)
    vectors = model.apply({"params": whole}, **given, method="row_vectors")
    return LMExampleLosses(model)(whole, {**rest, "vectors": vectors}).sum()

  compiled = jax.jit(jax.grad(loss)).lower(learned, still, given).compile()
  return hlo.count(compiled.as_text()).product_flops


@pytest.mark.parametrize("config, shape, frozen, trained", [
  (READING, SPANS, "reader/(?!top/).*", Trained()),
  pytest.param(READING, SPANS, "text/.*", Trained(text=False, reader=Depth.WHOLE),
               marks=pytest.mark.slow),
  pytest.param(READING, SPANS, "reader/.*", Trained(reader=Depth.FROZEN), marks=pytest.mark.slow),
  pytest.param(SEEING, PICTURES, "nothing", Trained(vision=Depth.WHOLE), marks=pytest.mark.slow),
  pytest.param(SEEING, PICTURES, "vision/(?!top/|post_norm/).*", Trained(),
               marks=pytest.mark.slow),
], ids=["top", "frozen decoder", "frozen reader", "whole fused", "top fused"])
def test_a_row_takes_what_xla_compiles(config, shape, frozen, trained):
  rules = {frozen: None} if frozen != "nothing" else {}
  optimizer = optimizers.partition({**rules, ".*": optimizers.sgd(0.1)})
  found = universal.trained_by(optimizer, _params(config))
  parts = ("text", *(name for name in ("reader", "vision") if getattr(config, name)))
  assert [getattr(found, name) for name in parts] == [getattr(trained, name) for name in parts]
  # XLA computes the scores that causal attention masks, forwards and twice backwards.
  masked = 3 * 2 * TEXT.num_layers * shape.length**2 * TEXT.width
  want = ROWS * (universal.row_flops(config, shape, trained) + masked)
  assert _step_flops(config, shape, frozen) == want


def test_encoding_alone_takes_what_xla_compiles():
  for config, shape in ((READING, SPANS), (SEEING, PICTURES)):
    given = {n: x for n, x in _batch(shape).items() if n in ENCODER_INPUTS}
    encode = functools.partial(UniversalLM(config).apply, method="row_vectors")
    compiled = jax.jit(encode).lower({"params": _params(config)}, **given).compile()
    found = hlo.count(compiled.as_text()).product_flops
    assert found == ROWS * universal.encoding_flops(config, shape)


def test_a_row_without_an_encoder_for_what_it_has_is_refused():
  assert universal.encoding_flops(READING, RowShape(24)) == 0
  with pytest.raises(ValueError, match="something for models.UniversalConfig.vision, which is"):
    universal.row_flops(READING, PICTURES)
