"""Sections of the report: what pictures teach about texts, thoughts about pictures, and Raven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax.data.synthetic_pictures.matrices import LAYOUTS
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

_NOTE = (f"Percent with Wilson's {figures.LEVEL:.0%} interval of the answers of all seeds; these "
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
  return [_transfer(found), _thought(found), _raven(report, found, items, pictures, said)]


def _table(found, names: Sequence[str], *, chance: Mapping[str, float] | None = None) -> html.Table:
  """A line for each name, a column for each arm that was asked any of them."""
  arms = [arm for arm in found if any(name in found[arm] for name in names)]
  header = ["", *arms, *(["chance"] if chance else [])]
  rows = [[figures.label(name), *(figures.share(found[arm].get(name)) for arm in arms),
           *([f"{100 * chance[name]:.1f}"] if chance else [])] for name in names]
  return html.Table(header, rows, note=_NOTE)


def _transfer(found) -> html.Section:
  chance = {f"color/{TYPICAL}": 1 / 8, f"is_larger/{TYPICAL}": 1 / 2}
  return html.Section(
    "From pictures to texts",
    "Each shape has a typical colour and size, which pictures of one source show and no text "
    "tells: its captions name shapes alone. After training, “The color of a star is?” and “Is a "
    "star larger than a heart?” are asked without any picture. Arms that see no picture can "
    "only guess.", tables=[_table(found, list(chance), chance=chance)])


def _thought(found) -> html.Section:
  names = [f"{kind}/{group}" for kind in (
    figures.READING_KIND, PLAIN_KIND, THOUGHT_KIND, TEXT_KIND) for group in (OF_PICTURES, OF_TEXTS)]
  return html.Section(
    "Thinking in two stages",
    "Pictures of words. Of half of the words the sentiment was told about pictures, of the others "
    "in texts alone; reading was taught of both. The sentiment is asked of the picture at once, "
    "of the picture with what the model itself read in it, and of the text alone.",
    tables=[_table(found, names)])


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
