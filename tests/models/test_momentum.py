"""Momentum attention against a double loop, its forms against each other, and inside the model."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models import momentum
from lmops_jax.models.momentum import FORMS, momentum_attention, momentum_term
from lmops_jax.models.transformer import Transformer, TransformerConfig, num_params
from lmops_jax.training.losses import lm_example_losses

ETA = 0.8
CONFIG = TransformerConfig(
  vocab_size=40, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=64,
  momentum=ETA,
)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def _random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def _loop(values, eta, mask=None, segments=None):
  """`sum over i < t`, position by position; a segment is a stretch of equal ids."""
  out = np.zeros(values.shape)
  rows, length, _ = values.shape
  for b in range(rows):
    for t in range(length):
      for i in range(t - 1, -1, -1):
        if segments is not None and segments[b, i] != segments[b, i + 1]:
          break
        if mask is None or mask[b, i]:
          out[b, t] += eta ** (t - i) * values[b, i]
  return out


def _segments(rows, length, seed=1, count=5):
  rng = np.random.default_rng(seed)
  return np.sort(rng.integers(0, count, (rows, length)), axis=1).astype(np.int32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 300])
@pytest.mark.parametrize("cut", ["none", "segments", "mask", "both"])
def test_every_form_is_the_double_loop(x64, form, length, cut):
  values = _random(2, length, 3)
  segments = _segments(2, length) if cut in ("segments", "both") else None
  if cut == "both":
    segments = segments % 2  # ids come back, and are other segments
  mask = _random(2, length, seed=2) > -0.5 if cut in ("mask", "both") else None
  run = jax.jit(functools.partial(momentum_term, form=form))
  got = run(values, ETA, mask=mask, segment_ids=segments)
  np.testing.assert_allclose(got, _loop(values, ETA, mask, segments), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_forms_agree_where_the_length_chooses(x64):
  for length in (512, 513, 1000):
    values = _random(1, 2, length, 4, seed=length)
    got, *others = (momentum_term(values, 0.95, form=form) for form in (None, *FORMS))
    for other in others:
      np.testing.assert_allclose(got, other, rtol=1e-12, atol=1e-12)


def test_a_decoders_steps_give_the_same_sums(x64):
  values = _random(2, 9, 3)
  state, states = jnp.zeros((2, 3)), []
  for t in range(9):
    states.append(state)
    state = momentum.momentum_step(state, values[:, t], ETA)
  np.testing.assert_allclose(np.stack(states, 1), _loop(values, ETA), rtol=1e-12, atol=1e-12)


def _attention_loop(q, k, v, eta):
  """One head, `[T,dh]` each."""
  out = np.zeros(v.shape)
  for t in range(len(q)):
    scores = np.array([q[t] @ k[i] for i in range(t + 1)]) / q.shape[1] ** 0.5
    weights = np.exp(scores - scores.max())
    out[t] = weights / weights.sum() @ v[: t + 1]
    for i in range(t):
      out[t] += eta ** (t - i) * v[i]
  return out


def test_attention_is_softmax_plus_sum_and_eta_zero_is_vanilla_bit_for_bit(x64):
  q, k, v = _random(3, 2, 3, 7, 4)
  got = momentum_attention(q, k, v, ETA)
  for b in range(2):
    for h in range(3):
      want = _attention_loop(q[b, h], k[b, h], v[b, h], ETA)
      np.testing.assert_allclose(got[b, h], want, rtol=1e-12, atol=1e-12)
  plain = momentum.self_attention(*(jnp.asarray(x).swapaxes(1, 2) for x in (q, k, v)))
  np.testing.assert_array_equal(momentum_attention(q, k, v, 0), plain.swapaxes(1, 2))
  traced = jax.jit(momentum_attention)(q, k, v, 0.0)
  np.testing.assert_allclose(traced, plain.swapaxes(1, 2), rtol=1e-12, atol=1e-14)


def test_padding_on_the_left_changes_nothing(x64):
  q, k, v = _random(3, 2, 3, 7, 4)
  padded = [np.concatenate([_random(2, 3, 5, 4, seed=9), x], axis=2) for x in (q, k, v)]
  mask = np.broadcast_to(np.arange(12) >= 5, (2, 12))
  got = momentum_attention(*padded, ETA, mask=mask)[:, :, 5:]
  np.testing.assert_allclose(got, momentum_attention(q, k, v, ETA), rtol=1e-12, atol=1e-12)
  one = momentum_attention(*(x[0] for x in padded), ETA, mask=mask[0])[:, 5:]
  np.testing.assert_allclose(one, got[0], rtol=1e-12, atol=1e-12)


def test_gradients_in_values_and_eta_to_second_order(x64):
  values, segments = _random(1, 260, 2), _segments(1, 260)
  readout = _random(1, 260, 2, seed=3)

  def f(form, values, eta):
    return jnp.vdot(readout, jnp.sin(momentum_term(values, eta, segment_ids=segments, form=form)))

  direction = (_random(1, 260, 2, seed=4), 0.3)
  results = {}
  for form in FORMS:
    grad = jax.jit(jax.grad(functools.partial(f, form), argnums=(0, 1)))
    results[form] = jax.jvp(grad, (values, ETA), direction)
  step = 1e-6
  moved = [grad(values + s * direction[0], ETA + s * direction[1]) for s in (step, -step)]
  central = jax.tree.map(lambda a, b: (a - b) / (2 * step), *moved)
  for form in FORMS:
    gradient, product = results[form]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
      gradient, results["recurrence"][0])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), product, central)
  at_zero = jax.grad(functools.partial(f, "dense"), argnums=1)(values, 0.0)
  change = (f("dense", values, step) - f("dense", values, 0.0)) / step
  np.testing.assert_allclose(at_zero, change, rtol=1e-4)


@pytest.mark.parametrize("eta", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_eta_out_of_range_is_refused(eta):
  q = jnp.zeros((1, 2, 3))
  with pytest.raises(ValueError, match=r"eta=.* must be in \[0, 1\)"):
    momentum_attention(q, q, q, eta)
  with pytest.raises(ValueError, match="momentum=.* must be a number of at least 0 and below 1"):
    dataclasses.replace(CONFIG, momentum=eta)


@pytest.mark.parametrize("change, message", [
  (dict(causal=False), "is causal"),
  (dict(eta=jnp.zeros(2)), r"eta has the shape \(2,\)"),
  (dict(k=jnp.zeros((1, 3, 3))), "all must be the same"),
  (dict(v=jnp.zeros((2, 3, 5))), "all must be the same"),
  (dict(q=jnp.zeros((2, 4, 4))), "all must be the same"),
  (dict(mask=jnp.ones((2, 3), bool)), r"mask has the shape \(2, 3\); expected \(3,\)"),
])
def test_bad_input_is_one_sentence(change, message):
  arguments = {name: jnp.zeros((2, 3, 4)) for name in "qkv"} | {"eta": 0.5} | change
  with pytest.raises(ValueError, match=message):
    momentum_attention(**arguments)


def test_the_term_refuses_shapes_that_do_not_fit():
  for keywords, message in (
    (dict(mask=jnp.ones((3, 1), bool)), "mask has the shape"),
    (dict(segment_ids=jnp.ones((4, 5, 6), jnp.int32)), "segment_ids has the shape"),
    (dict(form="fast"), "'fast' is not one of dense, scan, recurrence"),
  ):
    with pytest.raises(ValueError, match=message):
      momentum_term(jnp.zeros((3, 6, 2)), 0.5, **keywords)
  with pytest.raises(ValueError, match="values have the shape"):
    momentum_term(jnp.zeros(3), 0.5)


# ---------------------------------------------------------------------------------- in the model


@pytest.fixture(scope="module")
def params():
  tokens = jnp.zeros((1, 3), jnp.int32)
  made = nn.unbox(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), tokens)["params"])
  return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, made)


def _tokens(rows=2, length=9, seed=0):
  return np.random.default_rng(seed).integers(0, 40, (rows, length)).astype(np.int32)


@functools.cache
def _program(config):
  return jax.jit(lambda p, *a: Transformer(config).apply({"params": p}, *a))


def _hidden(config, params, *args):
  return _program(config)(params, *args)


def _changed(**changes):
  return dataclasses.replace(CONFIG, **changes)


def test_config_refuses_encoders_and_windows():
  with pytest.raises(ValueError, match="momentum=0.8 needs causal=True"):
    _changed(causal=False)
  with pytest.raises(ValueError, match="sliding_window=4 hides them"):
    _changed(sliding_window=4)
  with pytest.raises(ValueError, match="momentum=True must be"):
    _changed(momentum=True)


def test_zero_is_the_ordinary_model_bit_for_bit_and_has_no_parameters(params):
  plain = _hidden(_changed(momentum=None), params, _tokens())
  np.testing.assert_array_equal(_hidden(_changed(momentum=0.0), params, _tokens()), plain)
  assert np.abs(np.asarray(_hidden(CONFIG, params, _tokens())) - plain).max() > 0.1
  assert num_params(CONFIG) == num_params(_changed(momentum=None))


def test_the_models_first_layer_adds_the_sum_before_the_output_projection(params):
  """A layer whose MLP and norms are taken out by hand."""
  config = _changed(num_layers=1, final_norm=False, positions="none")
  layer = jax.tree.map(lambda p: p[:1], params["layers"])
  layer["mlp"] = jax.tree.map(jnp.zeros_like, layer["mlp"])
  one = {**params, "layers": layer}
  x = params["embedding"][_tokens()]
  difference = _hidden(config, one, _tokens()) - _hidden(
    dataclasses.replace(config, momentum=None), one, _tokens())
  normed = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
  attention = jax.tree.map(lambda p: p[0], layer["attention"])
  values = jnp.einsum("bsd,dke->bske", normed, attention["value"]["kernel"])
  term = np.stack([_loop(values[:, :, k], ETA) for k in range(2)], 2)
  want = jnp.einsum("bshe,hed->bsd", np.repeat(term, 2, axis=2), attention["out"]["kernel"])
  np.testing.assert_allclose(difference, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [
  dict(attention="chunked", attention_chunk=4), dict(scan_layers=False),
  dict(remat="full"), dict(remat="dots", scan_layers=False),
])
def test_execution_choices_change_nothing(params, changes):
  segments = _segments(2, 9, count=3)
  arguments = (_tokens(), None, segments)
  np.testing.assert_allclose(
    _hidden(_changed(**changes), params, *arguments), _hidden(CONFIG, params, *arguments),
    rtol=2e-5, atol=2e-5)


def test_packed_segments_do_not_see_each_other(params):
  first, second = _tokens(1, 5, seed=1), _tokens(1, 4, seed=2)
  packed = np.concatenate([first, second], 1)
  positions = np.concatenate([np.arange(5), np.arange(4)])[None]
  segments = np.array([[1] * 5 + [2] * 4], np.int32)
  got = _hidden(CONFIG, params, packed, positions, segments)[0]
  want = np.concatenate([_hidden(CONFIG, params, part)[0] for part in (first, second)])
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def _batch(rows=8, length=12):
  return {
    "tokens": _tokens(rows, length), "targets": _tokens(rows, length, seed=5),
    "loss_mask": np.ones((rows, length), np.float32), "segment_ids": _segments(rows, length),
  }


def _gradient_and_product(config, params, batch, direction):
  def loss(p):
    return jnp.mean(lm_example_losses(Transformer(config))(p, batch))

  return jax.jvp(jax.grad(loss), (params,), (direction,))


def test_second_order_through_the_model_against_finite_differences(x64, params):
  config = _changed(dtype="float64", param_dtype="float64", remat="full")
  wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
  direction = jax.tree.map(jnp.cos, wide)
  batch = _batch(2, 6)
  _, product = jax.jit(functools.partial(_gradient_and_product, config))(wide, batch, direction)
  step = 1e-6
  gradient = jax.jit(jax.grad(
    lambda p: jnp.mean(lm_example_losses(Transformer(config))(p, batch))))
  moved = [
    gradient(jax.tree.map(lambda p, d: p + s * d, wide, direction)) for s in (step, -step)]  # noqa: B023
  central = jax.tree.map(lambda a, b: (a - b) / (2 * step), *moved)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), product, central)


@pytest.mark.parametrize("form", ["dense", "scan"])
def test_eight_devices_give_one_devices_gradient_and_hessian_product(params, form, monkeypatch):
  if form == "scan":
    monkeypatch.setattr(momentum, "DENSE_LENGTH", 1)
    monkeypatch.setattr(momentum, "_BLOCK", 5)
  config = _changed(attention="xla" if form == "dense" else "chunked")
  batch = _batch(4, 12)
  direction = jax.tree.map(jnp.cos, params)
  run = functools.partial(_gradient_and_product, config)
  want = jax.jit(run)(params, batch, direction)
  partitioner = MeshConfig(2, 2, 2).build()
  boxed = jax.eval_shape(
    lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
  shardings = partitioner.shardings(boxed)
  placed = [jax.device_put(tree, shardings) for tree in (params, direction)]
  with partitioner.activate():
    got = jax.jit(run)(placed[0], partitioner.place_batch(batch), placed[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), got, want)
