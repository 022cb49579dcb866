"""Stage `report`: how alike learning in context and finetuning are, and what that is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.reporting import html, plots, run_report
from lmops_jax.stages import pipeline
from lmops_jax.systems.meta_optimizer.study import METRICS, SETTINGS, TRAINED, Results

REQUIRED = (
  "tasks.*.networks.*.sim_aou", "tasks.*.networks.*.accuracy_icl", "tasks.*.seeds",
  "stages[].seconds",
)
_SETTING_NAMES = {"zsl": "zero-shot", "ft": "finetuned", "icl": "in context"}
_NETWORK_NAMES = {
  TRAINED: "trained", "untrained": "untrained", "untrained_but_tables": "untrained but tables"}
_CAUTION = (
  "**A positive SimAOU alone proves little.** It compares changes of outputs that were first "
  "scaled to length 1, and this makes also unrelated changes alike: two orthogonal ones score 0.25 "
  "where they are 1.7 times as long as the output, and up to 0.5. In a replication (arXiv "
  "2311.07772) networks with random weights scored as high as the trained one. So read it beside "
  "the raw version, beside the change of attention maps, and beside the untrained controls: only "
  "what the trained network has and these have not can be due to learning in context."
)


@component(module="meta_optimizer")
@dataclasses.dataclass(frozen=True)
class Report:
  """What the report shows.

  Attributes:
    picture_tokens: the most tokens in the picture of a query's attention.
  """

  picture_tokens: PositiveInt = 400


def run(
  context: pipeline.StageContext, *, config: Report, runs: Mapping[tuple[str, int], str]
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    context: the stage's.
    config: what to show.
    runs: stages of the studies, by task and seed.
  """
  found: dict[str, list[Results]] = {}
  for (task, _), stage in runs.items():
    found.setdefault(task, []).append(Results.load(context.input(stage)))
  report = run_report.RunReport(context, tuple(runs.values()))
  summary = {
    "tasks": {task: _task_summary(results) for task, results in found.items()},
    "stages": report.costs,
  }
  pictures = _Pictures(report, config)
  report.write(summary, required=REQUIRED, page=html.Report(
    title="Meta-optimizers: learning in context beside finetuning",
    lead="\n\n".join(
      [*(_lead(task, of) for task, of in summary["tasks"].items()), _CAUTION]),
    key_figures=[*_key_figures(summary), report.work_figure("all studies together")],
    sections=[
      *(_task_section(task, summary["tasks"][task], results, pictures)
        for task, results in found.items()),
      _meaning(),
    ],
    facts={
      "seeds": ", ".join(str(r.summary["seed"]) for r in next(iter(found.values()))),
      "readout": next(iter(found.values()))[0].summary["readout"],
      "work": report.work,
      "versions": report.versions,
    },
  ))


def _task_summary(results: Sequence[Results]) -> dict[str, Any]:
  """Values of every seed, and their mean and deviation, for each network and metric."""
  networks = {}
  for name in results[0].summary["networks"]:
    of = [r.summary["networks"].get(name) for r in results]
    of = [row for row in of if row is not None]
    values = {
      **{f"accuracy_{s}": [row["accuracy"][s] for row in of] for s in SETTINGS},
      **{metric: [row[metric] for row in of] for metric in ("rec2ftp", *METRICS)},
    }
    networks[name] = {metric: _statistics(value) for metric, value in values.items()}
  keys = (
    "rate", "rate_accuracy", "num_diverged_rates", "rate_is_at_the_end", "num_context_tokens",
    "left_out",
  )
  first = results[0].summary
  return {
    "seeds": [r.summary["seed"] for r in results],
    **{key: first[key] for key in (
      "num_rows", "num_demonstrations", "readout", "objective", "tune_on", "kendall", "words")},
    "runs": [{key: r.summary[key] for key in keys} for r in results],
    "networks": networks,
  }


def _statistics(values: Sequence[float | None]) -> dict[str, Any]:
  known = [value for value in values if value is not None]
  return {
    "values": list(values), "mean": float(np.mean(known)) if known else None,
    "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None,
  }


def _text(of: Mapping[str, Any], spec: str = ".3f") -> str | None:
  """Mean and deviation over seeds."""
  if of["mean"] is None:
    return None
  text = format(of["mean"], spec)
  if of["deviation"] is not None:
    text += f" ± {format(of['deviation'], spec)}"
  missing = sum(value is None for value in of["values"])
  return text + (f" (on {len(of['values']) - missing} of {len(of['values'])})" if missing else "")


