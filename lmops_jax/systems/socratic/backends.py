"""Where replies come from: one protocol, and the backends that need no model.

A backend is handed complete messages and settings, and knows nothing of problems, but for the place
of the call, by which scripted ones find their reply.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from lmops_jax.systems.socratic.context import Messages
from lmops_jax.systems.socratic.problems import sha256


class BackendError(RuntimeError):
  """The backend gives no reply; the run can be resumed."""


class WindowExceeded(BackendError):
  """The backend finds a request too long, whatever our count of its tokens says."""


class ScriptMismatch(BackendError):
  """A request differs from the one that was recorded."""


@dataclasses.dataclass(frozen=True)
class Usage:
  """Tokens of a call; `estimated` if the backend did not count them."""

  prompt: int
  reply: int
  estimated: bool = False

  @property
  def total(self) -> int:
    """Of prompt and reply."""
    return self.prompt + self.reply


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a backend says: text, why it ended (stop, length, content_filter), tokens, model."""

  text: str
  finish: str
  usage: Usage
  model: str = ""


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a reply is decoded."""

  max_new_tokens: int = 1024
  temperature: float = 0.7
  top_p: float = 0.95
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Place:
  """Which call of a run it is."""

  problem: str
  pattern: str
  attempt: int
  sample: int = 0


class Backend(Protocol):
  """A model, or something that replies like one.

  Attributes:
    model: its name, which is part of the key of a call.
    window: tokens of prompt and reply together.
    can_score: whether `score` may be called.
  """

  model: str
  window: int
  can_score: bool

  def complete(self, messages: Messages, sampling: Sampling, place: Place,
               stream: Callable[[str], None] | None = None) -> Reply:
    """A reply.

    Args:
      stream: called with the pieces of the text as they come.

    Raises:
      BackendError: if there is none.
    """

  def count_tokens(self, messages: Messages) -> int:
    """Tokens of messages, or an estimate that is rather too high."""

  def score(self, messages: Messages, choices: Sequence[str]) -> list[float]:
    """Log-likelihood of each choice as the reply, nats."""


def estimated_tokens(text: str) -> int:
  """About a token for 3 bytes, rather too many for English."""
  return -(-len(text.encode("utf-8", "surrogatepass")) // 3)


class _Counting:
  """Counts as an estimate does."""

  can_score = False

  def count_tokens(self, messages: Messages) -> int:
    """An estimate: see `estimated_tokens`, and 4 for each message."""
    return sum(estimated_tokens(content) + 4 for _, content in messages)

  def score(self, messages: Messages, choices: Sequence[str]) -> list[float]:
    """Not offered."""
    raise NotImplementedError(f"{type(self).__name__} scores nothing.")

  def reply(self, messages: Messages, text: str, finish: str = "stop") -> Reply:
    """A reply with estimated usage."""
    usage = Usage(self.count_tokens(messages), estimated_tokens(text), estimated=True)
    return Reply(text, finish, usage, self.model)


class Rules(_Counting):
  """Replies that a Python function makes: simulations and tests."""

  def __init__(self, rule: Callable[[Messages, Place, random.Random], str | Reply], *,
               model: str = "rules", window: int = 8192):
    """
    Args:
      rule: `(messages, place, random) -> text`, or a `Reply`. The random numbers depend on the
        sampling's seed alone.
    """
    self.model, self.window, self._rule = model, window, rule
    self.num_calls = 0

  def complete(self, messages, sampling, place, stream=None) -> Reply:
    """What the function returns."""
    self.num_calls += 1
    made = self._rule(messages, place, random.Random(sampling.seed))
    return self.reply(messages, made) if isinstance(made, str) else made


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A call of a transcript."""

  name: str
  messages: Messages
  reply: str
  place: Place | None = None
  finish: str = "stop"


class Scripted(_Counting):
  """Replies from a transcript.

  `strict`: the messages must be those recorded, in order. `keyed`: found by problem, pattern and
  attempt. `ordered`: the next one, whatever is asked.
  """

  def __init__(self, records: Iterable[Recorded], mode: str = "strict", *,
               model: str = "scripted", window: int = 1 << 30):
    """
    Raises:
      ValueError: for another mode, or a keyed record without place.
    """
    if mode not in ("strict", "keyed", "ordered"):
      raise ValueError(f"mode {mode!r} must be strict, keyed or ordered.")
    self.model, self.window, self._mode = model, window, mode
    self._records = list(records)
    self._next = 0
    self._by_place: Mapping[Any, Recorded] = {}
    if mode == "keyed":
      self._by_place = {self._key(record.place, record.name): record for record in self._records}

  @staticmethod
  def _key(place: Place | None, name: str):
    if place is None:
      raise ValueError(f"record {name} has no place; replay it strict or ordered.")
    return place.problem, place.pattern, place.attempt

  def complete(self, messages, sampling, place, stream=None) -> Reply:
    """The recorded reply.

    Raises:
      ScriptMismatch: if there is none, or (strict) it was a reply to something else.
    """
    if self._mode == "keyed":
      record = self._by_place.get(self._key(place, ""))
    else:
      record = self._records[self._next] if self._next < len(self._records) else None
      self._next += 1
    if record is None:
      raise ScriptMismatch(f"the transcript has no reply for problem {place.problem}, pattern "
                           f"{place.pattern}, attempt {place.attempt}.")
    if self._mode == "strict" and sha256(messages) != sha256(record.messages):
      raise ScriptMismatch(f"{record.name}: {difference(record.messages, messages)}")
    return self.reply(messages, record.reply, record.finish)


def difference(recorded: Messages, asked: Messages) -> str:
  """The first place where two lists of messages differ, in a sentence."""
  for i, (old, new) in enumerate(zip(recorded, asked)):
    if tuple(old) == tuple(new):
      continue
    if old[0] != new[0]:
      return f"message {i} was from {old[0]} and is now from {new[0]}."
    at = next((k for k, (a, b) in enumerate(zip(old[1], new[1])) if a != b),
              min(len(old[1]), len(new[1])))
    start = max(0, at - 20)
    return (f"message {i} ({old[0]}) differs from character {at} on: recorded "
            f"{old[1][start : at + 30]!r}, asked {new[1][start : at + 30]!r}.")
  return f"{len(recorded)} messages were recorded, {len(asked)} are asked."
