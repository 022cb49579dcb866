"""Backends of rules for the tests: a cooperative model, and hostile ones."""

from lmops_jax.systems.socratic import Calls, Engine, Limits, NoLog, Rules, default_patterns

REPLIES = {
  "ASSESS": "DECISION: SPLIT\nREASON: it is several",
  "CHECK": "VERDICT: OK",
  "VER": "VERDICT: OK",
  "DED": "Think.\n\nCONCLUSION: leaf\nANSWER: 1",
  "REFINE": "CONCLUSION: better\nANSWER: 2",
  "TRA": "PROBLEM: another view\nBRIDGE: equivalent",
  "SUMMARISE": "CONCLUSION: short",
}


def cooperative(changes=None, parts=2):
  """A rule that splits into distinct parts and cites them all; `changes` by pattern."""
  changes = changes or {}

  def rule(messages, place, random):
    made = changes.get(place.pattern)
    if callable(made):
      made = made(messages, place, random)
    if made is not None:
      return made
    if place.pattern == "DEC":
      return "\n".join(f"PART {i}: question {i} of {place.problem}" for i in range(1, parts + 1))
    if place.pattern == "INT":
      cited = " ".join(f"[S{i}]" for i in range(1, 6))
      return f"CONCLUSION: whole {place.problem} from {cited}\nANSWER: 3"
    return REPLIES[place.pattern]

  return rule


def engine(rule, *, log=None, statement="What is it?", pins=(), window=8192, person=None,
           watch=None, **limits):
  """An engine over a rule, and its backend."""
  backend = Rules(rule, window=window)
  made = Limits(**{"max_turns": 10_000, "max_tokens": 10**9, **limits})
  calls = Calls(backend, log or NoLog(), made, default_patterns(), person, watch)
  return Engine(statement, calls, pins), backend