class _Pictures:
  """Draws figures into the stage's folder."""

  def __init__(self, report, config):
    self.figure, self.config = report.figure, config

  def curves(self, name, results, series, y_label, caption) -> html.Figure | None:
    """Values by layer: `series` has a network and a metric for each label."""
    shown = {}
    for label, (network, metric) in series.items():
      key = f"{network}/{metric}"
      runs = [r.arrays[key] for r in results if key in r.arrays]
      if not runs:
        continue
      known = ~np.isnan(np.stack(runs)).any(axis=0)
      if known.any():
        layers = np.flatnonzero(known) + 1
        shown[label] = [plots.Run(layers, values[known]) for values in runs]
    if not shown:
      return None
    figure = plots.curves(
      shown, x_label="layer", y_label=y_label, styles=plots.looks(list(series), list(series)[:1]),
      height=3.1)
    return self.figure(name, figure, caption)

  def attention(self, name: str, result: Results) -> html.Figure | None:
    """One query's attention over the demonstrations' tokens, a row a layer."""
    if not result.arrays.get("picture/icl", np.zeros((0, 0))).size:
      return None
    count = min(self.config.picture_tokens, result.arrays["picture/icl"].shape[1])
    ranks = [_ranks(result.arrays[f"picture/{s}"])[:, :count] for s in ("icl", "ft")]
    layers = len(ranks[0])
    gap = np.full((1, count), np.nan)
    labels = [f"{s} {i + 1}" if layers <= 8 or i % (layers // 6) == 0 else ""
              for s in ("in context", "finetuned") for i in range(layers)]
    labels.insert(layers, "")
    figure = plots.heatmap(
      np.concatenate([ranks[0], gap, ranks[1]]), row_labels=labels, limits=(0.0, 1.0),
      x_label="tokens of the demonstrations", value_label="rank within the layer",
      height=1.2 + 0.16 * min(len(labels), 40))
    beyond = result.arrays["picture/icl"].shape[1] - count
    return self.figure(
      name, figure, "Where the first row's query looks: scores before softmax, as ranks of tokens "
      "from 0 (lowest) to 1 within each layer. Above, learning in context; below, finetuning (the "
      "inner products of training queries with the query). Kendall's tau compares the two orders."
      + (f" {beyond:,} further tokens are not shown." if beyond else ""))


def _ranks(values: np.ndarray) -> np.ndarray:
  ranks = values.argsort(axis=-1).argsort(axis=-1)
  return ranks / max(values.shape[-1] - 1, 1)


def _task_section(task, summary, results, pictures) -> html.Section:
  networks = list(summary["networks"])
  titles = [_NETWORK_NAMES[n] for n in networks]
  note = (
    f"Mean ± standard deviation of {len(results)} seeds, over layers and "
    f"{summary['num_rows']:,} rows." if len(results) > 1 else
    f"One seed; mean over layers and {summary['num_rows']:,} rows.")

  def table(caption, rows):
    return html.Table(["", *titles], [
      [label, *(_text(summary["networks"][n][metric], spec) for n in networks)]
      for label, metric, spec in rows], caption=caption, note=note)

  curves = []
  controls = {f"{_NETWORK_NAMES[n]}": (n, "sim_aou") for n in networks[1:]}
  for name, series, y_label, caption in (
    ("aou", {"trained": (TRAINED, "sim_aou"), **controls,
             "random update": (TRAINED, "sim_aou_random")}, "SimAOU",
     "Likeness of attention's output updates, outputs normalised, as published. Mean and span of "
     "seeds."),
    ("aou_raw", {"trained": (TRAINED, "sim_aou_raw"),
                 **{k: (n, "sim_aou_raw") for k, (n, _) in controls.items()}}, "SimAOU, raw",
     "The same without normalisation."),
    ("am", {"after": (TRAINED, "sim_am"), "before": (TRAINED, "sim_am_before"),
            "change": (TRAINED, "sim_am_delta")}, "SimAM",
     "Likeness of attention maps in context to those after and before finetuning, and of both "
     "changes against zero-shot."),
    ("am_delta", {"trained": (TRAINED, "sim_am_delta"),
                  **{k: (n, "sim_am_delta") for k, (n, _) in controls.items()}}, "SimAM, change",
     "The change of attention maps, beside untrained networks."),
    ("kendall", {"trained": (TRAINED, "kendall"),
                 **{k: (n, "kendall") for k, (n, _) in controls.items()},
                 "random": (TRAINED, "kendall_random")}, "Kendall's tau",
     "Order of the training tokens by attention in context and by finetuning's inner products."),
  ):
    figure = pictures.curves(f"{task}_{name}", results, series, y_label, caption)
    if figure is not None:
      curves.append(figure)
  picture = pictures.attention(f"{task}_attention", results[0])
  left_out = {
    name: reason for run in summary["runs"] for name, reason in run["left_out"].items()}
  return html.Section(
    f"Task {task}",
    f"{summary['num_demonstrations']} demonstrations in front of {summary['num_rows']:,} rows; "
    f"labels {', '.join(f'`{w}`' for w in summary['words'])}. {_rate_text(summary)}"
    + "".join(
      f" The control {_NETWORK_NAMES[n]} is left out: {why}" for n, why in left_out.items()),
    sections=[
      html.Section("Accuracy", tables=[table("Accuracy", [
        *((_SETTING_NAMES[s], f"accuracy_{s}", ".1%") for s in SETTINGS),
        ("Rec2FTP (percent)", "rec2ftp", ".1f")])]),
      html.Section(
        "Updates and attention", "Each row has its baselines below it; columns further right are "
        "networks with random weights.", tables=[table("Likeness", [
          ("SimAOU", "sim_aou", ".3f"), ("SimAOU, random update", "sim_aou_random", ".3f"),
          ("SimAOU, raw", "sim_aou_raw", ".3f"), ("SimAM after", "sim_am", ".3f"),
          ("SimAM before", "sim_am_before", ".3f"), ("SimAM, change", "sim_am_delta", ".3f"),
          ("Kendall", "kendall", ".3f"), ("Kendall, random weights", "kendall_random", ".3f"),
          ("Kendall of demonstrations", "kendall_demonstrations", ".3f"),
          ("recall of top 5 demonstrations", "recall_5_demonstrations", ".3f"),
          ("recall of top 100 tokens", "recall_100_tokens", ".3f"),
          ("recall of top 100, random", "recall_100_tokens_random", ".3f")])], figures=curves),
      *([html.Section("Attention of one query", figures=[picture])] if picture else []),
    ])


def _rate_text(summary) -> str:
  rates = ", ".join(f"{run['rate']:g}" for run in summary["runs"])
  kind = " layer by layer" if summary["objective"] == "layer_causal" else ""
  text = f"Learning rates of finetuning{kind}, by seed: {rates}"
  if all(run["rate_accuracy"] is None for run in summary["runs"]):
    return text + ", as given."
  text += f", the best on {summary['tune_on']} rows."
  if summary["tune_on"] == "evaluation":
    text += (
      " **These are the reported rows themselves**, as in the paper: finetuning's accuracy is "
      "flattered.")
  if any(run["rate_is_at_the_end"] for run in summary["runs"]):
    text += " A chosen rate is at an end of the grid; a wider one may do better."
  return text


def _lead(task: str, summary: Mapping[str, Any]) -> str:
  of = summary["networks"][TRAINED]
  accuracy = ", ".join(
    f"{_text(of[f'accuracy_{s}'], '.1%')} {_SETTING_NAMES[s]}" for s in SETTINGS)
  text = f"**{task}**: accuracy {accuracy}. SimAOU is {_text(of['sim_aou'])}"
  controls = [
    f"{_text(found['sim_aou'])} {_NETWORK_NAMES[n]}"
    for n, found in summary["networks"].items() if n != TRAINED]
  if controls:
    text += f" ({', '.join(controls)})"
  return text + (
    f", raw {_text(of['sim_aou_raw'])}; SimAM {_text(of['sim_am'])} after finetuning and "
    f"{_text(of['sim_am_before'])} before; Kendall's tau {_text(of['kendall']) or 'undefined'}.")


def _key_figures(summary) -> list[html.KeyFigure]:
  figures = []
  for task, of in summary["tasks"].items():
    trained = of["networks"][TRAINED]
    controls = [found["sim_aou"]["mean"] for n, found in of["networks"].items() if n != TRAINED]
    note = task + (f", {max(controls):.2f} untrained" if controls else "")
    figures.append(html.KeyFigure(f"{trained['sim_aou']['mean']:.2f}", "SimAOU", note))
    if trained["rec2ftp"]["mean"] is not None:
      figures.append(html.KeyFigure(f"{trained['rec2ftp']['mean']:.0f}%", "Rec2FTP", task))
  return figures[:4]


def _meaning() -> html.Section:
  return html.Section(
    "What is measured",
    "Finetuning takes one step of gradient descent on each demonstration, key and value "
    "projections only. All cosines are means over examples, then over layers.\n\n"
    "- **Rec2FTP**: of the rows that are wrong zero-shot and right after finetuning, those that "
    "are right in context.\n"
    "- **SimAOU**: cosine of the changes against zero-shot of the attention's output, in context "
    "and after finetuning. Its baseline has a random vector for the finetuned change.\n"
    "- **SimAM**: cosine of a query's attention scores to its own tokens, before softmax, in "
    "context and after (or before) finetuning; **change** compares both less the zero-shot scores. "
    "It is undefined in the first layer of models with relative positions.\n"
    "- **Kendall**: rank correlation of a query's attention to the demonstrations' tokens in "
    "context with the inner products of their training queries and its own.\n\n"
    "Untrained networks have random weights, with trained embeddings and norms where it says so; "
    "they are finetuned at the trained network's learning rate.")


def table(summary: Mapping[str, Any]) -> str:
  """Tasks and networks as a plain table."""
  rows = [("task", "network", "zero-shot", "finetuned", "in context", "Rec2FTP", "SimAOU", "raw",
           "SimAM", "before", "Kendall")]
  for task, of in summary["tasks"].items():
    for name, found in of["networks"].items():
      rows.append((
        task, _NETWORK_NAMES[name],
        *(_text(found[f"accuracy_{s}"], ".1%") for s in SETTINGS),
        _text(found["rec2ftp"], ".1f") or "-",
        *(_text(found[key]) or "-"
          for key in ("sim_aou", "sim_aou_raw", "sim_am", "sim_am_before", "kendall"))))
  return run_report.text_table(rows)
