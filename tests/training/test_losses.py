"""Per-example losses against NumPy, masks, chunking to second order, and refusals on the host."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.heads import SequenceRegressor
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training import losses as losses_lib
from lmops_jax.training.losses import (
  _default_chunk,
  check_batch,
  lm_example_losses,
  map_sequence_chunks,
  regression_example_losses,
)
from tests.abstract_meshes import abstract_mesh
from tests.models.test_products import ORDERS

CONFIG = TransformerConfig(
  vocab_size=50, num_layers=1, width=16, num_heads=2, mlp_width=24, max_length=16
)
MODEL = Transformer(CONFIG)
B, S, EOS = 3, 10, 49


@pytest.fixture(scope="module")
def params():
  init = jax.jit(MODEL.init)
  return nn.unbox(init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


@pytest.fixture(scope="module")
def losses():
  return jax.jit(lm_example_losses(MODEL, chunk=4))


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, EOS, (B, S + 1)).astype(np.int32)
  rows[0, 4] = EOS
  mask = np.ones((B, S), np.float32)
  mask[1, 7:] = 0
  mask[rows[:, :-1] == EOS] = 0  # an EOS input predicts the next document
  return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": mask}


def test_losses_are_masked_token_means(params, losses):
  batch = _batch()
  logits = np.asarray(
    jax.jit(lambda p, t: MODEL.apply({"params": p}, t, method="logits"))(params, batch["tokens"]),
    np.float64,
  )
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  want = []
  for b in range(B):
    real = [s for s in range(S) if batch["loss_mask"][b, s]]
    want.append(-np.mean([log_probs[b, s, batch["targets"][b, s]] for s in real]))
  got = losses(params, batch)
  assert got.dtype == jnp.float32 and got.shape == (B,)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_masked_and_padded_positions_do_not_matter(params, losses):
  batch = _batch()
  want = losses(params, batch)
  spoiled = {k: v.copy() for k, v in batch.items()}
  spoiled["tokens"][1, 7:] = 3
  spoiled["targets"][1, 7:] = 5
  spoiled["targets"][0, 4] = 6  # predicted from the EOS
  np.testing.assert_array_equal(losses(params, spoiled), want)
  padded = {k: np.pad(v, ((0, 0), (0, 5))) for k, v in batch.items()}
  np.testing.assert_allclose(jax.jit(lm_example_losses(MODEL))(params, padded), want, rtol=1e-5)
  counted = {k: v.copy() for k, v in batch.items()}
  counted["targets"][2, 5] = (counted["targets"][2, 5] + 1) % EOS
  assert losses(params, counted)[2] != want[2]


def test_fully_masked_example_is_zero_on_device_and_refused_on_host(params, losses):
  batch = _batch() | {"example_id": np.array([7, 8, 2**62])}
  batch["loss_mask"][2] = 0
  on_device = {k: v for k, v in batch.items() if k != "example_id"}
  assert losses(params, on_device)[2] == 0
  grads = jax.jit(jax.grad(lambda p: jnp.sum(losses(p, on_device))))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  with pytest.raises(ValueError, match=f"loss_mask is 0 at every position of example {2**62}"):
    lm_example_losses(MODEL).check_batch(batch)
  del batch["example_id"]
  with pytest.raises(ValueError, match="of row 2"):
    check_batch(batch)


@pytest.mark.parametrize("field,value", [("tokens", 50), ("targets", -1)])
def test_ids_outside_the_vocabulary_are_refused(field, value):
  batch = _batch()
  lm_example_losses(MODEL).check_batch(batch)
  batch[field] = batch[field].copy()  # tokens and targets are views of the same rows
  batch[field][1, 3] = value
  with pytest.raises(ValueError, match=f"{field} of row 1 holds id {value} at position 3"):
    lm_example_losses(MODEL).check_batch(batch)


def test_chunking_changes_neither_loss_nor_gradient_nor_hessian_product(params):
  batch = _batch(1)
  weights = jnp.array([0.2, 0.5, 0.3])
  tangent = jax.tree.map(jnp.cos, params)

  def all_orders(chunk):
    example_losses = lm_example_losses(MODEL, chunk=chunk)

    def weighted(p):
      values = example_losses(p, batch)
      return jnp.vdot(weights, values), values

    f = jax.grad(weighted, has_aux=True)
    return jax.jit(lambda p: jax.jvp(f, (p,), (tangent,)))(params)

  whole, chunked = all_orders(S), all_orders(3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), chunked, whole)


def test_chunked_logits_never_exist_whole():
  config = dataclasses.replace(CONFIG, vocab_size=5000, max_length=64)
  model = Transformer(config)
  params = nn.unbox(
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )["params"]
  field = jax.ShapeDtypeStruct((4, 64), jnp.int32)
  batch = {"tokens": field, "targets": field, "loss_mask": field}

  def temp_bytes(chunk):
    grad = jax.grad(lambda p, b: jnp.sum(lm_example_losses(model, chunk=chunk)(p, b)))
    return jax.jit(grad).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

  logits_bytes = 4 * 64 * 5000 * 4
  assert temp_bytes(64) > logits_bytes
  assert temp_bytes(8) < logits_bytes / 2


@pytest.mark.parametrize("most", [5, 6])
def test_positions_that_are_not_learned_are_left_out_unless_a_row_learns_many(
  params, monkeypatch, most):
  monkeypatch.setattr(losses_lib, "_ORDERED_BYTES", 0)
  rng, batch = np.random.default_rng(3), _batch(2)
  for row, num_learned in enumerate((2, most, 0)):
    batch["loss_mask"][row] = rng.permutation(np.arange(S) < num_learned)
  tangent = jax.tree.map(jnp.cos, params)

  class Seldom(losses_lib.LMExampleLosses):
    often_learned = 0.5

  def all_orders(example_losses):
    def weighted(p):
      values = example_losses(p, batch)
      return jnp.sum(jnp.sin(values)), values

    f = jax.grad(weighted, has_aux=True)
    return jax.jit(lambda p: jax.jvp(f, (p,), (tangent,)))(params)

  got, want = all_orders(Seldom(MODEL)), all_orders(lm_example_losses(MODEL))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), got, want)
  nats = jax.jit(Seldom(MODEL).token_losses)(params, batch, batch["loss_mask"])
  assert np.count_nonzero(nats) == B * (S if most > S // 2 else S // 2)


def test_chunks_cover_every_position_in_order():
  hidden = jnp.arange(2 * 7 * 1.0).reshape(2, 7, 1)
  targets = jnp.arange(14).reshape(2, 7)
  got = map_sequence_chunks(lambda h, t: h[..., 0] * 100 + t, hidden, targets, 3)
  np.testing.assert_array_equal(got, hidden[..., 0] * 100 + targets)
  with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
    lm_example_losses(MODEL, chunk=0)


def test_chosen_chunks_keep_small_logits_whole_and_cut_large_ones():
  assert _default_chunk(4, 1024, 8192) == 1024  # 128 MiB
  for batch_size, length, vocab_size in ((16, 1024, 32_000), (32, 128, 32_000), (8, 4096, 50_257)):
    chunk = _default_chunk(batch_size, length, vocab_size)
    assert 4 * batch_size * chunk * vocab_size <= 32 << 20 or chunk == 1
    assert chunk < length
  with MeshConfig(4, 2).build().activate():  # eight devices hold an eighth each
    assert _default_chunk(128, 128, 4096) == 128


def test_loss_objects_are_equal_when_they_compute_the_same():
  assert lm_example_losses(Transformer(CONFIG), chunk=4) == lm_example_losses(MODEL, chunk=4)
  assert hash(lm_example_losses(Transformer(CONFIG))) == hash(lm_example_losses(MODEL))
  assert lm_example_losses(MODEL, chunk=4) != lm_example_losses(MODEL)


@pytest.mark.parametrize("order", ORDERS)
def test_a_gathered_logit_has_the_derivatives_of_a_compared_one(order):
  rng = np.random.default_rng(0)
  targets = jnp.asarray(rng.integers(0, 7, (2, 3)))

  def loss(logit, logits):
    nats = jax.nn.logsumexp(logits, axis=-1) - jax.vmap(logit)(logits, targets)
    return jnp.sum(jnp.sin(nats.sum(1)) ** 3)

  with jax.enable_x64(True):
    logits, u, v = (jnp.asarray(rng.normal(size=(2, 3, 7))) for _ in range(3))
    got, want = (ORDERS[order](functools.partial(loss, f), logits, u, v)
                 for f in (losses_lib._gathered, losses_lib._compared))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_logits_on_several_devices_are_not_gathered(num_devices):
  with jax.sharding.use_abstract_mesh(abstract_mesh("cpu", num_devices, "tensor")):
    trace = jax.make_jaxpr(losses_lib.cross_entropy)(jnp.zeros((3, 7)), jnp.zeros(3, jnp.int32))
  assert ("gather" in str(trace)) == (num_devices == 1)


def test_regression_loss_is_the_squared_error():
  model = SequenceRegressor(CONFIG)
  batch = {
    "tokens": _batch()["tokens"], "mask": np.ones((B, S), np.int32),
    "score": np.array([0.5, -1.0, 2.0], np.float32),
  }
  variables = jax.jit(model.init)(jax.random.key(0), batch["tokens"], batch["mask"])
  params = nn.unbox(variables)["params"]
  example_losses = regression_example_losses(model)
  predictions = jax.jit(example_losses.predict)(params, batch)
  np.testing.assert_allclose(
    jax.jit(example_losses)(params, batch), (predictions - batch["score"]) ** 2, rtol=1e-6
  )
  batch["mask"][1] = 0
  with pytest.raises(ValueError, match="mask is 0 at every position of row 1"):
    example_losses.check_batch(batch)
