"""Stage `report` of the embedded default: accuracy by depth and arm, and what verification did."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.evaluation.intervals import of_difference
from lmops_jax.evaluation.over_seeds import LEVEL, share, shares_of
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.socratic import arms, simulate

REQUIRED = ("arms", "levels", "seeds", "accuracy.*.*.mean", "verification", "stages[].seconds")
NAMES = {
  arms.CHECKED: "Socratic, checked", arms.UNCHECKED: "Socratic, unchecked",
  arms.STEPS: "steps", arms.VOTE: "answer at once", arms.GREEDY: "answer once"}
_SHOWN = 6  # examples of a kind
_KINDS = ("right at once", "mended", "missed", "spoiled", "questioned in vain")
Rows = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def stage_of(arm: str, seed: int) -> str:
  """The stage of an arm and a seed."""
  return f"solve/{arm}/seed{seed}"


def run(
  context: pipeline.StageContext, seeds: Sequence[int], stages: Sequence[str], *, rounds: int,
  modulus: int,
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    stages: all stages before this one.
    rounds: of verification.
    modulus: of the operators.
  """
  rows = {(arm, seed): arms.read_rows(context.input(stage_of(arm, seed)))
          for arm in arms.ARMS for seed in seeds}
  report = RunReport(context, stages)
  summary = summarised(rows, seeds, rounds) | {"modulus": modulus, "stages": report.costs}
  report.write(summary, _page(report, summary, rows), required=REQUIRED)


def summarised(rows: Rows, seeds: Sequence[int], rounds: int) -> dict[str, Any]:
  """The figures of a run.

  Args:
    rows: of each arm and seed, in the order of problems; one of the arms is `checked`.
  """
  levels = sorted({row["levels"] for row in rows[arms.CHECKED, seeds[0]]})
  names = list(dict.fromkeys(arm for arm, _ in rows))

  def of(arm, seed, level):
    return [row for row in rows[arm, seed] if row["levels"] == level]

  def mean(arm, level, name):
    return float(np.mean([row[name] for seed in seeds for row in of(arm, seed, level)]))

  def compared(arm, chosen):
    first, second = ([float(row["right"]) for seed in seeds for level in chosen
                      for row in of(name, seed, level)] for name in (arm, arms.CHECKED))
    found = of_difference(first, second, LEVEL)
    return {"mean": found.value, "low": found.low, "high": found.high}

  verification = verified(node for seed in seeds for row in rows[arms.CHECKED, seed]
                          for node in row["nodes"])
  return {
    "arms": names, "levels": levels, "seeds": list(seeds), "rounds": rounds,
    "problems": len(rows[arms.CHECKED, seeds[0]]),
    "accuracy": {arm: {str(level): shares_of([
      (sum(row["right"] for row in of(arm, seed, level)), len(of(arm, seed, level)))
      for seed in seeds]) for level in levels} for arm in names},
    **{name: {arm: {str(level): mean(arm, level, name) for level in levels} for arm in names}
       for name in ("calls", "tokens")},
    "repeats": {arm: {str(level): float(np.mean([
      len(row["answers"]) for seed in seeds for row in of(arm, seed, level)])) for level in levels}
      for arm in names},
    "compared": {arm: {**{str(level): compared(arm, [level]) for level in levels},
                       "all": compared(arm, levels)} for arm in names if arm != arms.CHECKED},
    "verification": verification,
    "predicted": {str(level): predicted(
      verification, rounds, [row for seed in seeds for row in of(arms.CHECKED, seed, level)])
      for level in levels},
  }


def verified(nodes) -> dict[str, Any]:
  """What verification did to the conclusions of problems that were split as they are built.

  Returns:
    `error` (share of first conclusions that are wrong), `accept` and `catch` (shares of right ones
    that pass and of wrong ones that are objected to), `mended` (share of objections to wrong ones
    behind which the next is right), `counts` by kind, and how many each share is of.
  """
  kinds, passed, mended = collections.Counter(), {True: [], False: []}, []
  first, badly_split = [], 0
  for node in nodes:
    if not node["well_split"] or not node["right"]:
      badly_split += 1
      continue
    first.append(node["right"][0])
    kinds[kind_of(node)] += 1
    for right, is_passed in arms.verdicts(node):
      passed[right].append(is_passed)
    mended += [after for before, after in zip(node["right"], node["right"][1:]) if not before]

  def of(values):
    return float(np.mean(values)) if values else None

  catch = of(passed[False])
  return {
    "error": None if not first else 1 - of(first), "accept": of(passed[True]),
    "catch": None if catch is None else 1 - catch, "mended": of(mended),
    "counts": {kind: kinds[kind] for kind in _KINDS}, "badly_split": badly_split,
    "num": {"error": len(first), "accept": len(passed[True]), "catch": len(passed[False]),
            "mended": len(mended)}}


