"""One question to the model: request, budget, log, retry, and what a person makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmops_jax.systems.socratic import context, hooks, replies
from lmops_jax.systems.socratic.backends import (
  Backend,
  Place,
  Reply,
  Sampling,
  Usage,
  WindowExceeded,
)
from lmops_jax.systems.socratic.context import ContextOverflow, Messages, Past
from lmops_jax.systems.socratic.journal import Log
from lmops_jax.systems.socratic.patterns import Pattern, View
from lmops_jax.systems.socratic.problems import Problem, sha256
from lmops_jax.systems.socratic.replies import Result, Unreadable
from lmops_jax.systems.socratic.settings import (
  Limits,
  control_character,
  persona_code,
  repaired,
  system_message,
)
from lmops_jax.systems.socratic.tools import Claim, Tool, checked

_CONTINUE = "Continue exactly where you stopped."


class Spent(Exception):
  """The budget leaves no room for this call."""


class Paused(Exception):
  """The time is up; the run can be resumed."""


@dataclasses.dataclass(frozen=True)
class Refused:
  """No usable reply: it was empty, filtered, or a refusal."""

  reason: str


class Turn(NamedTuple):
  """A call that was paid for; its texts are in the log under its key."""

  number: int
  problem: str
  pattern: str
  persona: str
  key: str
  finish: str
  usage: Usage
  references: tuple[dict[str, Any], ...]
  notes: tuple[str, ...]
  by_human: bool = False


class Said(NamedTuple):
  """What came of a question: what the reply says, and the turn as context of later ones."""

  parsed: Result | Unreadable | Refused
  past: Past


@dataclasses.dataclass
class Spending:
  """What was spent so far."""

  turns: int = 0
  prompt_tokens: int = 0
  reply_tokens: int = 0
  cost: float = 0.0
  estimated: bool = False

  @property
  def tokens(self) -> int:
    """Of prompts and replies."""
    return self.prompt_tokens + self.reply_tokens


class Calls:
  """Asks the model within the limits, and logs what was asked.

  Attributes:
    turns: all calls so far.
    spent: what they cost.
  """

  def __init__(self, backend: Backend, log: Log, limits: Limits, patterns: Mapping[str, Pattern],
               person: hooks.Hooks | None = None,
               watch: Callable[[str, Problem, Turn | None], None] | None = None,
               stream: Callable[[str], None] | None = None,
               is_over: Callable[[], bool] = lambda: False,
               tools: Mapping[str, Tool] | None = None):
    """
    Args:
      person: takes part in the run; None is automatic.
      watch: called with an event, its problem and perhaps its turn.
      stream: called with the pieces of a reply.
      is_over: whether the time is up, asked before a call is sent.
      tools: check claims for verification, by name; they cost no tokens but those of what they say.
    """
    self._backend, self._log, self.limits, self._patterns = backend, log, limits, patterns
    self._person, self.watch, self._stream, self._is_over = person, watch, stream, is_over
    self._tools = tools or {}
    self.turns: list[Turn] = []
    self.spent = Spending()

  def spare(self, problem: Problem) -> int:
    """Calls that a problem may make so that each problem above it can still be integrated."""
    return self.limits.max_turns - self.spent.turns - problem.depth

  def pattern(self, name: str) -> Pattern:
    """A pattern by name."""
    return self._patterns[name]

  def ask(self, problem: Problem, name: str, view: View, *, past: Sequence[Past] = (),
          keep: int = 0, sample: int = 0) -> Said:
    """Asks one question; at most one more call follows if the reply is cut off or unreadable.

    Args:
      past: earlier turns on the problem.
      keep: calls that must be left afterwards.

    Raises:
      Spent: if there is no budget for it.
      ContextOverflow: if it cannot be made to fit the window.
      Paused: if the time is up.
    """
    exchange = _Exchange(self, problem, self._patterns[name], view, past, keep, sample)
    return exchange.run()

  def send(self, problem: Problem, pattern: Pattern, persona: str, messages: Messages,
           references: tuple, notes: tuple, sample: int = 0,
           choices: Sequence[str] = ()) -> tuple[int, Reply]:
    """Sends messages, or takes the logged reply; returns the turn's number and the reply."""
    attempt = problem.attempts.get(pattern.name, 0) + 1
    place = Place(problem.id, pattern.name, attempt, sample)
    sampling = Sampling(self.limits.max_new_tokens, self.limits.temperature, self.limits.top_p,
                        self.limits.seed)
    self._check(messages, problem)
    key = sha256([*vars(place).values(), messages, vars(sampling), list(choices),
                  self._backend.model])
    reply = self._log.reply(key)
    if reply is None:
      if self._is_over():
        raise Paused
      self._log.write("call", key=key, place=place, messages=messages, sampling=sampling,
                      references=references)
      if choices:
        reply = self._choose(messages, choices)
      else:
        own = dataclasses.replace(sampling, seed=int(sha256([key, sampling.seed])[:8], 16))
        try:
          reply = self._backend.complete(messages, own, place, self._stream)
        except WindowExceeded:  # logged, so that a resumed run goes the same way
          reply = Reply("", "window", Usage(0, 0), self._backend.model)
      self._log.write("reply", key=key, text=reply.text, finish=reply.finish, usage=reply.usage,
                      model=reply.model)
    problem.attempts[pattern.name] = attempt
    problem.turns_used += 1
    self._record(problem, pattern.name, persona, key, reply, references, notes)
    return len(self.turns), reply

  def _check(self, messages: Messages, problem: Problem) -> None:
    """Refuses control characters, and calls that would overspend."""
    for role, content in messages:
      found = control_character(content)
      if found is not None:
        raise ValueError(f"a message of role {role} on problem {problem.id} holds the control "
                         f"character {found!r}; write the text without it, or run with --repair.")
    limits, spent = self.limits, self.spent
    prompt = self._backend.count_tokens(messages)
    if spent.turns >= limits.max_turns:
      raise Spent
    if spent.tokens + prompt + limits.max_new_tokens > limits.max_tokens:
      raise Spent
    if limits.max_cost is not None and (
        spent.cost + limits.cost(prompt, limits.max_new_tokens) > limits.max_cost):
      raise Spent

  def _choose(self, messages: Messages, choices: Sequence[str]) -> Reply:
    replied = [f"DECISION: {choice}" for choice in choices]
    scores = self._backend.score(messages, replied)
    best = max(range(len(choices)), key=lambda i: scores[i])
    usage = Usage(self._backend.count_tokens(messages), 1, estimated=True)
    return Reply(replied[best], "stop", usage, self._backend.model)

  def _record(self, problem, name, persona, key, reply, references, notes, by_human=False) -> None:
    spent, usage = self.spent, reply.usage
    if not by_human:
      spent.turns += 1
      spent.prompt_tokens += usage.prompt
      spent.reply_tokens += usage.reply
      spent.cost += self.limits.cost(usage.prompt, usage.reply)
      spent.estimated |= usage.estimated
    turn = Turn(len(self.turns) + 1, problem.id, name, persona, key, reply.finish, usage,
                references, notes, by_human)
    self.turns.append(turn)
    self.event("turn", problem, turn)

  def by_hand(self, problem: Problem, pattern: Pattern, key: str, text: str) -> int:
    """A reply that a person wrote; it costs nothing. Returns the turn's number."""
    reply = Reply(text, "stop", Usage(0, 0))
    self._record(problem, pattern.name, "human", key, reply, (), (), by_human=True)
    return len(self.turns)

  def human(self, hook: str, key: str, ask: Callable[[hooks.Hooks], hooks.Action]
            ) -> hooks.Action | None:
    """What a person decides, from the log if it is there; None without a person."""
    action = self._log.human(key)
    if action is None:
      if self._person is None:
        return None
      action = hooks.checked(hook, ask(self._person), self.limits.max_parts)
      self._log.write("human", key=key, hook=hook, action=action)
    return action

  def build(self, pattern: Pattern, view: View, past: Sequence[Past], share: float = 1.0
            ) -> context.Built:
    """A request that fits the backend's window."""
    room = self._backend.window - self.limits.max_new_tokens - self.limits.margin
    return context.build(pattern, view, past, int(room * share), self._backend.count_tokens)

  def choices(self, pattern: Pattern, view: View) -> Sequence[str]:
    """What to choose from by likelihood, if the backend can."""
    return pattern.choices(view) if self._backend.can_score else ()

  @property
  def tools(self) -> tuple[str, ...]:
    """Names of the tools that check claims."""
    return tuple(self._tools)

  def checked(self, problem: Problem, claims: Sequence[Claim]) -> str:
    """What tools say of a conclusion's claims, a line each; it is logged."""
    if not claims:
      return ""
    found = checked(self._tools, claims)
    self._log.write("tool", key=sha256([problem.id, list(map(list, claims))]), problem=problem.id,
                    found=found)
    return "\n".join(found)

  def event(self, kind: str, problem: Problem, turn: Turn | None = None) -> None:
    """Tells those who watch."""
    if self.watch is not None:
      self.watch(kind, problem, turn)


