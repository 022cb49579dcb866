"""Stage `report`: what was selected, what it was worth, and what it cost.

The only stage that opens the kind labels.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.config.setting_types import Count, PositiveInt, component
from lmops_jax.evaluation import curves, intervals
from lmops_jax.reporting import html, plots, run_report
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import evaluate, methods, prepare, scorer, scores, select

BASELINE = "random"
COST = (
  "Seconds on the clock and floating-point operations by count, compilation included in the "
  "former. The report itself is not in the list."
)


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Report:
  """What the report shows.

  Attributes:
    num_examples: best and worst instances shown for each method with scores.
    excerpt_characters: the most characters of a shown instance.
  """

  num_examples: Count = 5
  excerpt_characters: PositiveInt = 400


SUMMARY_KEYS = (
  "methods.*.seeds", "methods.*.target_test_loss", "methods.*.steps_to_match_random",
  "selected_share_by_kind.*", "corpus_share_by_kind", "scorer.validation_spearman",
  "stages[].name", "stages[].seconds", "stages[].flops",
)


def run(
  context: pipeline.StageContext, config: Report, stages: Sequence[str],
  method_names: Sequence[str],
) -> None:
  """Writes summary.json, the plots and index.html."""
  view = _View(context, config, stages, method_names)
  summary = view.summary()
  page = html.Report(
    title="PDS: pre-training data selection by optimal control",
    lead=_lead(summary),
    key_figures=[*_key_figures(summary), view.report.work_figure()],
    sections=[
      view.learning_section(summary), view.selection_section(summary), view.scores_section(summary),
      view.examples_section(), view.report.cost_section(COST, total=True), view.corpus_section(),
    ],
    facts=view.facts(),
  )
  view.report.write(summary, page, required=SUMMARY_KEYS)


class _View:
  """The finished run, read once; each method makes one part of the report."""

  def __init__(self, context, config: Report, stages, method_names):
    self.context, self.config, self.method_names = context, config, list(method_names)
    self.report = run_report.RunReport(context, stages)
    self.manifests = {name: context.manifest(name) for name in stages}
    self.prepared = prepare.Prepared(context.input("prepare"))
    self.corpus = self.prepared.corpus
    self.labels = self.prepared.labels()
    self.evaluations = json.loads((context.input("evaluate") / evaluate.FILE).read_text())
    self.selected = {
      name: select.selected_indices(context, f"select/{name}") for name in self.method_names
    }
    self.fitted = [  # to scores of proxies
      name for name in self.method_names
      if "validation_spearman" in self.manifests.get(f"scorer/{name}", {}).get("extra", {})
    ]
    self.styles = plots.looks(self.method_names, emphasis=self.method_names[:1])

  def summary(self) -> dict[str, Any]:
    kinds = {document: kind for document, (kind, _) in self.labels.items()}
    fits = {name: self.manifests[f"scorer/{name}"]["extra"] for name in self.fitted}
    spearman = {name: fit["validation_spearman"] for name, fit in fits.items()}
    main = self.fitted[0] if self.fitted else None
    results = method_results(self.evaluations)
    return {
      "methods": results,
      "difference_by_chance": intervals.half_width_of_difference(
        [result["target_test_loss"] for result in results.values()]),
      "corpus_share_by_kind": share_by_kind(self.corpus, np.arange(len(self.corpus)), kinds),
      "selected_share_by_kind": {
        name: share_by_kind(self.corpus, indices, kinds)
        for name, indices in self.selected.items()
      },
      "scorer": {
        "method": main,
        "validation_spearman": spearman.get(main),
        "validation_spearman_by_method": spearman,
      },
      "num_instances": len(self.corpus),
      "num_selected": {name: len(indices) for name, indices in self.selected.items()},
      "stages": self.report.costs,
      "corpus": self.prepared.statistics(),
    }

  def facts(self) -> dict[str, str]:
    seeds = sorted({row["seed"] for row in self.evaluations})
    return {
      "work": self.report.work,
      "seeds": ", ".join(map(str, seeds)),
      "versions": self.report.versions,
    }

  def learning_section(self, summary) -> html.Section:
    results = summary["methods"]
    series = {
      name: [
        plots.Run(result["curve"]["steps"], losses)
        for losses in result["curve"]["target_test_loss"]
      ]
      for name, result in results.items()
    }
    reference, crossings = None, {}
    if BASELINE in results:
      reference = (results[BASELINE]["target_test_loss_mean"], "random at the end")
      crossings = {
        name: float(np.mean(result["steps_to_match_random"]))
        for name, result in results.items()
        if name != BASELINE and None not in result["steps_to_match_random"]
      }
    steps = next(iter(results.values()))["curve"]["steps"]
    figure = plots.curves(
      series, x_label="pre-training steps", y_label="target test loss (nats per token)",
      styles=self.styles, reference=reference, crossings=crossings,
      focus_from=steps[len(steps) // 3],
    )
    ranked = sorted(results, key=lambda name: results[name]["target_test_loss_mean"])
    with_corpus = all("corpus_loss" in result for result in results.values())
    columns = ["method", html.Column("target test loss", ".3f"), "each seed",
               html.Column("against random", "+.3f"), "steps to random's final loss"]
    rows = []
    for name in ranked:
      result = results[name]
      rows.append([
        name, result["target_test_loss_mean"],
        ", ".join(f"{loss:.3f}" for loss in result["target_test_loss"]),
        result["target_test_loss_mean"] - reference[0] if reference else None,
        ", ".join(map(_steps_text, result["steps_to_match_random"]))
        if reference and name != BASELINE else None,
      ])
      if with_corpus:
        rows[-1].append(float(np.mean(result["corpus_loss"])))
    if with_corpus:
      columns.append(html.Column("corpus loss", ".3f"))
    chance = summary["difference_by_chance"]
    sure = "" if chance is None else (
      f" Two methods less than {chance:.3f} apart may be so by chance (95 %, by how far trainings "
      "of one method differ).")
    return html.Section(
      "What the selection is worth",
      "Models of one size, trained alike for the same number of steps, each on one selection. The "
      "test part of the target was opened for these numbers only. Lower is better; the corpus loss "
      f"is on held-out text of the whole corpus, which a selection is free to neglect.{sure}",
      figures=[self.report.figure("target_test_loss", figure,
                                  "Mean over seeds; the band spans them. The start is cut off.")],
      tables=[html.Table(columns, rows, highlight=[0])],
    )

  def selection_section(self, summary) -> html.Section:
    shares = {"corpus": summary["corpus_share_by_kind"], **summary["selected_share_by_kind"]}
    shown = {name: shares[name] for name in ["corpus", *self.method_names[:3]]}
    figure = plots.grouped_bars(
      shown, x_label="share of tokens", styles=self.styles,
      order=list(summary["corpus_share_by_kind"]),
    )
    kinds = list(summary["corpus_share_by_kind"])
    rows = [[kind, *(share.get(kind, 0.0) for share in shares.values())] for kind in kinds]
    columns = ["kind", *(html.Column(name, ".1%") for name in shares)]
    return html.Section(
      "What was selected",
      "Shares of the tokens by kind of document. No stage before this report has read the kinds.",
      figures=[self.report.figure("share_by_kind", figure, "Kinds in the order of their share.")],
      tables=[html.Table(columns, rows)],
    )

  def scores_section(self, summary) -> html.Section:
    figures, rows = [], []
    for name in self.fitted:
      extra = self.manifests[f"scorer/{name}"]["extra"]
      rows.append([name, extra["validation_spearman"], extra["top_30_percent"]["f1"],
                   extra["top_30_percent"]["random_f1"], extra["best_step"],
                   extra["num_train"], extra["num_validation"]])
    if self.fitted:
      name = self.fitted[0]
      values = self._corpus_scores(name)
      chosen = values[self.selected[name]]
      figures.append(self.report.figure("scores", plots.histogram(
        {"corpus": values, "selected": chosen}, x_label=f"score by {name} (standard deviations)",
        y_label="instances",
      ), "Scores of all instances and of the selected ones."))
      with np.load(self.context.input(f"scorer/{name}") / scorer.VALIDATION_FILE) as arrays:
        target, predicted = arrays["target"], arrays["predicted"]
      figures.append(self.report.figure("scorer", plots.scatter(
        target, predicted, x_label="score from the costates", y_label="the scorer's prediction",
        note=f"Spearman {summary['scorer']['validation_spearman']:.3f}", identity=True,
      ), "Proxies that the scorer was not trained on."))
    return html.Section(
      "Scores and the scorer",
      "Methods that score a proxy set hand its scores to a scorer, which then scores the corpus.",
      figures=figures,
      tables=[html.Table(
        ["method", html.Column("Spearman", ".3f"), html.Column("F1, best 30 %", ".3f"),
         html.Column("by chance", ".3f"), html.Column("best step", ",d"),
         html.Column("trained on", ",d"), html.Column("validated on", ",d")], rows,
      )] if rows else (),
    )

  def examples_section(self) -> html.Section:
    parts = []
    vocabulary = self.prepared.vocabulary
    for name in self.fitted[:1]:
      values = self._corpus_scores(name)
      order = np.argsort(values, kind="stable")
      num = min(self.config.num_examples, len(order) // 2)
      best, worst = order[::-1][:num], order[:num]
      for title, indices in (("Highest scores", best), ("Lowest scores", worst)):
        excerpts = []
        texts = methods.texts_of(self.corpus, indices, vocabulary)
        for index, text in zip(indices, texts, strict=True):
          documents, _ = self.corpus.documents(int(index))
          kinds, sources = zip(*(self.labels[int(d)] for d in documents), strict=True)
          excerpts.append(html.Excerpt(
            text, title=", ".join(dict.fromkeys(sources)),
            facts={"score": f"{values[index]:+.2f}", "kind": ", ".join(dict.fromkeys(kinds)),
                   "instance": int(index)},
            max_characters=self.config.excerpt_characters,
          ))
        parts.append(html.Section(f"{title} by {name}", excerpts=excerpts))
    return html.Section("The best and the worst", sections=parts)

  def corpus_section(self) -> html.Section:
    statistics = self.prepared.statistics()
    corpus = statistics["corpus"]
    rows = [
      ["documents", corpus["num_documents"]], ["characters", corpus["num_characters"]],
      ["tokens", corpus["num_tokens"]], ["instances", corpus["num_instances"]],
      ["held out", corpus["num_held_out"]],
      *([f"left out: {reason}", num] for reason, num in corpus["dropped"].items()),
      ["left out: shared with the target", len(corpus["overlaps_with_target"])],
      *([f"left out of the target: {reason}", num]
        for reason, num in statistics["target"]["dropped"].items()),
      *([f"{part} {unit}", statistics[part][f"num_{unit}"]]
        for part in ("target_dev", "target_test") for unit in ("documents", "instances")),
    ]
    return html.Section(
      "The text", tables=[html.Table(["what", html.Column("number", ",d")], rows)]
    )

  def _corpus_scores(self, name: str) -> np.ndarray:
    folder = self.context.input(f"annotate/{name}")
    return np.concatenate([s for _, s in scores.read_shards(folder, len(self.corpus))])


def _steps_text(step: float | None) -> str:
  return "never" if step is None else f"{step:.0f}"


def _compared(summary) -> tuple[str, dict, dict] | None:
  """The first method that is not the baseline, its results and the baseline's."""
  results = summary["methods"]
  others = [name for name in results if name != BASELINE]
  if BASELINE not in results or not others:
    return None
  return others[0], results[others[0]], results[BASELINE]


