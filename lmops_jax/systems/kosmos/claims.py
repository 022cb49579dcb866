"""Sections of the report: what pictures teach about texts, thoughts about pictures, and Raven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.data.synthetic_pictures.matrices import LAYOUTS
from lmops_jax.evaluation.over_seeds import LEVEL, share
from lmops_jax.reporting import html
from lmops_jax.systems.kosmos import figures
from lmops_jax.systems.kosmos.gallery import Puzzle, puzzles
from lmops_jax.systems.kosmos.items import (
  HELD_OUT,
  MATRIX_KIND,
  OF_PICTURES,
  OF_TEXTS,
  PLAIN_KIND,
  TEXT_KIND,
  THOUGHT_KIND,
  TYPICAL,
  Item,
)

_NOTE = (f"Percent with Wilson's {LEVEL:.0%} interval of the answers of all seeds; these "
         "are of the same items, so that the interval is rather too narrow.")


def sections(
  report, found: Mapping[str, Mapping[str, Any]], items: Sequence[Item], pictures: np.ndarray,
  said: Sequence[Any],
) -> list[html.Section]:
  """The sections on the paper's claims beyond captions, questions and episodes.

  Args:
    found: by arm, the figures of `figures.over_seeds`.
    items, pictures, said: those of a seeing arm, for examples.
  """
  return [_transfer(found), _thought(found, items), _raven(report, found, items, pictures, said)]


def _table(
  found, names: Sequence[str], baseline: str = "", of_baseline: Mapping[str, float] | None = None
) -> html.Table:
  """A line for each name, a column for each arm that was asked any, and one for a baseline."""
  arms = [arm for arm in found if any(name in found[arm] for name in names)]
  rows = []
  for name in names:
    row = [figures.label(name), *(share(found[arm].get(name)) for arm in arms)]
    if of_baseline:
      row.append(f"{100 * of_baseline[name]:.1f}" if name in of_baseline else "–")
    rows.append(row)
  return html.Table(["", *arms, *([baseline] if of_baseline else [])], rows, note=_NOTE)


def _transfer(found) -> html.Section:
  chance = {f"color/{TYPICAL}": 1 / 8, f"is_larger/{TYPICAL}": 1 / 2}
  return html.Section(
    "From pictures to texts",
    "Each shape has a typical colour and size, which pictures of one source show and no text "
    "tells: its captions name shapes alone. After training, “The color of a star is?” and “Is a "
    "star larger than a heart?” are asked without any picture. Arms that see no picture can "
    "only guess.", tables=[_table(found, list(chance), "chance", chance)])


def _thought(found, items: Sequence[Item]) -> html.Section:
  asked = [(kind, group) for kind in (PLAIN_KIND, THOUGHT_KIND, TEXT_KIND)
           for group in (OF_PICTURES, OF_TEXTS)]
  constant = {f"{kind}/{group}": one_answer(items, kind, group) for kind, group in asked}
  names = [*(f"{figures.READING_KIND}/{group}" for group in (OF_PICTURES, OF_TEXTS)), *constant]
  return html.Section(
    "Thinking in two stages",
    "Pictures of words. Of half of the words the sentiment was told about pictures, of the others "
    "in texts alone; reading was taught of both. The sentiment is asked of the picture at once, "
    "of the picture with what the model itself read in it, and of the text alone. The last column "
    "is what always giving the more frequent answer would reach.",
    tables=[_table(found, names, "one answer", constant)])


def one_answer(items: Sequence[Item], kind: str, group: str) -> float:
  """The share of the most frequent right option among items of a kind and a group."""
  labels = [item.label for item in items if (item.kind, item.group) == (kind, group)]
  return max(map(labels.count, labels)) / len(labels)


def _raven(report, found, items, pictures, said) -> html.Section:
  names = [name for name in max(found.values(), key=len)
           if name.startswith((MATRIX_KIND, figures.MATRICES_KIND, figures.RULE_KIND))]
  order = (figures.MATRICES_KIND, MATRIX_KIND, figures.RULE_KIND)
  names.sort(key=lambda name: (
    [name.startswith(kind) for kind in order].index(True), name.endswith(HELD_OUT), name))
  return html.Section(
    "Raven's matrices",
    "Which of six candidates completes a matrix, by the probability of “Yes” behind “Is it "
    f"correct?”; chance is {1 / 6:.1%}. The wrong ones are the right one with one attribute "
    "changed: a model that likes some pictures more than others, whatever the context, takes the "
    "right one less often than by chance. Only arms that see pictures are asked.",
    figures=[report.figure(
      "matrices", puzzles(_shown(items, pictures, said)),
      "Matrices with their candidates and the probability of “Yes”: green for the right one, bold "
      "for the chosen one, red if that is wrong.")],
    tables=[_table(found, names)])


def _shown(items: Sequence[Item], pictures: np.ndarray, said: Sequence[Any]) -> list[Puzzle]:
  """The first matrix of each number of pictures of context, of seen and of held-out rules."""
  first: dict[tuple[str, str], int] = {}
  for i, item in enumerate(items):
    if item.candidates:
      first.setdefault((item.kind, item.group), i)
  order = sorted(first, key=lambda key: (int(key[0].removeprefix(MATRIX_KIND)), key[1] == HELD_OUT))
  return [
    Puzzle([pictures[p] for p in items[i].pictures], LAYOUTS[len(items[i].pictures)],
           [pictures[p] for p in items[i].candidates], said[i], items[i].label)
    for i in (first[key] for key in order)]
