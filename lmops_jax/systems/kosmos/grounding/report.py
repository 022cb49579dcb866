"""Stage `report`: where each arm says that things are, beside the truth, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lmops_jax.data import boxes
from lmops_jax.data.box_overlap import iou
from lmops_jax.evaluation.grounding import THRESHOLD
from lmops_jax.evaluation.over_seeds import spread, spread_of
from lmops_jax.reporting import drawn_boxes, html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos import prepare, tower
from lmops_jax.systems.kosmos.figures import GROUPS
from lmops_jax.systems.kosmos.gallery import Shown, gallery
from lmops_jax.systems.kosmos.grounding.evaluate import (
  BOUND,
  FREE,
  baselines,
  found_box,
)
from lmops_jax.systems.kosmos.grounding.world import (
  ANSWER,
  CAPTION_KIND,
  EXPRESSION,
  PHRASE,
  Item,
  items,
)
from lmops_jax.systems.kosmos.items import HELD_OUT, SEEN
from lmops_jax.systems.kosmos.report import last_losses, outcomes, told_of_tower
from lmops_jax.systems.kosmos.world import World

REQUIRED = ("arms", "seeds", "figures.*.*.mean", "baselines.constant.seen", "losses.*.*[]",
            "tower.*.color", "stages[].seconds")
_LABELS = {
  EXPRESSION: "expression to box", "overlap": "mean overlap of these",
  PHRASE: "phrase of a caption",
  "bound": "expression to box, by the grammar", ANSWER: "box to words",
  "located": "shapes named and placed in captions", CAPTION_KIND: "caption's words",
  "malformed": "malformed boxes in captions", "malformed_bound": "the same by the grammar"}
_BASELINES = {"constant": "best constant box", "centre": "box in the centre",
              "ceiling": "true box by its cells"}
_NUM_SHOWN = 8  # scenes of the gallery, half of them of held-out pairs
_ENLARGED = 6  # pictures of the gallery


def run(
  context: pipeline.StageContext, *, runs: Mapping[tuple[str, int], tuple[str, str]],
  stages: Sequence[str], world: World, grid: int, seeing: str,
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    runs: (arm, seed) to the names of its stages train and evaluate.
    stages: all stages before this one.
    seeing: the arm with boxes and pictures, which is shown and compared with the others.
  """
  arms, seeds, results, losses = outcomes(context, runs)
  report = RunReport(context, stages)
  summary = {
    "arms": arms, "seeds": seeds,
    "figures": {arm: _figures([results[arm, seed]["figures"] for seed in seeds]) for arm in arms},
    "baselines": baselines(world, grid),
    "losses": {arm: last_losses([losses[arm, seed] for seed in seeds]) for arm in arms},
    "tower": context.manifest(tower.STAGE)["extra"]["tested"],
    "counts": context.manifest(prepare.STAGE)["extra"]["counts"],
    "stages": report.costs,
  }
  said = results[seeing, seeds[0]]["said"][FREE]
  report.write(
    summary, _page(report, summary, _shown(list(items(world)), said, grid), seeing),
    required=REQUIRED)


