"""PDS itself: the costates of a training run score the proxies.

With an outer loop, algorithm 1 of the paper in full: runs on weighted proxies, a step on the
weights after each. Metagradient descent (arXiv 2503.13751, section 4) is that loop with its own
step, and with the target's loss at the end of a run in place of its sum over the run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import numpy as np
import optax

from lmops_jax import control
from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  Name,
  NonEmpty,
  Positive,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.control.options import AUTO
from lmops_jax.data import batches as data_batches
from lmops_jax.mesh import checkpoints, meshes, processes
from lmops_jax.sizing import budget, solve_cost
from lmops_jax.systems.pds import plan, pretrain
from lmops_jax.systems.pds.methods.bench import DIVISORS, Bench
from lmops_jax.systems.pds.methods.sizes import Inner
from lmops_jax.training import language_models, loop

MATMUL_PRECISIONS = ("default", "high", "highest")
UNFINISHED = "unfinished"  # a solve's states: a folder in its stage until the scores are written


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class PMP:
  """PDS: scores from the costates of Pontryagin's principle, averaged over proxy checkpoints.

  Attributes:
    name: the method's name in folders and figures.
    optimizer: that of the inner run; the costates are exact for any optax transformation.
    options: options of each solve. Their `micro_batch_size` is rounded so that each of the mesh's
      shards has equally many rows, at least one; `trajectory` "auto" takes what recomputes least in
      the memory of the devices; `segment_steps` lie between two points that an interrupted solve
      resumes from, and the states of these points lie in host memory.
    num_steps: inner steps, T.
    batch_size: instances of an inner step, drawn from the corpus by `data_seed`.
    checkpoints: proxy steps to start from; None: the proxy's last.
    num_target: random instances of the target's dev part in J; None: all; "auto": `max_target`, or
      all if there are fewer.
    max_target: the most that "auto" takes.
    device_bytes: memory of a device, for `trajectory="auto"` if jax does not tell it.
    micro_batch_size: target instances, and proxies unless the options say, that are differentiated
      at a time; rounded like that of the options.
    matmul_precision: precision of the solve's products, as jax names it; "highest" is full float32
      also on GPUs and TPUs, None their default.
    inner_data: what inner batches are drawn from: "corpus", or "proxies" as in the paper's
      algorithm, by which every scored example may also have been trained on.
    shuffle: draw the inner batches by `data_seed`; False takes the first instances in order, as the
      reference does.
    divide_by: divide each proxy's score by its "gradient_norm" at the checkpoint or by the
      "sqrt_length" of its text; None leaves it, as the paper does.
    outer: weigh the proxies, by one run and one step after another, and take the weights in place
      of the scores, N times those on the simplex. Runs are on the proxies, each weighted batch an
      unbiased estimate of the weighted sum over all of them, and go on through the proxies' order
      where the run before has stopped. None: one run, whose scores are taken.
  """

  optimizer: optax.GradientTransformation
  name: Name = "pds"
  options: control.SolveOptions = control.SolveOptions()
  num_steps: PositiveInt = 40
  batch_size: PositiveInt = 32
  checkpoints: Annotated[Sequence[Count], NonEmpty, Distinct] | None = None
  num_target: PositiveInt | Literal[AUTO] | None = None
  max_target: PositiveInt = 128
  device_bytes: Positive | None = None
  micro_batch_size: PositiveInt = 64
  matmul_precision: Literal[MATMUL_PRECISIONS] | None = None
  data_seed: Seed = 0
  inner_data: Literal["corpus", "proxies"] = "corpus"
  shuffle: bool = True
  divide_by: Literal[DIVISORS] | None = None
  outer: control.OuterLoop | None = None

  def __post_init__(self):
    self.options.check_sizes(self.num_steps, self.batch_size)
    if self.outer is not None and self.inner_data != "proxies":
      raise ValueError(
        f"method {self.name!r} has an outer loop, whose weights are those of the proxies, but its "
        'runs are on the corpus; set pds.PMP.inner_data to "proxies".')
    if self.outer is not None and self.divide_by is not None:
      raise ValueError(
        f"method {self.name!r} has an outer loop, which leaves weights and no scores to divide; "
        "set pds.PMP.divide_by to None.")

  @property
  def num_solves(self) -> int:
    """Inner runs in all."""
    return len(self.checkpoints or (1,)) * (1 if self.outer is None else self.outer.epochs)

  def needs_forward_mode(self) -> bool:
    """True: it differentiates the proxy's losses along costates."""
    return True

  def inner(self) -> Inner:
    """The size of an inner batch, and what it is drawn from."""
    return Inner(
      self.batch_size, "batch_size (INNER_BATCH_SIZE)", self.inner_data == "proxies")

  def target_instances(self, num: int) -> int:
    """Instances in J, for a dev part of `num` instances."""
    if self.num_target == AUTO:
      return min(self.max_target, num)
    return self.num_target or num

  def check_optimizer(self, proxy: pretrain.Pretrain, length: int, partitioner) -> None:
    """Refuses, from shapes alone, an inner optimizer under which every score would be 0."""
    size = proxy.model.vocab_size or 2  # the real one is not known before the texts are read
    model = language_models.language_model(proxy.model, size, length)
    params = language_models.abstract_params(loop.initializer(model), partitioner)
    control.check_optimizer(
      self.optimizer, params, self.options.surrogate, "pds.PMP.", "control.SolveOptions."
    )

  def decided(self, bench: Bench) -> PMP:
    """The method, its trajectory decided from the devices' memory if it is "auto"."""
    if self.options.trajectory != AUTO:
      return self
    memory = budget.memory_of_mesh(bench.partitioner, self.device_bytes)
    parts = plan.solve_parts(
      self, bench.proxy, bench.proxy_set, bench.corpus.vocab_size, bench.corpus.length,
      bench.partitioner, len(bench.prepared.target_dev), bench.partitioner.platform,
    )
    policy = plan.resolve_trajectory(self, parts, memory)
    bench.context.log(
      f"{self.name}: trajectory {policy!r} for states of {parts.state / 2**20:,.1f} MiB in "
      f"{memory.device_bytes / 2**20:,.1f} MiB a device"
    )
    return dataclasses.replace(
      self, options=dataclasses.replace(self.options, trajectory=policy)
    )

  def inner_rows(self, partitioner: meshes.Partitioner) -> int | None:
    """Rows of an inner batch that are differentiated at a time on that mesh; None: all."""
    return partitioner.micro_batch_size(self.batch_size, self.options.micro_batch_size)

  def score_proxies(self, bench: Bench) -> np.ndarray:
    """`[C,M]`: the proxies' scores from each checkpoint."""
    bench.check_sizes(self)
    num_proxies = len(bench.proxies["example_id"])
    proxies, proxy_batch_size = bench.place_rows(
      bench.proxies, self.options.proxy_batch_size or self.micro_batch_size
    )
    num_target = self.target_instances(len(bench.prepared.target_dev))
    target_loss = bench.target_loss(num_target, self.micro_batch_size)
    options = dataclasses.replace(
      self.options, micro_batch_size=self.inner_rows(bench.partitioner),
      proxy_batch_size=proxy_batch_size,
    )
    solve = functools.partial(
      self._solve, bench, proxies=proxies, target_loss=target_loss, options=options)
    rows, norms = [], collections.defaultdict(list)

    def scored(params, gamma, epoch, title):
      result = solve(params, self._batches(bench, epoch), self._weights(gamma, epoch), title)
      for name in ("target_losses", "costate_norms", "target_grad_norms"):
        norms[name].append(np.asarray(getattr(result, name), np.float64).tolist())
      return result.proxy_scores[:num_proxies]

    for step in self.checkpoints or (bench.proxy.num_steps,):
      params = bench.proxy_params(step)
      if self.outer is None:
        values = scored(params, None, 0, str(step))
        rows.append(bench.divided(values, params, self.divide_by))
        continue
      gamma = np.full(num_proxies, 1 / num_proxies, np.float32)
      for epoch in range(self.outer.epochs):
        gamma = np.asarray(self.outer.moved(gamma, scored(params, gamma, epoch, f"{step}-{epoch}")))
        bench.context.log(
          f"{self.name}@{step}: target loss {norms['target_losses'][-1][-1]:.4f} after run "
          f"{epoch + 1} of {self.outer.epochs}; {np.count_nonzero(gamma == 0)} proxies now weigh 0")
      rows.append(num_proxies * gamma)
    for name, found in norms.items():
      bench.context.extra.setdefault(name, []).extend(found)
    passes = solve_cost.solve_passes(
      self.optimizer, params, self.num_steps, options, in_segments=True
    )
    sizes = solve_cost.Passes(batch=self.batch_size, target=num_target, proxy=num_proxies)
    for num_passes, size in zip(passes, sizes, strict=True):
      bench.add_flops(size * bench.corpus.length * self.num_solves, num_passes)
    return np.stack(rows)

  def _batches(self, bench: Bench, epoch: int):
    """The batches of an outer epoch's run, placed, leaves `[T,B,...]`."""
    inner_indices = bench.proxy_indices if self.inner_data == "proxies" else None
    source = language_models.batch_source(
      bench.corpus, inner_indices, self.batch_size, self.data_seed, self.shuffle
    )
    steps = [source.batch(t) for t in self._steps(epoch)]
    return bench.partitioner.place_batch(
      {name: np.stack([step[name] for step in steps]) for name in steps[0]}, axis=1
    )

  def _weights(self, gamma: np.ndarray | None, epoch: int) -> np.ndarray:
    """`[T,B]` of the examples of a run, from `gamma [M]` of the proxies (None: all alike)."""
    if gamma is None:
      return np.full((self.num_steps, self.batch_size), 1 / self.batch_size, np.float32)
    rows = np.stack([
      data_batches.batch_indices(
        len(gamma), self.batch_size, self.data_seed, t, shuffle=self.shuffle)
      for t in self._steps(epoch)
    ])
    return (len(gamma) / self.batch_size * gamma[rows]).astype(np.float32)

  def _steps(self, epoch: int) -> range:
    return range(epoch * self.num_steps, (epoch + 1) * self.num_steps)

  def _solve(self, bench: Bench, params, batches, weights, place: str, *, proxies, target_loss,
             options: control.SolveOptions) -> control.PmpResult:
    """One solve, checked and on the host; `place` names its folder and its progress."""
    num_segments = -(-self.num_steps // options.segment_steps)
    title = f"{self.name}@{place}" + (f" of {bench.proxy_stage}" if bench.proxy_run else "")
    directory = bench.context.directory / UNFINISHED / bench.proxy_stage / place
    with (
      contextlib.closing(checkpoints.CheckpointStore(
        directory, max_to_keep=2, keep_steps=range(1, num_segments), chained=True)) as store,
      bench.context.progress(2 * num_segments, "segments", title) as bar,
      bench.partitioner.activate(),
      processes.saving_on_request(),
      jax.default_matmul_precision(self.matmul_precision),
    ):

      def advance(done, _):
        bar.update(done - bar.done)
        if processes.stop_requested():
          store.wait()
          raise processes.Terminated

      run = control.TrainingRun(
        bench.example_losses, self.optimizer, params, batches, weights,
        bench.partitioner.device_rows,
      )
      result = control.solve(
        run, target_loss, options, proxy=proxies, store=store, progress=advance,
        log=lambda text: bench.context.log(f"{title}: {text}"),
      )
    result = processes.fetch(result._replace(params=None))
    control.check_result(result)
    return result
