"""Demonstrations put together into groups: within a budget of tokens, aligned at their ends.

arXiv 2212.06713, section 2.1, and the two published scripts, whose rules differ. With a BOS token
common to all groups the rules are those of the dense models (an open group may overflow by one
demonstration and is cut on the left); without it they are BLOOM's (the demonstration that does not
fit ends its group). `even` is this library's: no demonstration is cut or left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STRATEGIES = ("even", "truncate", "mask", "space")


class Groups(NamedTuple):
  """Groups without their BOS.

  Attributes:
    ids: `[M,W] int32`, each group at its row's end, 0 in front.
    mask: `[M,W] bool`, False for what is in front.
    drawn: number of demonstrations looked at until the last group was complete.
    used: number of demonstrations that stand in a group in full.
    skipped: number of those drawn that are longer than the budget.
  """

  ids: np.ndarray
  mask: np.ndarray
  drawn: int
  used: int
  skipped: int

  @property
  def num_groups(self) -> int:
    """M."""
    return len(self.ids)

  @property
  def num_tokens(self) -> int:
    """Tokens of all groups together."""
    return int(self.mask.sum())


class _Group(NamedTuple):
  tokens: list[int]
  whole: int  # demonstrations that are there in full


def pack(
  demos: Sequence[Sequence[int]], max_length: int, strategy: str = "even",
  chunk_num: int | None = None, bos_id: int | None = None, space_id: int | None = None,
) -> Groups:
  """Groups of demonstrations.

  Args:
    demos: token ids of each, separator included, in the order in which they are taken.
    max_length: the most tokens of a group, a BOS included.
    strategy: "even", as few groups as hold all demonstrations, of similar lengths; "truncate",
      groups filled to the last token by cutting the oldest demonstrations; "mask", whole
      demonstrations while they fit; "space", as "mask", with shorter groups filled in front with
      `space_id`, which is seen. All but "even" drop the last, unfinished group if there are others.
    chunk_num: groups to stop at, for "even" the least number; None takes all demonstrations.
    bos_id: counted in `max_length` if not None, but not returned.
    space_id: token of one blank, for "space".

  Raises:
    ValueError: for an unknown strategy, a budget or `chunk_num` below 1, an empty demonstration,
      one longer than the budget if the strategy cannot skip it, or fewer groups than `chunk_num`.
  """
  if strategy not in STRATEGIES:
    raise ValueError(f"the strategy {strategy!r} is not one of {', '.join(STRATEGIES)}.")
  if strategy == "space" and space_id is None:
    raise ValueError(
      "the strategy 'space' fills groups with a blank, and this vocabulary has no single token for "
      "one; take 'mask'."
    )
  if chunk_num is not None and chunk_num < 1:
    raise ValueError(f"chunk_num={chunk_num} must be at least 1, or None for all demonstrations.")
  budget = max_length - (bos_id is not None)
  if budget < 1:
    raise ValueError(f"a group has room for {budget} tokens; expected at least 1.")
  for i, demo in enumerate(demos):
    if not len(demo):
      raise ValueError(f"demonstration {i} has no tokens.")
  demos = [list(demo) for demo in demos]
  longest = max(map(len, demos), default=0)
  # The published script for the dense models skips what is longer than the group with its BOS.
  limit = max_length if strategy == "truncate" else budget
  if longest > limit and (strategy == "even" or (strategy == "space" and bos_id is None)):
    i = next(i for i, demo in enumerate(demos) if len(demo) > limit)
    raise ValueError(
      f"demonstration {i} has {len(demos[i])} tokens and a group room for {limit}; leave it out, "
      "or take the strategy 'mask' or 'truncate', which skip it."
    )
  kept = [i for i, demo in enumerate(demos) if len(demo) <= limit]
  cutting = _cut if bos_id is None else _overflowing
  fill = {"even": _even, "truncate": cutting}.get(strategy, _whole)
  groups, last = fill([demos[i] for i in kept], budget, chunk_num)
  drawn = len(demos) if last is None else kept[last] + 1
  if chunk_num is not None and len(groups) < chunk_num:
    raise ValueError(
      f"{len(demos)} demonstrations make {len(groups)} groups of {max_length} tokens, and "
      f"{chunk_num} are asked for; give more demonstrations."
    )
  skipped = sum(len(demo) > limit for demo in demos[:drawn])
  return _arrays(groups, drawn, skipped, space_id if strategy == "space" else None)


# Each returns the groups and the index of the demonstration that completed the last of `chunk_num`,
# or None.
def _even(demos, budget, chunk_num):
  """Runs of demonstrations: as few as fit, the longest as short as possible, the others similar."""
  lengths = [len(demo) for demo in demos]
  count = min(len(demos), max(_runs_from(lengths, budget)[0], chunk_num or 1))
  low, high = max(lengths, default=0), budget
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if _runs_from(lengths, middle)[0] <= count else (middle + 1, high)
  runs_from, total, done = _runs_from(lengths, low), sum(lengths), 0
  groups: list[list[Sequence[int]]] = []
  for i, demo in enumerate(demos):
    left = count - len(groups)
    full = groups and sum(map(len, groups[-1])) + len(demo) > low
    # The run ends at whichever place is nearer to an equal share's end, if the rest still fits.
    ends = runs_from[i] <= left and done + len(demo) / 2 > total / count * len(groups)
    if not groups or full or (left and (ends or len(demos) - i <= left)):
      groups.append([])
    groups[-1].append(demo)
    done += len(demo)
  return [_Group(sum(group, []), len(group)) for group in groups], None


def _runs_from(lengths, limit) -> list[int]:
  """For each demonstration, how many runs of at most `limit` tokens it and those behind it make."""
  runs, end, inside = [0] * (len(lengths) + 1), len(lengths), 0
  for start in reversed(range(len(lengths))):
    inside += lengths[start]
    while inside > limit:
      end -= 1
      inside -= lengths[end]
    runs[start] = 1 + runs[end]
  return runs


def _whole(demos, budget, chunk_num):
  """Whole demonstrations while they fit."""
  groups, tokens, whole = [], [], 0
  for i, demo in enumerate(demos):
    if len(tokens) + len(demo) > budget:
      groups.append(_Group(tokens, whole))
      if len(groups) == chunk_num:
        return groups, i
      tokens, whole = [], 0
    tokens, whole = tokens + demo, whole + 1
  return _with_last(groups, tokens, whole), None


def _cut(demos, budget, chunk_num):
  """Appends the demonstration that does not fit; keeps the last tokens (the script for BLOOM)."""
  groups, tokens, lengths = [], [], []
  for i, demo in enumerate(demos):
    tokens, lengths = tokens + demo, [*lengths, len(demo)]
    if len(tokens) > budget:
      groups.append(_last_tokens(tokens, lengths, budget))
      if len(groups) == chunk_num:
        return groups, i
      tokens, lengths = [], []
  return _with_last(groups, tokens, len(lengths)), None


def _overflowing(demos, budget, chunk_num):
  """An open group takes a further one while it is within the budget (the dense models' script)."""
  groups, tokens, lengths = [], [], []
  for i, demo in enumerate(demos):
    if len(tokens) > budget:
      groups.append(_last_tokens(tokens, lengths, budget))
      if len(groups) == chunk_num:
        return groups, i
      tokens, lengths = [], []
    tokens, lengths = tokens + demo, [*lengths, len(demo)]
  if not groups and len(tokens) > budget:
    return [_last_tokens(tokens, lengths, budget)], None
  return _with_last(groups, tokens, len(lengths)), None


def _last_tokens(tokens, lengths, budget):
  whole, seen = 0, 0
  for length in reversed(lengths):
    seen += length
    whole += seen <= budget
  return _Group(tokens[-budget:], whole)


def _with_last(groups, tokens, whole):
  """The open group counts only if there is no other."""
  return [_Group(tokens, whole)] if not groups and tokens else groups


def _arrays(groups, drawn, skipped, space_id) -> Groups:
  width = max((len(group.tokens) for group in groups), default=0)
  ids, mask = np.zeros((len(groups), width), np.int32), np.zeros((len(groups), width), bool)
  for row, group in enumerate(groups):
    start = width - len(group.tokens)
    ids[row, start:], mask[row, start:] = group.tokens, True
    if space_id is not None:
      ids[row, :start], mask[row, :start] = space_id, True
  return Groups(ids, mask, drawn, sum(group.whole for group in groups), skipped)
