"""One seed's study: is learning in context like finetuning on the demonstrations?

arXiv 2212.10559, section 4, with the controls of arXiv 2311.07772: measures without normalisation,
of changes instead of whole maps, and the same on a network that has never been trained. The
learning rate is chosen on training rows that are not demonstrated; the paper chose it, and the
seed, on the rows that it reports.

Left out: sharding over devices; a study runs on one.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding.prefixes import read_text
from lmops_jax.models.transformer import unstack_layers
from lmops_jax.sizing import flops
from lmops_jax.systems.meta_optimizer import metrics
from lmops_jax.systems.meta_optimizer.finetune import (
  check_losses,
  key_value_leaves,
  kv_finetune,
)
from lmops_jax.systems.meta_optimizer.prompts import Prompts, draw
from lmops_jax.systems.meta_optimizer.record import predict, record
from lmops_jax.systems.meta_optimizer.settings import CONTROLS, Study

TRAINED = "trained"
SETTINGS = ("zsl", "ft", "icl")
# Metrics of all rows, and of the first `kendall_rows`; each `[L]`.
OF_ALL = (
  "sim_aou", "sim_aou_random", "sim_aou_raw", "sim_am_before", "sim_am", "sim_am_delta",
)
OF_SOME = (
  "kendall", "kendall_random", "kendall_demonstrations", "recall_5_demonstrations",
  "recall_100_tokens", "recall_100_tokens_random",
)
METRICS = (*OF_ALL, *OF_SOME)
_EVALUATION_SEED = 1  # of the script's shuffle of evaluation rows
_TOP_DEMONSTRATIONS, _TOP_TOKENS = 5, 100
_TABLES = ("embedding", "norm")  # in names of leaves that "untrained_but_tables" keeps
_ARRAYS, _SUMMARY = "arrays.npz", "study.json"


class Results(NamedTuple):
  """What a study found.

  Attributes:
    arrays: `NETWORK/METRIC` `[L]` for each network and metric of `METRICS`, NaN where undefined
      (such as `sim_am_delta` in the first layer of a model with relative positions);
      `NETWORK/pred_SETTING` `[N]`; `NETWORK/losses` `[k]` of finetuning; `gold` and `row_ids`
      `[N]`; `rates`, `rate_accuracy` (NaN where training diverged); and `picture/icl`,
      `picture/ft` `[L,n]`, one query's attention before softmax to the demonstrations' tokens.
    summary: JSON-able: for each network accuracies and means over layers, None where undefined.
  """

  arrays: dict[str, np.ndarray]
  summary: dict[str, Any]

  def save(self, directory: Path) -> None:
    """Writes `arrays.npz` and `study.json`."""
    np.savez(directory / _ARRAYS, **self.arrays)
    text = json.dumps(self.summary, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / _SUMMARY).write_text(text + "\n", encoding="utf-8")

  @classmethod
  def load(cls, directory: Path) -> Results:
    """Reads what `save` wrote."""
    with np.load(Path(directory) / _ARRAYS) as arrays:
      found = dict(arrays)
    return cls(found, json.loads((Path(directory) / _SUMMARY).read_text(encoding="utf-8")))


def run_study(
  model, params, tokenizer, task, settings: Study, seed: int = 0,
  log: Callable[[str], None] = lambda text: None,
  progress: Callable[[int], None] = lambda rows: None,
) -> Results:
  """Runs one seed.

  Args:
    model: a causal `Transformer`.
    params: its parameters, layers stacked or not.
    tokenizer: the model's, with `encode`, `eos_id` and `decode`.
    task: see `prompts`.
    settings: what to do.
    seed: of the demonstrations, of the validation rows, and of all baselines.
    log: called with lines of text.
    progress: called with the number of rows measured since the last call, of
      `num_rows(task, settings)` rows.

  Raises:
    ValueError: a task, texts or demonstrations that do not fit the model; see `prompts`.
    FloatingPointError: training diverges at every rate.
  """
  with jax.default_matmul_precision("highest"):
    return _Run(model, params, tokenizer, task, settings, seed, log, progress).results()


def check_rows(task, settings: Study) -> None:
  """Refuses a task with too few rows to demonstrate, or none left to choose the rate on.

  Raises:
    ValueError: naming the task.
  """
  num = len(task.train or ())
  if num < settings.demonstrations:
    raise ValueError(
      f"task {task.name}: {settings.demonstrations} demonstrations are wanted and the training "
      f"rows are {num}; ask for at most {num}."
    )
  if num == settings.demonstrations and settings.needs_validation:
    raise ValueError(
      f"task {task.name} has {num} training rows, all of them demonstrations, and none to choose "
      "the learning rate on; give more, or name a single rate."
    )


def num_rows(task, settings: Study) -> int:
  """Rows that a study measures, each network's counted."""
  limit = settings.evaluation_rows or len(task.rows)
  return min(len(task.rows), limit) * (1 + len(settings.controls))


