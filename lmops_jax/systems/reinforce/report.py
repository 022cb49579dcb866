"""The report of a run of reinforcement learning: scores, divergence, and what was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport
from lmops_jax.training.metrics import read_records
from lmops_jax.training.reinforce.journal import read_journal

_CURVES = {  # figure: what is drawn, and the axis
  "score": ("score", "mean score of a response"),
  "kl": ("kl", "nats a response from the reference"),
  "length": ("response_tokens", "tokens a response, end included"),
  "entropy": ("entropy", "nats a token"),
}


def write(context, model: str, journal: str, num_shown: int) -> None:
  """Writes summary.json and index.html of the stage `report`.

  Args:
    context: the stage's.
    model: path of the model that the run began with.
    journal: name of the rollouts' file in the stage `train`.
    num_shown: responses of the first and of the last batch on the page.
  """
  report = RunReport(context, ("train",))
  cost, = report.costs
  folder = context.input("train")
  records = read_records(folder / "metrics.jsonl")
  first, last = records[0], records[-1]
  counts = context.manifest("train")["extra"]["prompts"]
  shown = _shown(folder / journal, num_shown)
  summary = {
    "num_steps": last["step"], "prompts": counts,
    "curve": [{"step": r["step"], "score": r["score"], "kl": r["kl"],
               "response_tokens": r["response_tokens"], "coefficient": r["coefficient"]}
              for r in records],
    "score": {"first": first["score"], "last": last["score"]}, "kl": last["kl"],
    "seconds": cost["seconds"], "flops": cost["flops"],
  }
  figures = [
    report.figure(name, plots.curves(
      {field: [plots.Run([r["step"] for r in records], [r[field] for r in records])]},
      x_label="batches of rollouts", y_label=axis), f"{axis.capitalize()}, by batch.")
    for name, (field, axis) in _CURVES.items()]
  columns = ["prompt", "response", html.Column("score", ".3f"), html.Column("KL", ".3f"),
             html.Column("tokens", ",d")]
  report.write(summary, html.Report(
    title="Reinforcement learning of a language model",
    lead=f"The mean score went from {first['score']:.3f} to {last['score']:.3f} in {last['step']} "
         f"batches of responses; the policy is {last['kl']:.3f} nats a response from where it "
         "began.",
    key_figures=[
      html.KeyFigure(f"{last['score']:.3f}", "score", f"{first['score']:.3f} at first"),
      html.KeyFigure(f"{last['kl']:.3f}", "nats a response", "from the reference"),
      html.KeyFigure(f"{last['response_tokens']:.1f}", "tokens a response",
                     f"{first['response_tokens']:.1f} at first"),
    ],
    sections=[
      html.Section("Course", "Each point is a mean over a batch, before it is learned from.",
                   figures=figures),
      html.Section("Responses", f"All of them are in `{journal}` of the stage train.", tables=[
        html.Table(columns, [
          [row["prompt"], row["response"], row["score"], row["kl"], row["num_tokens"]]
          for row in rows], caption=f"Batch {step + 1}") for step, rows in shown.items()]),
    ],
    facts={"model": model, "prompts": f"{counts['prompts']:,}",
           "dropped prompts": f"{counts['dropped']:,}", "seconds": f"{cost['seconds']:.0f}",
           "FLOPs": f"{cost['flops']:.3g} (scoring and updates)"},
  ))


def _shown(path, num: int) -> dict[int, list[dict[str, Any]]]:
  """The first responses of the first and the last batch."""
  shown: dict[int, list[dict[str, Any]]] = {}
  for row in read_journal(path):
    of_step = shown.setdefault(row["step"], [])
    if len(of_step) < num:
      of_step.append(row)
    for step in sorted(shown)[1:-1]:
      del shown[step]
  return shown


def table(summary: Mapping[str, Any]) -> str:
  """Scores by batch, ten at most, for the terminal."""
  curve = summary["curve"]
  every = -(-len(curve) // 10)
  rows = [*curve[:-1:every], curve[-1]]
  return "\n".join([f"  {'batch':>8}  {'score':>10}  {'KL (nats)':>10}  {'tokens':>8}", *(
    f"  {row['step']:8}  {row['score']:10.4f}  {row['kl']:10.4f}  {row['response_tokens']:8.1f}"
    for row in rows)])
