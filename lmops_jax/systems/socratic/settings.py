"""What a user sets about a run: limits, decoding, and who speaks."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

from annotated_types import Ge, Le

from lmops_jax.config.setting_types import (
  Count,
  NonNegative,
  PositiveInt,
  Seed,
  Share,
  Text,
  component,
)

PERSONAS = {
  "W": "a wise philosopher",
  "C": "a mathematician and computer theory expert, good at innovation and thinking",
  "T": "an expert mathematician collaborator who is good at proving theorems",
  "P": "a mathematician skilled in probability theory",
  "N": "a mathematician skilled in probability theory, numerical methods, and combinatorics",
}
_Depth = Annotated[int, Ge(0), Le(50)]
_Parts = Annotated[int, Ge(2), Le(50)]
MAX_PROBLEM_CHARS = 200_000


@component(module="socratic")
@dataclasses.dataclass(frozen=True)
class Limits:
  """What a run may spend, and how far it may go.

  Attributes:
    max_turns: calls of the model, retries included.
    max_tokens: tokens of all prompts and replies.
    max_cost: in the unit of the prices; None is no limit.
    price_in, price_out: of a million tokens of prompts and of replies.
    max_new_tokens: of one reply.
    max_depth: levels below the target; problems there are answered directly.
    max_parts: of one problem.
    attempts: calls of one pattern on one problem that may fail before another way is taken.
    rounds: of verification; 0 is none.
    rephrases: transforms in a row.
    samples: answers drawn for a conclusion, of which one is chosen.
    temperature, top_p: of the decoding.
    seed: of models that run in process; sent to others.
    margin: tokens of the window left free.

  Raises:
    ValueError: naming the field.
  """

  max_turns: PositiveInt = 200
  max_tokens: PositiveInt = 400_000
  max_cost: NonNegative | None = None
  price_in: NonNegative = 0.0
  price_out: NonNegative = 0.0
  max_new_tokens: PositiveInt = 1024
  max_depth: _Depth = 4
  max_parts: _Parts = 5
  attempts: PositiveInt = 2
  rounds: Count = 2
  rephrases: Count = 2
  samples: PositiveInt = 1
  temperature: NonNegative = 0.7
  top_p: Share = 0.95
  seed: Seed = 0
  margin: Count = 32

  @property
  def calls_per_problem(self) -> int:
    """The most calls that one problem takes, one retry of each included."""
    return 2 * self.samples * (2 + 3 * self.attempts + 3 * self.rounds)

  @property
  def most_problems(self) -> int:
    """The most problems of a tree."""
    return sum(self.max_parts**depth for depth in range(self.max_depth + 1))

  def cost(self, prompt: int, reply: int) -> float:
    """The price of some tokens."""
    return (prompt * self.price_in + reply * self.price_out) / 1e6


@component(module="socratic")
@dataclasses.dataclass(frozen=True)
class Cast:
  """Who speaks in each pattern: a code of `PERSONAS`, or a description such as "a careful chemist".
  """

  assess: Text = "C"
  deduce: Text = "T"
  transform: Text = "W"
  decompose: Text = "C"
  verify: Text = "T"
  integrate: Text = "C"


def described(persona: str) -> str:
  """The persona that a code or a description names.

  Raises:
    ValueError: for an unknown code.
  """
  if persona in PERSONAS:
    return PERSONAS[persona]
  if " " not in persona.strip() or not persona.isprintable():
    raise ValueError(f"there is no persona {persona!r}; give one of {', '.join(PERSONAS)}, or a "
                     'description such as "a careful chemist".')
  return persona.strip()


def system_message(persona: str) -> str:
  """The system message: exactly "You are <persona>."."""
  return f"You are {described(persona)}."


def persona_code(message: str) -> str | None:
  """The code of the persona that a system message gives, None for another."""
  return next((code for code in PERSONAS if message == system_message(code)), None)


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def control_character(text: str) -> str | None:
  """The first character that no prompt should hold, such as the bell that "\\alpha" became."""
  found = _CONTROL.search(text)
  return found[0] if found else None


def repaired(text: str) -> tuple[str, int]:
  """The text without control characters, and how many there were."""
  return _CONTROL.subn("", text)
