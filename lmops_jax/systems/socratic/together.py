"""Several runs side by side whose requests a model answers as one batch.

Each run goes on in a thread of its own until it asks; when all of them wait, what they ask is
answered together, in the order of runs. So what is in a batch depends on the runs and not on
threads, and each run sees an ordinary backend and has a journal of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from lmops_jax.systems.socratic.backends import Backend, Reply, Sampling
from lmops_jax.systems.socratic.context import Messages

T = TypeVar("T")


class Many(Protocol):
  """A model that answers several requests at a time."""

  model: str
  window: int
  can_score: bool

  def count_tokens(self, messages: Messages) -> int:
    """See `Backend`."""

  def complete_many(self, asked: Sequence[tuple[Messages, Sampling]]) -> list[Reply | Exception]:
    """A reply to each, or the error that `Backend.complete` would raise."""

  def score_many(self, asked: Sequence[tuple[Messages, Sequence[str]]]) -> list[list[float]]:
    """Of each what `Backend.score` gives."""


class Stopped(Exception):
  """Another run failed."""


def run_together(model: Many, runs: Sequence[Callable[[Backend], T]], at_once: int) -> list[T]:
  """What each run returns, in order.

  Args:
    runs: each is called with a backend, in a thread of its own.
    at_once: most runs that go on at a time.

  Raises:
    The error of the first run that failed, after all have ended.
  """
  meeting = _Meeting(model, runs)
  workers = [threading.Thread(target=meeting.work, daemon=True)
             for _ in range(min(at_once, len(runs)))]
  meeting.working = len(workers)
  for worker in workers:
    worker.start()
  try:
    while meeting.answer():
      pass
  finally:
    meeting.stop()
    for worker in workers:
      worker.join()
  for number in sorted(meeting.errors):
    raise meeting.errors[number]
  return [meeting.results[number] for number in range(len(runs))]


class _Asked(NamedTuple):
  messages: Messages
  sampling: Sampling | None  # None if choices are to be scored
  choices: Sequence[str]


class _Meeting:
  """Where runs wait for replies. `working` counts the threads that have not ended."""

  def __init__(self, model: Many, runs):
    self.model, self._runs = model, runs
    self.results: dict[int, Any] = {}
    self.errors: dict[int, BaseException] = {}
    self.working = 0
    self._next, self._stopped = 0, False
    self._asked: dict[int, _Asked] = {}
    self._answers: dict[int, Any] = {}
    self._changed = threading.Condition()

  def work(self) -> None:
    """Takes one run after another until none is left."""
    try:
      while True:
        with self._changed:
          if self._next == len(self._runs) or self._stopped:
            return
          number, self._next = self._next, self._next + 1
        try:
          self.results[number] = self._runs[number](_Place(self, number))
        except Stopped:
          return
        except BaseException as error:  # raised again where the runs were begun
          self.errors[number] = error
          self.stop()
          return
    finally:
      with self._changed:
        self.working -= 1
        self._changed.notify_all()

  def ask(self, number: int, asked: _Asked) -> Any:
    """Waits for the answer to a run's request."""
    with self._changed:
      self._asked[number] = asked
      self._changed.notify_all()
      self._changed.wait_for(lambda: self._stopped or number in self._answers)
      if number not in self._answers:
        raise Stopped
      answer = self._answers.pop(number)
    if isinstance(answer, Exception):
      raise answer
    return answer

  def answer(self) -> bool:
    """Waits until every run waits, and answers them; False once all have ended."""
    with self._changed:
      self._changed.wait_for(lambda: self._stopped or len(self._asked) == self.working)
      if self._stopped or not self.working:
        return False
      asked = sorted(self._asked.items())
      self._asked = {}
    texts = [(number, one) for number, one in asked if one.sampling is not None]
    choices = [(number, one) for number, one in asked if one.sampling is None]
    answers = dict(zip((number for number, _ in texts), self.model.complete_many(
      [(one.messages, one.sampling) for _, one in texts]))) if texts else {}
    if choices:
      answers |= zip((number for number, _ in choices), self.model.score_many(
        [(one.messages, one.choices) for _, one in choices]))
    with self._changed:
      self._answers |= answers
      self._changed.notify_all()
    return True

  def stop(self) -> None:
    """Lets every run end at its next request."""
    with self._changed:
      self._stopped = True
      self._changed.notify_all()


class _Place:
  """The backend of one run."""

  def __init__(self, meeting: _Meeting, number: int):
    self._meeting, self._number = meeting, number
    self.model, self.window = meeting.model.model, meeting.model.window
    self.can_score = meeting.model.can_score
    self.count_tokens = meeting.model.count_tokens

  def complete(self, messages, sampling, place, stream=None) -> Reply:
    """See `Backend`; nothing is streamed."""
    return self._meeting.ask(self._number, _Asked(messages, sampling, ()))

  def score(self, messages, choices) -> list[float]:
    """See `Backend`."""
    return self._meeting.ask(self._number, _Asked(messages, None, choices))