def _figures(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """By "figure/group": shares by seed, their mean and half the width of the interval."""
  found = {}
  for group in (SEEN, HELD_OUT):
    def share(kind, part="right", whole="num", how=FREE, group=group):
      rows = [of[how][f"{kind}/{group}"] for of in by_seed]
      return spread_of([row[part] / max(row[whole], 1) for row in rows])

    found |= {f"{name}/{group}": of for name, of in {
      EXPRESSION: share(EXPRESSION), "overlap": share(EXPRESSION, "overlap"),
      "bound": share(EXPRESSION, how=BOUND), PHRASE: share(PHRASE), ANSWER: share(ANSWER),
      "located": share(CAPTION_KIND, "located", "shapes"), CAPTION_KIND: share(CAPTION_KIND),
      "malformed": share(CAPTION_KIND, "malformed", "groups"),
      "malformed_bound": share(CAPTION_KIND, "malformed", "groups", BOUND)}.items()}
  return found


def _shown(asked: Sequence[Item], said: Sequence[str], grid: int) -> list[Shown]:
  """Scenes with the boxes of what a model's caption names, and where it puts an expression."""
  chosen = []
  for group in (SEEN, HELD_OUT):
    of_group = [i for i, item in enumerate(asked)
                if item.group == group and item.kind == CAPTION_KIND]
    chosen += of_group[: _NUM_SHOWN // 2]
  found = []
  for i in chosen:
    scene = asked[i].scene
    grounded = boxes.extract(said[i], grid)
    lines: list[tuple[str, bool | None]] = [(grounded.text, None)]
    for j, item in enumerate(asked):
      if item.scene is scene and item.kind == EXPRESSION:
        box = found_box(item, boxes.extract(said[j], grid))
        placed = "nowhere" if box is None else "({:.2f}, {:.2f}) to ({:.2f}, {:.2f})".format(*box)
        right = box is not None and iou(box, item.box) >= THRESHOLD
        lines.append((f"{item.prompt}: {placed}", right))
    side = len(scene.picture) * _ENLARGED
    image = Image.fromarray(scene.picture).resize((side, side), Image.Resampling.NEAREST)
    drawn = drawn_boxes.draw(image, [(e.name, e.boxes) for e in grounded.entities])
    found.append(Shown(np.asarray(drawn), lines))
  return found


def table(summary: Mapping[str, Any]) -> str:
  """A line for each figure, a column for each arm."""
  return text_table(_rows(summary))


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
  figures, arms = summary["figures"], summary["arms"]
  rows = [["", *arms]]
  for kind, label in _LABELS.items():
    spec = ".2f" if kind == "overlap" else ".1%"
    rows += [[f"{label}, {GROUPS[group]}", *(
      spread(figures[arm][f"{kind}/{group}"], spec) for arm in arms)]
      for group in (SEEN, HELD_OUT)]
  for name, label in _BASELINES.items():
    rows += [[f"{label}, {GROUPS[group]}", f"{summary['baselines'][name][group]:.1%}",
              *[""] * (len(arms) - 1)] for group in (SEEN, HELD_OUT)]
  return rows


def _page(report, summary, shown, seeing: str) -> html.Report:
  arms, seeds, figures = summary["arms"], summary["seeds"], summary["figures"]
  note = ("One seed, so no intervals." if len(seeds) == 1 else
          f"Means of {len(seeds)} seeds with half the width of their 95% interval (t "
          "distribution).")

  def share(kind, group=SEEN, arm=seeing):
    return figures[arm][f"{kind}/{group}"]["mean"]

  constant = summary["baselines"]["constant"]
  bars = plots.grouped_bars(
    {arm: {GROUPS[group]: share(EXPRESSION, group, arm) for group in constant} for arm in arms},
    x_label="expressions whose box overlaps the true one by half", styles=plots.looks(
      arms, emphasis=[seeing]), order=[GROUPS[group] for group in constant])
  header, *rows = _rows(summary)
  loss_rows = [[part, *(float(np.mean(summary["losses"][arm][part])) for arm in arms)]
               for part in summary["losses"][seeing]]
  return html.Report(
    title="Kosmos-2: a small language model that says where things are",
    lead=f"Asked for a shape by its colour and name, the model puts **{share(EXPRESSION):.0%}** of "
         "the boxes so that they overlap the true one by half, "
         f"{share(EXPRESSION, HELD_OUT):.0%} on pairs of shape and colour that training never "
         f"showed. The best constant box is right for {constant[SEEN]:.0%}. All arms share one "
         "tower, which was taught what stands where, boxes included, on scenes of this world and "
         "then frozen.",
    key_figures=[
      html.KeyFigure(f"{share(EXPRESSION):.0%}", "boxes right", f"constant {constant[SEEN]:.0%}"),
      html.KeyFigure(f"{share(EXPRESSION, HELD_OUT):.0%}", "boxes right", "held-out pairs"),
      html.KeyFigure(f"{share(ANSWER):.0%}", "boxes put in words", "seen pairs"),
      html.KeyFigure(f"{share('malformed'):.1%}", "malformed boxes", "without the grammar"),
      report.work_figure()],
    sections=[
      html.Section(
        "What it says and where",
        figures=[report.figure(
          "gallery", gallery(shown),
          f"Captions of the arm {seeing} and its first seed with the boxes that they name, then "
          "the box that it gives an expression: green if it overlaps the true one by half. The "
          "lower row shows pairs of shape and colour that training held out.")]),
      html.Section(
        "Arms", figures=[report.figure("expressions", bars, "Means of seeds.")],
        tables=[html.Table(header, rows, note=note)]),
      html.Section(
        "Losses by source",
        tables=[html.Table(
          ["part", *(html.Column(arm, ".3f") for arm in arms)], loss_rows,
          note="Nats a learned token of validation rows after the last step, means of seeds; rows "
               "with and without boxes have other tokens, so arms differ.")]),
      report.cost_section(by_kind=True, total=True),
    ],
    facts={"seeds": ", ".join(map(str, seeds)),
           "tower": told_of_tower(summary["tower"]),
           "work": report.work, "versions": report.versions},
  )
