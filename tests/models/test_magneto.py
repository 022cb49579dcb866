"""Sub-LayerNorm, the initialisation that belongs to it, and the residual scale of DeepNorm."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
  vocab_size=24, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32, norm="layer",
  gated_mlp=False, activation="relu", qkv_bias=True, out_bias=True, mlp_bias=True, sub_norm=True,
  positions="sinusoidal", position_offset=2, norm_eps=1e-12)
TOKENS = np.random.default_rng(0).integers(0, 24, (8, 9)).astype(np.int32)


@functools.cache
def _boxed(config):
  return jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"]


def _params(config=CONFIG, factor=8):
  """Larger than at initialisation, with biases and scales that are not trivial."""
  leaves, treedef = jax.tree.flatten(nn.unbox(_boxed(config)))
  rng = np.random.default_rng(1)
  return treedef.unflatten(
    [(factor * x + rng.normal(size=x.shape) * 0.1).astype(np.float32) for x in leaves])


def _hidden(config, params):
  return jax.jit(lambda p: Transformer(config).apply({"params": p}, TOKENS))(params)


def _scaled(params, part, name, factor):
  """Kernel and bias of one product times a factor that differs by layer."""
  factor = np.asarray(factor)
  of = params["layers"][part][name]
  of = jax.tree.map(lambda x: x * factor.reshape(-1, *[1] * (x.ndim - 1)), of)
  layers = params["layers"] | {part: params["layers"][part] | {name: of}}
  return params | {"layers": layers}


@pytest.mark.parametrize("part, name", [("attention", "value"), ("mlp", "up")])
def test_the_size_of_values_and_of_the_hidden_layer_cancels(part, name):
  """In front of a norm only the direction counts (of the MLP since relu keeps it)."""
  params, without = (
    jax.tree.map(np.float64, _params(dataclasses.replace(CONFIG, sub_norm=sub_norm)))
    for sub_norm in (True, False))
  config = dataclasses.replace(CONFIG, dtype="float64", param_dtype="float64")
  plain = dataclasses.replace(config, sub_norm=False)
  with jax.enable_x64(True):
    np.testing.assert_allclose(
      _hidden(config, _scaled(params, part, name, [7.0, 0.2])), _hidden(config, params),
      rtol=1e-8, atol=1e-9)
    changed = _hidden(plain, _scaled(without, part, name, [7.0, 0.2]))
    assert np.abs(changed - _hidden(plain, without)).max() > 0.1


def test_inner_norms_stand_in_front_of_the_last_product():
  """One layer, by hand."""
  config = dataclasses.replace(CONFIG, num_layers=1, norm_eps=1e-5)
  params = _params(config)
  states = jax.jit(lambda p: Transformer(config).apply(
    {"params": p}, TOKENS[:1], method="all_hidden"))(params)
  of = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])

  def normed(x, p):
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return x * p["scale"].reshape(-1) + p["bias"].reshape(-1)

  def product(x, p, name):
    kernel = p[name]["kernel"]
    return x @ kernel.reshape(x.shape[-1], -1) + p[name]["bias"].reshape(-1)

  x = np.asarray(states[0, 0], np.float64)
  y, attention = normed(x, of["attention_norm"]), of["attention"]
  q, k, v = (product(y, attention, n).reshape(9, 4, 4) for n in ("query", "key", "value"))
  scores = np.where(np.tri(9), np.einsum("she,mhe->hsm", q, k) / 2, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  heads = np.einsum("hsm,mhe->she", weights, v).reshape(9, 16)
  x = x + product(normed(heads, attention["inner_norm"]), attention, "out")
  hidden = np.maximum(product(normed(x, of["mlp_norm"]), of["mlp"], "up"), 0)
  x = x + product(normed(hidden, of["mlp"]["inner_norm"]), of["mlp"], "down")
  last = jax.tree.map(lambda x: np.asarray(x, np.float64), params["final_norm"])
  np.testing.assert_allclose(states[1, 0], normed(x, last), rtol=1e-4, atol=1e-4)


def test_inner_norms_are_split_as_what_they_norm():
  layers = _boxed(CONFIG)["layers"]
  assert layers["attention"]["inner_norm"]["scale"].names == ("layers", "heads", "head_dim")
  assert layers["attention"]["inner_norm"]["bias"].value.shape == (2, 4, 4)
  assert layers["mlp"]["inner_norm"]["scale"].names == ("layers", "mlp")
  assert layers["mlp"]["inner_norm"]["bias"].value.shape == (2, 24)


def test_execution_choices_change_nothing():
  def gradient(config):
    def loss(params):
      return jnp.mean(Transformer(config).apply({"params": params}, TOKENS) ** 3)
    return jax.jit(jax.grad(loss))(_params(factor=1))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    gradient(dataclasses.replace(CONFIG, scan_layers=False, remat="dots")), gradient(CONFIG))


def test_sharded_equals_single():
  def loss(params, tokens):
    logits = Transformer(CONFIG).apply({"params": params}, tokens, method="logits")
    return jnp.mean(logits**2)

  params = _params(factor=1)
  want = jax.jit(jax.value_and_grad(loss))(params, TOKENS)
  partitioner = MeshConfig(2, 2, 2).build()
  with partitioner.activate():
    placed = jax.device_put(params, partitioner.shardings(_boxed(CONFIG)))
    assert "tensor" in placed["layers"]["mlp"]["inner_norm"]["scale"].sharding.spec
    assert "tensor" in placed["layers"]["attention"]["inner_norm"]["scale"].sharding.spec
    tokens = partitioner.place_batch({"tokens": TOKENS})["tokens"]
    got = jax.jit(jax.value_and_grad(loss))(placed, tokens)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


DEVIATIONS = {
  "xavier": lambda i, o: math.sqrt(2 / (i + o)), "fan_in": lambda i, o: (3 * i) ** -0.5,
  "normal": lambda i, o: 0.02}


@pytest.mark.parametrize("kind, gain, factor", [
  ("xavier", "magneto", math.sqrt(math.log(12))), ("fan_in", "magneto", math.sqrt(math.log(12))),
  ("normal", "deepnorm", 48**-0.25), ("xavier", 1.0, 1.0)])
def test_the_gain_is_that_of_mlp_value_and_output_alone(kind, gain, factor):
  deviation = DEVIATIONS[kind]
  config = TransformerConfig(
    vocab_size=500, num_layers=6, width=64, num_heads=4, mlp_width=160, initialization=kind,
    branch_gain=gain, tied_embeddings=True)
  params = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(3), TOKENS)["params"])
  attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
  square, wide = deviation(64, 64), deviation(64, 160)
  for kernel, want in (
    (attention["query"], square), (attention["key"], square), (attention["value"], square * factor),
    (attention["out"], square * factor), (mlp["gate"], wide * factor), (mlp["up"], wide * factor),
    (mlp["down"], deviation(160, 64) * factor),
  ):
    assert np.std(kernel["kernel"]) == pytest.approx(want, rel=0.02)
  table = {"xavier": 64**-0.5, "fan_in": 1.0, "normal": 0.02}[kind]
  assert np.std(params["embedding"]) == pytest.approx(table, rel=0.02)


def test_the_published_gains():
  config = TransformerConfig(num_layers=24, branch_gain="magneto")
  assert config.branch_factor == pytest.approx(1.9675, abs=1e-4)
  deep = dataclasses.replace(config, branch_gain="deepnorm", residual_scale="deepnorm")
  assert deep.branch_factor == pytest.approx(0.2686, abs=1e-4)
  assert deep.residual_factor == pytest.approx(2.632, abs=1e-3)


@pytest.mark.parametrize("placement", ["pre", "post", "parallel"])
def test_the_residual_scale_multiplies_what_a_part_is_added_to(placement):
  """Parts that give nothing leave the stream: scaled, and normed where the norm comes after."""
  config = dataclasses.replace(
    CONFIG, norm_placement=placement, num_layers=1, residual_scale=3.0, final_norm=False)
  params = _params(config)
  for part, name in (("attention", "out"), ("mlp", "down")):
    params = _scaled(params, part, name, [0.0])
  states = jax.jit(lambda p: Transformer(config).apply(
    {"params": p}, TOKENS, method="all_hidden"))(params)
  if placement == "post":
    plain = dataclasses.replace(config, residual_scale=1.0)
    want = jax.jit(lambda p: Transformer(plain).apply(
      {"params": p}, TOKENS, method="all_hidden"))(params)[1]  # norms know no scale
  else:
    want = states[0] * (3.0 if placement == "parallel" else 9.0)
  np.testing.assert_allclose(states[1], want, rtol=1e-5, atol=1e-5)
