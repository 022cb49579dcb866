"""What a person sees while a run goes on: a tree that grows where `rich` is, plain lines elsewhere.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from lmops_jax.host.words import shortened

_MOST_SHOWN = 40  # problems in the tree that is drawn


@contextlib.contextmanager
def view(limits, *, plain: bool = False) -> Iterator[Callable]:
  """Gives what watches a run: `(event, problem, turn) -> None`.

  Args:
    limits: of the run, to show what is left.
    plain: lines even on a terminal that can draw.
  """
  if plain or not sys.stderr.isatty() or not _has_rich():
    yield _Lines(limits)
    return
  from rich.console import Console
  from rich.live import Live

  drawn = _Drawn(limits)
  with Live(get_renderable=drawn.tree, console=Console(stderr=True), refresh_per_second=4,
            transient=True):
    yield drawn


def _has_rich() -> bool:
  try:
    import rich  # noqa: F401
  except ImportError:
    return False
  return True


class _Spending:
  """Calls and tokens so far, from the turns that were seen."""

  def __init__(self, limits):
    self._limits, self.turns, self.tokens, self.cost = limits, 0, 0, 0.0

  def add(self, turn) -> None:
    if not turn.by_human:
      self.turns += 1
    self.tokens += turn.usage.total
    self.cost += self._limits.cost(turn.usage.prompt, turn.usage.reply)

  def shown(self) -> str:
    cost = f", cost {self.cost:.4g}" if self.cost else ""
    return (f"{self.turns}/{self._limits.max_turns} calls, {self.tokens:,}/"
            f"{self._limits.max_tokens:,} tokens{cost}")


def _line(text: str) -> str:
  from lmops_jax.reporting.html import visible  # no escape sequence of a model reaches a terminal

  return shortened(" ".join(visible(text).split()), 70)


class _Lines:
  """A line for each new problem, call and result."""

  def __init__(self, limits):
    self._spent = _Spending(limits)

  def __call__(self, event: str, problem, turn=None) -> None:
    if turn is not None:
      self._spent.add(turn)
      said = f"{turn.pattern} ({self._spent.shown()})"
    elif event in ("begin", "end"):
      said = {"begin": _line(problem.statement), "end": f"-> {problem.state}"}[event]
    else:
      return
    print(f"{'  ' * problem.depth}{problem.id} {said}", file=sys.stderr, flush=True)


class _Drawn:
  """The tree, drawn anew; keeps the problems that it has seen."""

  def __init__(self, limits):
    self._spent, self._problems, self._last = _Spending(limits), {}, ""

  def __call__(self, event: str, problem, turn=None) -> None:
    self._problems[problem.id] = problem
    if turn is not None:
      self._spent.add(turn)
      self._last = f"{problem.id} {turn.pattern}"

  def tree(self):
    """The tree as rich draws it."""
    from rich.text import Text
    from rich.tree import Tree

    drawn = Tree(Text(f"{self._spent.shown()}  {self._last}"))
    nodes = {None: drawn}
    shown = list(self._problems.values())
    for problem in shown[:_MOST_SHOWN]:
      above = nodes.get(problem.parent)
      if above is not None:
        text = Text(f"{problem.id} {_line(problem.statement)}  ")
        text.append(problem.state, style=_STYLES.get(problem.state, "yellow"))
        nodes[problem.id] = above.add(text)
    if len(shown) > _MOST_SHOWN:
      drawn.add(Text(f"and {len(shown) - _MOST_SHOWN} more problems"))
    return drawn


_STYLES = {"verified": "green", "unverified": "magenta", "failed": "red", "abandoned": "dim"}
