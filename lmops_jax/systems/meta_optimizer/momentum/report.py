"""Stage `report`: the two kinds of model side by side, and their difference over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.evaluation.intervals import mean_and_half_width
from lmops_jax.evaluation.lm import perplexity
from lmops_jax.reporting import html, plots, run_report
from lmops_jax.stages import pipeline
from lmops_jax.training.metrics import read_records

VANILLA, MOMENTUM = "vanilla", "momentum"
RESULTS_FILE = "results.json"
REQUIRED = ("eta", "seeds", "perplexity.*.vanilla", "perplexity.*.loss_difference.mean",
            "stages[].seconds")
_ARMS = (VANILLA, MOMENTUM)
_LEVEL = 0.95


def run(
  context: pipeline.StageContext, *, runs: Mapping[tuple[str, int], tuple[str, str]],
  stages: Sequence[str], eta: float, seeds: Sequence[int], lengths: Sequence[int],
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    runs: (arm, seed) to the names of its stages train and evaluate.
    stages: all stages before this one.
    eta: decay of the arm momentum.
    seeds: the seeds, in order.
    lengths: lengths of the validation instances.
  """
  results = {
    key: json.loads((context.input(evaluate) / RESULTS_FILE).read_text())
    for key, (_, evaluate) in runs.items()
  }
  curves = {
    key: [r for r in read_records(context.input(train) / "metrics.jsonl") if "loss" in r]
    for key, (train, _) in runs.items()
  }
  report = run_report.RunReport(context, stages)
  summary = {
    "eta": eta, "seeds": list(seeds), "lengths": list(lengths),
    "perplexity": _perplexities(results, seeds, lengths),
    "in_context": _accuracies(results, seeds),
    "train_loss": {
      arm: [curves[arm, seed][-1]["loss"] for seed in seeds] for arm in _ARMS
    },
    "texts": context.manifest("texts")["extra"]["statistics"],
    "num_tokens": context.manifest(runs[VANILLA, seeds[0]][0])["extra"]["num_tokens"],
    "stages": report.costs,
  }
  report.write(summary, _page(report, summary, curves), required=REQUIRED)


def _perplexities(results, seeds, lengths) -> dict[str, Any]:
  """By part: perplexities by seed, and what momentum changes in the loss and in the perplexity."""
  found = {}
  for part in (f"train_{lengths[-1]}", *(f"validation_{length}" for length in lengths)):
    nats = {arm: [results[arm, seed]["losses"][part] for seed in seeds] for arm in _ARMS}
    values = {arm: [perplexity(x) for x in nats[arm]] for arm in _ARMS}
    found[part] = values | {
      "loss_difference": _difference(nats[MOMENTUM], nats[VANILLA]),
      "perplexity_difference": _difference(values[MOMENTUM], values[VANILLA]),
    }
  return found


def _accuracies(results, seeds) -> dict[str, Any]:
  """By number of demonstrations: accuracies by seed, each the mean over draws."""
  found = {}
  shots = dict.fromkeys(row["shots"] for row in results[VANILLA, seeds[0]]["in_context"])
  for number in shots:
    values = {
      arm: [float(np.mean([row["accuracy"] for row in results[arm, seed]["in_context"]
                           if row["shots"] == number])) for seed in seeds]
      for arm in _ARMS
    }
    rows = [r for r in results[VANILLA, seeds[0]]["in_context"] if r["shots"] == number]
    found[str(number)] = values | {
      "difference": _difference(values[MOMENTUM], values[VANILLA]),
      "num_rows": rows[0]["num_rows"], "num_draws": len(rows),
    }
  return found


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
  """Differences of paired values: by seed, their mean, and its t interval (None for one seed)."""
  values = [a - b for a, b in zip(ours, theirs, strict=True)]
  mean, half = mean_and_half_width(values, _LEVEL)
  return {"values": values, "mean": mean,
          "interval": None if half is None else [mean - half, mean + half]}


def table(summary: Mapping[str, Any]) -> str:
  """Perplexities and accuracies, a line each."""
  lines = [f"  {'perplexity':<18}{VANILLA:>10}{MOMENTUM:>10}   difference"]
  for part, of in summary["perplexity"].items():
    means = (np.mean(of[arm]) for arm in _ARMS)
    lines.append(f"  {part:<18}" + "".join(f"{mean:10.2f}" for mean in means)
                 + f"   {_spread(of['perplexity_difference'], '+.2f')}")
  for shots, of in summary["in_context"].items():
    means = (np.mean(of[arm]) for arm in _ARMS)
    lines.append(f"  {f'accuracy, {shots} shots':<18}" + "".join(f"{mean:10.1%}" for mean in means)
                 + f"   {_spread(of['difference'], '+.1%')}")
  return "\n".join(lines)


