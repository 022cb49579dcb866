"""Runs in folders: begin, resume, and read back what one did."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmops_jax
from lmops_jax.systems.socratic import journal as journal_lib
from lmops_jax.systems.socratic.backends import Backend, BackendError
from lmops_jax.systems.socratic.calls import Calls, Spending, Turn
from lmops_jax.systems.socratic.engine import Engine
from lmops_jax.systems.socratic.journal import Journal
from lmops_jax.systems.socratic.patterns import Pattern, default_patterns, named_patterns
from lmops_jax.systems.socratic.problems import Pin, Tree, sha256
from lmops_jax.systems.socratic.settings import Cast, Limits
from lmops_jax.systems.socratic.tools import named_tools


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run is: problem, limits, who speaks, and which model; all of it goes into the log.

  Attributes:
    backend: its kind and how to reach it, such as `{"kind": "http", "endpoint": ..., "model": ...,
      "key_env": ...}`; never a key.
    texts: templates other than the packaged ones, by pattern.
    named: patterns of installed packages, by the names of their entry points.
    tools: names of the tools that check claims for verification.
  """

  statement: str
  limits: Limits
  cast: Cast
  backend: dict[str, Any]
  pins: tuple[Pin, ...] = ()
  texts: dict[str, str] = dataclasses.field(default_factory=dict)
  named: tuple[str, ...] = ()
  tools: tuple[str, ...] = ()

  def record(self) -> dict[str, Any]:
    """As JSON values."""
    return {
      "statement": self.statement, "limits": dataclasses.asdict(self.limits),
      "cast": dataclasses.asdict(self.cast), "backend": self.backend,
      "pins": [dataclasses.asdict(pin) for pin in self.pins], "texts": self.texts,
      "named": list(self.named),
      **({"tools": list(self.tools)} if self.tools else {}),  # logs without tools stay as they were
    }

  @classmethod
  def of(cls, record: dict[str, Any]) -> Plan:
    """From what `record` gave."""
    return cls(
      record["statement"], Limits(**record["limits"]), Cast(**record["cast"]), record["backend"],
      tuple(Pin(**pin) for pin in record["pins"]), record["texts"],
      tuple(record["named"]), tuple(record.get("tools", ())))

  def patterns(self) -> dict[str, Pattern]:
    """The patterns of the run."""
    return {**default_patterns(self.cast, self.texts), **named_patterns(self.named)}


class Outcome(NamedTuple):
  """What a run came to.

  Attributes:
    digest: SHA-256 of the tree.
  """

  tree: Tree
  turns: list[Turn]
  spent: Spending
  digest: str
  plan: Plan


def run(folder: Path | str, plan: Plan, backend: Backend, *, fork: bool = False,
        **options) -> Outcome:
  """Begins a run, or goes on with the one in the folder; replies that are there cost nothing.

  Args:
    fork: go on although the folder's run has another plan; replies to the same calls are kept.
    options: of `Calls`: person, watch, stream, is_over.

  Raises:
    ValueError: if the folder holds the run of another plan, is damaged or in use.
    Paused: if the time is up.
    BackendError: if the model gives no reply; the run can be resumed.
  """
  with Journal(folder) as journal:
    if journal.config is not None and journal.config != plan.record() and not fork:
      changed = [name for name, value in plan.record().items()
                 if journal.config.get(name) != value]
      raise ValueError(f"{folder} holds a run with another {' and '.join(changed)}; resume it as "
                       "it is, choose another folder, or keep its replies with --fork.")
    if journal.config != plan.record():
      journal.write("run", config=plan.record(), digest=sha256(plan.record()),
                    version=lmops_jax.__version__)
    return _executed(journal, plan, backend, **options)


def _executed(journal: Journal, plan: Plan, backend: Backend, **options) -> Outcome:
  calls = Calls(backend, journal, plan.limits, plan.patterns(), tools=named_tools(plan.tools),
                **options)
  engine = Engine(plan.statement, calls, plan.pins)
  engine.run()
  outcome = Outcome(engine.tree, calls.turns, calls.spent, engine.tree.digest(), plan)
  journal.write("end", digest=outcome.digest, turns=calls.spent.turns, tokens=calls.spent.tokens)
  if journal.end["digest"] != outcome.digest:
    journal.write("note", text="a resumed run ended with another tree", digest=outcome.digest)
  return outcome


def plan_of(folder: Path | str) -> Plan:
  """The plan of the run in a folder.

  Raises:
    ValueError: if there is none.
  """
  configs = [line["config"] for line in journal_lib.read(folder) if line["kind"] == "run"]
  if not configs:
    raise ValueError(f"{folder} holds a log without the beginning of a run; begin it anew.")
  return Plan.of(configs[-1])


class _Unanswered(BackendError):
  """The log has no reply to this call."""


class _Nothing:
  """The backend of a log that is only read."""

  def __init__(self, backend: Backend):
    self.model, self.window, self.can_score = backend.model, backend.window, backend.can_score
    self.count_tokens = backend.count_tokens

  def complete(self, messages, sampling, place, stream=None):
    """There is no reply."""
    raise _Unanswered

  def score(self, messages, choices):
    """There is no reply."""
    raise _Unanswered


class _ReadOnly:
  """A journal that is not written."""

  def __init__(self, journal: Journal):
    self.reply, self.human = journal.reply, journal.human

  def write(self, kind: str, **fields: Any) -> None:
    """Writes nothing."""


@contextlib.contextmanager
def looked_at(folder: Path | str, backend: Backend) -> Iterator[tuple[Outcome, Journal]]:
  """How far the run in a folder has come, by executing it again on its log alone.

  Args:
    backend: the run's, or one that counts tokens and names the model as it does; is never asked.

  Yields:
    The tree so far, and the log to read requests and replies from.

  Raises:
    ValueError: if there is no run, or its log is damaged.
  """
  plan = plan_of(folder)
  with Journal(folder, writes=False) as journal:
    calls = Calls(_Nothing(backend), _ReadOnly(journal), plan.limits, plan.patterns(),
                  tools=named_tools(plan.tools))
    engine = Engine(plan.statement, calls, plan.pins)
    with contextlib.suppress(_Unanswered):  # then the run is not finished
      engine.run()
    yield Outcome(engine.tree, calls.turns, calls.spent, engine.tree.digest(), plan), journal


def texts_of(journal: Journal) -> Callable[[Turn], tuple[list[tuple[str, str]], str]]:
  """Reads the messages and the reply of a turn from the log."""
  def read(turn: Turn) -> tuple[list[tuple[str, str]], str]:
    if turn.by_human:
      return [], journal.human(turn.key)["text"]
    call, reply = journal.call(turn.key), journal.reply(turn.key)
    return [tuple(message) for message in call["messages"]], reply.text
  return read