class _Exchange:
  """A question, its reply, and at most one more call if that is cut off or unreadable."""

  def __init__(self, calls: Calls, problem: Problem, pattern: Pattern, view: View,
               past: Sequence[Past], keep: int, sample: int):
    self._calls, self._problem, self._pattern, self._view = calls, problem, pattern, view
    self._past, self._keep, self._sample = past, keep, sample
    self._extra = False  # whether the one more call was made
    self._number = 0

  def run(self) -> Said:
    calls, view = self._calls, self._view
    self._require_spare()
    built = calls.build(self._pattern, view, self._past)
    self._persona = self._pattern.persona
    self._built = built
    messages, answer = self._edited(built)
    if answer is not None:
      text, finish = answer, "stop"
    else:
      messages, text, finish = self._fetch(messages)
    text = repaired(text)[0]
    messages, text, finish = self._reviewed(messages, text, finish)
    parsed = self._parsed(text, finish)
    if isinstance(parsed, Unreadable) and not self._extra and self._has_spare():
      parsed, text = self._asked_again(messages, text, parsed)
    if isinstance(parsed, Unreadable) and parsed.result is not None:
      parsed = parsed.result
    return Said(parsed, Past(self._number, messages[-1][1], text))

  def _asked_again(self, messages: Messages, text: str, parsed: Unreadable):
    """The one retry of an unreadable reply, which quotes the form; what it says, and its text."""
    again = (*messages, ("assistant", text), ("user", (
      f"I cannot read that reply: {parsed.reason}. Give it again in this form.\n"
      f"{self._pattern.form(self._view)}")))
    try:
      second, finish = self._send(again, (f"the reply before was unreadable: {parsed.reason}",))
    except Spent:
      return parsed, text
    second = repaired(second)[0]
    retried = self._parsed(second, finish)
    return (parsed, text) if isinstance(retried, Refused) else (retried, second)

  def _require_spare(self) -> None:
    if self._calls.spare(self._problem) < 1 + self._keep:
      raise Spent

  def _has_spare(self) -> bool:
    return self._calls.spare(self._problem) >= 1 + self._keep

  def _send(self, messages: Messages, notes=(), choices=()) -> tuple[str, str]:
    self._number, reply = self._calls.send(
      self._problem, self._pattern, self._persona, messages, self._built.references,
      (*self._built.cuts, *notes), self._sample, choices)
    return reply.text, reply.finish

  def _fetch(self, messages: Messages) -> tuple[Messages, str, str]:
    """A reply; the request is made smaller once if the backend finds it too long."""
    text, finish = self._send(messages, (), self._calls.choices(self._pattern, self._view))
    if finish == "window":
      self._extra = True
      if not self._has_spare():
        raise ContextOverflow("context_overflow: the backend finds the request too long.")
      self._built = self._calls.build(self._pattern, self._view, self._past, 0.75)
      messages = self._built.messages
      text, finish = self._send(messages, ("built again with a budget smaller by a quarter",))
      if finish == "window":
        raise ContextOverflow("context_overflow: the backend finds the request too long, and a "
                              "quarter shorter too.")
    if finish == "length" and text.strip() and not self._extra and self._has_spare():
      self._extra = True
      with contextlib.suppress(Spent):  # then it stays cut off
        more, finish = self._send((*messages, ("assistant", repaired(text)[0]),
                                   ("user", _CONTINUE)), ("continued",))
        text = replies.continued(text, more)
    return messages, text, finish

  def _parsed(self, text: str, finish: str) -> Result | Unreadable | Refused:
    if finish == "content_filter":
      return Refused("the backend filtered the reply")
    if not text.strip():
      return Refused("the reply is empty")
    parsed = self._pattern.parse(text, self._view)
    plain = isinstance(parsed, Unreadable) or parsed.fallback
    return Refused("the model refused") if plain and replies.is_refusal(text) else parsed

  def _key(self, hook: str, step: int = 0) -> str:
    return " ".join(map(str, (hook, self._problem.id, self._pattern.name, self._sample,
                              len(self._calls.turns), step)))

  def _edited(self, built: context.Built) -> tuple[Messages, str | None]:
    """The messages as a person wants them, or the reply that the person gives."""
    messages, key = built.messages, self._key("before_call")
    action = self._calls.human("before_call", key, lambda person: person.before_call(
      self._problem.id, self._pattern.name, messages)) or {"do": "send"}
    if action["do"] == "answer":
      self._number = self._calls.by_hand(self._problem, self._pattern, key, action["text"])
      return messages, action["text"]
    if action["do"] == "edit":
      pairs = list(zip(messages[1:-1:2], messages[2:-1:2]))
      turns = [r for r in built.references if "turn" in r]
      dropped = set(action.get("drop", ()))
      kept = [(pair, r) for pair, r in zip(pairs, turns) if r["turn"] not in dropped]
      system = messages[0]
      if "persona" in action:
        system = ("system", system_message(action["persona"]))
        self._persona = persona_code(system[1]) or action["persona"]
      final = ("user", action.get("prompt", messages[-1][1]))
      messages = (system, *(m for pair, _ in kept for m in pair), final)
      pins = tuple(r for r in built.references if "pin" in r)
      self._built = dataclasses.replace(
        built, messages=messages, references=pins + tuple(r for _, r in kept))
    return messages, None

  def _reviewed(self, messages: Messages, text: str, finish: str) -> tuple[Messages, str, str]:
    """The reply as a person wants it."""
    step = 0
    while True:
      shown = text
      action = self._calls.human("after_reply", self._key("after_reply", step),
                                 lambda person: person.after_reply(
                                   self._problem.id, self._pattern.name, shown))  # noqa: B023
      step += 1
      if action is None or action["do"] == "accept":
        return messages, text, finish
      if action["do"] == "select":
        return messages, " ... ".join(text[a:b] for a, b in action["spans"]), "stop"
      if action["do"] == "edit":
        return messages, action["text"], "stop"
      self._require_spare()
      if action["do"] == "resample":
        text, finish = self._send(messages, ("resampled",))
      else:
        said = action.get("critique") or action.get("question")
        messages = (*messages, ("assistant", text), ("user", said))
        more, finish = self._send(messages, ("a person asked on",))
        text = more if action["do"] == "reject" else f"{text}\n\n{more}"
      text = repaired(text)[0]