class _Run:
  """What the parts of a study share."""

  def __init__(self, model, params, tokenizer, task, settings, seed, log, progress):
    self.model, self.tokenizer, self.task = model, tokenizer, task
    self.params = unstack_layers(nn.unbox(params))
    self.settings, self.seed, self.log, self.progress = settings, seed, log, progress
    self.prompts = Prompts(tokenizer, task, settings.newline)
    check_rows(task, settings)
    chosen, others = draw(
      len(task.train or ()), settings.demonstrations, seed, settings.order)
    rows = np.random.default_rng(_EVALUATION_SEED).permutation(len(task.rows))
    self.row_indices = np.sort(rows[: settings.evaluation_rows])
    self.queries = self.prompts.queries([task.rows[i] for i in self.row_indices])
    self.validation = self.queries
    if settings.needs_validation:
      others = others[: settings.validation_rows]
      self.validation = self.prompts.queries([task.train[i] for i in others])
    longest = max(int(q.mask.sum(1).max()) for q in (self.queries, self.validation))
    longest += settings.readout == "first_label"
    self.made = self.prompts.demonstrations(
      [task.train[i] for i in chosen], self._positions(), longest)
    self.demonstration_ids = [int(task.train[i].id) for i in chosen]

  def _positions(self) -> int:
    """Positions that the context and a query may take; all of them must be in sight."""
    config = self.model.config
    return min(config.max_length, config.sliding_window or config.max_length)

  @property
  def first_layer_is_fixed(self) -> bool:
    """Whether the first layer's scores between a query's tokens do not depend on the context.

    So it is where they depend on distances only: their change is then rounding, and has no
    direction.
    """
    return self.model.config.positions in ("rotary", "alibi", "none")

  def results(self) -> Results:
    rate, accuracies = self.choose_rate()
    arrays = {
      "gold": self.queries.gold, "row_ids": np.array(
        [self.task.rows[i].id for i in self.row_indices]),
      "rates": np.asarray(self.settings.rates, np.float64), "rate_accuracy": accuracies,
    }
    networks, left_out = {}, {}
    for name in (TRAINED, *self.settings.controls):
      params = self.params if name == TRAINED else self.control(name)
      try:
        found, networks[name] = self.measure(params, rate, with_picture=name == TRAINED)
      except FloatingPointError as error:
        if name == TRAINED:
          raise
        left_out[name] = str(error)
        self.log(f"the control {name} is left out: {error}")
        continue
      arrays |= {key if "/" in key else f"{name}/{key}": value for key, value in found.items()}
      accuracy = networks[name]["accuracy"]
      self.log(f"{name}: accuracy " + ", ".join(f"{s} {accuracy[s]:.1%}" for s in SETTINGS))
    kept = self.made.context_ids[self.made.context_kept]
    summary = {
      "task": self.task.name, "seed": self.seed, "readout": self.settings.readout,
      "objective": self.settings.objective, "tune_on": self.settings.tune_on,
      "kendall": self.settings.kendall,
      "num_rows": len(self.queries.gold), "num_demonstrations": len(self.made.ids),
      "num_context_tokens": len(self.made.context_ids), "num_training_tokens": len(kept),
      "demonstration_ids": self.demonstration_ids, "words": list(self.task.words),
      "rate": rate,
      "rate_accuracy": float(np.nanmax(accuracies)) if len(accuracies) > 1 else None,
      "num_rates": len(accuracies),
      "num_diverged_rates": int(np.isnan(accuracies).sum()) if len(accuracies) > 1 else 0,
      "rate_is_at_the_end": len(accuracies) > 1 and rate in (
        min(self.settings.rates), max(self.settings.rates)),
      "picture_tokens": [self.tokenizer.decode([int(i)]) for i in kept],
      "networks": networks, "left_out": left_out, "flops": self.flops(len(networks)),
    }
    return Results(arrays, summary)

  def choose_rate(self) -> tuple[float, np.ndarray]:
    """The rate with the best accuracy, the lowest of equal ones; and each rate's accuracy."""
    rates = np.asarray(self.settings.rates, np.float32)
    if len(rates) == 1:
      return float(self.settings.rates[0]), np.array([np.nan])
    ids, mask, gold = self.validation
    front = self.prompts.front
    ids = np.concatenate([np.tile(np.asarray(front, np.int32), (len(ids), 1)), ids], axis=1)
    mask = np.concatenate([np.ones((len(ids), len(front)), bool), mask], axis=1)
    size = min(self.settings.batch_rows, len(ids))
    index = np.resize(np.arange(len(ids)), (-(-len(ids) // size), size))
    at_once = min(self.settings.rates_at_once, len(rates))
    accuracies, first_losses = np.full(len(rates), np.nan), None
    for start in range(0, len(rates), at_once):
      part = np.resize(rates[start : start + at_once], at_once)
      predictions, losses, finite = _try_rates(
        self.model, self.params, self.made.ids, self.made.mask, ids[index], mask[index],
        self.prompts.label_ids, part, len(front), self.settings.objective)
      predictions = np.asarray(predictions).reshape(at_once, -1)[:, : len(gold)]
      first_losses = np.asarray(losses)[0] if first_losses is None else first_losses
      for i in range(min(at_once, len(rates) - start)):
        if finite[i]:
          accuracies[start + i] = np.mean(predictions[i] == gold)
    if np.isnan(accuracies).all():
      check_losses(first_losses, rates[0])
      raise FloatingPointError(
        f"finetuning diverges at all {len(rates)} learning rates; name lower ones in "
        "meta_optimizer.Study.rates."
      )
    best = min(
      np.flatnonzero(accuracies == np.nanmax(accuracies)), key=lambda i: self.settings.rates[i])
    rate = float(self.settings.rates[best])
    self.log(
      f"learning rate {rate:g} of {len(rates)}: accuracy {accuracies[best]:.1%} on "
      f"{len(gold)} {self.settings.tune_on} rows, {np.isnan(accuracies).sum()} rates diverge")
    return rate, accuracies

  def control(self, name: str):
    """Random weights of the same network."""
    fresh = jax.jit(self.model.init)(
      jax.random.key(self.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    fresh = unstack_layers(nn.unbox(fresh))
    if name == CONTROLS[0]:
      return fresh

    def chosen(path, random, trained):
      keys = [getattr(part, "key", "") for part in path]
      return trained if any(part in str(key) for key in keys for part in _TABLES) else random

    return jax.tree_util.tree_map_with_path(chosen, fresh, self.params)

  def measure(self, params, rate: float, with_picture: bool):
    """Arrays and summary of one network."""
    made, front, settings = self.made, self.prompts.front, self.settings
    tuned = kv_finetune(
      self.model, params, made.ids, made.mask, rate, num_front=len(front),
      objective=settings.objective)
    train_q = jnp.moveaxis(tuned.train_q[np.nonzero(made.kept)], 0, 1)  # [L,n,H*E]

    def before(params, ids):
      return read_text(self.model, params, ids) if len(ids) else None

    contexts = {"zsl": before(params, front), "ft": before(tuned.params, front),
                "icl": before(params, made.context_ids)}
    of = {"zsl": params, "ft": tuned.params, "icl": params}
    slots = np.zeros(0, np.int32)
    if contexts["icl"] is not None:
      slots = np.flatnonzero(contexts["icl"].cache.valid[0])[made.context_kept]
    each = {name: [] for name in METRICS}
    predictions = {name: [] for name in SETTINGS}
    arrays = {"losses": np.asarray(tuned.losses)}
    count = len(self.queries.gold)
    size = min(settings.batch_rows, count)
    for start in range(0, count, size):
      rows = np.minimum(np.arange(start, start + size), count - 1)
      real = min(size, count - start)
      part = self.queries.part(rows)
      found = {
        name: record(self.model, of[name], part.ids, part.mask, contexts[name], settings.readout,
                     label_ids=self.prompts.label_ids) for name in SETTINGS}
      for name in SETTINGS:
        predictions[name].append(np.asarray(found[name]["pred"])[:real])
      random = metrics.uniform(self.seed, rows, found["icl"]["attn_out"].shape[1:])
      values = _of_all({name: (r["attn_out"], r["raw"]) for name, r in found.items()}, random)
      known = min(real, settings.kendall_rows - start)
      if known > 0:
        seen, trained = _of_context(found["icl"]["ctx"], slots, train_q, found["ft"]["q"])
        if with_picture and start == 0:
          arrays |= {"picture/icl": np.asarray(seen[0]), "picture/ft": np.asarray(trained[0])}
        random = metrics.uniform(self.seed + 1, rows, seen.shape[1:])
        some = self.compare_orders(seen, trained, random)
        for name, value in some.items():
          each[name].append(np.asarray(value)[:known])
      for name, value in values.items():
        each[name].append(np.array(value)[:real])
      if self.first_layer_is_fixed:
        each["sim_am_delta"][-1][:, 0] = np.nan
      self.progress(real)
    predicted = {name: np.concatenate(predictions[name]) for name in SETTINGS}
    arrays |= {f"pred_{name}": value for name, value in predicted.items()}
    summary = {"accuracy": {
      name: float(np.mean(value == self.queries.gold)) for name, value in predicted.items()}}
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", metrics.Undefined)  # said by None and by counts
      recall = metrics.rec2ftp(
        self.queries.gold, predicted["zsl"], predicted["ft"], predicted["icl"])
      summary["rec2ftp"] = None if math.isnan(recall) else recall
      for name in METRICS:
        found = metrics.defined_mean(np.concatenate(each[name]))
        arrays[name] = found.mean
        known = found.mean[~np.isnan(found.mean)]
        summary[name] = float(known.mean()) if known.size else None
        if name == "kendall":
          summary["num_undefined_kendall"] = int(found.num_undefined.sum())
    return arrays, summary

  def compare_orders(self, seen, trained, random):
    """Metrics of `OF_SOME` of scores `[N,L,n]`."""
    groups = self.made.groups
    num_groups = len(self.made.ids)
    by_demonstration = [metrics.of_groups(x, groups, num_groups) for x in (seen, trained)]

    def tau(a, b):
      return metrics.kendall_each(a, b, self.settings.kendall)

    return dict(zip(OF_SOME, (
      tau(seen, trained), tau(seen, random), tau(*by_demonstration),
      metrics.top_recall_each(*by_demonstration, _TOP_DEMONSTRATIONS),
      metrics.top_recall_each(seen, trained, _TOP_TOKENS),
      metrics.top_recall_each(seen, random, _TOP_TOKENS))))

  def flops(self, num_networks: int) -> float:
    """Floating-point operations of the run, about."""
    made, context = self.made, len(self.made.context_ids)
    queries, trained = int(self.queries.mask.sum()), int(made.mask.sum())

    def forward(length):
      return flops.forward_flops_per_token(self.model.config, max(length, 1))

    width = self.queries.ids.shape[1]
    total = num_networks * (
      context * forward(context) + trained * 3 * forward(made.ids.shape[1])
      + queries * (2 * forward(width) + forward(context + width)))
    if len(self.settings.rates) > 1:
      tried = int(self.validation.mask.sum()) * forward(self.validation.ids.shape[1])
      total += len(self.settings.rates) * (trained * 3 * forward(made.ids.shape[1]) + tried)
    return float(total)


@functools.partial(jax.jit, static_argnames=("model", "num_front", "objective"))
def _try_rates(
  model, params, demo_ids, demo_mask, ids, mask, label_ids, rates, num_front, objective
):
  """Predictions `[r,batches,rows]` after finetuning at each rate, losses, and if all is finite."""

  def one(lr):
    tuned = kv_finetune(
      model, params, demo_ids, demo_mask, lr, num_front=num_front, objective=objective)
    predictions = jax.lax.map(
      lambda batch: predict(model, tuned.params, *batch, label_ids), (ids, mask))
    finite = jnp.all(jnp.isfinite(tuned.losses))
    for leaf in key_value_leaves(tuned.params):
      finite &= jnp.all(jnp.isfinite(leaf))
    return predictions, tuned.losses, finite

  return jax.vmap(one)(rates)


@jax.jit
def _of_all(found, random):
  """Metrics of `OF_ALL`, `[N,L]` each, of outputs and scores in the three settings."""
  outputs, scores = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
  of_outputs = outputs["icl"], outputs["zsl"], outputs["ft"]
  return dict(zip(OF_ALL, (
    metrics.sim_aou_each(*of_outputs),
    metrics.sim_aou_random_each(outputs["icl"], outputs["zsl"], random),
    metrics.sim_aou_each(*of_outputs, normalise=False),
    metrics.sim_am_each(scores["icl"], scores["zsl"]),
    metrics.sim_am_each(scores["icl"], scores["ft"]),
    metrics.sim_am_delta_each(scores["icl"], scores["zsl"], scores["ft"]),
  )))


@jax.jit
def _of_context(ctx, slots, train_q, q):
  """Scores `[N,L,n]` to the demonstrations' tokens: in context, and of finetuning's queries."""
  return ctx[:, :, slots], jnp.einsum("lnd,bld->bln", train_q, q)

