"""What each phase of PDS takes: parameters, FLOPs and bytes a device, before anything runs.

Arithmetic on shapes and shardings; nothing is compiled, allocated or read. Activations are an
estimate (`sizing.activations`); `lmops aot` asks the compiler.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models import heads
from lmops_jax.sizing import flops, recomputation, solve_cost, solve_plan, solve_programs
from lmops_jax.sizing.budget import Memory, Phase, device_bytes
from lmops_jax.sizing.training import (
  abstract_state_of,
  abstract_train_state,
  batch_bytes,
  count_params,
  gathered_bytes,
  language_training_phase,
  training_phase,
  transformer_bytes,
)
from lmops_jax.systems.pds import pretrain, programs, scorer
from lmops_jax.systems.pds.programs import Sizes
from lmops_jax.training import language_models

# Compiled, a solve's activations take up to this share more than estimated
# (tests/benchmarks/results/aot.md).
_ACTIVATIONS_MARGIN = 0.5


def phases(pipeline: Any, partitioner: Partitioner, memory: Memory, sizes: Sizes,
           platform: str) -> list[Phase]:
  """The phases of a `pds.Pipeline` in the order in which they run.

  Args:
    partitioner: a real or planned mesh (`MeshConfig.plan`).
    memory: that of a device, for `trajectory="auto"` and `remat="auto"`.
    sizes: what only the data tell.
    platform: the devices' kind: "cpu", "gpu" or "tpu".
  """
  length = pipeline.prepare.length
  size_of = functools.partial(programs.vocabulary_size, vocabulary=pipeline.prepare.vocabulary)
  found = [
    _training(pretrain.proxy_stage(run), pipeline.proxy, size_of(pipeline.proxy.model), length,
              partitioner, memory, platform) for run in range(pipeline.proxy_runs)]
  for method in pipeline.solves:
    found += _solve(method, pipeline.proxy, pipeline.proxy_set, size_of(pipeline.proxy.model),
                    length, partitioner, memory, sizes, platform, pipeline.proxy_runs)
  if pipeline.proxy_methods or pipeline.scorer_methods:
    fit, annotate = _scorer(
      pipeline, size_of(pipeline.scorer.trunk(pipeline.proxy)), length, partitioner, sizes,
      platform)
    found += [fit, annotate] if pipeline.proxy_methods else [annotate]
  found.append(_training("pretrain", pipeline.pretrain, size_of(pipeline.pretrain.model), length,
                         partitioner, memory, platform))
  return found


def _training(name, config, vocab_size, length, partitioner, memory, platform) -> Phase:
  model = recomputation.training_model(
    config, vocab_size, length, partitioner, memory, platform)
  return language_training_phase(
    name, config, model, length, partitioner, platform,
    programs.training_remedies(config, model.config, partitioner))


class SolveParts(NamedTuple):
  """Bytes that the reverse pass of `methods.PMP` takes, for one device.

  Attributes:
    on_device: bytes by name, all but the trajectory in a segment.
    state: one state of that trajectory.
    on_host: bytes of host memory, whatever the trajectory.
  """

  on_device: dict[str, float]
  state: float
  on_host: float

  @property
  def device_bytes(self) -> float:
    return sum(self.on_device.values())


def solve_parts(method: Any, proxy: Any, proxy_set: Any, vocab_size: int, length: int,
                partitioner: Partitioner, num_target: int, platform: str) -> SolveParts:
  """The bytes of the solve's parts, by arithmetic."""
  model = language_models.language_model(proxy.model, vocab_size, length)
  params = abstract_train_state(model, proxy.optimizer, partitioner).params
  state = solve_programs.abstract_state(method.optimizer, params)
  programs.abstract_batch(partitioner, method.batch_size, length)  # checks that it splits
  inner = method.inner_rows(partitioner)
  state_sizes = device_bytes(params), device_bytes(state.opt_state)
  sizes = solve_plan.solve_bytes(
    *state_sizes, micro_batches=inner is not None, groups=method.options.groups is not None,
    whole_bytes=gathered_bytes(params, partitioner))
  act = functools.partial(transformer_bytes, model.config, length=length, partitioner=partitioner,
                          platform=platform, loss_chunk=proxy.loss_chunk)
  num_target = method.target_instances(num_target)
  _, target_rows = partitioner.filled_rows(num_target, method.micro_batch_size)
  _, proxy_rows = partitioner.filled_rows(
    proxy_set.most, method.options.proxy_batch_size or method.micro_batch_size)
  one_by_one = {
    "Hessian product": act(inner or method.batch_size, tangents=True),
    "target gradient": act(target_rows),
    "proxy slopes": act(proxy_rows, backward=False, tangents=True),
  }
  rows = method.num_steps * method.batch_size + num_target + proxy_set.most
  on_device = {**sizes._asdict(), "data": batch_bytes(rows, length, partitioner),
               "activations": max(one_by_one.values())}
  num_segments = -(-method.num_steps // method.options.segment_steps)
  return SolveParts(
    on_device, device_bytes(state), solve_plan.host_bytes(*state_sizes, num_segments))


def resolve_trajectory(method: Any, parts: SolveParts, memory: Memory) -> str | int:
  """The policy that `trajectory="auto"` means; any other as it is.

  Raises:
    ValueError: if the memory of a device is not known or holds no state, or if the starts of the
      segments do not fit into the host's.
  """
  excess = _host_excess(method, parts, memory)
  if excess:
    raise ValueError(excess)
  return _trajectory(method, parts, memory)


def _host_excess(method: Any, parts: SolveParts, memory: Memory) -> str:
  """A sentence if the starts of the segments do not fit into the host's memory, otherwise ""."""
  if not 0 < memory.host_bytes < parts.on_host:
    return ""
  return (
    f"the states that a solve's segments start from take {parts.on_host / 2**30:,.1f} GiB of the "
    f"{memory.host_bytes / 2**30:,.1f} GiB of host memory that a device has; raise "
    f"control.SolveOptions.segment_steps (now {method.options.segment_steps}) or give "
    "mesh.make.fsdp more devices.")


def _trajectory(method: Any, parts: SolveParts, memory: Memory) -> str | int:
  if method.options.trajectory != "auto":
    return method.options.trajectory
  if memory.device_bytes is None:
    raise ValueError(
      'control.SolveOptions.trajectory="auto" needs to know the memory of a device, which jax does '
      "not tell here; set pds.PMP.device_bytes, or a policy such as \"all\".")
  free = memory.device_bytes - parts.device_bytes
  cautious = free - _ACTIVATIONS_MARGIN * parts.on_device["activations"]
  # Room for two states, one at work and one on its way, is worth some risk; room for more is not.
  return solve_plan.choose_trajectory(
    parts.state, min(method.options.segment_steps, method.num_steps),
    max(cautious, min(free, 2 * parts.state)), max(0, memory.host_bytes - parts.on_host))


def planned_trajectory(method: Any, parts: SolveParts, memory: Memory) -> str | int:
  """`resolve_trajectory`, or 1 if not even one state fits: the plan then shows the excess.

  Whether the host's memory is enough is not asked.
  """
  if method.options.trajectory == "auto" and memory.device_bytes is not None:
    if memory.device_bytes < parts.device_bytes + parts.state:
      return 1
  return _trajectory(method, parts, memory)


def _solve(method, proxy, proxy_set, vocab_size, length, partitioner, memory, sizes,
           platform, runs) -> list[Phase]:
  num_target = method.target_instances(sizes.num_target)
  parts = solve_parts(method, proxy, proxy_set, vocab_size, length, partitioner, num_target,
                      platform)
  policy = planned_trajectory(method, parts, memory)
  options = dataclasses.replace(method.options, trajectory=policy)
  segment_steps = min(options.segment_steps, method.num_steps)
  copies = solve_plan.device_state_copies(policy, segment_steps)
  held = parts.on_device
  reverse = held | {"trajectory": copies * parts.state}
  model = language_models.language_model(proxy.model, vocab_size, length)
  params = abstract_train_state(model, proxy.optimizer, partitioner).params
  num_params = count_params(params)
  passes = solve_cost.solve_passes(
    method.optimizer, params, method.num_steps, options, in_segments=True)
  per_row = length * flops.forward_flops_per_token(model.config, length)
  forward_flops = 3 * method.num_steps * method.batch_size * per_row
  step_flops = passes.batch * method.batch_size * per_row - forward_flops
  solves = runs * method.num_solves
  forward = {k: held[k] for k in ("params", "opt_state", "given", "data")}
  inner = method.inner_rows(partitioner)
  micro = inner is not None
  forward["accumulators"] = held["params"] * (1 + micro)
  forward["gathered"] = (2 + micro) * gathered_bytes(params, partitioner)
  forward["activations"] = transformer_bytes(
    model.config, inner or method.batch_size, length, partitioner, platform,
    loss_chunk=proxy.loss_chunk)
  recomputed = solve_plan.num_recomputed(policy, segment_steps) / segment_steps
  policy_text = (
    f"trajectory {policy!r}: {copies} states of {parts.state / 2**20:,.1f} MiB on a device in a "
    f"segment of {segment_steps} steps, {recomputed:.2f} steps computed again for each; "
    f"{parts.on_host / 2**20:,.1f} MiB of the host's memory for a device")
  name, total = method.name, solves * method.num_steps
  remedies = programs.solve_remedies(method, proxy, partitioner)
  refusal = _host_excess(method, parts, memory)
  starts = runs * len(method.checkpoints or (1,))
  from_points = f"from {starts} checkpoints" if starts > 1 else "from one checkpoint"
  if solves > starts:
    from_points = f"{solves // starts} times {from_points}"
  return [
    Phase(f"solve {name}, forward", num_params, solves * forward_flops, total, forward,
          f"{method.num_steps} steps {from_points}", remedies, refusal),
    Phase(f"solve {name}, reverse", num_params,
          solves * (step_flops + passes.target * num_target * per_row), total, reverse,
          policy_text, remedies, refusal),
    Phase(f"solve {name}, off-batch scores", num_params,
          solves * passes.proxy * proxy_set.most * per_row, total, reverse,
          f"{proxy_set.most:,} proxies, scored {passes.proxy // 3} times, within the "
          "reverse pass", remedies),
  ]


def _scorer(pipeline, vocab_size, length, partitioner, sizes, platform) -> list[Phase]:
  config = pipeline.scorer
  trunk = language_models.language_model(config.trunk(pipeline.proxy), vocab_size, length)
  model = heads.SequenceRegressor(trunk.config, pooling=config.pooling)
  state = abstract_state_of(scorer.initializer(model), config.optimizer, partitioner)
  per_row = length * flops.forward_flops_per_token(model.config, length, unembedding=False)
  act = functools.partial(transformer_bytes, model.config, length=length, partitioner=partitioner,
                          platform=platform, unembedding=False)
  annotate = {
    "params": device_bytes(state.params),
    "data": batch_bytes(config.inference_batch_size, length, partitioner),
    "activations": act(config.inference_batch_size, backward=False)}
  return [
    training_phase(
      "scorer", state, 3 * config.batch_size * per_row, config.num_steps,
      data=batch_bytes(config.batch_size, length, partitioner), kept=act(config.batch_size),
      note=f"{config.batch_size} x {length}",
      remedies=("a smaller pds.Scorer.batch_size", programs.more_devices(partitioner))),
    Phase("annotate", count_params(state.params), sizes.num_corpus * per_row,
          -(-sizes.num_corpus // config.inference_batch_size), annotate,
          f"{sizes.num_corpus:,} instances",
          ("a smaller pds.Scorer.inference_batch_size", programs.more_devices(partitioner))),
  ]
