"""The training step: what it minimises, accumulation, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.sizing import hlo
from lmops_jax.training.optimizers import sgd
from lmops_jax.training.step import make_train_step
from lmops_jax.training.train_state import TrainState, new_state

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4,)), jnp.float32)}
BATCH = {
  "x": RNG.normal(size=(6, 4)).astype(np.float32),
  "y": RNG.normal(size=(6,)).astype(np.float32),
}


def _losses(params, batch):
  return (batch["x"] @ params["w"] - batch["y"]) ** 2


def _gradient(weights):
  residual = BATCH["x"] @ np.asarray(PARAMS["w"]) - BATCH["y"]
  return BATCH["x"].T @ (2 * weights * residual)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_step_descends_the_weighted_loss_for_any_accumulation(accumulate):
  weights = np.array([0.1, 0.0, 0.3, 0.2, 0.4, 0.0], np.float32)
  optimizer = sgd(0.05)
  step = jax.jit(make_train_step(_losses, optimizer, accumulate=accumulate))
  state, metrics = step(new_state(PARAMS, optimizer), BATCH, weights)
  gradient = _gradient(weights)
  np.testing.assert_allclose(state.params["w"], PARAMS["w"] - 0.05 * gradient, rtol=1e-5)
  losses = np.asarray(_losses(PARAMS, BATCH))
  assert isinstance(state, TrainState) and int(state.step) == 1
  assert float(metrics["loss_sum"]) == pytest.approx(losses.sum(), rel=1e-5)
  assert float(metrics["objective"]) == pytest.approx(weights @ losses, rel=1e-5)
  assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
  assert int(metrics["num_examples"]) == 6 and int(metrics["nonfinite"]) == 0
  assert "num_tokens" not in metrics


def test_micro_batches_have_a_row_for_each_device():
  """A batch of 16 on eight devices: four micro-batches of 4 rows would be computed twice."""
  mesh = MeshConfig(data=1, fsdp=8).build().mesh
  split = NamedSharding(mesh, PartitionSpec("fsdp"))
  params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)}
  batch = {"x": jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split)}

  def losses(params, batch):
    return jnp.sum((batch["x"] @ params["w"]) ** 2, axis=1)

  def product_flops(**kwargs):
    step = make_train_step(losses, sgd(0.05), accumulate=4, **kwargs)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(
      sgd(0.05).init, params))
    return hlo.count(jax.jit(step).lower(state, batch).compile().as_text()).product_flops

  # The gradient of a row is an outer product and does not count.
  ideal = 2 * 16 * 64 * 64 / 8
  assert product_flops(num_shards=8) == ideal
  assert product_flops() == 2 * ideal


def test_default_weights_are_the_mean():
  optimizer = sgd(0.05)
  state, _ = jax.jit(make_train_step(_losses, optimizer))(new_state(PARAMS, optimizer), BATCH)
  want = PARAMS["w"] - 0.05 * _gradient(np.full(6, 1 / 6))
  np.testing.assert_allclose(state.params["w"], want, rtol=1e-5)


def test_tokens_are_counted_from_the_mask():
  def losses(params, batch):
    return jnp.sum(batch["loss_mask"], axis=1) * jnp.sum(params["w"])

  mask = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
  optimizer = sgd(0.1)
  _, metrics = make_train_step(losses, optimizer)(new_state(PARAMS, optimizer), {"loss_mask": mask})
  assert int(metrics["num_tokens"]) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_loss_is_flagged(bad):
  batch = BATCH | {"y": np.where(np.arange(6) == 2, bad, BATCH["y"]).astype(np.float32)}
  optimizer = sgd(0.1)
  _, metrics = make_train_step(_losses, optimizer)(new_state(PARAMS, optimizer), batch)
  assert int(metrics["nonfinite"]) == 1


def test_infinite_gradient_of_a_finite_loss_is_flagged():
  def losses(params, batch):
    return jnp.sqrt(jnp.abs(params["w"][:1] - params["w"][:1])) + 0 * batch["y"][:1]

  optimizer = optax.sgd(0.1)
  step = make_train_step(losses, optimizer)
  _, metrics = step(new_state(PARAMS, optimizer), {"y": BATCH["y"][:1]})
  assert np.isfinite(metrics["loss_sum"]) and int(metrics["nonfinite"]) == 1


def test_accumulation_that_does_not_divide_is_refused():
  optimizer = sgd(0.1)
  with pytest.raises(ValueError, match="batch of 6 examples does not split into accumulate=4"):
    make_train_step(_losses, optimizer, accumulate=4)(new_state(PARAMS, optimizer), BATCH)
  with pytest.raises(ValueError, match="accumulate=0 must be at least 1"):
    make_train_step(_losses, optimizer, accumulate=0)
