"""Groups of parameters with transformations of their own, and frozen ones, which cost nothing."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lmops_jax.config import resolve
from lmops_jax.control import dynamics, pmp_scores
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.training import loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.optimizers import adamw, partition, sgd
from lmops_jax.training.sources import Batches

RNG = np.random.default_rng(0)
PARAMS = {
  "body": {"first": jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32),
           "bias": jnp.zeros(6, jnp.float32)},
  "head": {"second": jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)},
}


def _batch(step):
  rng = np.random.default_rng(step)
  return {"x": rng.normal(size=(8, 4)).astype(np.float32),
          "y": rng.normal(size=(8, 2)).astype(np.float32)}


def _losses(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["body"]["first"] + params["body"]["bias"])
  return jnp.sum((hidden @ params["head"]["second"] - batch["y"]) ** 2, axis=1)


def _head_losses(head, batch):
  return _losses({**PARAMS, "head": head}, batch)


FROZEN_BODY = partition({"body/.*": None, ".*": adamw(0.1, eps_root=1e-8)})


def _train(directory, optimizer, losses=_losses, params=PARAMS, num_steps=4, layout=None,
           accumulate=1):
  partitioner = None if layout is None else layout.build(jax.devices()[:2])
  return loop.train(
    supervised(lambda key: params, losses, optimizer, accumulate=accumulate,
               partitioner=partitioner),
    Batches(_batch), num_steps, 0, directory, partitioner,
    records=loop.Records(tensorboard=False, checkpoint_every=2))


def test_the_first_match_decides_and_each_group_has_its_own_rule():
  optimizer = partition({"body/bias": None, "body/.*": sgd(0.5), ".*": sgd(0.25)})
  gradients = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
  found = {"first": updates["body"]["first"], "bias": updates["body"]["bias"],
           "second": updates["head"]["second"]}
  assert {name: float(u.ravel()[0]) for name, u in found.items()} == {
    "first": -0.5, "bias": 0.0, "second": -0.25}


def test_a_pattern_matches_whole_paths():
  optimizer = partition({"body": None, "body/first": sgd(1.0), "(body/bias|head/second)": None})
  updates, _ = optimizer.update(
    jax.tree.map(jnp.ones_like, PARAMS), optimizer.init(PARAMS), PARAMS)
  assert float(updates["body"]["first"][0, 0]) == -1.0


@pytest.mark.parametrize("accumulate, layout", [
  (1, None), (2, None), (2, MeshConfig(data=2)),
], ids=["plain", "accumulated", "mesh"])
def test_the_rest_learns_as_if_the_frozen_were_constants(tmp_path, accumulate, layout):
  got = _train(tmp_path / "a", FROZEN_BODY, accumulate=accumulate, layout=layout)
  want = _train(tmp_path / "b", adamw(0.1, eps_root=1e-8), _head_losses, PARAMS["head"])
  jax.tree.map(np.testing.assert_array_equal, got.state.params["body"], PARAMS["body"])
  np.testing.assert_allclose(
    got.state.params["head"]["second"], want.state.params["second"], rtol=1e-5, atol=1e-6)
  assert got.history[-1]["grad_norm"] == pytest.approx(want.history[-1]["grad_norm"], rel=1e-5)


def test_the_frozen_have_neither_gradient_nor_state():
  plain = adamw(0.1, eps_root=1e-8)

  def products(optimizer):
    traced = jax.make_jaxpr(functools.partial(dynamics.step, _losses, optimizer.update))(
      dynamics.init_state(*optimizer, PARAMS), _batch(0), jnp.full(8, 1 / 8))
    return len(re.findall(r"= dot_general\[", str(traced)))

  weighted_sum = 1  # of the losses, for the record
  assert products(plain) - weighted_sum == 5  # two forward; both kernels' gradients, the hidden's
  assert products(FROZEN_BODY) - weighted_sum == 3  # two forward, the gradient of the last kernel
  sizes = sorted(x.size for x in jax.tree.leaves(FROZEN_BODY.init(PARAMS)) if x.ndim)
  assert sizes == [12, 12]  # the moments of the head


def test_a_run_with_frozen_parameters_resumes_with_the_same_bits(tmp_path):
  want = _train(tmp_path / "whole", FROZEN_BODY)

  def killed(step):
    if step == 3:
      raise InterruptedError
    return _batch(step)

  learner = supervised(lambda key: PARAMS, _losses, FROZEN_BODY)
  with pytest.raises(InterruptedError):
    loop.train(learner, Batches(killed), 4, 0, tmp_path / "cut",
               records=loop.Records(tensorboard=False, checkpoint_every=2))
  got = _train(tmp_path / "cut", FROZEN_BODY)
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)


def test_scores_are_those_of_a_solve_without_the_frozen():
  batches = jax.tree.map(lambda *rows: np.stack(rows), *map(_batch, range(3)))
  target = _batch(9)

  def target_loss(params):
    return jnp.mean(_losses(params, target))

  def target_loss_of_head(head):
    return jnp.mean(_head_losses(head, target))

  got = pmp_scores(_losses, target_loss, FROZEN_BODY, PARAMS, batches, None)
  want = pmp_scores(_head_losses, target_loss_of_head, adamw(0.1, eps_root=1e-8), PARAMS["head"],
                    batches, None)
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4, atol=1e-6)


def test_a_parameter_without_a_pattern_is_named_before_anything_compiles(tmp_path):
  with pytest.raises(ValueError, match="must cover the parameter body/bias, which none of its pat"):
    _train(tmp_path, partition({"body/first": sgd(0.1), "head/.*": None}))
  assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("rules, message", [
  ({"(": None}, "the pattern '\\(', which must be a regular expression"),
  ({}, "optim.partition.rules={} must be"), ({"a": 1}, "optim.partition.rules"),
])
def test_rules_that_make_no_sense_are_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    partition(rules)


def test_gin_binds_rules():
  built = resolve.load(["pds/smoke.gin"], [
    "OPTIMIZER = @optim.partition()",
    "optim.partition.rules = {'embedding': None, '.*': @optim.adamw()}",
  ]).build()
  state = built.pretrain.optimizer.init({"embedding": jnp.ones((3, 2)), "norm": jnp.ones(5)})
  assert isinstance(built.pretrain.optimizer, optax.GradientTransformation)
  assert {x.size for x in jax.tree.leaves(state) if x.ndim} == {5}


def test_what_is_masked_needs_no_place_on_a_mesh():
  """Linen's boxes around frozen parameters hold no array in an optimizer's state."""
  boxed = {
    name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 4), jnp.float32), ("embed", "mlp"))
    for name in ("frozen", "trained")
  }
  state = jax.eval_shape(partition({"frozen.*": None, ".*": adamw(0.1)}).init, boxed)
  shardings = MeshConfig(data=2, fsdp=2, tensor=2).build().shardings(state)
  assert jax.tree.structure(shardings) == jax.tree.structure(nn.unbox(state))
  split = [s for s in jax.tree.leaves(shardings) if s.spec == PartitionSpec("fsdp", "tensor")]
  assert len(split) == 2  # both moments of the trained one