def _spread(difference: Mapping[str, Any], spec: str) -> str:
  """Mean and interval."""
  text = format(difference["mean"], spec)
  if difference["interval"] is None:
    return text
  low, high = difference["interval"]
  return f"{text} ({format(low, spec)} to {format(high, spec)})"


def _verdict(difference: Mapping[str, Any]) -> str:
  if difference["interval"] is None:
    return "one seed cannot tell whether that is more than chance"
  low, high = difference["interval"]
  if low <= 0 <= high:
    return f"the {_LEVEL:.0%} interval holds 0, so the seeds do not tell them apart"
  return f"the {_LEVEL:.0%} interval over seeds leaves 0 out"


def _page(report, summary, curves) -> html.Report:
  seeds, num = summary["seeds"], len(summary["seeds"])
  longest = f"validation_{summary['lengths'][-1]}"
  main = summary["perplexity"][longest]
  better = "lower" if main["perplexity_difference"]["mean"] < 0 else "higher"
  note = ("One seed, so no intervals." if num == 1 else
          f"Means of {num} seeds; differences with their {_LEVEL:.0%} interval (t distribution).")
  styles = plots.looks([MOMENTUM, VANILLA], emphasis=[MOMENTUM])

  def rows(group, key, spec):
    return [
      [name, *(format(np.mean(of[arm]), spec) for arm in _ARMS), _spread(of[key], f"+{spec}"),
       "  ".join(format(value, f"+{spec}") for value in of[key]["values"])]
      for name, of in group.items()
    ]

  columns = ["", VANILLA, MOMENTUM, "difference", "by seed"]
  training = plots.curves(
    {arm: [plots.Run([r["step"] for r in curves[arm, s]], [r["loss"] for r in curves[arm, s]])
           for s in seeds] for arm in (MOMENTUM, VANILLA)},
    x_label="steps", y_label="training loss (nats a token)", styles=styles,
    focus_from=curves[VANILLA, seeds[0]][len(curves[VANILLA, seeds[0]]) // 4]["step"],
  )
  lengths = summary["lengths"]
  by_length = plots.curves(
    {arm: [plots.Run(lengths, [summary["perplexity"][f"validation_{n}"][arm][i] for n in lengths])
           for i in range(num)] for arm in (MOMENTUM, VANILLA)},
    x_label="tokens of a validation instance", y_label="perplexity", styles=styles, height=3.0,
  )
  sections = [html.Section(
    "Perplexity",
    "The number after a part's name is the length in tokens of its instances; the validation text "
    "is the same at every length. Tokens count alike.",
    figures=[
      report.figure("perplexity", by_length, "Validation by length, mean and span of seeds."),
      report.figure("training", training, "Training loss by step, mean and span of seeds.")],
    tables=[html.Table(columns, rows(summary["perplexity"], "perplexity_difference", ".3f"),
                       note=note)],
  )]
  if summary["in_context"]:
    shown = {f"{shots} demonstrations": of for shots, of in summary["in_context"].items()}
    sections.append(html.Section(
      "In-context learning", "Accuracy of the most likely label word, mean over draws of "
      "demonstrations.", tables=[html.Table(columns, rows(shown, "difference", ".1%"), note=note)],
    ))
  sections.append(report.cost_section(shares=False))
  return html.Report(
    title="Momentum attention: pairs of language models with and without",
    lead=f"With a decay of {summary['eta']} momentum attention's perplexity on unseen text is "
         f"**{better}** by {abs(main['perplexity_difference']['mean']):.3f}: "
         f"{_verdict(main['perplexity_difference'])}. Both models of a seed start from the same "
         "numbers and read the same batches; the paper gives no decay and one run of each.",
    key_figures=[
      html.KeyFigure(f"{np.mean(main[VANILLA]):.2f}", "perplexity, vanilla", longest),
      html.KeyFigure(f"{np.mean(main[MOMENTUM]):.2f}", "perplexity, momentum", longest),
      html.KeyFigure(_spread(main["loss_difference"], "+.4f"), "difference", "nats a token"),
      html.KeyFigure(f"{summary['num_tokens']:,}", "tokens trained on", "each model"),
    ],
    sections=sections,
    facts={
      "eta": str(summary["eta"]), "seeds": ", ".join(map(str, seeds)),
      "work": report.work, "versions": report.versions,
    },
  )
