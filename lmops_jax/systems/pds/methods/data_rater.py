"""DataRater: a scorer that is trained by the exact gradient through windows of training.

arXiv 2505.17895. There is nothing to learn scores from: the scorer rates what models train on, and
descends their loss on the target (`control.rated_window`). Beside the paper's own setting, the
target stands for its held-out part of the corpus, inner models start from the proxy's checkpoints
instead of random parameters, and the rater is PDS's scorer instead of a transformer that is not
causal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmops_jax import control
from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  Name,
  NonEmpty,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.control.dynamics import State, init_state
from lmops_jax.data import batches as data_batches
from lmops_jax.mesh import checkpoints
from lmops_jax.sizing import flops, solve_cost
from lmops_jax.systems.pds import scorer
from lmops_jax.systems.pds.methods.bench import Bench
from lmops_jax.systems.pds.methods.sizes import Inner
from lmops_jax.training import loop, losses
from lmops_jax.training.learner import Learner
from lmops_jax.training.sources import Batches, part_of

_RATED, _TARGET = "rated", "target"  # parts of a batch


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class DataRater:
  """DataRater (arXiv 2505.17895): the scorer learns to rate from windows of training on proxies.

  Attributes:
    optimizer: that of the inner models.
    meta_optimizer: the rater's. Each inner model has a state of its own for it, and their updates
      are averaged.
    num_windows: steps of the rater; each takes a window of every inner model.
    window_steps: inner steps that a window differentiates through, T.
    batch_size: proxies of an inner step, whose ratings a softmax turns into weights.
    target_batch_size: instances of the target's loss behind a window, drawn anew for each; lowered
      to the target's size, in multiples of the mesh's shards.
    population: inner models.
    lifetime: windows after which an inner model starts anew, each at another time.
    checkpoints: kept steps of the proxy that inner models start from, in turn; None: its last.
    num_target: random instances of the target's dev part that batches are drawn from; None: all.
    micro_batch_size: instances that are differentiated at a time.
    checkpoint_every: windows between two states to resume from.
    data_seed: of the order.
  """

  optimizer: optax.GradientTransformation
  meta_optimizer: optax.GradientTransformation
  name: Name = "data_rater"
  num_windows: PositiveInt = 60
  window_steps: PositiveInt = 2
  batch_size: PositiveInt = 32
  target_batch_size: PositiveInt = 32
  population: PositiveInt = 2
  lifetime: PositiveInt = 20
  checkpoints: Annotated[Sequence[Count], NonEmpty, Distinct] | None = None
  num_target: PositiveInt | None = None
  micro_batch_size: PositiveInt = 64
  checkpoint_every: PositiveInt = 50
  data_seed: Seed = 0

  def needs_forward_mode(self) -> bool:
    """True: it differentiates the proxy's losses along costates."""
    return True

  def inner(self) -> Inner:
    """The size of a batch, which is of proxies."""
    return Inner(self.batch_size, "batch_size (INNER_BATCH_SIZE)", of_proxies=True)

  def fit_scorer(self, bench: Bench, config: scorer.Scorer) -> None:
    """See `ScorerMethod`; of `config`, what the rater is and starts from counts."""
    bench.check_sizes(self)
    context, partitioner = bench.context, bench.partitioner
    view = scorer.own_view(context, config, bench.prepared)
    model = scorer.scorer_model(config, bench.proxy, view)
    steps = self.checkpoints or (bench.proxy.num_steps,)
    rater = scorer.first_params(config, model, bench.proxy_params, partitioner)
    if rater is None:
      rater = jax.jit(lambda key: nn.unbox(scorer.initializer(model)(key)))(
        jax.random.key(config.seed))
    result = loop.train(
      self.learner(bench, model, len(steps)), Batches(self._windows(bench, view)),
      self.num_windows, self.data_seed, context.directory / "training", partitioner,
      initial_params={"rater": rater, "starts": tuple(map(bench.proxy_params, steps))},
      records=loop.Records(
        checkpoint_every=self.checkpoint_every, description=f"{self.name} windows"),
    )
    rater = result.state.params["rater"]
    checkpoints.save_params(context.directory / scorer.PARAMS_FOLDER, rater)
    context.extra["windows"] = result.history
    self._count(bench, model, view, result.state.params["starts"][0])

  def learner(self, bench: Bench, model, num_starts: int) -> Learner:
    """What the loop trains: a step is a window of each inner model, and one step of the rater."""
    example_losses, partitioner = bench.example_losses, bench.partitioner
    ratings = functools.partial(_ratings, losses.regression_example_losses(model).predict)
    size = partitioner.micro_batch_size(self.batch_size, self.micro_batch_size)
    first_of = functools.partial(init_state, self.optimizer.init, self.optimizer.update)

    def init(key, params=None):
      if params is None:
        start = loop.initializer(bench.model)(key)
        params = {"rater": scorer.initializer(model)(key), "starts": (start,) * num_starts}
      meta = init_state(self.meta_optimizer.init, self.meta_optimizer.update, params["rater"])
      copied = functools.partial(jax.tree.map, jnp.copy)  # states share no array: they are donated
      return RaterState(
        params, tuple(copied(meta.opt_state) for _ in range(self.population)),
        tuple(copied(first_of(params["starts"][p % num_starts])) for p in range(self.population)),
        jnp.zeros((), jnp.int32))

    def step(state, batch, key):
      rater, target = state.params["rater"], part_of(batch, _TARGET)
      rows = {name: x for name, x in batch.items() if not name.startswith(f"{_TARGET}/")}
      target_loss = control.mean_target_loss(
        example_losses, target, self.micro_batch_size, device_rows=partitioner.device_rows)

      def through_window(member):
        start, inner, opt_state, is_new, batches = member
        inner = jax.tree.map(lambda a, b: jnp.where(is_new, a, b), first_of(start), inner)
        run = control.TrainingRun(
          example_losses, self.optimizer, inner.params, batches,
          device_rows=partitioner.device_rows)
        window = control.rated_window(
          ratings, rater, run, target_loss, opt_state=inner.opt_state, micro_batch_size=size)
        return window, *self.meta_optimizer.update(window.grads, opt_state, rater)

      members = range(self.population)
      ages = state.window + np.array([p * self.lifetime // self.population for p in members])
      starts = [state.params["starts"][p % num_starts] for p in members]
      window, updates, opt_states = jax.lax.map(through_window, (  # compiled once for all of them
        _stacked(starts), _stacked(state.inner), _stacked(state.meta), ages % self.lifetime == 0,
        {name: jnp.moveaxis(x, 0, 2) for name, x in rows.items()}))
      rater = optax.apply_updates(rater, jax.tree.map(lambda x: x.mean(0), updates))
      loss_sum = jnp.sum(window.target_loss)
      grad_norm = jax.vmap(optax.tree.norm)(window.grads).mean()
      is_finite = jnp.isfinite(loss_sum) & jnp.isfinite(grad_norm)
      sums = {
        "loss_sum": loss_sum, "num_examples": jnp.asarray(self.population, jnp.int32),
        "grad_norm": grad_norm, "nonfinite": 1 - is_finite.astype(jnp.int32),
        "effective_share": 1 / (self.batch_size * jnp.square(window.weights).sum(-1).mean()),
      }
      params = {**state.params, "rater": rater}
      return RaterState(
        params, _parts(opt_states, members), _parts(window.state, members), state.window + 1), sums

    return Learner(init, step, lambda state: state.params, settings={
      name: getattr(self, name) for name in (
        "window_steps", "population", "lifetime", "micro_batch_size")})

  def _windows(self, bench: Bench, view: scorer.View):
    """`window -> batch`: `[B,P,T,S]` of the inner steps, and a batch of the target."""
    rated = view.rows(bench.proxy_indices)
    rows = _plain(bench.proxies) | _prefixed(_RATED, _plain(rated))
    target = _prefixed(_TARGET, _plain(bench.target_batch(self.num_target)))
    num_proxies, num_target = (len(next(iter(x.values()))) for x in (rows, target))
    # A target smaller than the mesh is repeated until every shard has a row.
    num_filled = max(num_target, bench.partitioner.num_batch_shards)
    target_size = self._target_size(bench)

    def own(size):
      return data_batches.host_rows(size, jax.process_index(), jax.process_count())

    def at(window):
      first = window * self.population * self.window_steps
      index = np.stack([
        data_batches.batch_indices(num_proxies, self.batch_size, self.data_seed, first + i)
        for i in range(self.population * self.window_steps)])
      index = index.reshape(self.population, self.window_steps, self.batch_size)
      index = np.moveaxis(index[..., own(self.batch_size)], -1, 0)
      drawn = data_batches.batch_indices(num_filled, target_size, self.data_seed, window)
      drawn = drawn[own(target_size)] % num_target
      return {name: x[index] for name, x in rows.items()} | {
        name: x[drawn] for name, x in target.items()}

    return at

  def _target_size(self, bench: Bench) -> int:
    """Instances of a batch of the target."""
    shards = bench.partitioner.num_batch_shards
    num = self.num_target or len(bench.prepared.target_dev)
    return max(min(self.target_batch_size, num) // shards, 1) * shards

  def _count(self, bench: Bench, model, view: scorer.View, params) -> None:
    """Adds what all windows compute."""
    windows = self.num_windows * self.population
    passes = solve_cost.solve_passes(
      self.optimizer, params, self.window_steps, control.SolveOptions(objective="terminal"))
    bench.add_flops(windows * self.batch_size * bench.corpus.length, passes.batch)
    bench.add_flops(windows * self._target_size(bench) * bench.corpus.length, passes.target)
    rated = windows * self.window_steps * self.batch_size * view.length
    per_token = flops.forward_flops_per_token(model.config, view.length, unembedding=False)
    bench.context.flops += (1 + solve_cost.GRADIENT) * rated * per_token


class RaterState(NamedTuple):
  """What is carried from window to window.

  Attributes:
    params: `rater`, and `starts`, a tuple of what inner models start from.
    meta: the rater's optimizer, a state for each inner model.
    inner: the inner models.
    window: `[] int32`, windows done.
  """

  params: dict[str, Any]
  meta: tuple[Any, ...]
  inner: tuple[State, ...]
  window: jax.Array


def _stacked(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _parts(stacked: Any, indices: Sequence[int]) -> tuple[Any, ...]:
  return tuple(jax.tree.map(lambda x: x[p], stacked) for p in indices)  # noqa: B023


def _ratings(predict, params, batch) -> jax.Array:
  return predict(params, part_of(batch, _RATED))


def _plain(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Rows without their ids: rows of windows are no rows of a batch that an id could name."""
  return {name: x for name, x in rows.items() if name != "example_id"}


def _prefixed(part: str, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {f"{part}/{name}": x for name, x in rows.items()}
