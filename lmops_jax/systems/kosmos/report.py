"""Stage `report`: what each arm says and chooses, beside the truth, over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.evaluation.over_seeds import LEVEL, spread
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos import claims, figures, prepare, tower
from lmops_jax.systems.kosmos.evaluate import RESULTS_FILE
from lmops_jax.systems.kosmos.gallery import Shown, gallery
from lmops_jax.systems.kosmos.items import (
  CAPTION_KIND,
  HELD_OUT,
  SEEN,
  SHOTS_KIND,
  TYPICAL,
  Item,
)
from lmops_jax.systems.kosmos.training import FULL, VALIDATION
from lmops_jax.training.metrics import read_records

REQUIRED = (
  "arms", "seeds", "figures.*.*.mean", "losses.*.*[]", "tower.*.color", "stages[].seconds")
_NUM_SHOWN = 8  # scenes of the gallery, half of them of held-out pairs
_KINDS = (CAPTION_KIND, "CIDEr", "color", "shape", "count", SHOTS_KIND)  # of the main table
_CHANCE = {"count": 1 / 2, "color": 1 / 8, "shape": 1 / 8}


def run(
  context: pipeline.StageContext, *, runs: Mapping[tuple[str, int], tuple[str, str]],
  stages: Sequence[str],
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    runs: (arm, seed) to the names of its stages train and evaluate.
    stages: all stages before this one.
  """
  arms, seeds, results, losses = outcomes(context, runs)
  report = RunReport(context, stages)
  summary = {
    "arms": arms, "seeds": seeds,
    "figures": {
      arm: figures.over_seeds([results[arm, seed]["figures"] for seed in seeds]) for arm in arms},
    "losses": {arm: last_losses([losses[arm, seed] for seed in seeds]) for arm in arms},
    "tower": context.manifest(tower.STAGE)["extra"]["tested"],
    "counts": context.manifest(prepare.STAGE)["extra"]["counts"],
    "stages": report.costs,
  }
  items, pictures = prepare.Prepared(context.input(prepare.STAGE)).items()
  said = results[FULL, seeds[0]]["said"]
  report.write(
    summary, _page(report, summary, losses, items, pictures, said), required=REQUIRED)


def outcomes(
  context: pipeline.StageContext, runs: Mapping[tuple[str, int], tuple[str, str]]
) -> tuple[list[str], list[int], dict[tuple[str, int], Any], dict[tuple[str, int], list]]:
  """What the stages of all arms and seeds left; for `runs` see `run`.

  Returns:
    The arms, the seeds, and by (arm, seed) the results and the records of validation losses.
  """
  results = {
    key: json.loads((context.input(asked) / RESULTS_FILE).read_text())
    for key, (_, asked) in runs.items()}
  losses = {
    key: [r for r in read_records(context.input(train) / "metrics.jsonl")
          if any(name.startswith(f"{VALIDATION}/") for name in r)]
    for key, (train, _) in runs.items()}
  arms, seeds = ([*dict.fromkeys(key[i] for key in runs)] for i in (0, 1))
  return arms, seeds, results, losses


