"""What the small solver learns: rows of prompt and reply, in the words that the engine reads.

Nested expressions of one-digit or longer numbers, each operator modulo `modulus`. The engine's
skills are to assess, split, solve one operator, join two results, question parts and conclusions,
and mend a conclusion; two more answer a whole expression at once, with or without its steps, and
tables drill single operators. Prompts are built by the patterns that the engine asks with.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

from annotated_types import Ge, Le

from lmops_jax.config.setting_types import Probability, component
from lmops_jax.systems.socratic import expressions
from lmops_jax.systems.socratic.patterns import Known, Pattern, View, default_patterns
from lmops_jax.systems.socratic.replies import Result, Unreadable

WORDS = {"ASSESS": "assess", "DEC": "split", "CHECK": "plan", "DED": "solve", "INT": "join",
         "VER": "check", "REFINE": "mend"}
ANSWER, STEPS = "answer", "steps"  # words for a deduction of the whole at once
TABLE = "table"
_TABLE_LENGTH = 8
_CITED = "[S1] [S2]\n"  # in front of a conclusion that joins two
_OK, _ISSUE = "VERDICT: OK", "VERDICT: ISSUE\nISSUE: "
_WRONG_PARTS = 0.2  # of parts' conclusions in requests, so that they are read rather than guessed


@component(module="socratic")
@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """The expressions.

  Attributes:
    modulus: of each operator; numbers are 0 to modulus - 1.
    levels: the deepest, of 2**levels - 1 operators.
    steps_levels: the deepest whose steps are learned, which must fit the model's window.
    wrong: share of claims to question that are wrong.
    wrong_plans: the same of plans; a small solver learns little more than to trust them.
  """

  modulus: Annotated[int, Ge(2), Le(1000)] = 7
  levels: Annotated[int, Ge(1), Le(6)] = 3
  steps_levels: Annotated[int, Ge(1), Le(6)] = 2
  wrong: Probability = 0.5
  wrong_plans: Probability = 0.1

  def expression(self, generator: random.Random, levels: int) -> str:
    """A random expression of that many levels."""
    return expressions.balanced(
      generator, levels, lambda: str(generator.randrange(self.modulus)), gap="")

  @property
  def longest_request(self) -> int:
    """Characters of the engine's longest request with the line end behind it.

    That is to question a plan, which shows an expression and its two parts.
    """
    digits = len(str(self.modulus - 1))
    whole = digits
    for _ in range(self.levels):
      part, whole = whole, 2 * whole + 3
    return len("plan ") + whole + 2 * (len("\n[S1] ") + part) + 1

  def value(self, expression: str) -> int:
    """What it comes to."""
    return expressions.value(expression, self.modulus)

  def one(self, left: str, sign: str, right: str) -> str:
    """One operator worked out, such as 3+4=7."""
    found = expressions.applied(sign, int(left), int(right), self.modulus)
    return f"{left}{sign}{right}={found}"


@dataclasses.dataclass(frozen=True)
class Short:
  """A packaged pattern whose request is a word and what it is about, each on a line of its own.

  A part is shown by its conclusion, or by its statement if it has none yet.

  Attributes:
    packaged: reads the replies.
    word: begins the request.
  """

  packaged: Pattern
  word: str

  @property
  def name(self) -> str:
    """Of the pattern."""
    return self.packaged.name

  @property
  def persona(self) -> str:
    """Who speaks; the small solver's chat template leaves it out."""
    return self.packaged.persona

  def build(self, view: View) -> str:
    """The request."""
    lines = [f"{self.word} {view.problem}"]
    lines += [f"[{known.label}] {known.text or known.statement}" for known in view.children]
    return "\n".join([*lines, view.conclusion] if view.conclusion else lines)

  def form(self, view: View) -> str:
    """As packaged."""
    return self.packaged.form(view)

  def parse(self, text: str, view: View) -> Result | Unreadable:
    """As packaged."""
    return self.packaged.parse(text, view)

  def choices(self, view: View) -> Sequence[str]:
    """As packaged."""
    return self.packaged.choices(view)


def patterns(deduction: str = WORDS["DED"]) -> dict[str, Pattern]:
  """The patterns that the small solver knows; `deduction` is the word that asks for one."""
  packaged = default_patterns()
  words = {**WORDS, "DED": deduction}
  return {**packaged, **{name: Short(packaged[name], word) for name, word in words.items()}}


class Row(NamedTuple):
  """Something to learn.

  Attributes:
    skill: which.
    prompt: the request's last message.
    reply: to it.
  """

  skill: str
  prompt: str
  reply: str

  @property
  def about(self) -> str:
    """The expression that the request is about."""
    return self.prompt.partition("\n")[0].partition(" ")[2]


