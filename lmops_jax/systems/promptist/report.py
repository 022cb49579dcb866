"""Stage `report`: rewards of all arms with intervals, and pictures before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.evaluation.estimates import estimate
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline
from lmops_jax.systems.promptist import arms as arms_lib
from lmops_jax.systems.promptist import generator, policy, quality
from lmops_jax.systems.promptist.arms import ARMS, DOMAINS, FIXED, HUMAN, RAW, RL, SFT, SUFFIX
from lmops_jax.systems.promptist.gallery import Shown, before_and_after
from lmops_jax.systems.promptist.image_reward import ImageSource
from lmops_jax.systems.promptist.rewriting import completion_text
from lmops_jax.systems.promptist.world import IN_DOMAIN
from lmops_jax.training.metrics import read_records
from lmops_jax.training.reinforce.journal import read_journal

NAMES = {RAW: "user's prompt", HUMAN: "experienced person", SUFFIX: "one fixed suffix",
         SFT: "pairs (SFT)", RL: "pictures (RL)"}
COMPARED = ((SFT, RAW), (RL, SFT), (RL, RAW), (RL, HUMAN), (RL, SUFFIX))
REQUIRED = ("figures.*.*.score", "compared.*.*.mean", "generator.towers.content_named",
            "stages[].seconds", "seeds")
_NUM_SHOWN, _NUM_PICTURES, _NUM_HACKED = 5, 5, 4


class Run(NamedTuple):
  """Names of the stages of a seed."""

  sft: str
  rl: str
  evaluate: str


def run(
  context: pipeline.StageContext, *, runs: Mapping[int, Run], stages: Sequence[str],
  images: ImageSource,
) -> None:
  """Writes `summary.json`, the plots and `index.html`.

  Args:
    runs: by seed.
    stages: all stages before this one.
    images: draws the pictures that are shown.
  """
  report = RunReport(context, stages)
  rows = [arms_lib.read(context.input(FIXED)) | arms_lib.read(context.input(of.evaluate))
          for of in runs.values()]
  training = {seed: read_records(context.input(of.rl) / "metrics.jsonl")
              for seed, of in runs.items()}
  fixed = context.manifest(FIXED)["extra"]
  summary = {
    "seeds": list(runs),
    "figures": {domain: {arm: figures([of[arm] for of in rows], domain) for arm in ARMS}
                for domain in DOMAINS},
    "compared": {domain: {f"{a} - {b}": compared(rows, a, b, domain) for a, b in COMPARED}
                 for domain in DOMAINS},
    "by_seed": {str(seed): {
      domain: {f"{a} - {b}": compared([of], a, b, domain) for a, b in COMPARED}
      for domain in DOMAINS} for seed, of in zip(runs, rows)},
    "suffix": fixed["suffix"], "gains": fixed["gains"],
    "kl": [records[-1]["kl"] for records in training.values()],
    "generator": {
      name: context.manifest(name)["extra"]["tested"]
      for name in (generator.TOWERS, quality.STAGE)},
    "stages": report.costs,
  }
  hacked = worst_kept(context.input(next(iter(runs.values())).rl) / policy.JOURNAL)
  report.write(summary, _page(report, summary, rows, training, hacked, images), required=REQUIRED)


def by_prompt(
  rows: Sequence[Mapping[str, Any]], domain: str, name: str = "score"
) -> tuple[np.ndarray, list[str]]:
  """Means over each prompt's answers, and what each prompt asks for, in the prompts' order."""
  found: dict[tuple[str, str], list[float]] = {}
  for row in rows:
    if row["domain"] == domain:
      found.setdefault((row["prompt"], row["content"]), []).append(row[name])
  return np.array([np.mean(values) for values in found.values()]), [key[1] for key in found]


def figures(by_seed: Sequence[Sequence[Mapping[str, Any]]], domain: str) -> dict[str, float]:
  """Means over prompts and seeds, and how different the rewrites are.

  Returns:
    "score", "relevance", "aesthetic"; "modifiers", their mean number; "distinct", the share of
    different ones among the modifiers of all rewrites.
  """
  own = [[row for row in rows if row["domain"] == domain] for rows in by_seed]
  endings = [[tuple(row["modifiers"]) for row in rows] for rows in own]
  return {
    **{name: float(np.mean([by_prompt(rows, domain, name)[0].mean() for rows in own]))
       for name in ("score", "relevance", "aesthetic")},
    "modifiers": float(np.mean([len(words) for of in endings for words in of])),
    "distinct": float(np.mean([len(set(of)) / len(of) for of in endings]))}


def compared(
  by_seed: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]], one: str, other: str, domain: str
) -> dict[str, float]:
  """The mean difference of two arms over prompts, each the mean of all seeds, and its interval.

  The bootstrap draws contents: prompts for the same one belong together.
  """
  scores = [np.mean([by_prompt(of[arm], domain)[0] for of in by_seed], axis=0)
            for arm in (one, other)]
  contents = by_prompt(by_seed[0][one], domain)[1]
  found = estimate(f"{one} - {other}", scores[0] - scores[1], contents)
  return {"mean": found.value, "low": found.low, "high": found.high}


def worst_kept(journal) -> list[dict[str, Any]]:
  """Rollouts of high reward in spite of low relevance: what a policy might learn to exploit.

  Among the tenth with the highest scores those that are least relevant, each rewrite once.
  """
  rows = sorted(read_journal(journal), key=lambda row: -row["score"])
  best = {row["response"]: row for row in rows[: max(len(rows) // 10, 1)]}
  return sorted(best.values(), key=lambda row: row["parts"]["relevance"])[:_NUM_HACKED]


def table(summary: Mapping[str, Any]) -> str:
  """Scores by arm, and differences with their intervals."""
  found = summary["figures"]
  rows = [["", *(f"{domain} {name}" for domain in DOMAINS
                 for name in ("score", "relevance", "aesthetic"))]]
  rows += [[arm, *(f"{found[domain][arm][name]:.2f}" for domain in DOMAINS
                   for name in ("score", "relevance", "aesthetic"))] for arm in ARMS]
  more = [["difference", *DOMAINS]] + [
    [name, *(_interval(summary["compared"][domain][name]) for domain in DOMAINS)]
    for name in summary["compared"][IN_DOMAIN]]
  return f"{text_table(rows)}\n\n{text_table(more)}"


def _interval(found: Mapping[str, float]) -> str:
  return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _page(report, summary, rows, training, hacked, images) -> html.Report:
  found, differences = summary["figures"], summary["compared"]
  first = differences[IN_DOMAIN]
  tested = summary["generator"]
  columns = ["arm", *(html.Column(title, spec) for title, spec in (
    ("score", ".2f"), ("relevance", ".2f"), ("rating", ".2f"), ("modifiers", ".1f"),
    ("different endings", ".0%")))]
  tables = [html.Table(columns, [
    [NAMES[arm], *(found[domain][arm][name] for name in (
      "score", "relevance", "aesthetic", "modifiers", "distinct"))] for arm in ARMS],
    caption=domain.capitalize()) for domain in DOMAINS]
  tables.append(html.Table(
    ["difference of scores", *(html.Column(domain.capitalize()) for domain in DOMAINS)],
    [[f"{NAMES[name.split(' - ')[0]]} – {NAMES[name.split(' - ')[1]]}",
      *(_interval(differences[domain][name]) for domain in DOMAINS)] for name in first],
    note="Paired over prompts, means of seeds, 95 % intervals of the bootstrap over contents: of "
         "this generator and these policies, not of others."))
  curves = {
    name: plots.curves(
      {NAMES[RL]: [plots.Run([r["step"] for r in records], [r[name] for r in records])
                   for records in training.values()]},
      x_label="batches of rollouts", y_label=label)
    for name, label in (("score", "reward of rollouts, without the penalty"),
                        ("kl", "nats a response from SFT"))}
  return html.Report(
    title="Promptist: prompts learned from pictures",
    lead=f"On held-out prompts in the wordings of the domain, what is learned from pictures scores "
         f"**{_interval(first[f'{RL} - {SFT}'])}** above what is learned from pairs, and that "
         f"{_interval(first[f'{SFT} - {RAW}'])} above the user's own prompt.",
    key_figures=[
      *(html.KeyFigure(f"{found[IN_DOMAIN][arm]['score']:.2f}", NAMES[arm], "reward, in domain")
        for arm in (RAW, SFT, RL)),
      report.work_figure()],
    sections=[
      html.Section(
        "Before and after",
        "Each column starts from one noise: only the words differ. Held-out prompts in the "
        "wordings of the domain, evenly over their list, with the policies of the first seed.",
        figures=[report.figure(
          "pictures", before_and_after(_shown(rows[0], images)),
          "What the user wrote, and what both policies made of it.")]),
      html.Section(
        "Rewards", "Score is relevance to the user's own prompt (0 if the pictures show it, down "
        "to -5.6) plus the gain of the rating over the user's pictures.", tables=tables),
      html.Section(
        "Learning", figures=[
          report.figure("reward", curves["score"], "Mean and span of seeds."),
          report.figure("kl", curves["kl"], "Mean and span of seeds.")]),
      html.Section(
        "Words", "What each word alone changes the score of seen contents by, and how often it is "
        "written for held-out ones.",
        tables=[_words(summary, rows)]),
      html.Section(
        "High reward, low relevance",
        "Rollouts among the tenth with the highest reward that show the user's content least: "
        "what a policy may come to exploit.",
        figures=[report.figure(
          "hacked", before_and_after(_hacked(hacked, images)), "The rewrite and its pictures.")]),
      html.Section(
        "The generator", f"Towers name the right one of 48 contents of "
        f"{tested['towers']['content_named']:.0%} of pictures they have not seen (cosine "
        f"{tested['towers']['cosine_of_right']:.2f}, of wrong contents "
        f"{tested['towers']['cosine_of_others']:.2f}). The quality head's correlation with ratings "
        f"is {tested['quality']['correlation']:.2f}."),
      report.cost_section(by_kind=True, total=True)],
    facts={"seeds": ", ".join(map(str, summary["seeds"])),
           "fixed suffix": ", ".join(summary["suffix"]), "work": report.work,
           "versions": report.versions})


def _shown(of_seed: Mapping[str, Sequence[Mapping[str, Any]]], images: ImageSource) -> list[Shown]:
  """Held-out prompts, evenly over the domain's, as users, SFT and RL have them."""
  own = {arm: {row["prompt"]: row for row in reversed(of_seed[arm]) if row["domain"] == IN_DOMAIN}
         for arm in (RAW, SFT, RL)}
  prompts = list(own[RAW])[::-1]
  chosen = np.unique(np.linspace(0, len(prompts) - 1, _NUM_SHOWN).round().astype(int))
  found = []
  for i in chosen:
    rows = [own[arm][prompts[i]] for arm in own]
    found.append(Shown(
      ["user", "SFT", "RL"], [row["rewrite"] for row in rows],
      images([row["rewrite"] for row in rows], _NUM_PICTURES, [int(i)] * len(rows)),
      [f"score {row['score']:+.2f}" for row in rows]))
  return found


def _hacked(rows: Sequence[Mapping[str, Any]], images: ImageSource) -> list[Shown]:
  texts = [completion_text(row["response"]) for row in rows]
  return [Shown(
    ["rollout"], [f"{row['prompt']} → {text}"], images([text], _NUM_PICTURES, [number]),
    [f"score {row['score']:+.2f}, relevance {row['parts']['relevance']:+.2f}"])
    for number, (row, text) in enumerate(zip(rows, texts))]


def _words(summary, rows) -> html.Table:
  counts = {arm: Counter(word for of in rows for row in of[arm] for word in row["modifiers"])
            for arm in (HUMAN, SFT, RL)}
  totals = {arm: sum(len(of[arm]) for of in rows) for arm in counts}
  gains = summary["gains"]
  return html.Table(
    ["word", html.Column("gain alone", "+.2f"),
     *(html.Column(NAMES[arm], ".0%") for arm in counts)],
    [[word, gains[word], *(counts[arm][word] / totals[arm] for arm in counts)]
     for word in sorted(gains, key=gains.get, reverse=True)])
