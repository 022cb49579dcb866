"""Stage `report`: what each arm says and chooses, beside the truth, over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.evaluation.intervals import mean_and_half_width
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos import prepare, tower
from lmops_jax.systems.kosmos.evaluate import RESULTS_FILE
from lmops_jax.systems.kosmos.gallery import Shown, gallery
from lmops_jax.systems.kosmos.training import FULL, VALIDATION
from lmops_jax.systems.kosmos.world import CAPTION_KIND, HELD_OUT, SEEN, SHOTS_KIND, Item
from lmops_jax.training.metrics import read_records

REQUIRED = ("arms", "seeds", "figures.*.*.mean", "losses.*.*[]", "tower.color", "stages[].seconds")
_LEVEL = 0.95
_NUM_SHOWN = 8  # scenes of the gallery, half of them of held-out pairs
_KINDS = {"count": "count", "color": "colour", "shape": "shape"}  # for people
_CHANCE = {"color": 1 / 8, "shape": 1 / 8, "count": 1 / 2}
GROUPS = {SEEN: "seen pairs", HELD_OUT: "held-out pairs"}


def run(
  context: pipeline.StageContext, *, runs: Mapping[tuple[str, int], tuple[str, str]],
  stages: Sequence[str],
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    runs: (arm, seed) to the names of its stages train and evaluate.
    stages: all stages before this one.
  """
  results = {
    key: json.loads((context.input(asked) / RESULTS_FILE).read_text())
    for key, (_, asked) in runs.items()}
  losses = {
    key: [r for r in read_records(context.input(train) / "metrics.jsonl")
          if any(name.startswith(f"{VALIDATION}/") for name in r)]
    for key, (train, _) in runs.items()}
  arms, seeds = ([*dict.fromkeys(key[i] for key in runs)] for i in (0, 1))
  report = RunReport(context, stages)
  summary = {
    "arms": arms, "seeds": seeds,
    "figures": {arm: _figures([results[arm, seed]["figures"] for seed in seeds]) for arm in arms},
    "losses": {arm: last_losses([losses[arm, seed] for seed in seeds]) for arm in arms},
    "tower": context.manifest(tower.STAGE)["extra"]["tested"],
    "counts": context.manifest(prepare.STAGE)["extra"]["counts"],
    "stages": report.costs,
  }
  items, pictures = prepare.Prepared(context.input(prepare.STAGE)).items()
  said = results[FULL, seeds[0]]["said"]
  report.write(summary, _page(report, summary, losses, _shown(items, pictures, said)),
               required=REQUIRED)


def _figures(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """By "kind/group", and of captions also "CIDEr/group": shares by seed, mean, half width."""
  found = {}
  for name, of in by_seed[0].items():
    kind, group = name.split("/")
    rows = [figures[name] for figures in by_seed]
    found[name] = over_seeds([row["right"] / row["num"] for row in rows]) | {"num": of["num"]}
    if kind == CAPTION_KIND:
      found[f"CIDEr/{group}"] = over_seeds([row["CIDEr"] for row in rows]) | {"num": of["num"]}
  return found


def over_seeds(values: list[float]) -> dict[str, Any]:
  """Values of seeds, their mean and half the width of its interval."""
  mean, half = mean_and_half_width(values, _LEVEL)
  return {"values": values, "mean": mean, "half_width": half}


def last_losses(by_seed: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
  """By part: the last validation loss of each seed, nats a learned token."""
  names = [name for name in by_seed[0][-1] if name.startswith(f"{VALIDATION}/")]
  return {name.split("/")[1]: [records[-1][name] for records in by_seed] for name in names}


def _shown(items: Sequence[Item], pictures: np.ndarray, said: Sequence[Any]) -> list[Shown]:
  """Scenes with the caption and the answers of a model, beside the truth where they are wrong."""
  by_picture: dict[int, list[int]] = {}
  for i, item in enumerate(items):
    if len(item.pictures) == 1 and not item.kind.startswith(SHOTS_KIND):
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
  return f"{_KINDS[item.kind]}: {answer}" + ("" if right else f" (is: {truth})"), right


def spread(of: Mapping[str, Any], spec: str) -> str:
  """Mean and half width of the interval."""
  text = format(of["mean"], spec)
  return text if of["half_width"] is None else f"{text} ± {format(of['half_width'], spec)}"


def table(summary: Mapping[str, Any]) -> str:
  """A line for each figure, a column for each arm."""
  return text_table(_rows(summary))


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
  figures, arms = summary["figures"], summary["arms"]
  rows = [["", *arms]]
  for name in figures[FULL]:
    kind, group = name.split("/")
    label = kind if kind.startswith(SHOTS_KIND) else f"{_KINDS.get(kind, kind)}, {GROUPS[group]}"
    rows.append([label, *(
      spread(figures[arm][name], ".2f" if kind == "CIDEr" else ".1%") for arm in arms)])
  return rows


def _page(report, summary, losses, shown) -> html.Report:
  arms, seeds, figures = summary["arms"], summary["seeds"], summary["figures"]
  styles = plots.looks(arms, emphasis=[FULL])
  note = ("One seed, so no intervals." if len(seeds) == 1 else
          f"Means of {len(seeds)} seeds with half the width of their {_LEVEL:.0%} interval (t "
          "distribution).")

  def share(arm, kind):
    return figures[arm][f"{kind}/{SEEN}"]["mean"]

  answers = plots.grouped_bars(
    {arm: {_KINDS[kind]: share(arm, kind) for kind in _KINDS} for arm in arms},
    x_label="questions answered right, seen pairs", styles=styles, order=list(_KINDS.values()))
  shots = [name for name in figures[FULL] if name.startswith(SHOTS_KIND)]
  numbers = [int(name.split("/")[0].removeprefix(SHOTS_KIND)) for name in shots]
  few_shot = plots.curves(
    {arm: [plots.Run(numbers, [figures[arm][name]["values"][i] for name in shots])
           for i in range(len(seeds))] for arm in arms},
    x_label="pictures of each of two invented names", y_label="accuracy", styles=styles,
    reference=(0.5, "chance"))
  parts = summary["losses"][FULL]
  by_part = plots.curves(
    {part: [plots.Run(*zip(*((r["step"], r[f"{VALIDATION}/{part}"]) for r in losses[FULL, seed])))
            for seed in seeds] for part in parts},
    x_label="steps", y_label="validation loss (nats a learned token)",
    focus_from=losses[FULL, seeds[0]][1]["step"])
  header, *rows = _rows(summary)
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
      *(html.KeyFigure(f"{share(FULL, kind):.0%}", f"{label} right", f"chance {_CHANCE[kind]:.0%}")
        for kind, label in _KINDS.items()),
      html.KeyFigure(f"{figures[FULL][f'CIDEr/{SEEN}']['mean']:.2f}", "CIDEr", "seen pairs"),
      report.work_figure()],
    sections=[
      html.Section(
        "What it says",
        "Scenes that no arm was trained on, the second row with pairs of shape and colour that "
        "none has seen together. Captions are greedy and right if they name the same things; "
        "answers are the most likely option.",
        figures=[report.figure(
          "gallery", gallery(shown), f"The full model, seed {seeds[0]}: right in green, wrong in "
          "red with the truth behind it.")]),
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
           "tower": ", ".join(f"{name.replace('_', ' ')} {value:.0%}"
                              for name, value in summary["tower"].items()),
           "work": report.work, "versions": report.versions},
  )
