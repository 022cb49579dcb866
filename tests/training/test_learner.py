"""The step of a learner: what it minimises, accumulation, what it measures."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmops_jax.control import dynamics
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.sizing import hlo
from lmops_jax.training import loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.losses import lm_example_losses
from lmops_jax.training.optimizers import sgd
from lmops_jax.training.sources import Batches

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4,)), jnp.float32)}
BATCH = {
  "x": RNG.normal(size=(6, 4)).astype(np.float32),
  "y": RNG.normal(size=(6,)).astype(np.float32),
}


def _losses(params, batch):
  return (batch["x"] @ params["w"] - batch["y"]) ** 2


def _step(losses, optimizer, batch, params=PARAMS, **kwargs):
  learner = supervised(lambda key: params, losses, optimizer, **kwargs)
  key = jax.random.key(0)
  return jax.jit(learner.step)(learner.init(key), batch, key)


def _gradient(weights):
  residual = BATCH["x"] @ np.asarray(PARAMS["w"]) - BATCH["y"]
  return BATCH["x"].T @ (2 * weights * residual)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_step_descends_the_weighted_loss_for_any_accumulation(accumulate):
  weights = np.array([0.1, 0.0, 0.3, 0.2, 0.4, 0.0], np.float32)
  optimizer = sgd(0.05)
  step = jax.jit(functools.partial(
    dynamics.step, _losses, optimizer.update, micro_batch_size=6 // accumulate))
  state, found = step(dynamics.init_state(*optimizer, PARAMS), BATCH, weights)
  gradient = _gradient(weights)
  np.testing.assert_allclose(state.params["w"], PARAMS["w"] - 0.05 * gradient, rtol=1e-5)
  losses = np.asarray(_losses(PARAMS, BATCH))
  assert isinstance(state, dynamics.State)
  assert float(found.loss_sum) == pytest.approx(losses.sum(), rel=1e-5)
  assert float(found.objective) == pytest.approx(weights @ losses, rel=1e-5)
  assert float(found.grad_norm) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)


def test_micro_batches_have_a_row_for_each_device():
  """A batch of 16 on eight devices: four micro-batches of 4 rows would be computed twice."""
  mesh = MeshConfig(data=1, fsdp=8, reduction="layer").build()
  split = NamedSharding(mesh.mesh, PartitionSpec("fsdp"))
  params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)}
  batch = {"x": jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split)}

  def losses(params, batch):
    return jnp.sum((batch["x"] @ params["w"]) ** 2, axis=1)

  def product_flops(partitioner):
    step = supervised(None, losses, sgd(0.05), accumulate=4, partitioner=partitioner).step
    state = dynamics.State(params, jax.eval_shape(sgd(0.05).init, params))
    lowered = jax.jit(step).lower(state, batch, jax.random.key(0))
    return hlo.count(lowered.compile().as_text()).product_flops

  # The gradient of a row is an outer product and does not count.
  ideal = 2 * 16 * 64 * 64 / 8
  assert product_flops(mesh) == ideal
  assert product_flops(None) == 2 * ideal


def test_default_weights_are_the_mean():
  state, sums = _step(_losses, sgd(0.05), BATCH)
  assert int(sums["num_examples"]) == 6 and int(sums["nonfinite"]) == 0
  assert "num_tokens" not in sums
  want = PARAMS["w"] - 0.05 * _gradient(np.full(6, 1 / 6))
  np.testing.assert_allclose(state.params["w"], want, rtol=1e-5)


def test_tokens_are_counted_from_the_mask():
  def losses(params, batch):
    return jnp.sum(batch["loss_mask"], axis=1) * jnp.sum(params["w"])

  mask = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
  _, sums = _step(losses, sgd(0.1), {"loss_mask": mask})
  assert int(sums["num_tokens"]) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_loss_is_flagged(bad):
  batch = BATCH | {"y": np.where(np.arange(6) == 2, bad, BATCH["y"]).astype(np.float32)}
  _, sums = _step(_losses, sgd(0.1), batch)
  assert int(sums["nonfinite"]) == 1


def test_infinite_gradient_of_a_finite_loss_is_flagged():
  def losses(params, batch):
    return jnp.sqrt(jnp.abs(params["w"][:1] - params["w"][:1])) + 0 * batch["y"][:1]

  _, sums = _step(losses, optax.sgd(0.1), {"y": BATCH["y"][:1]})
  assert np.isfinite(sums["loss_sum"]) and int(sums["nonfinite"]) == 1


def test_accumulation_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="batch of 6 examples does not split into accumulate=4"):
    _step(_losses, sgd(0.1), BATCH, accumulate=4)
  with pytest.raises(ValueError, match="accumulate=0 must be at least 1"):
    _step(_losses, sgd(0.1), BATCH, accumulate=0)


# ---------------------------------------------------------------- the loop, a solve, and the keys

MODEL = Transformer(TransformerConfig(
  vocab_size=16, num_layers=1, width=8, num_heads=2, mlp_width=8, max_length=6))
LM_LOSSES = lm_example_losses(MODEL)
QUIET = loop.Records(tensorboard=False, params_at=(0,), checkpoint_every=1)


def _tokens(step):
  rows = np.random.default_rng(step).integers(0, 16, (8, 7)).astype(np.int32)
  return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": np.ones((8, 6), np.float32)}


_SOLVE_AND_TRAIN = """
import functools, sys
import jax, numpy as np
from lmops_jax import control
from lmops_jax.training import learner, loop, optimizers, sources
from tests.training import test_learner