def last_losses(by_seed: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
  """By part: the last validation loss of each seed, nats a learned token."""
  names = [name for name in by_seed[0][-1] if name.startswith(f"{VALIDATION}/")]
  return {name.split("/")[1]: [records[-1][name] for records in by_seed] for name in names}


def _shown(items: Sequence[Item], pictures: np.ndarray, said: Sequence[Any]) -> list[Shown]:
  """Scenes with the caption and the answers of a model, beside the truth where they are wrong."""
  by_picture: dict[int, list[int]] = {}
  for i, item in enumerate(items):
    if item.kind == CAPTION_KIND or item.kind in _CHANCE and item.pictures:
      by_picture.setdefault(item.pictures[0], []).append(i)
  groups = [[p for p, rows in by_picture.items() if items[rows[0]].group == group]
            for group in (SEEN, HELD_OUT)]
  chosen = [p for of_group in groups for p in of_group[: _NUM_SHOWN // 2]]
  return [Shown(pictures[p], [_line(items[i], said[i]) for i in by_picture[p]]) for p in chosen]


def _line(item: Item, said: Any) -> tuple[str, bool]:
  if item.kind == CAPTION_KIND:
    right = said in item.references
    return said if right else f"{said or 'nothing'} (is: {item.references[0]})", right
  right = said == item.label
  answer, truth = (item.options[i].strip() for i in (said, item.label))
  return f"{figures.KINDS[item.kind]}: {answer}" + ("" if right else f" (is: {truth})"), right


def table(summary: Mapping[str, Any]) -> str:
  """A line for each figure but those of single rules, a column for each arm."""
  return text_table(_rows(summary, (
    name for name in summary["figures"][FULL] if not name.startswith(figures.RULE_KIND))))


def _rows(summary: Mapping[str, Any], names: Iterable[str]) -> list[list[str]]:
  found, arms = summary["figures"], summary["arms"]
  rows = [["", *arms]]
  for name in names:
    spec = ".2f" if name.startswith("CIDEr/") else ".1%"
    rows.append([
      figures.label(name), *(spread(found[arm].get(name), spec) for arm in arms)])
  return rows


def _page(report, summary, losses, items, pictures, said) -> html.Report:
  arms, seeds, found = summary["arms"], summary["seeds"], summary["figures"]
  styles = plots.looks(arms, emphasis=[FULL])
  note = ("One seed, so no intervals." if len(seeds) == 1 else
          f"Means of {len(seeds)} seeds with half the width of their {LEVEL:.0%} interval "
          "(t distribution).")

  def share(arm, kind):
    return found[arm][f"{kind}/{SEEN}"]["mean"]

  answers = plots.grouped_bars(
    {arm: {figures.KINDS[kind]: share(arm, kind) for kind in _CHANCE} for arm in arms},
    x_label="questions answered right, seen pairs", styles=styles,
    order=[figures.KINDS[kind] for kind in _CHANCE])
  shots = [name for name in found[FULL] if name.startswith(SHOTS_KIND)]
  numbers = [int(name.split("/")[0].removeprefix(SHOTS_KIND)) for name in shots]
  few_shot = plots.curves(
    {arm: [plots.Run(numbers, [found[arm][name]["values"][i] for name in shots])
           for i in range(len(seeds))] for arm in arms},
    x_label="pictures of each of two invented names", y_label="accuracy", styles=styles,
    reference=(0.5, "chance"))
  parts = summary["losses"][FULL]
  by_part = plots.curves(
    {part: [plots.Run(*zip(*((r["step"], r[f"{VALIDATION}/{part}"]) for r in losses[FULL, seed])))
            for seed in seeds] for part in parts},
    x_label="steps", y_label="validation loss (nats a learned token)",
    focus_from=losses[FULL, seeds[0]][1]["step"])
  header, *rows = _rows(summary, (
    name for name in found[FULL] if name.startswith(_KINDS) and not name.endswith(TYPICAL)))
  loss_rows = [[part, *(float(np.mean(summary["losses"][arm][part]))
                        if part in summary["losses"][arm] else None for arm in arms)]
               for part in parts]
  others = [arm for arm in arms if arm != FULL]
  compared = "".join(f", {share(arm, 'color'):.0%} {arm}" for arm in others)
  return html.Report(
    title="Kosmos-1: a small language model that sees",
    lead=f"The full model answers **{share(FULL, 'color'):.0%}** of the questions about colours, "
         f"{share(FULL, 'shape'):.0%} about shapes and {share(FULL, 'count'):.0%} about counts "
         f"of scenes that it has not seen (colours: {_CHANCE['color']:.0%} by chance{compared}). "
         "All arms share one tower, which was taught what stands where on scenes of this world and "
         "then frozen.",
    key_figures=[
      *(html.KeyFigure(
          f"{share(FULL, kind):.0%}", f"{figures.KINDS[kind]} right", f"chance {chance:.0%}")
        for kind, chance in _CHANCE.items()),
      html.KeyFigure(f"{found[FULL][f'CIDEr/{SEEN}']['mean']:.2f}", "CIDEr", "seen pairs"),
      report.work_figure()],
    sections=[
      html.Section(
        "What it says",
        "Scenes that no arm was trained on, the second row with pairs of shape and colour that "
        "none has seen together. Captions are greedy and right if they name the same things; "
        "answers are the most likely option.",
        figures=[report.figure(
          "gallery", gallery(_shown(items, pictures, said)),
          f"The full model, seed {seeds[0]}: right in green, wrong in red with the truth behind "
          "it.")]),
      html.Section(
        "Questions and captions",
        "Blind arms see black pictures, shuffled ones were trained on pictures of other examples, "
        "the arm text on texts alone.",
        figures=[report.figure("answers", answers, "Accuracy by kind of question, mean of seeds.")],
        tables=[html.Table(header, rows, note=note)]),
      html.Section(
        "Learning from examples in context",
        "Two invented names, drawn anew in each episode, stand for a shape or a colour each; the "
        "last picture's name is asked for. Such episodes are among the training documents.",
        figures=[report.figure(
          "shots", few_shot, "Accuracy by number of examples, mean and span of seeds.")]),
      *claims.sections(report, found, items, pictures, said),
      html.Section(
        "Losses by source", figures=[report.figure(
          "losses", by_part, "The full model, mean and span of seeds.")],
        tables=[html.Table(
          ["part", *(html.Column(arm, ".3f") for arm in arms)], loss_rows,
          note="Nats a learned token of validation rows after the last step, means of seeds; the "
               "pictures are those that the arm is trained on.")]),
      report.cost_section(by_kind=True, total=True),
    ],
    facts={"seeds": ", ".join(map(str, seeds)),
           "tower": told_of_tower(summary["tower"]),
           "work": report.work, "versions": report.versions},
  )


def told_of_tower(of: Mapping[str, Mapping[str, float]]) -> str:
  """What the taught tower tells right."""
  told = [f"{name.replace('_', ' ')} {value:.0%}" for name, value in of[SEEN].items()]
  held = of[HELD_OUT]["shape_where_there"]
  return f"{', '.join(told)}; shape where there, held-out pairs {held:.0%}"