class Skills:
  """Makes rows."""

  def __init__(self, config: Arithmetic):
    self._config = config
    self._patterns = {word: patterns(word) for word in (WORDS["DED"], ANSWER, STEPS)}
    self._makers: Mapping[str, Callable] = {
      ANSWER: self._answer, STEPS: self._steps, "assess": self._assess, "split": self._split,
      "plan": self._plan, "solve": self._solve, "join": self._join, "check": self._check,
      "mend": self._mend, TABLE: self._table}

  def row(self, skill: str, generator: random.Random, levels: int) -> Row | None:
    """A random row of a skill on an expression of so many levels; None where there is no such."""
    made = self._makers[skill](generator, levels)
    return None if made is None else Row(skill, *made)

  def _asked(self, name: str, view: View, deduction: str = WORDS["DED"]) -> str:
    return self._patterns[deduction][name].build(view)

  def _answer(self, generator, levels):
    text = self._config.expression(generator, levels)
    return self._asked("DED", View(text), ANSWER), f"ANSWER: {self._config.value(text)}"

  def _steps(self, generator, levels):
    if levels > self._config.steps_levels:
      return None
    text = self._config.expression(generator, levels)
    steps = list(expressions.reductions(text, self._config.modulus))
    return self._asked("DED", View(text), STEPS), (
      f"CONCLUSION: {'='.join(steps)}\nANSWER: {steps[-1]}")

  def _assess(self, generator, levels):
    text = self._config.expression(generator, levels)
    return self._asked("ASSESS", View(text)), f"DECISION: {'SOLVE' if levels == 1 else 'SPLIT'}"

  def _split(self, generator, levels):
    if levels == 1:
      return None
    text = self._config.expression(generator, levels)
    left, _, right = expressions.sides(text)
    return self._asked("DEC", View(text)), f"PART 1: {left}\nPART 2: {right}"

  def _plan(self, generator, levels):
    if levels == 1:
      return None
    text = self._config.expression(generator, levels)
    parts = list(expressions.sides(text)[::2])
    reply = _OK
    if generator.random() < self._config.wrong_plans:
      side = generator.randrange(2)
      parts[side] = self._changed(generator, parts[side])
      reply = f"{_ISSUE}part {side + 1}"
    known = tuple(Known(f"S{i}", part, "proposed") for i, part in enumerate(parts, 1))
    return self._asked("CHECK", View(text, children=known)), reply

  def _changed(self, generator, expression: str) -> str:
    """The expression with another digit in one place."""
    digits = [i for i, c in enumerate(expression) if c.isdigit()]
    i = generator.choice(digits)
    other = generator.choice([d for d in "0123456789" if d != expression[i]])
    return expression[:i] + other + expression[i + 1 :]

  def _solve(self, generator, levels):
    text = self._config.expression(generator, 1)
    said = self._config.one(*expressions.sides(text))
    return self._asked("DED", View(text)), _concluded(said)

  def _parts(self, generator, levels):
    """An expression, its parts as they were concluded, and the operator on their results."""
    text = self._config.expression(generator, levels)
    parts = expressions.sides(text)
    if levels == 1:
      return text, (), parts
    known, results = [], []
    for i, part in enumerate((parts.left, parts.right), 1):
      one = expressions.sides(part)
      if levels > 2:  # what its own parts came to, right or wrong
        left, right = (str(generator.randrange(self._config.modulus)) for _ in range(2))
        one = expressions.Sides(left, one.sign, right)
      is_wrong = generator.random() < _WRONG_PARTS
      said = self._claim(generator, one) if is_wrong else self._config.one(*one)
      results.append(said.rpartition("=")[2])
      known.append(Known(f"S{i}", part, "unverified", said))
    return text, tuple(known), expressions.Sides(results[0], parts.sign, results[1])

  def _join(self, generator, levels):
    if levels == 1:
      return None
    text, known, one = self._parts(generator, levels)
    return self._asked("INT", View(text, children=known)), (
      _CITED + _concluded(self._config.one(*one)))

  def _check(self, generator, levels):
    text, known, one = self._parts(generator, levels)
    said = right = self._config.one(*one)
    reply = _OK
    if generator.random() < self._config.wrong:
      said, reply = self._claim(generator, one), f"{_ISSUE}wrong"
    # Worked out again, and the result that is claimed beside it, before it is judged.
    return self._asked("VER", View(text, children=known, conclusion=said)), (
      f"{right} {said.rpartition('=')[2]}\n{reply}")

  def _claim(self, generator, one: expressions.Sides) -> str:
    """A conclusion with another result than the right one."""
    said, _, result = self._config.one(*one).rpartition("=")
    other = int(result) + generator.randrange(1, self._config.modulus)
    return f"{said}={other % self._config.modulus}"

  def _mend(self, generator, levels):
    text, _, one = self._parts(generator, levels)
    said = self._claim(generator, one)
    return self._asked("REFINE", View(text, conclusion=said)), _concluded(self._config.one(*one))

  def _table(self, generator, levels):
    drawn = (expressions.sides(self._config.expression(generator, 1)) for _ in range(_TABLE_LENGTH))
    return TABLE, " ".join(self._config.one(*one) for one in drawn)


def _concluded(said: str) -> str:
  return f"CONCLUSION: {said}\nANSWER: {said.rpartition('=')[2]}"
