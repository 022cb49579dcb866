"""Stage `report`: what the policies did to learning, as a table, a page and `summary.json`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lmops_jax.config.setting_types import Count, NonNegative, PositiveInt, component
from lmops_jax.evaluation import power_law
from lmops_jax.evaluation.intervals import mean_and_half_width
from lmops_jax.reporting import html, plots, run_report
from lmops_jax.stages import pipeline
from lmops_jax.systems.learning_law import evaluate, optimise, report_text
from lmops_jax.systems.learning_law.evaluate import UNIFORM
from lmops_jax.systems.learning_law.report_text import told
from lmops_jax.systems.learning_law.tasks import load_task

MEASURES = (
  "auc_dev", "auc_test", "auc_change_dev", "auc_change_test", "compression_ratio_dev",
  "compression_ratio_test", "final_loss_dev", "final_loss_test", "acceleration_dev",
  "acceleration_test", "similarity_dev", "similarity_test", "adjoint_similarity", "gap",
  "zero_share",
  "excluded_share_dev", "excluded_share_test", "noise_weight", "learned_share_below",
)
REQUIRED = (
  "tasks.*.policies.*.auc_test", "tasks.*.policies.*.acceleration_test", "tasks.*.seeds",
  "stages[].seconds",
)
_NUM_FITTED_POINTS = 40


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Report:
  """What the report shows.

  Attributes:
    fit_from: power laws are fitted to the loss after this step; None chooses a fiftieth, a tenth or
      a fifth of the steps by the fit's correlation.
    fit_loss: the laws' loss L0 that no training removes; None fits it, one for all policies.
    num_bootstrap: refits for the intervals of the laws' constants.
  """

  fit_from: Count | None = None
  fit_loss: NonNegative | None = None
  num_bootstrap: PositiveInt = 200

  def check(self, num_steps: int) -> None:
    """Refuses what does not fit a run of T steps."""
    if self.fit_from is not None and self.fit_from > num_steps - 3:
      raise ValueError(
        f"learning_law.Report.fit_from={self.fit_from} leaves fewer than 3 of the {num_steps} "
        "steps for a fit; lower it."
      )

  def starts(self, num_steps: int) -> list[int]:
    """The t0 to try, none where there are too few steps."""
    if self.fit_from is not None:
      return [self.fit_from]
    return sorted({num_steps // n for n in (50, 10, 5)}) if num_steps >= 10 else []


class Run(NamedTuple):
  """Where one task and seed lies.

  Attributes:
    stage: its `evaluate` stage.
    data: its `data` stage; None for saved policies, which hold their task themselves.
    policies: optimiser's name to the `policy` stage, or to a folder if `data` is None.
  """

  stage: str
  data: str | None
  policies: Mapping[str, str]


def run(
  context: pipeline.StageContext, *, config: Report, runs: Mapping[tuple[str, int], Run],
  stages: Sequence[str],
) -> None:
  """Writes `summary.json`, the plots and `index.html`."""
  _Writer(context, config, runs, stages).write()


class _Result(NamedTuple):
  """One task and seed, loaded."""

  seed: int
  records: list[dict[str, Any]]
  series: dict[str, np.ndarray]
  policies: dict[str, optimise.SavedPolicy]

  def curve(self, policy: str, name: str, kind: str = "weights") -> np.ndarray:
    record = next(r for r in self.records if (r["policy"], r["kind"]) == (policy, kind))
    return np.asarray(self.series[evaluate.series_key(record, name)], np.float64)


class _Writer:
  def __init__(self, context, config, runs, stages):
    self.report, self.config = run_report.RunReport(context, stages), config
    self.results: dict[str, list[_Result]] = {}
    for (task, seed), run in runs.items():
      records, series = evaluate.load(context.input(run.stage))
      policies = {
        name: optimise.load_policy(Path(place) if run.data is None else context.input(place),
                                   None if run.data is None else load_task(context.input(run.data)))
        for name, place in run.policies.items()
      }
      self.results.setdefault(task, []).append(_Result(seed, records, series, policies))

  def write(self) -> None:
    summary = {
      "tasks": {task: self.task_summary(results) for task, results in self.results.items()},
      "stages": self.report.costs,
    }
    self.report.write(summary, required=REQUIRED, page=html.Report(
      title="The learning law: policies and what they do to learning",
      lead="\n\n".join(report_text.lead(task, found) for task, found in summary["tasks"].items()),
      key_figures=[*report_text.key_figures(summary), self.report.work_figure()],
      sections=[
        *(self.task_section(task, summary["tasks"][task]) for task in self.results),
        self.report.cost_section(by_kind=True),
      ],
      facts={
        "seeds": ", ".join(str(r.seed) for r in next(iter(self.results.values()))),
        "work": self.report.work,
        "loss": "nats a label",
        "versions": self.report.versions,
      },
    ))

  # --- numbers

  def task_summary(self, results: list[_Result]) -> dict[str, Any]:
    names = list(dict.fromkeys(
      r["policy"] for r in results[0].records if r["kind"] == "weights"))
    policies = {}
    for name in names:
      rows = [next(r for r in result.records if r["policy"] == name
                   and r["kind"] == "weights" and r["init_seed"] == result.records[0]["init_seed"])
              for result in results]
      policies[name] = {key: [row.get(key) for row in rows] for key in MEASURES}
      policies[name]["mean"] = {
        key: mean_and_half_width(values)[0]
        for key, values in policies[name].items() if key in MEASURES}
    return {
      "seeds": [result.seed for result in results],
      "policies": policies,
      "optimisation": {
        name: [_course(result.policies[name]) for result in results]
        for name in results[0].policies
      },
      "power_laws": [self.fits(result) for result in results],
      "other_inits": [_transfer(result) for result in results],
      "batches": [[r for r in result.records if r["kind"] == "batches"] for result in results],
    }

  def fits(self, result: _Result) -> dict[str, Any] | None:
    """Power laws of the test loss under uniform weights and each optimised policy."""
    names = [UNIFORM, *result.policies]
    curves = {name: result.curve(name, "loss_test") for name in names}
    starts = self.config.starts(len(curves[UNIFORM]) - 1)
    if not starts:
      return None
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", power_law.IllConditioned)  # said in the report
      found = power_law.fit_power_laws(
        curves, L0=self.config.fit_loss, t0=starts, num_bootstrap=self.config.num_bootstrap)
    base = found.laws[UNIFORM]
    num_steps = len(curves[UNIFORM]) - 1
    laws = {
      name: {
        "B": law.B, "beta": law.beta, "r2": law.r2,
        "interval": {k: list(v) for k, v in law.interval(report_text.LEVEL).items()}
        if len(law.samples) else None,
        "predicted_acceleration": {
          str(steps): power_law.predicted_acceleration(base, law, steps)
          for steps in (num_steps, 10 * num_steps)},
      } for name, law in found.laws.items()
    }
    step = max(1, len(found.profile) // 20)
    return {"L0": base.L0, "t0": base.t0, "is_ill_conditioned": found.is_ill_conditioned,
            "profile": found.profile[::step].tolist(), "laws": _finite(laws)}

  # --- the page

  def task_section(self, task: str, summary: Mapping[str, Any]) -> html.Section:
    results = self.results[task]
    names = list(summary["policies"])
    optimised = list(results[0].policies)
    styles = plots.looks([*optimised, UNIFORM, *(n for n in names if n not in optimised
                                                  and n != UNIFORM)], emphasis=optimised)
    sections = [self.speed_section(task, summary, results, names, styles)]
    if optimised:
      sections += [
        self.optimisation_section(task, results, styles),
        self.law_section(task, summary, results, [UNIFORM, *optimised], styles),
        self.weights_section(task, results, report_text.best(summary), names, styles),
      ]
    if summary["power_laws"][0] is not None:
      sections.append(self.scaling_section(task, summary, results, [UNIFORM, *optimised], styles))
    sections += report_text.further_sections(summary)
    data = results[0].policies[optimised[0]].task if optimised else None
    text = "" if data is None else (
      f"{data.num_train:,} training examples, {len(next(iter(data.parts['dev'].values()))):,} "
      f"desired ones (dev) and as many unseen (test), {len(results)} seeds of data and "
      "initialisation.")
    return html.Section(f"Task {task}", text, sections=sections)

  def speed_section(self, task, summary, results, names, styles) -> html.Section:
    x = np.arange(len(results[0].curve(UNIFORM, "loss_test")))
    series = {name: [plots.Run(x, r.curve(name, "loss_test")) for r in results] for name in names}
    crossings = {}
    for name, policy in summary["policies"].items():
      ratios = policy["acceleration_test"]
      if name in results[0].policies and None not in ratios:
        crossings[name] = float(np.mean([(len(x) - 1) / ratio for ratio in ratios]))
    end = float(np.mean([r.curve(UNIFORM, "loss_test")[-1] for r in results]))
    figure = plots.curves(
      series, x_label="steps", y_label="test loss (nats a label)", styles=styles,
      reference=(end, "uniform at the end"), crossings=crossings, log_y=True,
    )
    ranked = sorted(names, key=lambda n: summary["policies"][n]["mean"]["auc_test"])
    tables = []
    for part, text in (("test", "Unseen desired examples"), ("dev", "What the policy looks at")):
      rows = []
      for name in ranked:
        of = summary["policies"][name]
        rows.append([
          name, told(of[f"auc_{part}"], ".4f"), told(of[f"auc_change_{part}"], "+.1%"),
          of["mean"][f"compression_ratio_{part}"],
          told(of[f"acceleration_{part}"], ".2f") or "never",
          of["mean"][f"final_loss_{part}"],
        ])
      tables.append(html.Table(
        ["policy", "AUC", "change", html.Column("compression", ".2f"), "acceleration",
         html.Column("final loss", ".4f")], rows,
        caption=f"{text} ({part})", note=report_text.note(len(results)),
        highlight=[i for i, n in enumerate(ranked) if n in results[0].policies]))
    return html.Section(
      "How fast the desired loss falls",
      "All policies train the same model from the same start for the same number of steps. AUC is "
      "the mean of the desired loss over the steps, compression the steps' `ln |V|` over that, "
      "acceleration the steps over those needed to uniform weights' final loss. Test examples are "
      "read for these figures only.",
      figures=[self.report.figure(
        f"{task}_loss", figure, "Test loss by step, mean and span of seeds.")],
      tables=tables,
    )

  def optimisation_section(self, task, results, styles) -> html.Section:
    figures = []
    for key, label, log, caption in (
      ("auc_dev", "AUC on dev (nats a label)", False, "Area under the loss that the policy sees."),
      ("auc_test", "AUC on test (nats a label)", False,
       "The same on unseen examples; kept is the epoch that is best on a third part, select."),
      ("gap", "Frank-Wolfe gap (mean over steps)", True,
       "How far from first-order optimal a policy is: 0 where no change of weights helps."),
    ):
      series = {}
      for name in results[0].policies:
        histories = [result.policies[name].history for result in results]
        epochs = np.arange(min(map(len, histories)))
        series[name] = [plots.Run(epochs, [max(record[key], 1e-12) for record in h[:len(epochs)]])
                        for h in histories]
      figure = plots.curves(series, x_label="outer epochs", y_label=label, styles=styles,
                            log_y=log, height=2.9)
      figures.append(self.report.figure(f"{task}_{key}", figure, caption))
    return html.Section("Optimising the policies", figures=figures)

  def law_section(self, task, summary, results, names, styles) -> html.Section:
    series = {
      name: [plots.Run(r.curve(name, "loss_test")[:-1], r.curve(name, "similarity_test"))
             for r in results]
      for name in names}
    figure = plots.paths(series, x_label="test loss, falling as training goes on",
                         y_label="SIM of contributions (test)", styles=styles, log_x=True,
                         log_y=True, falling_x=True)
    rows = []
    for name in names:
      of = summary["policies"][name]
      rows.append([name, *(told(of[key], ".3f") for key in (
        "similarity_dev", "similarity_test", "adjoint_similarity")),
        *(of["mean"][key] for key in ("gap", "excluded_share_dev", "learned_share_below"))])
    figures = [self.report.figure(
      f"{task}_similarity", figure, "Contributions' mean over their spread, at equal loss; seeds "
      "after the first are faint.")]
    measured = [r for r in results[0].policies[names[1]].history if "similarity_dev" in r
                and r["similarity_dev"] is not None]
    if len(measured) > 2:
      by_epoch = plots.scatter(
        [1 / r["auc_dev"] for r in measured], [r["similarity_dev"] for r in measured],
        x_label="1 / AUC dev, in proportion to the compression ratio", y_label="SIM dev",
        height=2.8, note=f"Spearman {_spearman(measured):.2f}")
      figures.append(self.report.figure(
        f"{task}_trend", by_epoch, f"Outer epochs of {names[1]}, seed {results[0].seed}."))
    return html.Section(
      "The learning law",
      "Contributions are `<grad L, grad l_n>`; the paper's law says that the used examples' become "
      "equal, so that SIM, their weighted mean over their spread, grows. The exact condition has "
      "the costate in place of `grad L`: **adjoint SIM** belongs to it, and the gap is 0 exactly "
      "at an optimum. Excluded is the share of examples with contribution <= 0 that get no weight, "
      "learned low the share of perfectly learned examples (loss below 1e-6) with weight below a "
      "fifth of the step's largest.",
      figures=figures,
      tables=[html.Table(
        ["policy", "SIM dev", "SIM test", "adjoint SIM", html.Column("gap", ".2e"),
         html.Column("excluded", ".1%"), html.Column("learned low", ".1%")], rows,
        note=report_text.note(len(results)))],
    )

  def weights_section(self, task, results, name, names, styles) -> html.Section:
    saved = results[0].policies[name]
    noise = saved.task.is_noise
    order = np.lexsort((-saved.weights.sum(axis=0), noise))
    image = saved.weights[:, order].T * saved.task.num_train
    picture = plots.heatmap(
      image, x_label="steps", y_label="examples" + (", spoilt ones below" if noise.any() else ""),
      value_label="weight over uniform weight", limits=(0.0, float(np.quantile(image, 0.99)) or 1))
    figures = [self.report.figure(
      f"{task}_weights", picture, f"Weights under {name}, seed {results[0].seed}; examples by "
      "their sum. The scale ends at the 99th percentile.")]
    x = np.arange(len(saved.weights))
    active = plots.curves(
      {n: [plots.Run(x, r.curve(n, "num_active") / r.policies[name].task.num_train)
           for r in results] for n in names},
      x_label="steps", y_label="share of examples with weight", styles=styles, height=3.0)
    figures.append(self.report.figure(f"{task}_active", active, "Examples with weight by step."))
    tables = []
    if noise.any():
      mass = plots.curves(
        {n: [plots.Run(x, r.curve(n, "noise_weight")) for r in results] for n in names},
        x_label="steps", y_label="weight on spoilt examples", styles=styles, height=3.4)
      figures.append(self.report.figure(
        f"{task}_noise", mass, "Weight on spoilt examples by step."))
      half = max(1, len(x) // 2)
      rows = [[n, *(told([float(r.curve(n, "noise_weight")[part].mean()) for r in results], ".4f")
                    for part in (slice(None), slice(half), slice(-half, None)))] for n in names]
      tables.append(html.Table(
        ["policy", "weight on spoilt examples", "first half", "second half"], rows,
        note=f"{noise.mean():.1%} of the examples are spoilt. {report_text.note(len(results))}"))
    return html.Section("Where the weight goes", figures=figures, tables=tables)

  def scaling_section(self, task, summary, results, names, styles) -> html.Section:
    fits, fitted = {}, summary["power_laws"][0]
    for name in names:
      losses = results[0].curve(name, "loss_test")
      law = fitted["laws"][name]
      steps = np.arange(fitted["t0"] + 1, len(losses))
      chosen = np.unique(np.geomspace(1, len(steps), _NUM_FITTED_POINTS).round().astype(int)) - 1
      x = np.geomspace(steps[0], 10 * steps[-1], 100)
      fits[name] = plots.Fit(plots.Run(steps[chosen], losses[steps[chosen]]),
                             plots.Run(x, fitted["L0"] + (law["B"] / x) ** law["beta"]))
    figure = plots.fits(fits, x_label="steps", y_label="test loss (nats a label)", styles=styles)
    rows, vague = [], 0
    for result, found in zip(results, summary["power_laws"]):
      vague += found["is_ill_conditioned"]
      for name in names:
        law = found["laws"][name]
        ends = law["interval"] or {}
        rows.append([
          result.seed, name, found["L0"], found["t0"], law["B"], law["beta"],
          report_text.ends(ends.get("beta")), law["r2"],
          *(law["predicted_acceleration"].values() if name != UNIFORM else (None, None)),
        ])
    warning = (
      f" **On {vague} of {len(results)} seeds the curves do not determine L0, and so neither B: "
      "compare the laws only where L0 and t0 are shared.**" if vague else "")
    return html.Section(
      "Power laws", "`L(t) = L0 + (B / t) ^ beta` on the test loss after step t0, with one L0 and "
      f"one t0 for all policies of a seed. A fit on few steps is weak evidence.{warning}",
      figures=[self.report.figure(
        f"{task}_laws", figure, f"Seed {results[0].seed}; dashed where extrapolated.")],
      tables=[html.Table(
        [html.Column("seed", "d"), "policy", html.Column("L0", ".4f"), html.Column("t0", ",d"),
         html.Column("B", ".3g"), html.Column("beta", ".4f"), f"beta, {report_text.LEVEL:.0%}",
         html.Column("r2", ".5f"), html.Column("acceleration at T", ".2f"),
         html.Column("at 10 T", ".2f")], rows,
        note="Intervals by refitting to resampled blocks of residuals; accelerations as the laws "
             "predict them.")],
    )


def _course(saved: optimise.SavedPolicy) -> dict[str, Any]:
  """How an optimisation went."""
  history = saved.history
  first, best, last = history[0], history[saved.about["best_epoch"]], history[-1]
  auc = [record["auc_dev"] for record in history]
  return {
    "num_epochs": saved.about["num_epochs"], "best_epoch": saved.about["best_epoch"],
    "rising_epochs": int(np.sum(np.diff(auc) > 1e-6 * auc[0])),
    "gap": [first["gap"], best["gap"], last["gap"]],
    "similarity_dev": [first["similarity_dev"], last["similarity_dev"]],
    "adjoint_similarity": [first["adjoint_similarity"], last["adjoint_similarity"]],
  }


def _transfer(result: _Result) -> dict[str, list[dict[str, Any]]]:
  """Records of other initialisations, by policy."""
  own = result.records[0]["init_seed"]
  keys = ("init_seed", "auc_test", "auc_change_test", "acceleration_test")
  found: dict[str, list[dict[str, Any]]] = {}
  for record in result.records:
    if record["kind"] == "weights" and record["init_seed"] != own:
      found.setdefault(record["policy"], []).append({key: record[key] for key in keys})
  return found


def _finite(value: Any) -> Any:
  """Numbers that are not finite as None: a law of a flat or rising curve has no B."""
  if isinstance(value, Mapping):
    return {key: _finite(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  return None if isinstance(value, float) and not np.isfinite(value) else value


def _spearman(records) -> float:
  return float(stats.spearmanr([-r["auc_dev"] for r in records],
                               [r["similarity_dev"] for r in records]).statistic)
