"""How a configuration is refused: one error, which names the nearest valid name."""

import difflib
import re
from collections.abc import Iterable


class ConfigError(ValueError):
  """A configuration is refused; the message is one sentence that says what to change."""


def nearest(name: str, candidates: Iterable[str], end: str = ".") -> str:
  """`; the nearest valid name is X.`, or just `end` without any candidate."""
  def likeness(candidate: str) -> tuple[float, str]:
    def ratio(a: str, b: str) -> float:
      return difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()
    last = [re.split(r"[./]", text.removesuffix(".gin"))[-1] for text in (name, candidate)]
    return max(ratio(name, candidate), 0.95 * ratio(*last)), candidate
  best = max(((likeness(c)) for c in sorted(set(candidates), reverse=True)), default=None)
  return end if best is None else f"; the nearest valid name is {best[1]!r}{end}"
