"""The ways to score data: PDS and what it is compared with (PDS, section 3; spec section 7).

Two kinds of method. A *proxy method* scores a small random proxy set by gradients; a scorer then
learns those scores and annotates the corpus. A *corpus method* scores every instance directly. All
share proxy set, scorer, selection and pre-training, so that only the scores differ. A method is a
frozen dataclass with a `name`, bound in gin as `METHODS = [@pds.PMP(), @pds.Random(), ...]`; one of
your own needs a `name` and either `score_proxies(bench)` or `score_corpus(bench)`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
import optax

from lmops_jax import control
from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  Name,
  NonEmpty,
  NonNegative,
  Positive,
  PositiveInt,
  Seed,
  at_least,
  component,
)
from lmops_jax.control.gradient_norms import gradient_norms
from lmops_jax.control.options import AUTO
from lmops_jax.data import export
from lmops_jax.evaluation import examples
from lmops_jax.host import hashing
from lmops_jax.mesh import checkpoints, meshes, processes
from lmops_jax.sizing import budget, flops, solve_cost
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import dsir, plan, prepare, pretrain
from lmops_jax.training import language_models, loop, losses, optimizers

MATMUL_PRECISIONS = ("default", "high", "highest")
DIVISORS = ("gradient_norm", "sqrt_length")
UNFINISHED = "unfinished"  # folder of a solve's states, in its stage until the scores are written


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class ProxySet:
  """The random part of the corpus that gradient methods score. The same for every method.

  Attributes:
    num_proxies: instances, M; "auto" takes `max_proxies`, or all of a smaller corpus.
    seed: of the draw, uniform without replacement, which is a function of (seed, instance id).
    max_proxies: most that "auto" takes.
  """

  num_proxies: at_least(4) | Literal[AUTO] = AUTO
  seed: Seed = 1234
  max_proxies: at_least(4) = 3072

  @property
  def most(self) -> int:
    """M, of a corpus that is large enough."""
    return self.max_proxies if self.num_proxies == AUTO else self.num_proxies

  def count(self, num_examples: int) -> int:
    """M, of a corpus of that size.

    Raises:
      ValueError: the corpus has fewer than are asked for, or hardly any.
    """
    if self.num_proxies != AUTO and self.num_proxies > num_examples:
      raise ValueError(
        f"pds.ProxySet.num_proxies={self.num_proxies} (PROXIES) exceeds the corpus's "
        f"{num_examples} instances; lower it or enlarge the corpus."
      )
    if num_examples < 4:
      raise ValueError(
        f"the corpus has {num_examples} instances, too few to learn scores from; enlarge it."
      )
    return min(self.most, num_examples)

  def indices(self, ids: np.ndarray) -> np.ndarray:
    """Rows of the corpus, `[M] int64`, ascending, by the ids `[N]` of all its instances."""
    return hashing.draw_indices(ids, self.count(len(ids)), self.seed)


@runtime_checkable
class ProxyMethod(Protocol):
  """A setting with a `name` that scores the proxy set."""

  def score_proxies(self, bench: Bench) -> np.ndarray:
    """`[runs, M]` scores, one row a proxy checkpoint; large is good."""


@runtime_checkable
class CorpusMethod(Protocol):
  """A setting with a `name` that scores every instance of the corpus."""

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    """Scores of consecutive instances, in blocks; large is good."""


@runtime_checkable
class SolvingMethod(ProxyMethod, Protocol):
  """A proxy method that solves the control problem of a training run, as `PMP` does."""

  def check_optimizer(self, proxy: pretrain.Pretrain, length: int, partitioner) -> None:
    """Refuses, from shapes alone, an inner optimizer under which every score would be 0."""

  def decided(self, bench: Bench) -> SolvingMethod:
    """Itself, with all that the memory of the devices decides; called before `score_proxies`."""


@dataclasses.dataclass
class Bench:
  """What a method works with: the opened inputs of its stage, and the proxy language model."""

  context: pipeline.StageContext
  prepared: prepare.Prepared
  proxy: pretrain.Pretrain
  proxy_set: ProxySet
  partitioner: meshes.Partitioner

  @functools.cached_property
  def corpus(self):
    return self.prepared.corpus

  @functools.cached_property
  def proxy_indices(self) -> np.ndarray:
    """Rows of the corpus that are the proxy set, `[M] int64`, ascending."""
    return self.proxy_set.indices(self.corpus.ids)

  @functools.cached_property
  def proxies(self) -> dict[str, np.ndarray]:
    """The proxy set as one host batch."""
    batch = self.corpus.batch(self.proxy_indices)
    self.example_losses.check_batch(batch)
    return batch

  @functools.cached_property
  def model(self):
    return language_models.language_model(
      self.proxy.model, self.corpus.vocab_size, self.corpus.length
    )

  @functools.cached_property
  def example_losses(self) -> Callable[[Any, Any], jax.Array]:
    return losses.lm_example_losses(self.model, chunk=self.proxy.loss_chunk)

  def place_rows(self, rows, micro_batch_size: int) -> tuple[dict[str, jax.Array], int]:
    """Places any number of rows, filled up with repeats of the first so that the mesh divides them.

    Args:
      rows: the same in every process of the job.
      micro_batch_size: most rows to work on at a time.

    Returns:
      The placed rows, whose number is a multiple of the micro-batch size, and that size: at most
      `micro_batch_size` rounded up to a multiple of the mesh's shards.
    """
    num = len(next(iter(rows.values())))
    num_filled, size = self.partitioner.filled_rows(num, micro_batch_size)
    filler = num_filled - num
    filled = {k: np.concatenate([v, np.repeat(v[:1], filler, axis=0)]) for k, v in rows.items()}
    return self.partitioner.place_rows(filled), size

  def proxy_params(self, step: int | None = None):
    """Parameters of the proxy at a kept step (None: its last)."""
    step = self.proxy.num_steps if step is None else step
    if step not in self.proxy.kept_steps():
      raise ValueError(
        f"the proxy keeps no parameters at step {step}; add it to pds.Pretrain.keep_steps "
        f"(kept: {self.proxy.kept_steps()})."
      )
    return language_models.load_params(
      self.context.input("proxy"), step, self.model, self.partitioner
    )

  @functools.cached_property
  def _jitted_losses(self):
    return jax.jit(self.example_losses)

  def losses_of(self, params, rows, batch_size: int) -> np.ndarray:
    """`[N]` losses of the host batch `rows`, `batch_size` at a time."""
    return examples.map_examples(
      self._jitted_losses, params, rows, batch_size, self.partitioner
    )

  def target_batch(self, num: int | None) -> dict[str, np.ndarray]:
    """`num` random instances of the target's dev part, the same for every method (None: all)."""
    target = self.prepared.target_dev
    num = len(target) if num is None else num
    order = np.random.default_rng(self.proxy_set.seed).permutation(len(target))
    batch = target.batch(np.sort(order[:num]))
    self.example_losses.check_batch(batch)
    return batch

  def target_loss(self, num: int | None, micro_batch_size: int) -> Callable[[Any], jax.Array]:
    """`params -> J`, the mean loss over the target's dev part, a micro-batch at a time."""
    rows = self.target_batch(num)
    placed, size = self.place_rows(rows, micro_batch_size)
    return control.mean_target_loss(
      self.example_losses, placed, size, num_rows=len(rows["example_id"]),
      device_rows=self.partitioner.device_rows,
    )

  def check_sizes(self, method) -> None:
    """Refuses, before anything is placed or compiled, sizes that the data or the mesh cannot give.

    Raises:
      ValueError: naming the macro of the PDS gin files to change.
    """
    check_sizes(
      method, self.proxy_set, num_corpus=len(self.corpus), num_target=len(self.prepared.target_dev),
      num_shards=self.partitioner.num_batch_shards,
    )

  def divided(self, values: np.ndarray, params, divide_by: str | None) -> np.ndarray:
    """Proxy scores `[M]` over what `divide_by` names, so that size alone does not make a score.

    Args:
      values: scores of the proxies.
      params: where the gradients are taken.
      divide_by: "gradient_norm" (the score becomes a cosine, up to a common factor),
        "sqrt_length" of the positions that count, or None.
    """
    if divide_by is None:
      return values
    if divide_by == "sqrt_length":
      return values / np.sqrt(self.proxies["loss_mask"].sum(axis=1))
    # One example at a time, which no mesh splits: every device takes all of them.
    rows = {k: v for k, v in self.proxies.items() if k not in meshes.HOST_FIELDS}
    norms = processes.fetch(gradient_norms(self.example_losses, params, rows))
    self.add_flops(len(values) * self.corpus.length, 3)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)

  def add_flops(self, num_positions: float, passes: float) -> None:
    """Counts `passes` forward passes' worth of arithmetic over `num_positions` tokens."""
    per_token = flops.forward_flops_per_token(self.model.config, self.corpus.length)
    self.context.flops += passes * num_positions * per_token


