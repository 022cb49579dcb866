"""Stage `report`: accuracy by number of rows, what prototypes do, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.evaluation.intervals import of_difference
from lmops_jax.evaluation.over_seeds import LEVEL, spread, spread_of
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.prototypes import classifier, rows
from lmops_jax.systems.prototypes.texts import shown

REQUIRED = ("methods", "sizes", "seeds", "figures.*.*.mean", "num_classes", "stages[].seconds")
ROWS, ENCODE, CLASSIFIER = "rows", "encode", "classifier"  # stages, and a folder of a fit
RESULTS_FILE, SAID_FILE, VECTORS_FILE = "results.json", "said.npz", "vectors.npy"
_NEAREST = 5


def run(
  context: pipeline.StageContext, *, fits: Sequence[tuple[str, int, int, str]],
  stages: Sequence[str], encoder: str,
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    fits: label, size, seed and stage of every fit.
    stages: all stages before this one.
    encoder: its name.
  """
  results = {}
  for label, size, seed, stage in fits:
    found = json.loads((context.input(stage) / RESULTS_FILE).read_text())
    if "left_out" not in found:
      results[label, size, seed] = found
  labels = list(dict.fromkeys(key[0] for key in results))
  sizes = sorted({key[1] for key in results})
  seeds = list(dict.fromkeys(key[2] for key in results))
  of_rows = context.manifest(ROWS)["extra"]
  classes = bool(of_rows["names"])
  metric = "accuracy" if classes else "squared_error"

  def over_seeds(label, size, read):
    return spread_of([read(results[label, size, seed]) for seed in seeds])

  report = RunReport(context, stages)
  first = labels[0]
  grows = [name for name in labels if "prototypes" in results[name, sizes[0], seeds[0]]["fit"]]
  summary = {
    "rows": of_rows["name"], "num_test": of_rows["num_test"], "encoder": encoder,
    "num_classes": len(of_rows["names"]), "metric": metric,
    "methods": labels, "sizes": sizes, "seeds": seeds,
    "left_out": sorted({size for _, size, _, _ in fits} - set(sizes)),
    "figures": {label: {str(size): over_seeds(label, size, lambda r: r[metric])
                        for size in sizes} for label in labels},
    "prototypes": {
      label: {str(size): {
        name: over_seeds(label, size, lambda r, name=name: r["fit"][name])
        for name in ("prototypes", "created", "pruned", "suppressed", "threshold", "variance")}
        for size in sizes} for label in grows},
    "seconds": {
      label: {str(size): over_seeds(label, size, lambda r: r["fit"]["seconds"])
              for size in sizes}
      for label in labels if "seconds" in results[label, sizes[0], seeds[0]]["fit"]},
    "differences": {
      label: {str(size): differences(results, first, label, size, seeds) for size in sizes}
      for label in labels if label != first},
    "stages": report.costs,
  }
  shown = []
  if first in grows:
    largest = next(stage for label, size, seed, stage in fits
                   if (label, size, seed) == (first, sizes[-1], seeds[0]))
    shown = prototypes_of(context, largest)
    summary["kept"] = {"method": first, "size": sizes[-1], "seed": seeds[0], "stage": largest,
                       "prototypes": shown}
  last = {seed: next(stage for *key, stage in fits if key == [first, sizes[-1], seed])
          for seed in seeds}
  drawn = []
  if classes:
    drawn.append(report.figure("confusion", confusion(context, last.values()), (
      f"What {first} says of rows of each class after {sizes[-1]:,} rows, all seeds.")))
  if classes and shown:
    drawn.append(report.figure("map", map_of(context, last[seeds[0]]), (
      "Rows that it has learned from by their two main axes, and its prototypes as stars.")))
  report.write(summary, _page(report, summary, results, shown, drawn), required=REQUIRED)


def differences(results, first: str, other: str, size: int, seeds) -> dict[str, float]:
  """How much better the first method is than another, over rows and seeds in pairs.

  In shares of right rows, or in how much smaller the squared error is.
  """
  def rows_of(label):
    found = [results[label, size, seed] for seed in seeds]
    return np.concatenate([
      np.asarray(r["right"], float) if "right" in r else -np.asarray(r["errors"]) for r in found])

  found = of_difference(rows_of(other), rows_of(first), LEVEL)
  return {"mean": found.value, "low": found.low, "high": found.high}