losses, optimizer = test_learner.LM_LOSSES, optimizers.adamw(1e-2)
for accumulate in (1, 2):
  folder = f"{sys.argv[1]}/{accumulate}"
  trained = loop.train(
    learner.supervised(
      loop.initializer(test_learner.MODEL), losses, optimizer, accumulate=accumulate),
    sources.Batches(test_learner._tokens), 4, 0, folder, records=test_learner.QUIET)
  batches = jax.tree.map(lambda *x: np.stack(x), *map(test_learner._tokens, range(4)))
  solved = control.pmp_scores(
    losses, lambda params: losses(params, test_learner._tokens(9)).mean(), optimizer,
    loop.load_kept_params(folder, 0), batches, None, micro_batch_size=8 // accumulate)
  jax.tree.map(np.testing.assert_array_equal, trained.state.params, solved.params)
"""


def test_a_solves_forward_pass_is_training_bit_for_bit(tmp_path):
  """In XLA as users have it: some of the tests' flags round a scan's body unlike a program."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  subprocess.run([sys.executable, "-c", _SOLVE_AND_TRAIN, tmp_path], env=environment, check=True)


def _dropped(params, batch):
  """A loss that drops inputs at random."""
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(batch["key"])
  return ((kept * batch["x"]) @ params["w"] - batch["y"]) ** 2


def _keys(params, batch):
  """A loss whose gradient is the key of the example."""
  return jax.vmap(lambda key: jax.random.uniform(key))(batch["key"]) * jnp.sum(params["w"])


def _run(directory, losses=_dropped, num_steps=5, batch_at=lambda step: BATCH, seed=3, **kwargs):
  learner = supervised(lambda key: PARAMS, losses, sgd(0.05), keyed=True, **kwargs)
  return loop.train(learner, Batches(batch_at), num_steps, seed, directory,
                    kwargs.get("partitioner"), records=QUIET)


def test_keys_are_functions_of_the_seed_and_the_step(tmp_path):
  want = _run(tmp_path / "whole")
  again, other = _run(tmp_path / "again"), _run(tmp_path / "other", seed=4)
  np.testing.assert_array_equal(again.state.params["w"], want.state.params["w"])
  assert np.any(other.state.params["w"] != want.state.params["w"])

  def cut(step):
    if step == 3:
      raise InterruptedError
    return BATCH

  with pytest.raises(InterruptedError):
    _run(tmp_path / "cut", batch_at=cut)
  resumed = _run(tmp_path / "cut")
  np.testing.assert_array_equal(resumed.state.params["w"], want.state.params["w"])
  assert resumed.history == want.history


def test_every_step_and_example_has_its_own_key(tmp_path):
  drawn = []

  def losses(params, batch):
    jax.debug.callback(lambda keys: drawn.append(keys), jax.random.key_data(batch["key"]))
    return _keys(params, batch)

  _run(tmp_path, losses, num_steps=3)
  keys = np.concatenate(drawn)
  assert len(np.unique(keys, axis=0)) == len(keys) == 3 * 6


@pytest.mark.parametrize("mesh, accumulate", [
  (None, 3), (MeshConfig(2, 1, 1), 1), (MeshConfig(2, 1, 1, reduction="step"), 3)])
def test_what_is_drawn_depends_neither_on_micro_batches_nor_on_the_mesh(
    tmp_path, mesh, accumulate):
  want = _run(tmp_path / "one")
  partitioner = None if mesh is None else mesh.build(jax.devices()[:2])
  got = _run(tmp_path / "other", accumulate=accumulate, partitioner=partitioner)
  np.testing.assert_allclose(got.state.params["w"], want.state.params["w"], rtol=1e-5)


def test_a_source_may_read_the_parameters_and_resumes(tmp_path):
  """As rollouts do: the batch of a step is a function of the step and its parameters."""
  class Rollouts:
    reads_params = True
    stop_at = 3

    def batch(self, step, params=None):
      if step == self.stop_at:
        raise InterruptedError
      return BATCH | {"y": np.asarray(BATCH["x"] @ params["w"] + step + 1, np.float32)}

  def run(directory, source):
    return loop.train(supervised(lambda key: PARAMS, _losses, sgd(0.05)), source, 5, 0, directory,
                      records=QUIET)

  source, whole = Rollouts(), Rollouts()
  whole.stop_at = None
  want = run(tmp_path / "whole", whole)
  with pytest.raises(InterruptedError):
    run(tmp_path / "cut", source)
  got = run(tmp_path / "cut", whole)
  np.testing.assert_array_equal(got.state.params["w"], want.state.params["w"])
  assert [r["loss"] for r in want.history] == pytest.approx([11.0])  # mean of 1, 4, 9, 16, 25


def test_a_step_that_is_not_finite_ends_the_run_before_a_source_sees_its_parameters(tmp_path):
  class Rollouts:
    reads_params = True

    def batch(self, step, params=None):
      assert np.isfinite(params["w"]).all()
      return BATCH | {"y": np.full(6, np.inf if step == 1 else 0.0, np.float32)}

  with pytest.raises(loop.NonFiniteLossError, match="step 1 has loss inf"):
    loop.train(supervised(lambda key: PARAMS, _losses, sgd(0.05)), Rollouts(), 5, 0, tmp_path,
               records=QUIET)
