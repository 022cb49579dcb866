"""Demonstrations put together to groups: within a budget of tokens, aligned at their ends.

arXiv 2212.06713, section 2.1, and the two published scripts, whose rules differ: with a BOS token
common to all groups those of the dense models (an open group may overflow by one demonstration and
is cut on the left), without it those of BLOOM (the demonstration that does not fit ends its group).
`even` is this library's: no demonstration is cut or left over.
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
    drawn: demonstrations looked at.
    used: demonstrations that stand in a group in full.
    skipped: demonstrations longer than the budget.
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
    """Of all groups together."""
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
    max_length: most tokens of a group, a BOS included.
    strategy: "even", as few groups as hold all demonstrations, of like lengths; "truncate",
      groups filled to the last token by cutting the oldest ones; "mask", whole demonstrations
      while they fit; "space", as "mask", and shorter groups are filled in front with `space_id`,
      which is seen. All but "even" drop the last, unfinished group if there are others.
    chunk_num: groups to stop at; None takes all demonstrations.
    bos_id: counted in `max_length`, where not None, and not returned.
    space_id: token of one blank, for "space".

  Raises:
    ValueError: an unknown strategy, a budget below 1, an empty demonstration, one longer than the
      budget where the strategy cannot skip it, or fewer groups than `chunk_num`.
  """
  if strategy not in STRATEGIES:
    raise ValueError(f"the strategy {strategy!r} is not one of {', '.join(STRATEGIES)}.")
  if strategy == "space" and space_id is None:
    raise ValueError(
      "the strategy 'space' fills groups with a blank, and this vocabulary has no single token for "
      "one; take 'mask'."
    )
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
  kept = [demo for demo in demos if len(demo) <= limit]
  if strategy == "even":
    groups, drawn = _even(kept, budget, chunk_num), len(demos)
  else:
    fill = _whole if strategy != "truncate" else _overflowing if bos_id is not None else _cut
    groups, drawn = fill(kept, budget, chunk_num)
    drawn += len(demos) - len(kept)
  if chunk_num is not None and len(groups) < chunk_num:
    raise ValueError(
      f"{len(demos)} demonstrations make {len(groups)} groups of {max_length} tokens, and "
      f"{chunk_num} are asked for; give more demonstrations."
    )
  return _arrays(groups, drawn, len(demos) - len(kept), space_id if strategy == "space" else None)


def _even(demos, budget, chunk_num):
  """Runs of demonstrations, each up to an equal share of all tokens; as few as fit."""
  total = sum(map(len, demos))
  count = max(chunk_num or 1, -(-total // budget))
  while demos:
    share, groups, open_group, done = total / count, [], [], 0
    for demo in demos:
      # Whichever end is nearer to the share's.
      ends = share * (len(groups) + 1)
      if open_group and len(groups) + 1 < count and done + len(demo) / 2 > ends:
        groups.append(open_group)
        open_group = []
      open_group.append(demo)
      done += len(demo)
    groups.append(open_group)
    if all(sum(map(len, group)) <= budget for group in groups):
      return [_Group(sum(group, []), len(group)) for group in groups]
    count += 1
  return []


def _whole(demos, budget, chunk_num):
  """Demonstrations while they fit."""
  groups, tokens, whole, drawn = [], [], 0, 0
  for demo in demos:
    if len(groups) == chunk_num:
      break
    if len(tokens) + len(demo) > budget:
      groups.append(_Group(tokens, whole))
      if len(groups) == chunk_num:
        break
      tokens, whole = [], 0
    tokens, whole, drawn = tokens + demo, whole + 1, drawn + 1
  return _with_last(groups, tokens, whole, chunk_num), drawn


def _cut(demos, budget, chunk_num):
  """What does not fit is appended, and the group's last tokens stay (the script for BLOOM)."""
  groups, tokens, lengths, drawn = [], [], [], 0
  for demo in demos:
    if len(groups) == chunk_num:
      break
    tokens, lengths, drawn = tokens + demo, [*lengths, len(demo)], drawn + 1
    if len(tokens) > budget:
      groups.append(_last_tokens(tokens, lengths, budget))
      tokens, lengths = [], []
  return _with_last(groups, tokens, len(lengths), chunk_num), drawn


def _overflowing(demos, budget, chunk_num):
  """An open group takes one more while it is not above the budget (the dense models' script)."""
  groups, tokens, lengths, drawn = [], [], [], 0
  for demo in demos:
    if len(groups) == chunk_num:
      break
    if len(tokens) > budget:
      groups.append(_last_tokens(tokens, lengths, budget))
      if len(groups) == chunk_num:
        break
      tokens, lengths = [], []
    tokens, lengths, drawn = tokens + demo, [*lengths, len(demo)], drawn + 1
  if not groups and len(tokens) > budget:
    return [_last_tokens(tokens, lengths, budget)], drawn
  return _with_last(groups, tokens, len(lengths), chunk_num), drawn


def _last_tokens(tokens, lengths, budget):
  whole, seen = 0, 0
  for length in reversed(lengths):
    seen += length
    whole += seen <= budget
  return _Group(tokens[-budget:], whole)


def _with_last(groups, tokens, whole, chunk_num):
  """The open group counts only if there is no other."""
  if not groups and tokens and chunk_num != 0:
    return [_Group(tokens, whole)]
  return groups


def _arrays(groups, drawn, skipped, space_id) -> Groups:
  width = max((len(group.tokens) for group in groups), default=0)
  ids, mask = np.zeros((len(groups), width), np.int32), np.zeros((len(groups), width), bool)
  for row, group in enumerate(groups):
    start = width - len(group.tokens)
    ids[row, start:], mask[row, start:] = group.tokens, True
    if space_id is not None:
      ids[row, :start], mask[row, :start] = space_id, True
  return Groups(ids, mask, drawn, sum(group.whole for group in groups), skipped)
