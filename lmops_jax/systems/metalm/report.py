"""Stage `report`: the objectives side by side, over seeds and items."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmops_jax.evaluation.over_seeds import LEVEL, share, shares_of, spread, spread_of
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm import reader, tasks, texts
from lmops_jax.systems.metalm.arms import PREFIX, SEMI, Arm, Models
from lmops_jax.systems.metalm.evaluate import (
  BEFORE,
  COMMON,
  OTHER_WORDS,
  OWN,
  PLAIN,
  RESULTS_FILE,
)
from lmops_jax.systems.metalm.training import ALL, ENCODER, VALIDATION
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training.metrics import read_records

REQUIRED = (
  "arms", "seeds", "perplexity.*.common.mean", "figures.*.*.mean", "chance.*", "num_params.*",
  "curves.*[]", "stages[].seconds")
_VIEWS = {
  OWN: "tokens that the arm itself learns, given its spans",
  COMMON: "tokens that all arms learn, each given its own spans",
  PLAIN: "the same tokens, read by the decoder alone as words",
}
_TASKS = {
  tasks.NEXT_PASSAGE: "next passage", tasks.FILE_KIND: "file kind",
  tasks.SAME_DOCUMENT: "same document", OTHER_WORDS: "same document, other words",
}
_LOOKED_AT = 16  # rows, for one with a span
_MODES = {BEFORE: "", ENCODER: "decoder frozen", ALL: "all finetuned"}


@dataclasses.dataclass(frozen=True)
class Run:
  """Names of the stages of an arm and a seed; `finetune` by what is finetuned."""

  train: str
  evaluate: str
  finetune: Mapping[str, str]


def run(
  context: pipeline.StageContext, *, runs: Mapping[tuple[str, int], Run], stages: Sequence[str],
  models: Models,
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    runs: by (arm, seed). stages: all stages before this one.
    models: of the arms, whose spans are drawn.
  """
  arms, seeds = ([*dict.fromkeys(key[i] for key in runs)] for i in (0, 1))
  results = {
    key: json.loads((context.input(of.evaluate) / RESULTS_FILE).read_text())
    for key, of in runs.items()}
  curves = {
    key: [record for record in read_records(context.input(of.train) / "metrics.jsonl")
          if f"{VALIDATION}/loss" in record]
    for key, of in runs.items()}
  trained = {
    arm: context.manifest(runs[arm, seeds[0]].train)["extra"] for arm in arms}
  prepared = texts.Prepared(context.input(texts.STAGE))
  report = RunReport(context, stages)
  summary = {
    "arms": arms, "seeds": seeds,
    "perplexity": {
      arm: {view: spread_of([math.exp(results[arm, seed]["losses"][view]) for seed in seeds])
            for view in _VIEWS} for arm in arms},
    "num_tokens": {arm: results[arm, seeds[0]]["losses"]["num_tokens"] for arm in arms},
    "figures": {
      arm: figures_of([results[arm, seed]["answers"] for seed in seeds]) for arm in arms},
    "num_dropped": {
      arm: sum(row["num_dropped"] for of in results[arm, seeds[0]]["answers"].values()
               for rows in of.values() for row in rows) for arm in arms},
    "chance": chances(context.input(tasks.STAGE)),
    "num_params": {arm: trained[arm]["num_params"] for arm in arms},
    "spans": {arm: trained[arm]["spans"] for arm in arms},
    "curves": {
      arm: [[record[f"{VALIDATION}/loss"] for record in curves[arm, seed]] for seed in seeds]
      for arm in arms},
    "reader": context.manifest(reader.STAGE)["extra"]["tested"],
    "texts": context.manifest(texts.STAGE)["extra"]["statistics"],
    "stages": report.costs,
  }
  drawn = [drawn_row(models.arm(name, prepared.vocabulary.vocab_size), prepared, name)
           for name in (SEMI, PREFIX)]
  page = _page(report, summary, curves, drawn)
  report.write(summary, page, required=REQUIRED)


