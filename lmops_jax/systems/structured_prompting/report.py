"""Stage `report`: accuracy and cost against the number of demonstrations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.config.setting_types import component
from lmops_jax.data.tasks import Task, read_task
from lmops_jax.reporting import html, plots, run_report
from lmops_jax.stages import pipeline

REQUIRED = ("tasks.*.counts[].metric", "tasks.*.seeds", "stages[].seconds")


@component(module="structured_prompting")
@dataclasses.dataclass(frozen=True)
class Report:
  """What the report shows.

  Attributes:
    log_counts: make the axis of demonstrations logarithmic, with zero-shot drawn at 1.
  """

  log_counts: bool = True


def run(
  context: pipeline.StageContext, *, config: Report, evaluated: Sequence[tuple[str, int, str]],
  stages: Sequence[str], model: str,
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    evaluated: task, seed and stage of each evaluation.
    stages: all stages that count as cost.
    model: name of the model that was prompted.
  """
  records: dict[str, dict[int, dict[Any, dict[str, Any]]]] = {}  # task, seed, count
  for task, seed, stage in evaluated:
    found = json.loads((context.input(stage) / "records.json").read_text())
    records.setdefault(task, {})[seed] = {record["key"]: record for record in found}
  tasks = {task: read_task(context.input(f"task/{task}")) for task in records}
  report = run_report.RunReport(context, stages)
  summary = {
    "model": model,
    "tasks": {task: _summary(tasks[task], of_seeds) for task, of_seeds in records.items()},
    "stages": report.costs,
  }
  first = next(iter(summary["tasks"].values()))
  report.write(summary, required=REQUIRED, page=html.Report(
    title="Structured prompting: accuracy and cost by number of demonstrations",
    lead="\n\n".join(_lead(task, of) for task, of in summary["tasks"].items()),
    key_figures=[*_key_figures(summary), report.work_figure()],
    sections=[
      _section(report, config, task, of, records[task]) for task, of in summary["tasks"].items()],
    facts={
      "model": model, "seeds": ", ".join(map(str, first["seeds"])),
      "work": report.work, "versions": report.versions,
    },
  ))


