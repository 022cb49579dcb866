"""What of a run goes into a request: whole replies, key passages, pins, within a budget of tokens.

In this order: system message, request, pins, conclusions of parts or neighbours, statements of the
problems above, earlier turns on the same problem. What does not fit is dropped from the end and
recorded; the first four are never dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lmops_jax.systems.socratic import replies
from lmops_jax.systems.socratic.patterns import Pattern, View
from lmops_jax.systems.socratic.settings import system_message

Messages = tuple[tuple[str, str], ...]  # role and content


class ContextOverflow(ValueError):
  """What a request cannot do without is longer than the model's window."""


@dataclasses.dataclass(frozen=True)
class Past:
  """An earlier turn on the same problem.

  Attributes:
    number: of the turn.
    prompt, reply: its texts.
    selected: the passage of the reply that a human chose, half-open characters.
  """

  number: int
  prompt: str
  reply: str
  selected: tuple[tuple[int, int], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Built:
  """A request.

  Attributes:
    messages: role and content, in order.
    tokens: of the messages.
    references: what it quotes: `{"pin": id, "mode": "pin"}`, then for each pair of messages
      `{"turn": n, "mode": "whole" | "excerpt", "span": ...}`.
    cuts: what was left out, in words.
  """

  messages: Messages
  tokens: int
  references: tuple[dict[str, Any], ...]
  cuts: tuple[str, ...]


def build(pattern: Pattern, view: View, past: Sequence[Past], budget: int,
          count: Callable[[Messages], int]) -> Built:
  """A request of at most `budget` tokens.

  Args:
    past: earlier turns on the problem, oldest first.
    count: tokens of messages.

  Raises:
    ContextOverflow: if what is never dropped does not fit.
  """
  system = ("system", system_message(pattern.persona))
  cuts: list[str] = []
  ancestors = view.ancestors

  def request(num_ancestors: int) -> tuple[str, str]:
    return "user", pattern.build(dataclasses.replace(view, ancestors=ancestors[:num_ancestors]))

  kept = len(ancestors)
  final = request(kept)
  tokens = count((system, final))
  while tokens > budget and kept:
    kept -= 1
    final = request(kept)
    tokens = count((system, final))
  if tokens > budget:
    raise ContextOverflow(
      f"context_overflow: a request of pattern {pattern.name} takes {tokens} tokens, and {budget} "
      "are left of the window beside the reply; use a model with a longer window, ask for fewer "
      "new tokens, or shorten the problem.")
  cuts += [f"statement of the problem {i + 1} levels above" for i in range(kept, len(ancestors))]
  pairs: list[tuple[tuple[str, str], ...]] = []
  references: list[dict[str, Any]] = []
  full = kept < len(ancestors)
  for turn in reversed(past):
    taken = None
    for span in (turn.selected, None, replies.key_span(turn.reply)) if not full else ():
      if span is None and turn.selected is not None:
        continue
      text = turn.reply if span is None else " ... ".join(turn.reply[a:b] for a, b in span)
      pair = (("user", turn.prompt), ("assistant", text))
      new = count((system, *pair, *(m for p in pairs for m in p), final))
      if new <= budget:
        taken, tokens = (pair, span), new
        break
    if taken is None:
      full = True
      cuts.append(f"turn {turn.number}")
      continue
    pairs.insert(0, taken[0])
    reference = {"turn": turn.number, "mode": "whole" if taken[1] is None else "excerpt"}
    if taken[1] is not None:
      reference["span"] = [list(part) for part in taken[1]]
      cuts.append(f"turn {turn.number} but for its key passage")
    references.insert(0, reference)
  references = [{"pin": pin.id, "mode": "pin"} for pin in view.pins] + references
  messages = (system, *(m for pair in pairs for m in pair), final)
  return Built(messages, tokens, tuple(references), tuple(cuts))