def kind_of(node: Mapping[str, Any]) -> str:
  """What became of a problem's first conclusion."""
  right = node["right"]
  if not right[0]:
    return "mended" if right[-1] else "missed"
  if not right[-1]:
    return "spoiled"
  return "right at once" if len(right) == 1 else "questioned in vain"


def predicted(verification, rounds: int, rows) -> dict[str, Any]:
  """The closed form of `simulate` by the measured shares, and the share it speaks of.

  Returns:
    `expected` (all operators of a problem right; None if a share was not measured) and `measured`.
  """
  error, accept, catch = (verification[name] for name in ("error", "accept", "catch"))
  operators = 2 ** rows[0]["levels"] - 1
  known = None not in (error, accept)
  return {
    "expected": simulate.expected(error, rounds, accept, catch or 0.0).node**operators
    if known else None,
    "measured": float(np.mean([
      len(row["nodes"]) == operators and all(node["right"][-1:] == [True] for node in row["nodes"])
      for row in rows]))}


def table(summary: Mapping[str, Any]) -> str:
  """Accuracy by arm and number of operators."""
  return text_table(accuracy_rows(summary))


def accuracy_rows(summary, names: Mapping[str, str] = NAMES) -> list[list[str]]:
  """The same as cells, with the names of arms that readers see; the first row is the header."""
  header = ["right, %", *(operators_of(level) for level in summary["levels"])]
  return [header, *([names[arm], *(share(summary["accuracy"][arm][str(level)])
                                   for level in summary["levels"])] for arm in summary["arms"])]


def operators_of(level: int) -> str:
  """How many operators expressions of a depth have."""
  number = 2**level - 1
  return f"{number} operator{'s' if number > 1 else ''}"


def points(found: Mapping[str, float]) -> str:
  """A difference of shares with its interval, percentage points."""
  return f"{100 * found['mean']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def _page(report: RunReport, summary, rows: Rows) -> html.Report:
  levels, seeds = summary["levels"], summary["seeds"]
  deepest = str(levels[-1])
  accuracy, compared = summary["accuracy"], summary["compared"]
  labels = [NAMES[arm] for arm in summary["arms"]]
  figure = report.figure("accuracy", plots.curves(
    {NAMES[arm]: [plots.Run([2**level - 1 for level in levels],
                            [accuracy[arm][str(level)]["values"][i] for level in levels])
                  for i in range(len(seeds))] for arm in summary["arms"]},
    x_label="operators of an expression", y_label="share of right answers",
    reference=(1 / summary["modulus"], "chance"), styles=plots.looks(labels, labels[:1])),
    "Mean and span of seeds. All arms but “answer once” cost the same tokens on each problem.")
  header, *right_rows = accuracy_rows(summary)
  cost = [[NAMES[arm], operators_of(level), summary["calls"][arm][str(level)],
           summary["tokens"][arm][str(level)], summary["repeats"][arm][str(level)]]
          for arm in summary["arms"] for level in levels]
  sections = [
    html.Section(
      "Right answers", "Expressions that the solver has not met, but for single operators.",
      figures=[figure], tables=[
        html.Table(header, right_rows, note=(
          f"Means over solvers ({len(seeds)}), with Wilson's interval of {LEVEL:.0%} over all "
          "answers.")),
        html.Table(
          ["Socratic, checked, less", *(operators_of(level) for level in levels), "all"],
          [[NAMES[arm], *(points(compared[arm][key]) for key in (*map(str, levels), "all"))]
           for arm in compared],
          note="Percentage points, paired over problems and solvers; bootstrap.")]),
    html.Section(
      "Calls and tokens", "Means a problem, all repeats together; tokens are bytes of "
      "requests and replies.",
      tables=[html.Table(
        ["arm", "expressions", html.Column("calls", ",.1f"), html.Column("tokens", ",.0f"),
         html.Column("repeats", ",.1f")], cost)]),
    _verification_section(summary, rows, seeds)]
  chosen = _tree_shown(rows, seeds)
  sections.append(html.Section(
    "A tree", f"How “Socratic, checked” solved `{chosen['statement']}` (it is {chosen['answer']}, "
    f"and the run says {chosen['said'] or 'nothing'}). Behind each problem stands what was "
    "concluded; → comes after an objection; ✗ marks what does not follow from the parts.",
    listings=[html.Listing(drawn(chosen))]))
  sections.append(report.cost_section(by_kind=True, total=True))
  best = max(accuracy, key=lambda arm: accuracy[arm][deepest]["mean"])
  return html.Report(
    title="Socratic reasoning: a small solver, by itself and with the engine",
    lead=f"On expressions of {operators_of(levels[-1])}, **{NAMES[best]}** is right most often, in "
         f"{accuracy[best][deepest]['mean']:.0%}. Asked for the answer at once, the same solver is "
         f"right in {accuracy[arms.VOTE][deepest]['mean']:.0%} for the same tokens.",
    key_figures=[
      *(html.KeyFigure(f"{accuracy[arm][deepest]['mean']:.0%}", NAMES[arm],
                       operators_of(levels[-1]))
        for arm in (arms.CHECKED, arms.UNCHECKED, arms.VOTE)),
      report.work_figure()],
    sections=sections,
    facts={"seeds": ", ".join(map(str, seeds)), "modulo": summary["modulus"],
           "rounds": summary["rounds"], "work": report.work, "versions": report.versions})


