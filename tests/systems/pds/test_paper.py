"""The published setting, built without running it (spec sections 2, 3 and 5; check 20)."""

import math

import jax
import numpy as np
import pytest

from lmops_jax import config
from lmops_jax.systems.pds import pretrain
from lmops_jax.training import train_state

PATHS = [
  "CORPUS_PATH = '/c.jsonl'", "TARGET_PATH = '/t.jsonl'", "VOCABULARY_PATH = '/v.model'",
]
NUM_PARAMS = {
  "160m": 162_417_408, "470m": 468_239_360, "1b": 1_004_348_928, "1.7b": 1_741_785_088,
}


@pytest.fixture(scope="module")
def paper():
  return config.load(["pds/paper.gin"], PATHS)


def test_paths_are_owed():
  with pytest.raises(config.ConfigError, match="CORPUS_PATH"):
    config.load(["pds/paper.gin"], PATHS[1:])


def test_published_numbers(paper):
  system = paper.build()
  solve = system.methods[0]
  assert (solve.num_steps, solve.batch_size, solve.every_k) == (100, 256, 10)
  assert solve.checkpoints == (10_000, 20_000, 30_000, 40_000, 50_000)
  assert system.proxy_set.num_proxies == 163_840
  assert (system.select.ratio, system.select.tau) == (0.4, 0.1)
  assert system.prepare.length == 1024
  assert (system.pretrain.num_steps, system.pretrain.batch_size) == (100_000, 512)
  assert (system.scorer.num_steps, system.scorer.batch_size) == (1440, 512)
  # 5 epochs over nine tenths of the proxies, as the reference splits them
  assert system.scorer.num_steps == 5 * round(0.9 * 163_840) // 512


def _schedule(settings, *path):
  return settings.child(*path).build()


def test_learning_rates(paper):
  final = _schedule(paper.settings, "pretrain", "optimizer", "learning_rate")
  middle = 6e-5 + 0.5 * (6e-4 - 6e-5) * (1 + math.cos(math.pi * (51_000 - 2000) / 98_000))
  for step, want in [(0, 0.0), (1, 3e-7), (2000, 6e-4), (51_000, middle), (100_000, 6e-5)]:
    np.testing.assert_allclose(float(final(step)), want, rtol=1e-5, atol=1e-12)
  proxy = _schedule(paper.settings, "proxy", "optimizer", "learning_rate")
  for step in (2000, 50_000):
    assert float(proxy(step)) == float(final(step))  # the cosine is not annealed at 50,000
  scorer = _schedule(paper.settings, "scorer", "optimizer", "learning_rate")
  np.testing.assert_allclose([float(scorer(10)), float(scorer(1440))], [1e-4, 1e-7], rtol=1e-4)


@pytest.mark.parametrize("size", NUM_PARAMS)
def test_sizes_and_shardings(tmp_path, size):
  """Shapes, parameter counts and shardings on 8 devices, by abstract evaluation only."""
  (tmp_path / "size.gin").write_text(
    f"include 'pds/paper.gin'\ninclude 'models/pds_{size}.gin'\ninclude 'optim/pds_{size}.gin'\n"
    "include 'mesh/fsdp_tensor.gin'\n"
  )
  resolved = config.load([str(tmp_path / "size.gin")], PATHS)
  run = resolved.run()
  system, partitioner = run.system, run.mesh.build()
  model = pretrain.language_model(system.pretrain.model, 32_000, 1024)
  abstract = train_state.abstract_state(
    pretrain.initializer(model), system.pretrain.optimizer, jax.random.key(0)
  )
  shardings = jax.tree.leaves(partitioner.shardings(abstract))
  leaves = jax.tree.leaves(jax.tree.map(lambda x: x, abstract.params))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == NUM_PARAMS[size]
  per_device = sum(
    math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, sharding in zip(jax.tree.leaves(abstract), shardings, strict=True)
  )
  whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  assert per_device < 1.01 * whole / 8
  proxy = pretrain.language_model(system.proxy.model, 32_000, 1024)
  proxy_leaves = jax.tree.leaves(
    jax.eval_shape(pretrain.initializer(proxy), jax.random.key(0))
  )
  assert sum(math.prod(leaf.shape) for leaf in proxy_leaves) == NUM_PARAMS["160m"]


def test_solve_is_abstractly_sound():
  """The whole reverse pass of the 160M proxy traces at T = 2 without allocating anything."""
  from lmops_jax import control
  from lmops_jax.training import losses, optimizers

  system = config.load(["pds/paper.gin"], PATHS).build()
  model = pretrain.language_model(system.proxy.model, 32_000, 1024)
  example_losses = losses.lm_example_losses(model)

  def batch(*leading):
    shape = (*leading, 1024)
    return {
      "tokens": jax.ShapeDtypeStruct(shape, np.int32),
      "targets": jax.ShapeDtypeStruct(shape, np.int32),
      "loss_mask": jax.ShapeDtypeStruct(shape, np.float32),
    }

  def solve(params, batches, weights, proxy, target):
    return control.pmp_scores(
      example_losses, lambda p: example_losses(p, target).mean(), optimizers.sgd(0.008), params,
      batches, weights, proxy=proxy, every_k=10, proxy_batch_size=8, micro_batch_size=2,
    )

  params = jax.eval_shape(pretrain.initializer(model), jax.random.key(0))
  import flax.linen as nn

  out = jax.eval_shape(
    solve, nn.unbox(params), batch(2, 256), jax.ShapeDtypeStruct((2, 256), np.float32),
    batch(1024), batch(16),
  )
  assert out.scores.shape == (2, 256) and out.proxy_scores.shape == (1024,)
  assert out.target_losses.shape == (3,)
