"""The report of a training on groups of rows: losses by step, and what became of each source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.shared_stages.grouped_rows import VALIDATION
from lmops_jax.shared_stages.row_texts import LEARNED
from lmops_jax.stages import pipeline
from lmops_jax.training.metrics import read_records


def run(context: pipeline.StageContext, *, title: str) -> None:
  """Writes the report of the stages `rows`, by `GroupedSources.write`, and `train`.

  Args:
    title: of the page.
  """
  report = RunReport(context, ("rows", "train"))
  records = read_records(context.input("train") / "metrics.jsonl")
  counts, first_rows = (
    context.manifest("rows")["extra"][name] for name in ("counts", "first_rows"))
  trained = [r for r in records if "loss" in r]
  measured = [r for r in records if any(key.startswith(f"{VALIDATION}/") for key in r)]
  sources = [key.removeprefix(f"{VALIDATION}/") for key in (measured[-1] if measured else ())
             if key.startswith(f"{VALIDATION}/")]
  last = trained[-1]["loss"]
  validation = {source: measured[-1][f"{VALIDATION}/{source}"] for source in sources}
  curves = {"training": [_curve(trained, "loss")]} | {
    source: [_curve(measured, f"{VALIDATION}/{source}")] for source in sources}
  figure = plots.curves(
    curves, x_label="optimizer steps", y_label="loss (nats a learned token)")
  rows = [[source, name, num] for source, of in counts.items() for name, num in of.items()]
  sections = [html.Section(
    "Loss", "Sources are rows that nothing was learned from." if sources else "",
    figures=[report.figure("loss", figure, "Loss by step; lower is better.")],
    tables=[html.Table(
      ["held out", html.Column("first loss", ".3f"), html.Column("last loss", ".3f")],
      [[source, measured[0][f"{VALIDATION}/{source}"], validation[source]]
       for source in sources])] if sources else [])]
  report.write(
    {"train_loss": last, "validation_loss": validation, "num_steps": trained[-1]["step"],
     "counts": counts, "stages": report.costs},
    html.Report(
      title=title,
      lead=f"The training loss is {last:.3f} nats a learned token after {trained[-1]['step']} "
           "steps.",
      key_figures=[html.KeyFigure(f"{last:.3f}", "training loss", "nats a learned token"),
                   report.work_figure()],
      sections=[
        *sections,
        html.Section("Data", "What became of each source, and what was left out.", tables=[
          html.Table(["source", "what", html.Column("number", ",d")], rows)]),
        html.Section(
          "What is learned",
          f"The first row of each source; what stands between {' and '.join(LEARNED)} is learned.",
          excerpts=[html.Excerpt(text, source) for source, text in first_rows.items()]),
        report.cost_section()],
      facts={"work": report.work, "versions": report.versions}),
    required=["train_loss", "counts.*.rows"])


def table(summary: Mapping[str, Any]) -> str:
  """The losses and the rows of a finished run, for the terminal."""
  rows = [("", "rows"), *((name, f"{of['rows']:,}") for name, of in summary["counts"].items())]
  lines = [f"training loss at the end: {summary['train_loss']:.4f}"]
  lines += [f"validation loss of {name}: {loss:.4f}"
            for name, loss in summary["validation_loss"].items()]
  return "\n".join([*lines, text_table(rows)])


def _curve(records, name: str) -> plots.Run:
  return plots.Run([r["step"] for r in records], [r[name] for r in records])