def prototypes_of(context: pipeline.StageContext, stage: str) -> list[dict[str, Any]]:
  """Each prototype of a fit: class, share of its nearest rows of that class, and those rows."""
  folder = context.input(stage)
  params = classifier.load(folder / CLASSIFIER)
  train, _ = rows.read_rows(context.input(ROWS))
  some = train.taken(np.load(folder / SAID_FILE)["chosen"])
  near = classifier.nearest_rows(params, np.load(folder / VECTORS_FILE), _NEAREST)
  table, targets = params["table"], np.asarray(some.targets)

  def known(k, found):
    label = int(table.label[k])
    return {
      "slot": k, "class": some.names[label] if some.names else label, "born": int(table.born[k]),
      "purity": float(np.mean(targets[found] == label)) if some.names else None,
      "texts": [shown(some.inputs[i]) for i in found]}

  return [known(k, found) for k, found in near.items()]


def confusion(context: pipeline.StageContext, stages):
  """Shares of what is said, `[C said of,C said]`, of the rows to test on."""
  _, test = rows.read_rows(context.input(ROWS))
  counts = np.zeros((len(test.names),) * 2)
  for stage in stages:
    said = np.load(context.input(stage) / SAID_FILE)["said"].argmax(axis=1)
    np.add.at(counts, (np.asarray(test.targets), said), 1)
  return plots.heatmap(
    counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), row_labels=test.names,
    column_labels=test.names, annotate=".0%", x_label="said", y_label="class", limits=(0, 1))


def map_of(context: pipeline.StageContext, stage: str):
  """The rows of a fit and its prototypes on the rows' first two principal axes."""
  folder = context.input(stage)
  params, vectors = classifier.load(folder / CLASSIFIER), np.load(folder / VECTORS_FILE)
  train, _ = rows.read_rows(context.input(ROWS))
  some = train.taken(np.load(folder / SAID_FILE)["chosen"])
  middle = vectors.mean(axis=0)
  axes = np.linalg.svd(vectors - middle, full_matrices=False)[2][:2]
  used = np.asarray(params["table"].active)
  centers, labels = (
    np.asarray(of)[used] for of in (params["prototypes"].centers, params["table"].label))
  groups, marks = (
    {name: (points[labels == i] - middle) @ axes.T for i, name in enumerate(some.names)}
    for points, labels in ((vectors, np.asarray(some.targets)), (centers, labels)))
  return plots.clouds(groups, marks, x_label="first axis", y_label="second axis")


def table(summary: Mapping[str, Any]) -> str:
  """A line for each method, a column for each number of rows."""
  return text_table(_rows(summary))


def _rows(summary) -> list[list[str]]:
  scale, spec = (100, ".1f") if summary["metric"] == "accuracy" else (1, ".4g")
  header = [f"{summary['metric'].replace('_', ' ')}, {'%' if scale > 1 else 'mean'}",
            *(f"{size:,} rows" for size in summary["sizes"])]
  return [header, *(
    [label, *(spread(_scaled(summary["figures"][label][str(size)], scale), spec)
              for size in summary["sizes"])] for label in summary["methods"])]


def _scaled(of, scale):
  half = of["half_width"]
  return {**of, "mean": scale * of["mean"], "half_width": None if half is None else scale * half}


