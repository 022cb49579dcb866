"""Socratic reasoning: a tree of problems, five patterns and verification (arXiv 2309.05689).

Any model behind it, every call logged, resumed without paying twice. What it concludes is text that
a machine wrote: the engine asserts nothing about its truth.
"""

from lmops_jax.systems.socratic.backends import (
  Backend,
  BackendError,
  Recorded,
  Reply,
  Rules,
  Scripted,
  ScriptMismatch,
  Usage,
)
from lmops_jax.systems.socratic.calls import Calls
from lmops_jax.systems.socratic.engine import Engine
from lmops_jax.systems.socratic.journal import Journal, NoLog
from lmops_jax.systems.socratic.patterns import Pattern, default_patterns
from lmops_jax.systems.socratic.problems import Conclusion, Pin, Problem, Tree
from lmops_jax.systems.socratic.settings import Cast, Limits

__all__ = [
  "Backend",
  "BackendError",
  "Calls",
  "Cast",
  "Conclusion",
  "Engine",
  "Journal",
  "Limits",
  "NoLog",
  "Pattern",
  "Pin",
  "Problem",
  "Recorded",
  "Reply",
  "Rules",
  "ScriptMismatch",
  "Scripted",
  "Tree",
  "Usage",
  "default_patterns",
]