def figures_of(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """By "task", "task, finetuned" and with "/shots" behind it: shares over seeds and draws."""
  found, first = {}, by_seed[0]
  for mode in (mode for mode in _MODES if mode in first):
    for task in (task for task in _TASKS if task in first[mode]):
      rows = first[mode][task]
      for shots in dict.fromkeys(row["shots"] for row in rows):
        counts = [
          tuple(sum(row[part] for row in of[mode][task] if row["shots"] == shots)
                for part in ("right", "num")) for of in by_seed]
        found[name_of(mode, task, shots if len(rows) > 1 else None)] = shares_of(counts)
  return found


def name_of(mode: str, task: str, shots: int | None) -> str:
  """The key of a figure: "task/model" and, of a task with demonstrations, "/shots"."""
  return "/".join([task, mode, *([] if shots is None else [str(shots)])])


def label(name: str) -> str:
  """A figure's name for people."""
  task, mode, *shots = name.split("/")
  parts = [_TASKS[task], _MODES[mode], *(f"k = {number}" for number in shots)]
  return ", ".join(part for part in parts if part)


def chances(folder: Path) -> dict[str, float]:
  """By task: what the most frequent right option reaches, or any one if rows differ in theirs.

  Args:
    folder: of the stage `tasks`.
  """
  found = {}
  for name in tasks.NAMES:
    task = tasks.read(folder, name)
    labels = collections.Counter(row.label for row in task.rows)
    most = max(labels.values()) if task.words else len(task.rows) / len(task.rows[0].options)
    found[name] = most / len(task.rows)
  return found | {OTHER_WORDS: found[tasks.SAME_DOCUMENT]}


def drawn_row(arm: Arm, prepared: texts.Prepared, title: str) -> html.Excerpt:
  """The first unseen row in which spans are drawn, with its spans marked."""
  unseen = prepared.validation
  batch = arm.validation(unseen).batch(np.arange(min(len(unseen), _LOOKED_AT)))
  return drawn(batch, prepared.vocabulary, title)


def drawn(
  batch: Mapping[str, np.ndarray], vocabulary: Vocabulary, title: str
) -> html.Excerpt:
  """The first row of a batch in which there are spans, with its spans marked."""
  row = int(np.argmax((batch["vector_index"] >= 0).any(axis=1)))
  tokens, index = batch["tokens"][row], batch["vector_index"][row]
  # Between two spans side by side the encoder has a start token.
  is_span, follows = index >= 0, np.diff(index) == 1
  cuts = np.flatnonzero((is_span[1:] != is_span[:-1]) | is_span[1:] & ~follows) + 1
  pieces, marked, length = [], [], 0
  for start, end in zip([0, *cuts], [*cuts, len(tokens)]):
    text = vocabulary.decode(tokens[start:end])
    pieces.append(text)
    if is_span[start] and text:
      marked.append((length, length + len(text)))
    length += len(text)
  return html.Excerpt(
    "".join(pieces), title, {
      "spans": len(marked), "encoded tokens": int(is_span.sum()),
      "learned tokens": int(batch["loss_mask"][row].sum())},
    max_characters=max(length, 1), marked=marked)


def table(summary: Mapping[str, Any]) -> str:
  """A line for each figure, a column for each arm."""
  return text_table([["", *summary["arms"], "chance"], *_perplexity_rows(summary), *_rows(summary)])


def _perplexity_rows(summary) -> list[list[str]]:
  of = summary["perplexity"]
  return [[f"perplexity, {view}", *(spread(of[arm][view], ".1f") for arm in summary["arms"]), ""]
          for view in _VIEWS]


def _rows(summary, names: Iterable[str] | None = None) -> list[list[str]]:
  """Shares in percent with Wilson's interval, and chance."""
  found = summary["figures"]
  every = dict.fromkeys(name for arm in summary["arms"] for name in found[arm])
  return [
    [label(name), *(share(found[arm].get(name)) for arm in summary["arms"]),
     f"{100 * summary['chance'][name.split('/')[0]]:.1f}"]
    for name in (every if names is None else names)]


def _page(report: RunReport, summary, curves, drawn) -> html.Report:
  arms, seeds, found = summary["arms"], summary["seeds"], summary["figures"]
  styles = plots.looks(arms, emphasis=[SEMI] if SEMI in arms else [])
  header = ["", *arms, "chance"]
  note = (f"Percent with Wilson's {LEVEL:.0%} interval of the answers of all seeds, as if each "
          "were drawn on its own; those behind demonstrations are of all draws of these.")
  losses = plots.curves(
    {arm: [plots.Run([r["step"] for r in curves[arm, seed]],
                     [r[f"{VALIDATION}/loss"] for r in curves[arm, seed]]) for seed in seeds]
     for arm in arms},
    x_label="steps", y_label="unseen text (nats a learned token)", styles=styles,
    focus_from=curves[arms[0], seeds[0]][min(1, len(curves[arms[0], seeds[0]]) - 1)]["step"])
  few = [name for name in found[arms[0]] if name.startswith(f"{tasks.FILE_KIND}/{BEFORE}")]
  shots = [int(name.split("/")[2]) for name in few if name.count("/") == 2]
  figures = [report.figure("losses", losses, "Each arm's own objective, mean and span of seeds; "
                           "arms with an encoder learn fewer tokens, and know more of the others.")]
  in_context = []
  if len(shots) > 1:
    in_context.append(report.figure("few_shot", plots.curves(
      {arm: [plots.Run(shots, [found[arm][name]["values"][i] for name in few])
             for i in range(len(seeds))] for arm in arms},
      x_label="demonstrations", y_label="kinds of files told right", styles=styles,
      reference=(summary["chance"][tasks.FILE_KIND], "most frequent kind")),
      "Accuracy by number of demonstrations, mean and span of seeds."))
  tuned = {
    arm: {_MODES[mode]: found[arm].get(f"{tasks.SAME_DOCUMENT}/{mode}", {}).get("mean")
          for mode in (ENCODER, ALL)} for arm in arms}
  finetuned = report.figure("finetuned", plots.grouped_bars(
    tuned, x_label="pairs told right", styles=styles, order=[_MODES[ALL], _MODES[ENCODER]]),
    "Same document, mean of seeds. Arms without an encoder have no run with a frozen decoder.")

  def named(*starts):
    every = dict.fromkeys(name for arm in arms for name in found[arm])
    return [name for name in every if name.startswith(starts)]

  def best(name):
    means = {arm: found[arm][name]["mean"] for arm in arms if name in found[arm]}
    highest = max(means.values())
    return highest, " and ".join(arm for arm in means if means[arm] == highest)

  of_tuned = named(*(f"{task}/{mode}" for task in tasks.TUNED for mode in (ENCODER, ALL)))
  taught = [name for name in of_tuned if name.split("/")[2:] in ([], ["0"])]
  zero, tuned_best = (
    best(f"{tasks.NEXT_PASSAGE}/{BEFORE}"), best(f"{tasks.SAME_DOCUMENT}/{ALL}"))
  common = min((summary["perplexity"][arm][COMMON]["mean"], arm) for arm in arms)
  return html.Report(
    title="MetaLM: a decoder as the interface of encoders",
    lead="Decoders trained on the same rows by several objectives: causal, causal with as many "
         "parameters as decoder and encoder together, prefix, and semi-causal, in which an encoder "
         "reads random spans. On the tokens that all of them learn the lowest perplexity is that "
         f"of **{common[1]}** ({common[0]:.1f}); the most next passages are found by {zero[1]} "
         f"({zero[0]:.0%}), and after finetuning the most pairs are told by "
         f"{tuned_best[1]} ({tuned_best[0]:.0%}). The intervals say which of these differences are "
         "more than chance.",
    key_figures=[
      *(html.KeyFigure(f"{summary['num_params'][arm]:,}", f"parameters, {arm}") for arm in arms),
      report.work_figure()],
    sections=[
      html.Section(
        "What the encoder reads",
        "A row of unseen text. Marked spans reach the decoder as vectors of the encoder; of a span "
        "the first token is predicted, of all else every token.", excerpts=drawn),
      html.Section(
        "Perplexity", "\n".join(f"- {view}: {what}" for view, what in _VIEWS.items()),
        figures=figures,
        tables=[html.Table(
          header, _perplexity_rows(summary), note="Means of seeds with half the width of their "
          f"{LEVEL:.0%} interval (t distribution)." if len(seeds) > 1 else "One seed.")]),
      html.Section(
        "Without finetuning", "Which passage continues the text, and the kind of the file that an "
        "excerpt is from, behind k examples.", figures=in_context,
        tables=[html.Table(header, _rows(summary, named(
          tasks.NEXT_PASSAGE, f"{tasks.FILE_KIND}/{BEFORE}")), note=note)]),
      html.Section(
        "Finetuned", "Whether two passages stand in one document, and kinds of files, both learned "
        "together.", figures=[finetuned],
        tables=[html.Table(header, _rows(summary, taught), note=note)]),
      html.Section(
        "In-context customisation", "The finetuned models, asked with other label words and "
        "behind k examples, of which they saw none in one row.",
        tables=[html.Table(header, _rows(summary, [
          *named(OTHER_WORDS), *(name for name in of_tuned if name not in taught)]), note=note)]),
      report.cost_section(by_kind=True, total=True),
    ],
    facts={
      "seeds": ", ".join(map(str, seeds)),
      "encoder": ", ".join(f"{name.replace('_', ' ')} {value:.2f}"
                           for name, value in summary["reader"].items()),
      "work": report.work, "versions": report.versions},
  )
