"""The tree of a run: problems, conclusions, pins, and the order in which they may change.

States: new, assessed, then open (parts are worked on) or deducing, then concluded, then verified or
unverified; or abandoned or failed, with a reason. What the model wrote is text, whatever state it
is in: nothing here makes a conclusion true.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

STATES = (
  "new", "assessed", "open", "deducing", "concluded", "verified", "unverified", "abandoned",
  "failed",
)


@dataclasses.dataclass
class Conclusion:
  """What a problem came to.

  Attributes:
    text: the conclusion.
    answer: a short value that can be compared, if there is one.
    status: verified, unverified or partial (a part of the problem has none).
    uses: ids of the parts whose conclusions it joins.
    turns: numbers of the turns that made it.
    critiques: issues that were raised against it, in order.
  """

  text: str
  answer: str | None = None
  status: str = "unverified"
  uses: tuple[str, ...] = ()
  turns: tuple[int, ...] = ()
  critiques: tuple[str, ...] = ()

  @property
  def shown(self) -> str:
    """As requests show it: see `with_answer`."""
    return with_answer(self.text, self.answer)


def with_answer(text: str, answer: str | None) -> str:
  """A conclusion and its short value, the first line of it, unless the text ends in that."""
  if not answer:
    return text
  answer = answer.partition("\n")[0]
  end, short = text.rstrip(" .*"), answer.rstrip(" .*")
  before = end.removesuffix(short)[-1:]
  if end.endswith(short) and not before.isalnum() and before not in ("-", "."):
    return text
  return f"{text}\nANSWER: {answer}"


@dataclasses.dataclass
class Problem:
  """A node of the tree.

  Attributes:
    id: "0" for the target, "0.2.1" for the first part of its second part.
    origin: root, part or transform.
    bridge: for a transform, why solving it solves the parent.
    needs: ids of earlier siblings whose conclusions it builds on.
    attempts: calls so far by pattern.
    reason: why it was abandoned or failed.
    reopened: whether a later check has reopened it, which happens once.
    integrating: whether its parts are being joined; no part comes after that.
  """

  id: str
  statement: str
  parent: str | None = None
  origin: str = "root"
  bridge: str = ""
  needs: tuple[str, ...] = ()
  children: list[str] = dataclasses.field(default_factory=list)
  persona: str = ""
  pattern: str = ""
  state: str = "new"
  conclusion: Conclusion | None = None
  reason: str = ""
  attempts: dict[str, int] = dataclasses.field(default_factory=dict)
  turns_used: int = 0
  reopened: bool = False
  integrating: bool = False

  @property
  def depth(self) -> int:
    """0 for the target."""
    return self.id.count(".")


@dataclasses.dataclass(frozen=True)
class Pin:
  """A named text that later prompts quote: a definition, a theorem or a result."""

  id: str
  title: str
  text: str
  from_turn: int | None = None
  kind: str = "result"


class Tree:
  """All problems of a run, by id, in the order in which they came up."""

  def __init__(self, statement: str, pins: tuple[Pin, ...] = ()):
    self.problems = {"0": Problem("0", statement)}
    self.pins = pins

  @property
  def root(self) -> Problem:
    """The target."""
    return self.problems["0"]

  def children(self, problem: Problem) -> list[Problem]:
    """The parts of a problem, in order."""
    return [self.problems[name] for name in problem.children]

  def ancestors(self, problem: Problem) -> Iterator[Problem]:
    """The parent, its parent, and so on to the target."""
    while problem.parent is not None:
      problem = self.problems[problem.parent]
      yield problem

  def add(self, parent: Problem, statement: str, *, origin: str = "part", bridge: str = "",
          needs: tuple[int, ...] = ()) -> Problem:
    """Adds a part or a transform.

    Args:
      needs: numbers of earlier siblings, from 1.

    Raises:
      ValueError: if the parent is being integrated, or a need is no earlier sibling.
    """
    number = len(parent.children) + 1
    if parent.integrating:
      raise ValueError(f"problem {parent.id} is being integrated and takes no further part.")
    if any(not 1 <= need < number for need in needs):
      raise ValueError(f"part {number} of problem {parent.id} needs {list(needs)}; a part can need "
                       "earlier parts only.")
    child = Problem(f"{parent.id}.{number}", statement, parent.id, origin, bridge,
                    tuple(f"{parent.id}.{need}" for need in needs))
    parent.children.append(child.id)
    self.problems[child.id] = child
    return child

  def repeats(self, problem: Problem, statement: str) -> bool:
    """Whether a statement is that of the problem or of one above it, but for case and blanks."""
    found = normalised(statement)
    return any(normalised(other.statement) == found
               for other in (problem, *self.ancestors(problem)))

  def check(self) -> None:
    """Checks what must hold after every event.

    Raises:
      AssertionError: naming the problem.
    """
    for name, problem in self.problems.items():
      self.check_one(problem)
      assert problem.id == name, name

  def check_one(self, problem: Problem) -> None:
    """As `check`, for one problem."""
    name, parent = problem.id, problem.parent
    assert problem.state in STATES, name
    assert (parent is None) == (name == "0"), name
    if parent is not None:
      assert name.rpartition(".")[0] == parent and name in self.problems[parent].children, name
      siblings = self.problems[parent].children
      assert all(need in siblings[: siblings.index(name)] for need in problem.needs), name
    if problem.conclusion is not None and problem.children:
      concluded = tuple(c.id for c in self.children(problem) if c.conclusion is not None)
      assert problem.integrating and problem.conclusion.uses == concluded, name

  def record(self) -> dict[str, Any]:
    """The tree as JSON values."""
    return {
      "problems": [dataclasses.asdict(problem) | {"depth": problem.depth}
                   for problem in self.problems.values()],
      "pins": [dataclasses.asdict(pin) for pin in self.pins],
    }

  def digest(self) -> str:
    """SHA-256 of all problems, conclusions and pins."""
    return sha256(self.record())


def canonical(value: Any) -> str:
  """JSON text that equal values share."""
  return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(value: Any) -> str:
  """SHA-256 of a JSON value, in hexadecimal."""
  return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def normalised(statement: str) -> str:
  """A statement with case, blanks and punctuation folded; signs of operations stay."""
  return "".join(
    c for c in unicodedata.normalize("NFKC", statement).casefold()
    if not c.isspace() and not (unicodedata.category(c).startswith("P") and c not in "*/%-()&#@"))
