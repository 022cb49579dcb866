"""The report of a finetuning on tasks: what is right before and after, losses, and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.evaluation.over_seeds import share, shares_of
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm.evaluate import RESULTS_FILE
from lmops_jax.training.metrics import read_records

MOMENTS = ("before", "after")


def run(
  context: pipeline.StageContext, stages: Sequence[str], *, rows: str, train: str, evaluate: str,
  excerpts: Sequence[html.Excerpt],
) -> None:
  """Writes the report of the stages `rows`, `train` and `evaluate`, by their names.

  Args:
    stages: all. excerpts: rows to show.
  """
  report = RunReport(context, stages)
  results = json.loads((context.input(evaluate) / RESULTS_FILE).read_text())
  accuracy = {
    name: {moment: shares_of([(of[moment]["right"], of[moment]["num"])]) for moment in MOMENTS}
    for name, of in results.items() if "right" in of[MOMENTS[0]]}
  answers = {name: of for name, of in results.items() if name not in accuracy}
  records = [record for record in read_records(context.input(train) / "metrics.jsonl")
             if "loss" in record]
  steps = records[-1]["step"]
  curve = plots.curves(
    {"training": [plots.Run([r["step"] for r in records], [r["loss"] for r in records])]},
    x_label="optimizer steps", y_label="loss (nats a learned token)")
  counts = context.manifest(rows)["extra"]["counts"]
  kinds = sorted({kind for of in counts.values() for kind in of})
  summary = {
    "accuracy": accuracy, "answers": answers, "train_loss": records[-1]["loss"],
    "num_steps": steps, "num_params": context.manifest(train)["extra"]["num_params"],
    "rows": counts, "stages": report.costs}
  lead, figures = f"The loss is {records[-1]['loss']:.3f} nats after {steps} steps.", []
  if accuracy:
    means = summary["mean_accuracy"] = {
      moment: float(np.mean([of[moment]["mean"] for of in accuracy.values()]))
      for moment in MOMENTS}
    lead = (f"Before finetuning {means['before']:.1%} of the answers are right, and after "
            f"{steps} steps {means['after']:.1%}, mean of {len(accuracy)} task(s).")
    figures = [html.KeyFigure(f"{100 * means['after']:.1f}", "percent right", "mean of tasks")]
  of_answers = html.Table(
    ["task", "metric", *MOMENTS], _answer_rows(answers),
    note="With 95% intervals; CIDEr, BLEU and the like are 1 at best, but for CIDEr's 10.")
  report.write(
    summary,
    html.Report(
      title="MetaLM: a task finetuned", lead=lead, key_figures=[*figures, report.work_figure()],
      sections=[
        *([html.Section("Accuracy", tables=[html.Table(
          ["task", *MOMENTS], _accuracy_rows(accuracy),
          note="Percent with Wilson's 95% interval.")])] if accuracy else []),
        *([html.Section("Generated answers", tables=[of_answers], excerpts=[
          html.Excerpt(of[moment]["example"], f"{name}, the first answer, {moment}")
          for name, of in answers.items() for moment in MOMENTS])] if answers else []),
        html.Section("Loss", figures=[report.figure("loss", curve, "Loss by step.")]),
        html.Section(
          "What the encoder reads", "Marked spans reach the decoder as vectors.",
          tables=[html.Table(
            ["learned", *(html.Column(kind.replace("_", " "), ",d") for kind in kinds)],
            [[name, *(of.get(kind, 0) for kind in kinds)] for name, of in counts.items()])],
          excerpts=excerpts),
        report.cost_section()],
      facts={"work": report.work, "versions": report.versions}),
    required=[
      *(["accuracy.*.before.mean", "accuracy.*.after.mean"] if accuracy else []),
      *(["answers.*.after.figures.*"] if answers else []), "stages[].seconds"])


def table(summary: Mapping[str, Any]) -> str:
  """A line for each task, before and after, and for each figure of generated answers."""
  return text_table([
    ["", *MOMENTS], *_accuracy_rows(summary["accuracy"]),
    *([f"{name}, {metric}", *of] for name, metric, *of in _answer_rows(summary["answers"]))])


def _accuracy_rows(accuracy: Mapping[str, Any]) -> list[list[str]]:
  return [[name, *(share(of[moment]) for moment in MOMENTS)] for name, of in accuracy.items()]


def _answer_rows(answers: Mapping[str, Any]) -> list[list[str]]:
  return [
    [name, metric, *(_interval(of[moment]["figures"][metric]) for moment in MOMENTS)]
    for name, of in answers.items() for metric in of[MOMENTS[0]]["figures"]]


def _interval(figure: Sequence[float]) -> str:
  value, low, high = figure
  return f"{value:.3f} ({low:.3f}–{high:.3f})"
