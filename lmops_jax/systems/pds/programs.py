"""What PDS compiles, from shapes alone: the pre-training step and both passes of the solve.

No data is read. The programs are those that the stages run, with their shardings; see
`lmops_jax.sizing.aot` for what becomes of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax import control
from lmops_jax.control.problem import PROXY_SCOPE
from lmops_jax.control.targets import MeanTargetLoss
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.shared_stages import language_training
from lmops_jax.sizing import flops, recomputation, solve_cost
from lmops_jax.sizing import vocabulary as sizes
from lmops_jax.sizing.aot import Program
from lmops_jax.sizing.budget import Memory, check_splits, device_bytes
from lmops_jax.sizing.solve_programs import segment_programs
from lmops_jax.sizing.training import abstract_train_state, lowered_step
from lmops_jax.training import language_models, losses

BATCH_FIELDS = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.float32}


class Sizes(NamedTuple):
  """What only the data tell: instances of the target's dev part, and of the corpus."""

  num_target: int = 1024
  num_corpus: int = 1_000_000


def vocabulary_size(model_config: Any, vocabulary: Any) -> int:
  """V of a model, see `sizing.vocabulary`."""
  return sizes.vocabulary_size(
    model_config.vocab_size, vocabulary, "models.TransformerConfig.vocab_size=32000")


def abstract_batch(partitioner: Partitioner, rows: int, length: int, *leading: int) -> dict:
  """A batch of language-model instances `[*leading, rows, length]`, the rows over the mesh.

  Raises:
    ConfigError: if the mesh does not divide the rows.
  """
  check_splits(rows, "instances of a batch", partitioner, "batch size")
  sharding = partitioner.batch_sharding(len(leading) + 2, axis=len(leading))
  return {name: jax.ShapeDtypeStruct((*leading, rows, length), dtype, sharding=sharding)
          for name, dtype in BATCH_FIELDS.items()}


def pretrain_program(config: Any, vocab_size: int, length: int, partitioner: Partitioner,
                     memory: Memory, name: str) -> Program:
  """The step of `language_training.fit`; `memory`: see `recomputation.training_model`."""
  model = recomputation.training_model(
    config, vocab_size, length, partitioner, memory, partitioner.platform)
  state = abstract_train_state(model, config.optimizer, partitioner)
  batch = abstract_batch(partitioner, config.batch_size, length)
  example_losses = losses.lm_example_losses(model, chunk=config.loss_chunk)

  def lower():
    learner = language_training.learner(model, example_losses, config, partitioner)
    return lowered_step(learner, partitioner, state, batch)

  per_token = flops.forward_flops_per_token(model.config, length)
  return Program(
    name, lower, 3 * config.batch_size * length * per_token,
    remedies=training_remedies(config, model.config, partitioner))


def solve_programs(
  method: Any, proxy: Any, proxy_set: Any, vocab_size: int, length: int, partitioner: Partitioner,
  num_target: int, trajectory: str | int,
) -> list[Program]:
  """The segments of `methods.PMP`'s solve, forward and reverse.

  Args:
    num_target: instances of the target's dev part.
    trajectory: the policy, `"auto"` resolved.
  """
  model = language_models.language_model(proxy.model, vocab_size, length)
  example_losses = losses.lm_example_losses(model, chunk=proxy.loss_chunk)
  params = abstract_train_state(model, proxy.optimizer, partitioner).params
  num_steps = method.num_steps
  num_target = method.target_instances(num_target)
  target_rows, target_size = partitioner.filled_rows(num_target, method.micro_batch_size)
  proxy_rows, proxy_size = partitioner.filled_rows(
    proxy_set.most, method.options.proxy_batch_size or method.micro_batch_size)
  target = MeanTargetLoss(
    abstract_batch(partitioner, target_rows, length), example_losses, target_size, num_target,
    partitioner.device_rows)
  options = dataclasses.replace(
    method.options, trajectory=trajectory, micro_batch_size=method.inner_rows(partitioner),
    proxy_batch_size=proxy_size).checked(num_steps, method.batch_size)
  segment_steps = options.segment_steps
  weights = jax.ShapeDtypeStruct((num_steps, method.batch_size), jnp.float32,
                                 sharding=partitioner.replicated)
  run = control.TrainingRun(
    example_losses, method.optimizer, params,
    abstract_batch(partitioner, method.batch_size, length, num_steps), weights,
    partitioner.device_rows)
  programs = segment_programs(
    run, target, abstract_batch(partitioner, proxy_rows, length), options)

  def with_precision(lower):
    def lowered():
      with jax.default_matmul_precision(method.matmul_precision):
        return lower()
    return lowered

  num_segments = -(-num_steps // segment_steps)
  num_scored = solve_cost.num_scored(num_steps, options)
  per_row = length * flops.forward_flops_per_token(model.config, length)
  forward, reverse = (solve_cost.segment_passes(
    method.optimizer, params, segment_steps, options, is_reverse=is_reverse,
    num_scored=num_scored / num_segments) for is_reverse in (False, True))
  sizes = solve_cost.Passes(method.batch_size, num_target, proxy_set.most)
  common = dict(steps=segment_steps, remedies=solve_remedies(method, proxy, partitioner),
                bytes_beside=device_bytes(params))
  return [
    Program("solve, forward", with_precision(programs.forward),
            per_row * sum(p * n for p, n in zip(forward, sizes)), **common),
    Program("solve, reverse", with_precision(programs.reverse),
            per_row * sum(p * n for p, n in zip(reverse, sizes)),
            branch_shares={PROXY_SCOPE: num_scored / num_steps}, **common),
  ]


def training_remedies(config: Any, model: Any, partitioner: Partitioner) -> tuple[str, ...]:
  """Settings that lower the memory of a `Pretrain` of that model, the best first."""
  found = _less_gathering(partitioner)
  if config.batch_size // config.accumulate > partitioner.num_batch_shards:
    found.append(f"a smaller micro-batch (pds.Pretrain.accumulate above {config.accumulate})")
  return (*found, *_recomputation(model, "MODEL", config.remat), more_devices(partitioner))


def solve_remedies(method: Any, proxy: Any, partitioner: Partitioner) -> tuple[str, ...]:
  """Settings that lower the memory of a solve, the best first."""
  found = _less_gathering(partitioner)
  inner = method.options.micro_batch_size or method.batch_size
  if max(inner, method.micro_batch_size) > partitioner.num_batch_shards:
    found.append(
      f"smaller micro-batches (control.SolveOptions.micro_batch_size below {inner}, "
      f"pds.PMP.micro_batch_size below {method.micro_batch_size})")
  if method.options.trajectory not in ("host", "auto", 1):
    found.append('fewer stored states (control.SolveOptions.trajectory="auto")')
  return (*found, *_recomputation(proxy.model, "PROXY_MODEL"), more_devices(partitioner))


def _less_gathering(partitioner: Partitioner) -> list[str]:
  if partitioner.device_rows is None or not partitioner.splits_params:
    return []
  return ['parameters gathered by layers (mesh.make.reduction="layer")']


def _recomputation(model: Any, name: str, chosen: str | None = None) -> list[str]:
  if model.remat == "full":
    return []
  first = "" if chosen is None else "pds.Pretrain.remat=None and "
  return [f'recomputation ({first}models.TransformerConfig.remat="full" of {name})']


def more_devices(partitioner: Partitioner) -> str:
  """The setting that splits parameters and states further."""
  return f"more devices on mesh.make.fsdp (now {partitioner.mesh.shape['fsdp']})"
