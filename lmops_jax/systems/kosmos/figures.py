"""The figures of all arms and seeds, and their names for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmops_jax.evaluation.over_seeds import shares_of, spread_of
from lmops_jax.systems.kosmos import items

READING_KIND, MATRICES_KIND, RULE_KIND = "read", "matrices", "rule "
KINDS = {
  "count": "count", "color": "colour", "shape": "shape", "is_larger": "size",
  items.PLAIN_KIND: "sentiment at once", items.THOUGHT_KIND: "sentiment in two stages",
  items.TEXT_KIND: "sentiment of the text alone",
}
GROUPS = {
  items.SEEN: "seen pairs", items.HELD_OUT: "held-out pairs",
  items.TYPICAL: "in text alone",
  items.OF_PICTURES: "told of pictures", items.OF_TEXTS: "told in texts",
}
RULE_GROUPS = {items.SEEN: "seen rules", items.HELD_OUT: "with a held-out rule"}


def over_seeds(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """By "kind/group" what `evaluate.figures` counted for each seed of an arm, together.

  Added are "CIDEr/group" of captions, "read/group" of rationales, and of matrices "matrices/group"
  and "rule <rule>/group".

  Returns:
    Of each `values` by seed, their `mean`, `half_width` of its t interval and `num`; of shares also
    `interval`, Wilson's, of the answers of all seeds as if each were drawn on its own.
  """
  return {name: shares_of(rows) for name, rows in _counted(by_seed).items()} | {
    f"CIDEr/{name.split('/')[1]}": spread_of([of[name]["CIDEr"] for of in by_seed]) | {
      "num": row["num"]}
    for name, row in by_seed[0].items() if "CIDEr" in row}


def _counted(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, int]]]:
  """By "kind/group": (right, all) of each seed."""
  found: dict[str, list[tuple[int, int]]] = {}
  for name, first in by_seed[0].items():
    rows = [of[name] for of in by_seed]
    counts = [(row["right"], row["num"]) for row in rows]
    found[name] = counts
    kind, group = name.split("/")
    if "read" in first:
      found[f"{READING_KIND}/{group}"] = [(row["read"], row["num"]) for row in rows]
    if kind.startswith(items.MATRIX_KIND):
      _add(found, f"{MATRICES_KIND}/{group}", counts)
      for rule in first["by_rule"]:
        _add(found, f"{RULE_KIND}{rule}/{group}", [tuple(row["by_rule"][rule]) for row in rows])
  return found


def _add(found, name: str, counts: Sequence[tuple[int, int]]) -> None:
  before = found.get(name, [(0, 0)] * len(counts))
  found[name] = [(right + r, num + n) for (right, num), (r, n) in zip(before, counts)]


def label(name: str) -> str:
  """A "kind/group" for people."""
  kind, group = name.split("/")
  if kind.startswith(items.SHOTS_KIND):
    return kind
  if kind.startswith((items.MATRIX_KIND, MATRICES_KIND, RULE_KIND)):
    kind = kind.removeprefix(RULE_KIND).replace(":", ": ")
    if kind.startswith(items.MATRIX_KIND):
      kind = f"matrices, {kind.removeprefix(items.MATRIX_KIND)} in context"
    return f"{kind}, {RULE_GROUPS[group]}"
  return f"{KINDS.get(kind, kind)}, {GROUPS[group]}"
