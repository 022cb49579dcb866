"""What rewriting gains: rewards on held-out prompts, in and out of domain, compared in pairs.

Arms are ways from a user's prompt to the one that is drawn: leaving it as it is, a person's, the
fine-tuned policy's, the one trained on rewards. All are drawn from the same seeds, so arms are
compared prompt by prompt. The reward has no KL term. The raw arm's is not 0: its aesthetic gain is
0 and its relevance negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmops_jax.evaluation.diversity import distinct, self_bleu
from lmops_jax.evaluation.intervals import of_difference
from lmops_jax.reporting.run_report import text_table
from lmops_jax.systems.promptist.rewards import Weights

RAW = "raw"
MEASURES = ("score", "relevance", "aesthetic")
_DISTINCT = (1, 2)


class PromptSet(NamedTuple):
  """Held-out prompts and what they became.

  Attributes:
    name: such as "DiffusionDB".
    in_domain: whether prompts of its kind were learned from.
    prompts: what users wrote, N texts.
    rewrites: by arm N texts; arms may differ from set to set (people wrote none for captions).
  """

  name: str
  in_domain: bool
  prompts: Sequence[str]
  rewrites: Mapping[str, Sequence[str]]


class Measurer(Protocol):
  """Measures rewritten prompts, as `image_reward.ImageScorer.measure` does."""

  def __call__(self, prompts: Sequence[str], rewrites: Sequence[str]) -> Any:
    """See `image_reward.Measured`."""


class Row(NamedTuple):
  """An arm's values, `[N] float64` each; NaN where all pictures of a prompt failed.

  Attributes:
    score: the reward.
    relevance: to the user's prompt, -5.6 .. 0.
    aesthetic: mean rating of its pictures, not the gain.
  """

  score: np.ndarray
  relevance: np.ndarray
  aesthetic: np.ndarray


def measured(measure: Measurer, prompts: PromptSet, weights: Weights) -> dict[str, Row]:
  """The values of each arm, the raw one first.

  Args:
    measure: `ImageScorer.measure`.
    prompts: at least one arm.
    weights: those of the reward, for the raw arm.

  Raises:
    ValueError: no arm, an arm called "raw", or one with another number of texts.
  """
  if not prompts.rewrites or RAW in prompts.rewrites:
    raise ValueError(
      f"the set {prompts.name} has the arms {', '.join(prompts.rewrites) or 'none'}; give at least "
      f"one, none of them called {RAW!r}."
    )
  arms: dict[str, Row] = {}
  for arm, texts in prompts.rewrites.items():
    if len(texts) != len(prompts.prompts):
      raise ValueError(
        f"the arm {arm} of the set {prompts.name} has {len(texts)} texts for "
        f"{len(prompts.prompts)} prompts; give one for each."
      )
    found = measure(prompts.prompts, texts)
    arms.setdefault(RAW, Row(
      weights.relevance * found.raw.relevance, found.raw.relevance, found.raw.aesthetic))
    arms[arm] = Row(found.score, found.rewritten.relevance, found.rewritten.aesthetic)
  return arms


def evaluate(
  measure: Measurer, sets: Sequence[PromptSet], weights: Weights, *, num_resamples: int = 9999,
  seed: int = 0,
) -> dict[str, Any]:
  """Measures every arm of every set, and compares arms in pairs.

  Args:
    measure: `ImageScorer.measure`.
    sets: with names of their own.
    weights: of the reward.
    num_resamples, seed: of the bootstrap.

  Returns:
    JSON values: under "sets" by name, and under "domains" for "in" and "out" (all sets of a domain
    together, of the arms that each of them has): "num_prompts"; "arms", by name the means of the
    `MEASURES` and the diversity of the texts; "differences", for two arms "SECOND - FIRST" and each
    measure a mean with its interval.

  Raises:
    ValueError: as `measured`; no set, or two of one name.
  """
  names = [prompts.name for prompts in sets]
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f"the sets of prompts are called {', '.join(names) or 'nothing'}; give at least one, each "
      "with a name of its own.")
  found = {prompts.name: measured(measure, prompts, weights) for prompts in sets}
  texts = {prompts.name: {RAW: prompts.prompts, **prompts.rewrites} for prompts in sets}

  def summarised(chosen: Sequence[str]) -> dict[str, Any]:
    arms = [arm for arm in found[chosen[0]] if all(arm in found[name] for name in chosen)]
    rows = {arm: Row(*(np.concatenate(parts) for parts in zip(*(
      found[name][arm] for name in chosen)))) for arm in arms}
    written = {arm: [text for name in chosen for text in texts[name][arm]] for arm in arms}
    return _summary(rows, written, num_resamples, seed)

  domains = {
    domain: [prompts.name for prompts in sets if prompts.in_domain == is_in]
    for domain, is_in in (("in", True), ("out", False))}
  return {
    "sets": {name: summarised([name]) for name in names},
    "domains": {domain: summarised(chosen) for domain, chosen in domains.items() if chosen},
  }


def _summary(
  rows: Mapping[str, Row], texts: Mapping[str, Sequence[str]], num_resamples: int, seed: int
) -> dict[str, Any]:
  arms = {}
  for arm, row in rows.items():
    usable = np.isfinite(row.score)
    arms[arm] = {
      **{name: _mean(getattr(row, name)[usable]) for name in MEASURES},
      "num_failed": int((~usable).sum()), **_diversity(texts[arm])}
  differences = {
    f"{second} - {first}": {
      name: of_difference(
        getattr(rows[first], name), getattr(rows[second], name), num_resamples=num_resamples,
        seed=seed)._asdict()
      for name in MEASURES}
    for first, second in itertools.combinations(rows, 2)}
  num = len(next(iter(rows.values())).score)
  return {"num_prompts": num, "arms": arms, "differences": differences}


def _mean(values: np.ndarray) -> float | None:
  return float(values.mean()) if len(values) else None


def _diversity(texts: Sequence[str]) -> dict[str, float | None]:
  found: dict[str, float | None] = {f"distinct_{n}": distinct(texts, n) for n in _DISTINCT}
  written = [text for text in texts if text.strip()]
  found["self_bleu"] = self_bleu(written) if len(written) > 1 else None
  return found


def table(results: Mapping[str, Any]) -> str:
  """The means of each arm and what it gains over the raw one, as lines for the terminal."""
  lines = [["set", "arm", *MEASURES, "gain over raw"]]
  domains = {f"all {domain} domain": part for domain, part in results["domains"].items()}
  for name, part in {**results["sets"], **domains}.items():
    for arm, means in part["arms"].items():
      gain = part["differences"].get(f"{arm} - {RAW}", {}).get("score")
      lines.append([name, arm, *(_number(means[measure]) for measure in MEASURES), _gain(gain)])
  return text_table(lines)


def _number(value: float | None) -> str:
  return "–" if value is None else f"{value:.3f}"


def _gain(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return "–"
  return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
