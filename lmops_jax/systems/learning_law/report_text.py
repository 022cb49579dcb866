"""The words, numbers and further tables of the report, from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.evaluation.intervals import mean_and_half_width
from lmops_jax.reporting import html
from lmops_jax.reporting.run_report import text_table
from lmops_jax.systems.learning_law.evaluate import UNIFORM

LEVEL = 0.95


def further_sections(summary) -> list[html.Section]:
  """Tables of other initialisations and of batches, if there are any."""
  sections = []
  rows = [
    [seed, name, row["init_seed"], row["auc_test"], row["auc_change_test"],
     row["acceleration_test"]]
    for seed, found in zip(summary["seeds"], summary["other_inits"])
    for name, records in found.items() for row in records]
  if rows:
    sections.append(html.Section(
      "Other initialisations", "A policy is made for one initialisation; here it trains others.",
      tables=[html.Table(
        [html.Column("seed of the data", "d"), "policy", html.Column("initialisation", "d"),
         html.Column("AUC test", ".4f"), html.Column("change on test", "+.1%"),
         html.Column("acceleration test", ".2f")], rows)]))
  rows = [[seed, r["policy"], r["batch_size"], r["auc_test"], r["auc_change_test"],
           r["final_loss_test"]]
          for seed, found in zip(summary["seeds"], summary["batches"]) for r in found]
  if rows:
    sections.append(html.Section(
      "Batches drawn by a policy",
      "The same training on batches, whose examples are drawn by the step's weights.",
      tables=[html.Table(
        [html.Column("seed", "d"), "policy", html.Column("batch size", "d"),
         html.Column("AUC test", ".4f"), html.Column("change on test", "+.1%"),
         html.Column("final test loss", ".4f")], rows)]))
  return sections


def told(values: Sequence[float | None], spec: str) -> str | None:
  """Mean over seeds and half of its interval; None if no seed has a value."""
  mean, half = mean_and_half_width(values)
  if mean is None:
    known = [v for v in values if v is not None]
    if not known:
      return None
    return f"{format(float(np.mean(known)), spec)} (on {len(known)} of {len(values)})"
  return format(mean, spec) + ("" if half is None else f" ± {format(half, spec.lstrip('+'))}")


def note(num_seeds: int) -> str:
  """What the numbers of a table are."""
  if num_seeds == 1:
    return "One seed, so no intervals."
  return f"Mean of {num_seeds} seeds ± half of the {LEVEL:.0%} interval (t distribution)."


def ends(interval) -> str | None:
  """The two ends of an interval, None if it has not both."""
  known = interval is not None and None not in interval
  return f"{interval[0]:.4f} to {interval[1]:.4f}" if known else None


def best(summary: Mapping[str, Any]) -> str | None:
  """The optimised policy of a task with the least area under the loss on dev."""
  return min(summary["optimisation"], default=None,
             key=lambda name: summary["policies"][name]["mean"]["auc_dev"])


def lead(task: str, summary: Mapping[str, Any]) -> str:
  """A task's result in a paragraph."""
  name = best(summary)
  if name is None:
    return f"**{task}**: no policy was optimised."
  of, course = summary["policies"][name], summary["optimisation"][name]
  practical = [n for n in summary["policies"] if n != UNIFORM and n not in summary["optimisation"]]
  words = (
    f"**{task}**: under {name} the area under the test loss is {told(of['auc_test'], '.4f')} "
    f"({told(of['auc_change_test'], '+.1%')} against uniform weights), and uniform weights' final "
    f"loss comes {told(of['acceleration_test'], '.2f') or 'never'} times sooner. The gap to "
    f"first-order optimality fell to {np.mean([c['gap'][-1] / c['gap'][0] for c in course]):.1%} "
    "of its start."
  )
  if of["noise_weight"][0] is not None:
    words += f" Spoilt examples keep {told(of['noise_weight'], '.1%')} of the weight."
  if practical:
    closest = min(practical, key=lambda n: summary["policies"][n]["mean"]["auc_test"])
    change = told(summary["policies"][closest]["auc_change_test"], "+.1%")
    words += f" The best of the practical policies, {closest}, changes the area by {change}."
  return words


def key_figures(summary) -> list[html.KeyFigure]:
  """The first numbers of the page, four at most."""
  figures = []
  for task, found in summary["tasks"].items():
    name = best(found)
    if name is None:
      continue
    mean = found["policies"][name]["mean"]
    figures.append(html.KeyFigure(
      f"{mean['auc_change_test']:+.0%}".replace("-", "\N{MINUS SIGN}"), "area under the test loss",
      f"{task}, {name} against uniform"))
    if mean["noise_weight"] is not None:  # uniform weights may learn nothing: no acceleration
      figures.append(html.KeyFigure(
        f"{mean['noise_weight']:.1%}", "of the weight on spoilt examples",
        f"{task}, {found['policies'][UNIFORM]['mean']['noise_weight']:.0%} uniformly"))
    elif mean["acceleration_test"] is not None:
      figures.append(html.KeyFigure(
        f"{mean['acceleration_test']:.1f}\N{MULTIPLICATION SIGN}", "acceleration on test", task))
  return figures[:4]


def table(summary: Mapping[str, Any]) -> str:
  """Tasks and policies as a plain table, best first."""
  rows = [("task", "policy", "AUC dev", "AUC test", "change", "acceleration", "SIM test", "noise")]
  for task, found in summary["tasks"].items():
    names = sorted(found["policies"], key=lambda n: found["policies"][n]["mean"]["auc_test"])
    for name in names:
      of = found["policies"][name]
      rows.append((
        task, name, told(of["auc_dev"], ".4f"), told(of["auc_test"], ".4f"),
        told(of["auc_change_test"], "+.1%"), told(of["acceleration_test"], ".2f") or "never",
        told(of["similarity_test"], ".3f") or "-", told(of["noise_weight"], ".3f") or "-"))
  return text_table(rows)