def check_sizes(
  method, proxy_set: ProxySet, *, num_corpus: int, num_target: int, num_shards: int = 1
) -> None:
  """Refuses a proxy method's sizes that do not fit corpus, target or mesh.

  Args:
    method: any of those here, or one's own.
    proxy_set: that a proxy method scores.
    num_corpus: instances of the corpus.
    num_target: instances of the target's dev part.
    num_shards: parts that the mesh splits a batch into.
  """
  if not hasattr(method, "score_proxies"):
    return
  proxy_set.count(num_corpus)
  check_most_target(method, num_target, f"the target's dev part has {num_target} instances")
  size, what = _inner_size(method)
  if size > num_corpus:
    raise ValueError(
      f"method {method.name!r} has {what} of {size}, more than the corpus's {num_corpus} "
      "instances; lower it or enlarge the corpus."
    )
  check_inner_size(method, proxy_set.count(num_corpus), num_shards)


def check_most_target(method, most: int, why: str) -> None:
  """Refuses a number of target instances that is more than there can be."""
  wanted = getattr(method, "num_target", None)
  if isinstance(wanted, int) and wanted > most:
    raise ValueError(
      f"method {method.name!r} has num_target={wanted} (TARGET_INSTANCES), but {why}; lower it, "
      "or set None for all."
    )