def _lead(summary) -> str:
  compared = _compared(summary)
  if compared is None:
    return "The run compared no method with the random baseline."
  name, ours, random = compared
  better = sum(a < b for a, b in zip(ours["target_test_loss"], random["target_test_loss"],
                                     strict=True))
  matched = [s for s in ours["steps_to_match_random"] if s is not None]
  steps = ours["curve"]["steps"][-1]
  reached = (
    f"It reached random's final loss after {np.mean(matched):.0f} of {steps} steps"
    f"{'' if len(matched) == len(ours['seeds']) else f' (on {len(matched)} seeds)'}."
    if matched else "It never reached random's final loss."
  )
  return (
    f"{name} ended at a target test loss of {ours['target_test_loss_mean']:.3f} nats per token, a "
    f"random selection of the same size at {random['target_test_loss_mean']:.3f}; {name} was "
    f"better on {better} of {len(ours['seeds'])} seeds. {reached}"
  )


def _key_figures(summary) -> list[html.KeyFigure]:
  figures = []
  compared = _compared(summary)
  if compared is not None:
    name, ours, random = compared
    difference = ours["target_test_loss_mean"] - random["target_test_loss_mean"]
    figures.append(html.KeyFigure(f"{difference:+.3f}".replace("-", "\N{MINUS SIGN}"),
                                  "nats per token", f"{name} against random, target test loss"))
    matched = [s for s in ours["steps_to_match_random"] if s is not None]
    if matched:
      steps = ours["curve"]["steps"][-1]
      figures.append(html.KeyFigure(f"{steps / np.mean(matched):.2f}\N{MULTIPLICATION SIGN}",
                                    "fewer steps", "to random's final loss"))
  if summary["scorer"]["validation_spearman"] is not None:
    figures.append(html.KeyFigure(f"{summary['scorer']['validation_spearman']:.2f}",
                                  "Spearman", "of the scorer on unseen proxies"))
  return figures


