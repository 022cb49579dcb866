"""Prototypical fine-tuning as a learner: encoder and prototypes in one step (arXiv:2211.13638).

A step is: the loss of the batch and the encoder's update and the prototypes'; logits clipped to the
signs of their classes; the importance of each prototype remembered; then, from the features that
this same forward pass has found, prototypes created in the order of the rows; and at the pruning
points of an epoch, some taken away. A prototype that a step creates takes part from the next step
on: at once, its own row would be told for free.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Gt, Le

from lmops_jax.config.setting_types import (
  Count,
  NonNegative,
  Part,
  Positive,
  PositiveInt,
  Size,
  component,
)
from lmops_jax.control import dynamics
from lmops_jax.systems.prototypes import growth, mixture
from lmops_jax.systems.prototypes.growth import Table
from lmops_jax.systems.prototypes.mixture import Prototypes
from lmops_jax.training.learner import Learner

_CALIBRATION_ROWS = 2_000
_LEAST_WINDOW = 8
_CAPACITY, _PER_CLASS, _MOST = 64, 16, 256


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Growth:
  """How prototypes begin, come and go.

  Attributes:
    first_rows: rows of each class whose mean is its first prototype (n).
    start: "means" of those rows; "clusters", `per_class` centres of all rows of the class by
      k-means; or "random", the place of any row (PF-I).
    per_class: first prototypes of a class, for "clusters" alone.
    alpha: concentration; smaller opens fewer prototypes.
    quantile: of the distances of rows to their class's first prototype, where the threshold begins.
    variance: the first variance; None takes the one that `quantile` asks for.
    private_variances: a variance for each prototype in place of one for all.
    create: whether prototypes are added.
    warmup_epochs: epochs before the first is.
    cooldown_epochs: epochs after the last is. A prototype that comes in lies among the rows, nearer
      to most of them than those that have learned, and errs until it has learned too.
    capacity: most prototypes; None is max(64, 16 classes), at most 256.
    prunings_per_epoch: M; 0 prunes nothing.
    least_importance: eps, below which a prototype may go.
    window: steps whose importance counts; None is an epoch, at least 8.
    diversity: weight of the penalty of near prototypes (rho_d).
    diversity_limit: "root", the threshold's square root, or "printed", the threshold itself.
    diversity_threshold: "current", or "first" of the run (PF-F).
    rate_of_prototypes: what the optimizer's updates of prototypes are multiplied with.
    bins: quantile bins that take the place of classes if targets are numbers.
  """

  first_rows: PositiveInt = 8
  start: Literal["means", "clusters", "random"] = "means"
  per_class: PositiveInt = 1
  alpha: Annotated[float, Gt(0), Le(1)] = 0.1
  quantile: Part = 0.9
  variance: Positive | None = None
  private_variances: bool = False
  create: bool = True
  warmup_epochs: Count = 1
  cooldown_epochs: Count = 1
  capacity: Size | None = None
  prunings_per_epoch: Count = 1
  least_importance: NonNegative = 1e-3
  window: PositiveInt | None = None
  diversity: NonNegative = 1e-4
  diversity_limit: Literal["root", "printed"] = "root"
  diversity_threshold: Literal["current", "first"] = "current"
  rate_of_prototypes: Positive = 1.0
  bins: PositiveInt = 5

  def __post_init__(self):
    if self.per_class > 1 and self.start != "clusters":
      raise ValueError(
        f"prototypes.Growth.per_class={self.per_class} needs start='clusters', and start is "
        f"{self.start!r}; set that, or per_class to 1."
      )

  def room(self, num_classes: int) -> int:
    """K, the slots of a run.

    Raises:
      ValueError: for a capacity below the number of first prototypes.
    """
    first = num_classes * self.per_class
    if self.capacity is None:
      return max(first, min(max(_CAPACITY, _PER_CLASS * num_classes), _MOST))
    if self.capacity < first:
      raise ValueError(
        f"prototypes.Growth.capacity={self.capacity} is below the {first} prototypes that "
        f"{num_classes} classes begin with; set it to {first} or more."
      )
    return self.capacity

  def steps_of_window(self, steps_per_epoch: int) -> int:
    """W."""
    return self.window or max(steps_per_epoch, _LEAST_WINDOW)


class PrototypeState(NamedTuple):
  """The state of a run.

  Attributes:
    params: `{"encoder": tree, "prototypes": Prototypes}`.
    opt_state: the optimizer's, of both by the same names.
    table: what is not trained.
    step: `[] int32`, steps done.
    first_threshold: `[] float32`.
  """

  params: Any
  opt_state: Any
  table: Table
  step: jax.Array
  first_threshold: jax.Array


def first_prototypes(
  features: np.ndarray, targets: np.ndarray, num_classes: int | None, settings: Growth,
  window: int, seed: int,
) -> dict[str, Any]:
  """`{"prototypes": Prototypes, "table": Table}` of the rows before any training (principle 1).

  Args:
    features: `[N,D]`, the encoder's without dropout.
    targets: `[N]` classes from 0, or numbers if `num_classes` is None.
    window: steps, see `Growth.steps_of_window`.

  Raises:
    ValueError: for a class without a row, features that are not finite, or no variance that gives
      the threshold of `Growth.quantile`.
  """
  features = np.asarray(features, np.float32)
  if not np.isfinite(features).all():
    row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
    raise ValueError(f"the encoder's vector of row {row} is not finite; check its weights.")
  edges = None if num_classes else bin_edges(targets, settings.bins)
  labels = np.asarray(targets, np.int64) if num_classes else binned(targets, edges)
  number = num_classes or settings.bins
  rng = np.random.default_rng(seed)
  centers, of_label, says = [], [], []
  for label in range(number):
    rows = np.flatnonzero(labels == label)
    if not len(rows):
      what = f"class {label}" if num_classes else f"bin {label} of prototypes.Growth.bins"
      raise ValueError(
        f"no row is of {what}, so it has no prototype to begin with; give rows of it or leave it "
        "out."
      )
    begun = _first_centers(features, rows, settings, rng)
    centers.extend(begun)
    of_label += [label] * len(begun)
    says += [np.mean(np.asarray(targets)[rows], dtype=np.float64)] * len(begun)
  centers, of_label = np.asarray(centers, np.float32), np.asarray(of_label, np.int32)
  room, width = settings.room(number), features.shape[1]
  spread = mixture.spread_of(jnp.asarray(centers), jnp.ones(len(centers), bool))
  variance = settings.variance
  if variance is None:
    rows = rng.permutation(len(features))[:_CALIBRATION_ROWS]
    distances = np.array([
      np.square(features[row] - centers[of_label == labels[row]]).sum(axis=1).min()
      for row in rows])
    variance = mixture.calibrated_variance(
      distances, float(spread), settings.alpha, width, settings.quantile)
  first = jnp.asarray(of_label)
  if num_classes:
    logits = mixture.first_logits(first, number)
  else:
    logits = jnp.asarray(says, jnp.float32)[:, None]
  in_front = ((0, room - len(centers)), (0, 0))
  return {
    "prototypes": Prototypes(
      jnp.pad(jnp.asarray(centers), in_front), jnp.pad(logits, in_front),
      jnp.full((room,) if settings.private_variances else (), np.log(variance), jnp.float32)),
    "table": growth.new_table(first, room, window),
  }


def _first_centers(features, rows, settings: Growth, rng) -> np.ndarray:
  """Where the prototypes of a class begin, `[n,D]`."""
  if settings.start == "random":
    return features[rng.integers(len(features), size=1)]
  if settings.start == "means":
    chosen = rng.permutation(rows)[: settings.first_rows]
    return features[chosen].mean(axis=0, keepdims=True, dtype=np.float64)
  from sklearn.cluster import KMeans

  number = min(settings.per_class, len(np.unique(features[rows], axis=0)))
  found = KMeans(number, n_init=3, random_state=int(rng.integers(2**31))).fit(features[rows])
  return found.cluster_centers_


def bin_edges(targets: np.ndarray, bins: int) -> np.ndarray:
  """`[bins - 1] float64`: quantiles between which targets share a bin."""
  return np.quantile(np.asarray(targets, np.float64), np.arange(1, bins) / bins)


def binned(targets: np.ndarray, edges: np.ndarray) -> np.ndarray:
  """`[N] int64`, the bin of each target."""
  return np.searchsorted(edges, np.asarray(targets, np.float64), side="right")


def prototypical(
  init_encoder: Callable[[jax.Array], Any],
  encode: Callable[[Any, Mapping[str, jax.Array], jax.Array], jax.Array],
  optimizer: optax.GradientTransformation, settings: Growth, *, width: int,
  num_classes: int | None, steps_per_epoch: int, num_epochs: int, edges: tuple[float, ...] = (),
) -> Learner:
  """The learner; a run begins at the params of `first_prototypes` with the `encoder`'s beside them.

  Without any, all prototypes lie at 0.

  Args:
    init_encoder: `key -> encoder params`, with Linen's boxes.
    encode: `(encoder params, batch, keys [B]) -> [B,D]`, in training mode.
    optimizer: of the encoder and, with a state of its own, of the prototypes, so that a clipped
      norm is that of each.
    width: D.
    num_classes: None if targets are numbers.
    steps_per_epoch: what warm-up, cool-down and pruning points are counted in.
    num_epochs: of the run.
    edges: see `bin_edges`, if targets are numbers.

  The batch holds `label [B] int32`, or `target [B] float32` for numbers, and what `encode` reads.
  """
  init, step = _prototypical(
    init_encoder, encode, optimizer, settings, width, num_classes, steps_per_epoch, num_epochs,
    edges)
  told = {**dataclasses.asdict(settings), "steps_per_epoch": steps_per_epoch,
          "num_classes": num_classes}
  return Learner(init, step, kept, settings=told)


def kept(state: PrototypeState) -> dict[str, Any]:
  """What hooks see and runs keep: encoder, prototypes and table."""
  return {**state.params, "table": state.table}


def _now(prototypes: Prototypes, table: Table, alpha: float) -> dict[str, jax.Array]:
  """Variance and spread of the prototypes in use, and the threshold that these two give."""
  variance = mixture.variance_of(prototypes.log_variance, table.active)
  spread = mixture.spread_of(prototypes.centers, table.active)
  limit = mixture.threshold(variance, spread, alpha, prototypes.centers.shape[1])
  return {"variance": variance, "spread": spread, "threshold": limit}


@functools.lru_cache(maxsize=16)
def _prototypical(
  init_encoder, encode, optimizer, settings: Growth, width, num_classes, steps_per_epoch,
  num_epochs, edges,
):
  """The functions of `prototypical`; equal arguments give the same, which compile once."""
  warmup = settings.warmup_epochs * steps_per_epoch
  last_created = (num_epochs - settings.cooldown_epochs) * steps_per_epoch
  every = steps_per_epoch // max(settings.prunings_per_epoch, 1) or 1

  def nowhere():
    number = num_classes or settings.bins
    room = settings.room(number)
    log_variance = jnp.zeros((room,) if settings.private_variances else ())
    window = settings.steps_of_window(steps_per_epoch)
    return {
      "prototypes": Prototypes(
        jnp.zeros((room, width)), jnp.zeros((room, num_classes or 1)), log_variance),
      "table": growth.new_table(jnp.arange(number, dtype=jnp.int32), room, window),
    }

  def init(key, params=None):
    if params is None:
      params = {"encoder": init_encoder(key), **nowhere()}
    trained = {name: params[name] for name in ("encoder", "prototypes")}
    opt_state = {name: optimizer.init(tree) for name, tree in trained.items()}
    limit = _now(params["prototypes"], params["table"], settings.alpha)["threshold"]
    return PrototypeState(
      trained, dynamics.strong(opt_state), params["table"], jnp.zeros((), jnp.int32), limit)

  def step(state, batch, key):
    table = state.table
    limit = (state.first_threshold if settings.diversity_threshold == "first" else
             _now(state.params["prototypes"], table, settings.alpha)["threshold"])

    def objective(params):
      prototypes = params["prototypes"]
      keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
      features = encode(params["encoder"], batch, keys).astype(jnp.float32)
      log_weights = mixture.log_importance(prototypes, table.active, features)
      losses, right = _losses(log_weights, prototypes, batch, num_classes)
      value = jnp.mean(losses)
      if settings.diversity:
        value += settings.diversity * mixture.diversity(
          prototypes.centers, table.active, limit, settings.diversity_limit == "printed")
      return value, (losses, right, features, jnp.exp(log_weights))

    (value, (losses, right, features, importance)), grads = jax.value_and_grad(
      objective, has_aux=True)(state.params)
    states, norms = {}, []
    for name, grad in grads.items():
      before = dynamics.State(state.params[name], state.opt_state[name])
      grad = _read_alone(optimizer.update, before, grad)
      norms.append(optax.tree.norm(grad))
      rate = settings.rate_of_prototypes if name == "prototypes" else 1.0
      states[name] = dynamics.apply_update(_scaled(optimizer.update, rate), before, grad)
    prototypes = states["prototypes"].params
    if num_classes:
      prototypes = prototypes._replace(logits=mixture.with_signs(prototypes.logits, table.label))
    table = growth.remembered(table, jnp.mean(importance, axis=0), state.step)
    done = state.step + 1
    now = _now(prototypes, table, settings.alpha)
    moments = states["prototypes"].opt_state
    if settings.create:
      labels, logits = _as_prototypes(batch, num_classes, edges)
      use = (done > warmup) & (done <= last_created)
      prototypes, table, new = growth.create(
        prototypes, table, jax.lax.stop_gradient(features), labels, logits,
        jnp.where(use, now["threshold"], jnp.inf), done)
      moments = _forgotten(optimizer, moments, prototypes, new)
    if settings.prunings_per_epoch:
      due = (done % every == 0) & (done > warmup)
      table = jax.lax.cond(
        due, lambda: growth.prune(table, state.step, settings.least_importance, 1), lambda: table)
    norm = optax.tree.norm(norms)
    sums = {
      "loss_sum": jnp.sum(losses), "objective": value, "grad_norm": norm,
      "num_examples": jnp.asarray(len(losses), jnp.int32),
      "nonfinite": 1 - (jnp.isfinite(value) & jnp.isfinite(norm)).astype(jnp.int32),
      "prototypes": jnp.sum(table.active).astype(jnp.float32), **now,
    }
    if num_classes:
      sums["accuracy_sum"] = jnp.sum(right)
    return PrototypeState(
      {"encoder": states["encoder"].params, "prototypes": prototypes},
      {"encoder": states["encoder"].opt_state, "prototypes": moments},
      table, done, state.first_threshold), sums

  return init, step


def _losses(log_weights, prototypes, batch, num_classes):
  """Nats, or squared errors, `[B]`, and which rows are told right."""
  if num_classes is None:
    errors = mixture.values(log_weights, prototypes.logits) - batch["target"]
    return jnp.square(errors), None
  losses = -mixture.log_probability(log_weights, prototypes.logits, batch["label"])
  said = jnp.exp(log_weights) @ jax.nn.softmax(prototypes.logits, axis=-1)
  return losses, (jnp.argmax(said, axis=1) == batch["label"]).astype(jnp.float32)


def _as_prototypes(batch, num_classes, edges):
  """The class (or bin) of each row, and what a prototype made of it says, `[B,C]`."""
  if num_classes is None:
    bins = jnp.searchsorted(jnp.asarray(edges, jnp.float32), batch["target"], side="right")
    return bins.astype(jnp.int32), batch["target"][:, None]
  return batch["label"], mixture.first_logits(batch["label"], num_classes)


def _read_alone(update, state, grads):
  """The gradient with zeros where the optimizer does not read it, so that it is not computed."""
  leaves, treedef = jax.tree.flatten(grads)
  if not leaves:
    return grads
  read = dynamics.gradients_read(update, state)
  return treedef.unflatten(
    [x if is_read else jnp.zeros_like(x) for x, is_read in zip(leaves, read)])


def _scaled(update, rate):
  def scaled(grads, state, params):
    updates, state = update(grads, state, params)
    return (updates if rate == 1 else optax.tree.scale(rate, updates)), state
  return scaled


def _forgotten(optimizer, opt_state, prototypes, new):
  """The optimizer's state with zeros in the rows of slots that were filled anew."""
  kept = 1 - new.astype(jnp.float32)
  private = prototypes.log_variance.ndim
  rows = Prototypes(kept[:, None], kept[:, None], kept if private else jnp.ones(()))
  return optax.tree_utils.tree_map_params(
    optimizer, lambda moment, row: (moment * row).astype(moment.dtype), opt_state, rows)