def _summary(task: Task, of_seeds) -> dict[str, Any]:
  """A row for each count; that of the window differs by seed."""
  rows = []
  for key in next(iter(of_seeds.values())):
    found = [records[key] for records in of_seeds.values()]
    values = [record["metric"] for record in found]
    row = {
      "count": float(np.mean([r["count"] for r in found])),
      "counts": [r["count"] for r in found], "key": key, "is_window": key == "window",
      "metric": values, "mean": float(np.mean(values)),
      "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }
    for name in ("num_groups", "num_tokens", "used", "window", "read_seconds", "cache_bytes"):
      row[name] = float(np.mean([r[name] for r in found]))
    row["row_seconds"] = float(np.mean([r["rows_seconds"] / r["num_rows"] for r in found]))
    row["operations"] = float(np.mean([r["read_flops"] for r in found]))
    row["one_text_operations"] = float(np.mean([r["one_text_flops"] for r in found]))
    row["row_operations"] = float(np.mean([r["row_flops"] / r["num_rows"] for r in found]))
    rows.append(row)
  rows.sort(key=lambda row: row["count"])
  first = next(iter(next(iter(of_seeds.values())).values()))
  labels = [row.label for row in task.rows]
  most_frequent = None
  if task.words:
    most_frequent = max(labels.count(i) for i in range(len(task.words))) / len(labels)
  return {
    "seeds": list(of_seeds), "metric": task.metric, "num_rows": first["num_rows"],
    "words": list(task.words), "most_frequent_label": most_frequent,
    "window_count": [next(iter(r.values()))["window_count"] for r in of_seeds.values()],
    "counts": rows,
  }


def _section(report, config, task: str, of: Mapping[str, Any], of_seeds) -> html.Section:
  name = of["metric"].replace("_", " ")

  def x(count):
    return max(count, 1) if config.log_counts else count

  def runs(value):
    return [
      plots.Run([x(row["count"]) for row in of["counts"]],
                [value(records[row["key"]]) for row in of["counts"]])
      for records in of_seeds.values()]

  figures, one_seed = [], len(of["seeds"]) == 1
  spans = "One seed." if one_seed else f"Mean and span of {len(of['seeds'])} seeds."
  several = len({row["count"] for row in of["counts"]}) > 1
  if several:
    reference = None
    if of["most_frequent_label"] is not None:
      reference = of["most_frequent_label"], "the most frequent label"
    figure = plots.curves(
      {name: runs(lambda r: r["metric"])}, x_label="demonstrations", y_label=name,
      log_x=config.log_counts, reference=reference)
    figures.append(report.figure(
      f"{task}_metric", figure,
      f"{spans} Up to the window's {_numbers(of['window_count'])} demonstrations prompting is "
      "ordinary, beyond in groups."))
    figure = plots.curves(
      {"reading them once": runs(lambda r: r["read_seconds"]),
       "a hundred rows": runs(lambda r: 100 * r["rows_seconds"] / r["num_rows"])},
      x_label="demonstrations", y_label="seconds", log_x=config.log_counts, height=2.9)
    figures.append(report.figure(
      f"{task}_cost", figure, "Seconds on the clock, compilation of the first of each included."))
  names = [_numbers(row["counts"]) + (" (window)" if row["is_window"] else "")
           for row in of["counts"]]
  found = html.Table(
    ["demonstrations", html.Column("groups", ".1f"), html.Column("tokens", ",.0f"),
     html.Column(name, ".1%"), html.Column("deviation", ".1%"), "by seed (%)"],
    [[label, row["num_groups"], row["num_tokens"], row["mean"], row["deviation"],
      " ".join(f"{100 * value:.1f}" for value in row["metric"])]
     for label, row in zip(names, of["counts"])],
    note="One seed, so no deviation." if one_seed else "Deviation of the seeds' values.")
  cost = html.Table(
    ["demonstrations", html.Column("read (s)", ".1f"), html.Column("ms a row", ".0f"),
     html.Column("operations to read", ".1e"), html.Column("as one text", ".1e"),
     html.Column("operations a row", ".1e"), html.Column("keys, values (MiB)", ",.0f")],
    [[label, row["read_seconds"], 1000 * row["row_seconds"], row["operations"] or None,
      row["one_text_operations"] or None, row["row_operations"], row["cache_bytes"] / 2**20 or None]
     for label, row in zip(names, of["counts"])],
    note="Means over seeds. Operations by count; as one text, reading grows with the square.")
  words = f" Labels: {', '.join(of['words'])}." if of["words"] else ""
  return html.Section(
    f"Task {task}", f"{of['num_rows']:,} rows.{words}", figures=figures,
    tables=[found, cost])


def _numbers(values: Sequence[int]) -> str:
  low, high = min(values), max(values)
  return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _lead(task: str, of: Mapping[str, Any]) -> str:
  name, rows = of["metric"].replace("_", " "), of["counts"]
  parts = []
  for row in rows:
    spread = "" if row["deviation"] is None else f" ± {row['deviation']:.1%}"
    what = "without demonstrations" if not row["counts"][0] else (
      f"with {_numbers(row['counts'])}"
      + (" (as many as one window holds)" if row["is_window"] else "")
      + (f" in {row['num_groups']:.0f} groups" if row["num_groups"] > 1 else ""))
    parts.append(f"{row['mean']:.1%}{spread} {what}")
  chance = "" if of["most_frequent_label"] is None else (
    f" The most frequent label alone is right for {of['most_frequent_label']:.1%}.")
  return f"**{task}**, {name} on {of['num_rows']:,} rows: {', '.join(parts)}.{chance}"


def _key_figures(summary) -> list[html.KeyFigure]:
  figures = []
  for task, of in list(summary["tasks"].items())[:3]:
    last = of["counts"][-1]
    figures.append(html.KeyFigure(
      f"{last['mean']:.0%}", f"{task}, {of['metric'].replace('_', ' ')}",
      f"with {_numbers(last['counts'])} demonstrations"))
  return figures


def table(summary: Mapping[str, Any]) -> str:
  """Tasks and counts as a plain table."""
  rows = [("task", "demonstrations", "groups", "tokens", "metric", "deviation", "read s",
           "ms a row")]
  for task, of in summary["tasks"].items():
    for row in of["counts"]:
      rows.append((
        task, _numbers(row["counts"]) + (" (window)" if row["is_window"] else ""),
        f"{row['num_groups']:.1f}", f"{row['num_tokens']:,.0f}",
        f"{row['mean']:.1%}", "-" if row["deviation"] is None else f"{row['deviation']:.1%}",
        f"{row['read_seconds']:.1f}", f"{1000 * row['row_seconds']:.0f}"))
  return run_report.text_table(rows)