def _verification_section(summary, rows: Rows, seeds) -> html.Section:
  found = summary["verification"]
  shares = [[text, found[name], found["num"][name]] for text, name in (
    ("first conclusions that are wrong", "error"), ("right conclusions that pass", "accept"),
    ("wrong conclusions that are caught", "catch"),
    ("of those caught, right afterwards", "mended"))]
  predictions = [[operators_of(level), of["expected"], of["measured"]]
                 for level, of in ((level, summary["predicted"][str(level)])
                                   for level in summary["levels"])]
  examples = [[kind, node["id"], row["statement"], " → ".join(node["said"])]
              for kind, row, node in _examples(rows, seeds)]
  total = sum(found["counts"].values())
  return html.Section(
    "What verification did",
    f"Of {total:,} conclusions of single operators, {found['counts']['mended']} errors were "
    f"mended and {found['counts']['missed']} stayed; {found['counts']['spoiled']} right ones were "
    f"spoiled. {found['badly_split']} problems were not split as they are built, and count in "
    "none of these.",
    tables=[
      html.Table(["", html.Column("share", ".1%", align="right"), html.Column("of", ",d")], shares,
                 note=(
        "Verification helps if the shares of the second and third row have a sum above 1.")),
      html.Table(
        ["all operators right", html.Column("closed form", ".1%", align="right"),
         html.Column("measured", ".1%")], predictions, note=(
          "The closed form of `lmops socratic simulate` by the shares above: operators err on "
          "their own, and what is mended is drawn anew.")),
      html.Table(["kind", "problem", "of", "conclusions in turn"], examples, caption=(
        "Errors that were caught, that were missed, and harm that was done"))])


def _examples(rows: Rows, seeds) -> Iterator[tuple[str, Mapping, Mapping]]:
  for wanted in ("mended", "missed", "spoiled"):
    found = ((wanted, row, node) for seed in seeds for row in rows[arms.CHECKED, seed]
             for node in row["nodes"]
             if node["well_split"] and node["right"] and kind_of(node) == wanted)
    yield from (one for one, _ in zip(found, range(_SHOWN)))


def _tree_shown(rows: Rows, seeds) -> Mapping[str, Any]:
  """A right answer of the deepest problems in whose tree something was mended, if there is one."""
  of = rows[arms.CHECKED, seeds[0]]
  levels = max(row["levels"] for row in of)

  def rank(row):
    kinds = [kind_of(node) for node in row["nodes"] if node["right"] and node["well_split"]]
    return row["right"], "mended" in kinds, -kinds.count("missed")

  return max((row for row in of if row["levels"] == levels), key=rank)


def drawn(row: Mapping[str, Any]) -> str:
  """The tree of a solved problem, a line a problem."""
  nodes = {node["id"]: node for node in row["nodes"]}
  lines = []

  def visit(name: str, lead: str, stem: str) -> None:
    node = nodes[name]
    said = " → ".join(text + ("" if right else " ✗")
                      for text, right in zip(node["said"], node["right"]))
    lines.append(f"{lead}{node['statement']}   {said or node['state']}")
    children = [other for other in nodes if other.rpartition(".")[0] == name]
    for child in children:
      is_last = child == children[-1]
      visit(child, f"{stem}{'└─' if is_last else '├─'} ", f"{stem}{'   ' if is_last else '│  '}")

  visit("0", "", "")
  return "\n".join(lines)