def check_inner_size(method, num_proxies: int, num_shards: int) -> None:
  """Refuses an inner batch that the proxies or the mesh cannot give."""
  size, what = _inner_size(method)
  if getattr(method, "inner_data", None) == "proxies" and size > num_proxies:
    raise ValueError(
      f"method {method.name!r} has {what} of {size}, more than the {num_proxies} proxies that it "
      "draws from; lower it or raise PROXIES."
    )
  if size % num_shards:
    raise ValueError(
      f"method {method.name!r} has {what} of {size}, which does not split over the mesh's "
      f"{num_shards} data shards; set it to a multiple of {num_shards}."
    )


def _inner_size(method) -> tuple[int, str]:
  """Instances that a method takes together, and what they are called; 0 of other methods."""
  if isinstance(method, PMP):
    return method.batch_size, "batch_size (INNER_BATCH_SIZE)"
  if isinstance(method, InfluenceScores):
    return method.num_hessian, "num_hessian"
  return 0, ""


def fewer_than_most(
  method, proxy_set: ProxySet, *, num_corpus: int, num_target: int
) -> list[str]:
  """Sentences that tell where "auto" takes less than its bound; arguments as for `check_sizes`."""
  if not hasattr(method, "score_proxies"):
    return []
  told = []
  if proxy_set.num_proxies == AUTO and num_corpus < proxy_set.most:
    told.append(
      f"all {num_corpus} instances of the corpus are proxies, fewer than "
      f"pds.ProxySet.max_proxies={proxy_set.most}"
    )
  if getattr(method, "num_target", None) == AUTO and num_target < method.max_target:
    told.append(
      f"method {method.name!r} takes all {num_target} instances of the target's dev part, fewer "
      f"than max_target={method.max_target}"
    )
  return told


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class PMP:
  """PDS: scores from the costates of Pontryagin's principle, averaged over proxy checkpoints.

  Attributes:
    name: of the method in folders and figures.
    optimizer: of the inner run; the costates are exact for any optax transformation.
    options: of each solve. Its `micro_batch_size` is rounded so that each of the mesh's shards has
      as many rows, and at least one; `trajectory` "auto" takes what recomputes least in the memory
      of the devices; `segment_steps` lie between two points that an interrupted solve resumes from,
      and whose states lie in host memory.
    num_steps: inner steps, T.
    batch_size: instances of an inner step, drawn from the corpus by `data_seed`.
    checkpoints: proxy steps to start from; None: the proxy's last.
    num_target: random instances of the target's dev part in J; None: all; "auto": `max_target`, or
      all where there are fewer.
    max_target: most that "auto" takes.
    device_bytes: memory of a device, for `trajectory="auto"` if jax does not tell it.
    micro_batch_size: target instances, and proxies unless the options say, that are differentiated
      at a time; rounded like that of the options.
    matmul_precision: of the solve's products, as jax names it; "highest" is full float32 also on
      GPUs and TPUs, None their default.
    inner_data: what inner batches are drawn from, "corpus", or "proxies" as the paper's algorithm
      has it: then every example that is scored may also have been trained on.
    shuffle: draw the inner batches by `data_seed`; False takes the first instances in order, as the
      reference does.
    divide_by: divide each proxy's score by its "gradient_norm" at the checkpoint or by the
      "sqrt_length" of its text; None leaves it, as the paper does.
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

  def __post_init__(self):
    self.options.check_sizes(self.num_steps, self.batch_size)

  def target_instances(self, num: int) -> int:
    """Instances in J, of a dev part of that size."""
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
    """Itself, with the trajectory decided from the devices' memory if it is "auto"."""
    if self.options.trajectory != AUTO:
      return self
    device = bench.partitioner.mesh.devices.flat[0]
    memory = budget.memory_of(device, self.device_bytes)
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
    corpus, num_proxies = bench.corpus, len(bench.proxies["example_id"])
    proxies, proxy_batch_size = bench.place_rows(
      bench.proxies, self.options.proxy_batch_size or self.micro_batch_size
    )
    inner_indices = bench.proxy_indices if self.inner_data == "proxies" else None
    source = language_models.batch_source(
      corpus, inner_indices, self.batch_size, self.data_seed, self.shuffle
    )
    steps = [source.batch(t) for t in range(self.num_steps)]
    batches = bench.partitioner.place_batch(
      {name: np.stack([step[name] for step in steps]) for name in steps[0]}, axis=1
    )
    weights = np.full((self.num_steps, self.batch_size), 1 / self.batch_size, np.float32)
    num_target = self.target_instances(len(bench.prepared.target_dev))
    target_loss = bench.target_loss(num_target, self.micro_batch_size)
    options = dataclasses.replace(
      self.options, micro_batch_size=self.inner_rows(bench.partitioner),
      proxy_batch_size=proxy_batch_size,
    )
    num_segments = 2 * -(-self.num_steps // options.segment_steps)
    rows, norms = [], collections.defaultdict(list)
    for step in self.checkpoints or (bench.proxy.num_steps,):
      params = bench.proxy_params(step)
      title = f"{self.name}@{step}"
      with (
        self._store(bench, step) as store,
        bench.context.progress(num_segments, "segments", title) as bar,
        bench.partitioner.activate(),
        processes.saving_on_request(),
        jax.default_matmul_precision(self.matmul_precision),
      ):

        def advance(done, _, bar=bar, store=store):
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
          log=lambda text, title=title: bench.context.log(f"{title}: {text}"),
        )
      result = processes.fetch(result._replace(params=None))
      control.check_result(result)
      values = result.proxy_scores[:num_proxies]
      rows.append(bench.divided(values, params, self.divide_by))
      for name in ("target_losses", "costate_norms", "target_grad_norms"):
        norms[name].append(np.asarray(getattr(result, name), np.float64).tolist())
    bench.context.extra.update(norms)
    passes = solve_cost.solve_passes(
      self.optimizer, params, self.num_steps, options, in_segments=True
    )
    sizes = solve_cost.Passes(batch=self.batch_size, target=num_target, proxy=num_proxies)
    for num_passes, size in zip(passes, sizes, strict=True):
      bench.add_flops(size * corpus.length * len(rows), num_passes)
    return np.stack(rows)

  def _store(self, bench: Bench, step: int):
    num_segments = -(-self.num_steps // self.options.segment_steps)
    return contextlib.closing(checkpoints.CheckpointStore(
      bench.context.directory / UNFINISHED / str(step), max_to_keep=2,
      keep_steps=range(1, num_segments), chained=True,
    ))


@dataclasses.dataclass(frozen=True)
class _DirectionMethod:
  """Scores `<direction, grad l_n>` at proxy checkpoints; subclasses say which direction.

  Attributes:
    checkpoints, num_target, micro_batch_size, divide_by: as in `PMP`.
  """

  checkpoints: Annotated[Sequence[Count], NonEmpty, Distinct] | None = None
  num_target: PositiveInt | None = None
  micro_batch_size: PositiveInt = 64
  divide_by: Literal[DIVISORS] | None = None

  def direction(self, bench: Bench, params, target_grad):
    raise NotImplementedError

  def score_proxies(self, bench: Bench) -> np.ndarray:
    bench.check_sizes(self)
    num_proxies = len(bench.proxies["example_id"])
    proxies, proxy_batch_size = bench.place_rows(bench.proxies, self.micro_batch_size)
    target_loss = bench.target_loss(self.num_target, self.micro_batch_size)
    gradient = jax.jit(jax.grad(target_loss))
    rows = []
    for step in self.checkpoints or (bench.proxy.num_steps,):
      params = bench.proxy_params(step)
      with bench.partitioner.activate():
        direction = self.direction(bench, params, gradient(params))
        values = processes.fetch(control.directional_scores(
          bench.example_losses, params, direction, proxies, proxy_batch_size,
          device_rows=bench.partitioner.device_rows,
        ))[:num_proxies]
      rows.append(bench.divided(values, params, self.divide_by))
    num_target = len(bench.target_batch(self.num_target)["example_id"])
    num_scored = num_target + num_proxies
    bench.add_flops(num_scored * bench.corpus.length * len(rows), 3)
    return np.stack(rows)


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class OneStep(_DirectionMethod):
  """Gradient similarity at one step, `<grad J, grad l_n>`: the limit of PDS for T = 1."""

  name: Name = "one_step"

  def direction(self, bench, params, target_grad):
    return target_grad


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class InfluenceScores(_DirectionMethod):
  """IF-score: `<(H + damping I)^-1 grad J, grad l_n>` at one checkpoint, H of the corpus loss.

  Attributes:
    curvature: "fisher" (positive semi-definite) or "hessian", which far from a minimum has negative
      eigenvalues that the damping must exceed.
    damping: added to the Hessian's diagonal; None: a hundredth of its mean eigenvalue.
    solver: "lissa" or "cg". The matrix is so ill-conditioned with a small damping that conjugate
      gradients need hundreds of products before they are better than nothing.
    iterations: Hessian-vector products.
    num_hessian: corpus instances that estimate the Hessian, a multiple of `micro_batch_size`.
  """

  name: Name = "if_score"
  curvature: Literal["fisher", "hessian"] = "fisher"
  damping: NonNegative | None = None
  solver: Literal["lissa", "cg"] = "lissa"
  iterations: PositiveInt = 50
  num_hessian: PositiveInt = 256
  data_seed: Seed = 0

  def __post_init__(self):
    if self.num_hessian % min(self.micro_batch_size, self.num_hessian):
      raise ValueError(
        f"pds.InfluenceScores.num_hessian={self.num_hessian} is not a multiple of "
        f"micro_batch_size={self.micro_batch_size}; choose one."
      )

  def direction(self, bench, params, target_grad):
    source = language_models.batch_source(bench.corpus, None, self.num_hessian, self.data_seed)
    batch = bench.partitioner.place_batch(
      {name: rows[None] for name, rows in source.batch(0).items()}, axis=1
    )
    passes = solve_cost.influence_passes(
      self.solver, self.iterations, curvature=self.curvature, damping=self.damping
    )
    bench.add_flops(self.num_hessian * bench.corpus.length, passes)
    return control.influence_direction(
      bench.example_losses, target_grad, params, batch, damping=self.damping,
      curvature=self.curvature, method=self.solver, iterations=self.iterations,
      micro_batch_size=bench.partitioner.micro_batch_size(
        self.num_hessian, min(self.micro_batch_size, self.num_hessian)),
    )


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class RhoLoss:
  """RHO-loss: the proxy's loss less the loss after fine-tuning the proxy on the target.

  Attributes:
    optimizer: of the fine-tuning; None: AdamW at the constant `learning_rate`.
    learning_rate: of that AdamW.
    epochs: over the target's dev part.
    batch_size: of the fine-tuning; at most the target's size, in multiples of the mesh's shards.
  """

  name: Name = "rho_loss"
  optimizer: optax.GradientTransformation | None = None
  learning_rate: Positive = 1e-5
  epochs: PositiveInt = 3
  batch_size: PositiveInt = 32
  micro_batch_size: PositiveInt = 64
  data_seed: Seed = 0

  def score_proxies(self, bench: Bench) -> np.ndarray:
    bench.check_sizes(self)
    optimizer = self.optimizer or optimizers.adamw(self.learning_rate)
    target, shards = bench.prepared.target_dev, bench.partitioner.num_batch_shards
    # A target smaller than the mesh is repeated until every shard has a row.
    indices = np.resize(np.arange(len(target)), max(len(target), shards))
    size = max(min(self.batch_size, len(indices)) // shards, 1) * shards
    num_steps = self.epochs * (len(indices) // size)
    config = dataclasses.replace(
      bench.proxy, optimizer=optimizer, num_steps=num_steps, batch_size=size, keep_every=None,
      keep_steps=(), accumulate=math.gcd(bench.proxy.accumulate, size),
    )
    after = pretrain.fit(
      bench.model, bench.example_losses, config,
      language_models.batch_source(target, indices, size, self.data_seed), bench.partitioner,
      directory=bench.context.directory / "fine_tuning", seed=self.data_seed,
      initial_params=bench.proxy_params(), description=f"{self.name} fine-tuning",
    )
    before = bench.losses_of(bench.proxy_params(), bench.proxies, self.micro_batch_size)
    bench.add_flops(num_steps * size * target.length, 3)
    bench.add_flops(2 * len(bench.proxies["example_id"]) * bench.corpus.length, 1)
    return (before - bench.losses_of(after, bench.proxies, self.micro_batch_size))[None]


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Random:
  """Uniform selection: every score is 0 and the selection's Gumbel noise decides."""

  name: Name = "random"

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    return (np.zeros(len(indices)) for indices in blocks(len(bench.corpus), 65_536))


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Length:
  """Prefers instances with many real tokens; tells whether length alone explains a gain."""

  name: Name = "length"

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    for indices in blocks(len(bench.corpus), 4096):
      yield bench.corpus.batch(indices)["loss_mask"].sum(axis=1)


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Filters by the proxy's loss on each instance.

  Attributes:
    prefer: "low" keeps what the proxy predicts best, "middle" what is nearest the median loss.
  """

  name: Name = "perplexity"
  prefer: Literal["low", "middle"] = "low"
  batch_size: PositiveInt = 64

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    corpus, params = bench.corpus, bench.proxy_params()
    all_losses = []
    with bench.context.progress(len(corpus), "instances", self.name) as bar:
      for indices in blocks(len(corpus), 4096):
        all_losses.append(bench.losses_of(params, corpus.batch(indices), self.batch_size))
        bar.update(len(indices))
    bench.add_flops(len(corpus) * corpus.length, 1)
    values = np.concatenate(all_losses)
    yield -values if self.prefer == "low" else -np.abs(values - np.median(values))


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class DSIR:
  """Importance weights of hashed n-grams, target against raw (spec section 7).

  Attributes:
    num_raw: corpus instances that estimate the raw distribution, drawn by `seed`.
  """

  name: Name = "dsir"
  num_raw: PositiveInt = 20_000
  seed: Seed = 0

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    corpus, vocabulary = bench.corpus, bench.prepared.vocabulary
    target = bench.prepared.target_dev
    rng = np.random.default_rng(self.seed)
    raw = np.sort(rng.choice(len(corpus), min(self.num_raw, len(corpus)), replace=False))
    log_ratio = dsir.fit(
      texts_of(target, np.arange(len(target)), vocabulary), texts_of(corpus, raw, vocabulary)
    )
    with bench.context.progress(len(corpus), "instances", self.name) as bar:
      for indices in blocks(len(corpus), 4096):
        yield dsir.scores(texts_of(corpus, indices, vocabulary), log_ratio)
        bar.update(len(indices))


def needs_forward_mode(method) -> bool:
  """Whether the method differentiates the proxy's losses along a direction (see `control`)."""
  return isinstance(method, (PMP, _DirectionMethod))


def blocks(num: int, size: int) -> Iterator[np.ndarray]:
  """Consecutive indices `0 .. num` in blocks of `size`."""
  for start in range(0, num, size):
    yield np.arange(start, min(start + size, num), dtype=np.int64)


def texts_of(instances, indices: np.ndarray, vocabulary) -> list[str]:
  """The instances as text, an empty line between documents."""
  rows = zip(instances.tokens(indices), instances.num_tokens(indices), strict=True)
  return ["\n\n".join(export.instance_texts(row[:num], vocabulary)) for row, num in rows]
