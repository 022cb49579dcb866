"""The published setting, built without running it (spec sections 2, 3 and 5; check 20)."""

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from lmops_jax import control
from lmops_jax.config import resolve
from lmops_jax.control import pmp, targets
from lmops_jax.control.training_run import shardings_of
from lmops_jax.training import language_models, loop, losses
from lmops_jax.training.learner import supervised

PATHS = [
  "CORPUS_PATH = '/c.jsonl'", "TARGET_PATH = '/t.jsonl'", "VOCABULARY_PATH = '/v.model'",
  "TARGET_TEST_PATH = '/test.jsonl'",
]
NUM_PARAMS = {
  "160m": 162_417_408, "470m": 468_239_360, "1b": 1_004_348_928, "1.7b": 1_741_785_088,
}


@pytest.fixture(scope="module")
def paper():
  return resolve.load(["pds/paper.gin"], PATHS)


def test_paths_are_owed():
  for i, path in enumerate(PATHS):
    with pytest.raises(resolve.ConfigError, match=path.split(" = ")[0]):
      resolve.load(["pds/paper.gin"], PATHS[:i] + PATHS[i + 1:])


def test_published_numbers(paper):
  system = paper.build()
  solve = system.methods[0]
  assert (solve.num_steps, solve.batch_size, solve.options.every_k) == (100, 256, 10)
  assert solve.checkpoints == (10_000, 20_000, 30_000, 40_000, 50_000)
  assert system.proxy_set.num_proxies == 163_840
  assert (system.select.ratio, system.select.tau) == (0.4, 0.1)
  assert system.prepare.length == 1024
  assert (system.pretrain.num_steps, system.pretrain.batch_size) == (100_000, 512)
  assert (system.scorer.num_steps, system.scorer.batch_size) == (1440, 512)
  # 5 epochs over nine tenths of the proxies, as the reference splits them
  assert system.scorer.num_steps == 5 * round(0.9 * 163_840) // 512


def test_published_choices(paper):
  """J is over all of one set and the test part another; float32, corpus order, memory (spec 2)."""
  system = paper.build()
  assert system.prepare.target.path == "/t.jsonl"
  assert system.prepare.target_test.path == "/test.jsonl"
  solve = system.methods[0]
  assert solve.num_target is None and system.prepare.max_target_instances is None
  assert (system.proxy.model.dtype, system.proxy.model.param_dtype) == ("float32", "float32")
  assert solve.matmul_precision == "highest"
  assert system.pretrain.model.dtype == "bfloat16"
  assert not (solve.shuffle or system.proxy.shuffle or system.pretrain.shuffle)
  for model in (system.proxy.model, system.pretrain.model):
    assert (model.attention, model.remat) == ("chunked", "full")
  assert system.pretrain.accumulate == system.proxy.accumulate == 4


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
  resolved = resolve.load([str(tmp_path / "size.gin")], PATHS)
  run = resolved.run()
  system, partitioner = run.system, run.mesh.build()
  model = language_models.language_model(system.pretrain.model, 32_000, 1024)
  abstract = loop.abstract_state(
    supervised(loop.initializer(model), None, system.pretrain.optimizer))
  shardings = jax.tree.leaves(partitioner.shardings(abstract))
  leaves = jax.tree.leaves(jax.tree.map(lambda x: x, abstract.params))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == NUM_PARAMS[size]
  per_device = sum(
    math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, sharding in zip(jax.tree.leaves(abstract), shardings, strict=True)
  )
  whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  assert per_device < 1.01 * whole / 8
  proxy = language_models.language_model(system.proxy.model, 32_000, 1024)
  proxy_leaves = jax.tree.leaves(
    jax.eval_shape(loop.initializer(proxy), jax.random.key(0))
  )
  assert sum(math.prod(leaf.shape) for leaf in proxy_leaves) == NUM_PARAMS["160m"]


@pytest.mark.slow
def test_a_segment_of_the_solve_fits_one_accelerator(paper):
  """The compiled reverse segment of the 160M proxy at full size; nothing is allocated."""
  system = paper.build()
  solve = system.methods[0]
  model = language_models.language_model(system.proxy.model, 32_000, 1024)
  # What a batch of 64 gets on an accelerator; on a CPU the chunks are smaller.
  example_losses = losses.lm_example_losses(model, chunk=32)

  def rows(*leading):
    shape = (*leading, 1024)
    return {
      "tokens": jax.ShapeDtypeStruct(shape, np.int32),
      "targets": jax.ShapeDtypeStruct(shape, np.int32),
      "loss_mask": jax.ShapeDtypeStruct(shape, np.float32),
    }

  num_steps = solve.options.segment_steps
  params = nn.unbox(jax.eval_shape(loop.initializer(model), jax.random.key(0)))
  target_loss = targets.MeanTargetLoss(
    rows(1035), example_losses, solve.micro_batch_size, num_rows=1030
  )
  run = control.TrainingRun(
    example_losses, solve.optimizer, params, rows(num_steps, solve.batch_size),
    jax.ShapeDtypeStruct((num_steps, solve.batch_size), np.float32),
  )
  options = dataclasses.replace(solve.options, proxy_batch_size=solve.micro_batch_size)
  lowered = pmp._solve.lower(
    run.traceable(), target_loss, rows(system.proxy_set.num_proxies),
    options.checked(num_steps, solve.batch_size), shardings_of(params),
  )
  assert lowered.out_info.scores.shape == (num_steps, 256)
  assert lowered.out_info.proxy_scores.shape == (163_840,)
  memory = lowered.compile().memory_analysis()
  starts = solve.num_steps // num_steps * NUM_PARAMS["160m"] * 4  # kept for the other segments
  total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + starts
  assert 20e9 < total < 72e9, total