def _page(report: RunReport, summary, results, shown, drawn) -> html.Report:
  labels, sizes, seeds = summary["methods"], summary["sizes"], summary["seeds"]
  metric, styles = summary["metric"], plots.looks(labels, emphasis=labels[:1])
  many = len(sizes) > 1
  accuracy = report.figure(metric, plots.curves(
    {label: [plots.Run(sizes, [results[label, size, seed][metric] for size in sizes])
             for seed in seeds] for label in labels},
    x_label="rows to learn from", y_label=metric.replace("_", " "), styles=styles, log_x=many),
    "Mean and span of seeds; larger sets hold the smaller ones.")
  sections = [html.Section(
    "What is told right" if metric == "accuracy" else "Errors", "", figures=[accuracy],
    tables=[html.Table(*_split(_rows(summary)), note=(
      f"Means of seeds with half the width of their {LEVEL:.0%} interval (t distribution)."
      if len(seeds) > 1 else "One seed."))])]
  if summary["differences"]:
    scale, spec = (100, "+.1f") if metric == "accuracy" else (1, "+.3g")
    found = summary["differences"]
    sections.append(html.Section(
      f"{labels[0]} against the others",
      "Mean difference over rows and seeds, with the paired bootstrap's interval of "
      f"{LEVEL:.0%}: above 0 the first method is better.",
      tables=[html.Table(
        ["against", *(f"{size:,} rows" for size in sizes)],
        [[label, *(
          f"{scale * of['mean']:{spec}} ({scale * of['low']:{spec}} to {scale * of['high']:{spec}})"
          for of in (found[label][str(size)] for size in sizes))] for label in found])]))
  if summary["prototypes"]:
    grown = {label: [plots.Run(sizes, [results[label, size, seed]["fit"]["prototypes"]
                                       for size in sizes]) for seed in seeds]
             for label in summary["prototypes"]}
    counts = [[label, size, *(spread(of[str(size)][name], ".1f") for name in (
      "prototypes", "created", "pruned", "suppressed"))]
      for label, of in summary["prototypes"].items() for size in sizes]
    courses = {f"{size:,} rows": _courses([results[labels[0], size, seed] for seed in seeds])
               for size in sizes} if labels[0] in summary["prototypes"] else {}
    figures = [report.figure("prototypes", plots.curves(
      grown, x_label="rows to learn from", y_label="prototypes at the end", log_x=many,
      styles=styles), "Capacity follows the data.")]
    if courses:
      figures.append(report.figure("growth", plots.curves(
        courses, x_label="epochs", y_label=f"prototypes of {labels[0]}"),
        "How many prototypes are in use while it learns."))
    sections.append(html.Section(
      "How many prototypes", "", figures=figures, tables=[html.Table(
        ["method", "rows", "at the end", "created", "pruned", "found no room"], counts)]))
  if shown:
    sections.append(html.Section(
      "What prototypes stand for",
      f"Each prototype of {labels[0]} after {sizes[-1]:,} rows with the text nearest to it; purity "
      f"is the share of its {_NEAREST} nearest rows that are of its class.",
      tables=[html.Table(
        ["prototype", "class", "since step", html.Column("purity", ".0%"), "nearest text"],
        [[one["slot"], str(one["class"]), one["born"], one["purity"], one["texts"][0][:160]]
         for one in shown])]))
  if drawn:
    sections.append(html.Section("Where it errs, and where prototypes lie", "", figures=drawn))
  best = {size: max(labels, key=lambda label: _good(summary, label, size)) for size in sizes}
  sections.append(report.cost_section(by_kind=True, total=True))
  value = summary["figures"][labels[0]][str(sizes[-1])]["mean"]
  return html.Report(
    title="Prototypical fine-tuning: prototypes that grow and shrink with the data",
    lead=f"All methods on the vectors of {summary['encoder']}, rows of “{summary['rows']}”. Best "
         "on average: " + ", ".join(f"{best[size]} with {size:,} rows" for size in sizes) + ".",
    key_figures=[
      html.KeyFigure(f"{value:.1%}" if metric == "accuracy" else f"{value:.3g}",
                     f"{labels[0]}, {sizes[-1]:,} rows"),
      report.work_figure()],
    sections=sections,
    facts={"seeds": ", ".join(map(str, seeds)), "rows to test on": f"{summary['num_test']:,}",
           "work": report.work, "versions": report.versions})


def _courses(results):
  """How many prototypes there are after each epoch, by seed, while all of them go on."""
  histories = [of["history"] for of in results]
  length = min(map(len, histories))  # early stopping ends some before others
  return [plots.Run(list(range(1, 1 + length)), [record["prototypes"] for record in of[:length]])
          for of in histories]


def _split(table):
  return table[0], table[1:]


def _good(summary, label, size):
  mean = summary["figures"][label][str(size)]["mean"]
  return mean if summary["metric"] == "accuracy" else -mean