def table(summary: Mapping[str, Any]) -> str:
  """The methods as a plain table, best first."""
  results = summary["methods"]
  steps = next(iter(results.values()))["curve"]["steps"][-1]
  rows = [("method", "target test loss", "each seed", f"steps to random's loss at {steps}")]
  for name in sorted(results, key=lambda n: results[n]["target_test_loss_mean"]):
    result = results[name]
    rows.append((
      name, f"{result['target_test_loss_mean']:.3f}",
      " ".join(f"{loss:.3f}" for loss in result["target_test_loss"]),
      " ".join(map(_steps_text, result["steps_to_match_random"]))
      if BASELINE in results and name != BASELINE else "",
    ))
  return run_report.text_table(rows)


def method_results(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """Curves by method, and the steps each needs to reach the random baseline's final loss.

  `steps_to_match_random` compares runs of the same seed; it is None if the loss is never reached,
  and for every method if no method is called "random".
  """
  by_method: dict[str, dict[int, list[dict[str, float]]]] = collections.defaultdict(dict)
  for row in evaluations:
    by_method[row["method"]][row["seed"]] = row["curve"]
  results: dict[str, Any] = {}
  for method, runs in by_method.items():
    seeds = sorted(runs)
    steps = [point["step"] for point in runs[seeds[0]]]
    losses = [[point["target_test_loss"] for point in runs[seed]] for seed in seeds]
    results[method] = {
      "seeds": seeds,
      "target_test_loss": [row[-1] for row in losses],
      "target_test_loss_mean": float(np.mean([row[-1] for row in losses])),
      "steps_to_match_random": [
        _steps_to_match(steps, row, by_method.get(BASELINE, {}).get(seed))
        for seed, row in zip(seeds, losses, strict=True)
      ],
      "curve": {"steps": steps, "target_test_loss": losses},
    }
    if "corpus_loss" in runs[seeds[0]][-1]:
      results[method]["corpus_loss"] = [runs[seed][-1]["corpus_loss"] for seed in seeds]
  return results


def _steps_to_match(steps, losses, baseline) -> float | None:
  if baseline is None:
    return None
  return curves.steps_to_match(
    list(zip(steps, losses, strict=True)), baseline[-1]["target_test_loss"]
  )


def share_by_kind(corpus, indices: np.ndarray, kinds: Mapping[int, str]) -> dict[str, float]:
  """Share of the tokens of the instances `indices` that come from documents of each kind."""
  tokens: collections.Counter[str] = collections.Counter()
  for index in indices:
    for document, num in zip(*corpus.documents(int(index)), strict=True):
      tokens[kinds[int(document)]] += int(num)
  total = sum(tokens.values())
  return {kind: num / total for kind, num in sorted(tokens.items(), key=lambda x: -x[1])}
