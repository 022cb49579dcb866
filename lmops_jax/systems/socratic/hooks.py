"""Where a person may take part: before a call, after a reply, on new problems, when it is stuck.

What a person decides is a small JSON object, is logged, and is repeated when a run is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lmops_jax.systems.socratic.context import Messages
from lmops_jax.systems.socratic.settings import control_character, described

Action = dict[str, Any]
_ACTIONS = {
  "before_call": {"send": (), "edit": (), "answer": ("text",)},
  "after_reply": {"accept": (), "select": ("spans",), "edit": ("text",), "resample": (),
                  "reject": ("critique",), "ask": ("question",)},
  "on_problem": {"keep": (), "parts": ("parts",)},
  "on_stuck": {"go_on": (), "conclude": ("text",)},
}
_TEXTS = ("prompt", "text", "critique", "question", "answer")


class Hooks(Protocol):
  """A person, or a function in the place of one. Each method returns an action with "do".

  before_call: send; edit (any of "prompt", "persona", "drop", the numbers of turns to leave out);
  answer ("text") in the model's place. after_reply: accept; select ("spans" of the reply); edit
  ("text"); resample; reject ("critique"); ask ("question"). on_problem: keep; parts ("parts", each
  a statement and the earlier parts it needs). on_stuck: go_on; conclude ("text", "answer").
  """

  def before_call(self, problem: str, pattern: str, messages: Messages) -> Action:
    """Before a request is sent."""

  def after_reply(self, problem: str, pattern: str, text: str) -> Action:
    """When a reply has come."""

  def on_problem(self, problem: str, statements: Sequence[str]) -> Action:
    """When new parts were proposed and passed their check."""

  def on_stuck(self, problem: str, reason: str) -> Action:
    """When a problem failed or its conclusion is unverified."""


def checked(hook: str, action: Action, max_parts: int) -> Action:
  """An action that the hook knows, with what belongs to it; before it is logged.

  Args:
    max_parts: of a problem.

  Raises:
    ValueError: for another one.
  """
  known = _ACTIONS[hook]
  if not isinstance(action, dict) or action.get("do") not in known:
    raise ValueError(f"{hook} was answered with {action!r}; \"do\" must be one of "
                     f"{', '.join(known)}.")
  for name in known[action["do"]]:
    if name not in action:
      raise ValueError(f"{hook}: the action {action['do']} needs {name!r}.")
  if "persona" in action:
    described(action["persona"])
  parts = action.get("parts", ())
  if len(parts) > max_parts or (action["do"] == "parts" and not parts):
    raise ValueError(f"{hook}: {len(parts)} parts were given, of 1 to {max_parts}.")
  for number, (_, needs) in enumerate(parts, 1):
    if any(not 1 <= need < number for need in needs):
      raise ValueError(
        f"{hook}: part {number} needs {list(needs)}; it can need earlier parts only.")
  texts = [action[name] for name in _TEXTS if name in action] + [text for text, _ in parts]
  for text in texts:
    found = control_character(text)
    if found is not None or not text.strip():
      what = "is empty" if found is None else f"holds the control character {found!r}"
      raise ValueError(f"{hook}: a text {what}; write it again.")
  return action


class Terminal:
  """Asks a person at the terminal.

  `confirm` asks before a call is sent and when it is stuck; `interactive` asks everywhere.
  """

  def __init__(self, mode: str, ask: Callable[[str], str] = input,
               show: Callable[[str], None] = print):
    """
    Raises:
      ValueError: for another mode.
    """
    if mode not in ("confirm", "interactive"):
      raise ValueError(f"mode {mode!r} must be confirm or interactive.")
    self._all, self._ask, self._show = mode == "interactive", ask, show

  def before_call(self, problem, pattern, messages) -> Action:
    """Shows the request; Enter sends it."""
    self._show(f"\n--- {problem} {pattern}: {messages[0][1]}\n{messages[-1][1]}")
    choice = self._choose("[Enter] send, e edit the request, p persona, a answer it yourself",
                          ("e", "p", "a") if self._all else ())
    if choice == "e":
      return {"do": "edit", "prompt": self._text("The request")}
    if choice == "p":
      return {"do": "edit", "persona": self._ask("persona: ").strip()}
    return {"do": "answer", "text": self._text("The reply")} if choice == "a" else {"do": "send"}

  def after_reply(self, problem, pattern, text) -> Action:
    """Shows the reply; Enter accepts it."""
    if not self._all:
      return {"do": "accept"}
    self._show(f"\n<<< {problem} {pattern}\n{text}")
    choice = self._choose("[Enter] accept, s select a passage, e edit, r resample, x reject with a "
                          "critique, q ask a question", ("s", "e", "r", "x", "q"))
    if choice == "s":
      start, end = self._ask("first words: "), self._ask("last words: ")
      first, last = text.find(start), text.rfind(end)
      if first < 0 or last < first:
        self._show("That passage is not in the reply; all of it is kept.")
        return {"do": "accept"}
      return {"do": "select", "spans": [[first, last + len(end)]]}
    return {"e": lambda: {"do": "edit", "text": self._text("The reply")},
            "r": lambda: {"do": "resample"},
            "x": lambda: {"do": "reject", "critique": self._text("What is wrong")},
            "q": lambda: {"do": "ask", "question": self._text("The question")},
            "": lambda: {"do": "accept"}}[choice]()

  def on_problem(self, problem, statements) -> Action:
    """Shows the parts; Enter keeps them."""
    if not self._all:
      return {"do": "keep"}
    self._show("\n".join([f"\nParts of {problem}:", *(f"{i}. {s}" for i, s in
                                                      enumerate(statements, 1))]))
    if self._choose("[Enter] keep, e write them anew", ("e",)) == "e":
      lines = self._text("One part a line").splitlines()
      return {"do": "parts", "parts": [[line.strip(), []] for line in lines if line.strip()]}
    return {"do": "keep"}

  def on_stuck(self, problem, reason) -> Action:
    """Tells what happened; Enter goes on."""
    self._show(f"\nProblem {problem}: {reason}")
    if self._choose("[Enter] go on, c conclude it yourself", ("c",)) == "c":
      return {"do": "conclude", "text": self._text("The conclusion")}
    return {"do": "go_on"}

  def _choose(self, text: str, letters: Sequence[str]) -> str:
    while True:
      choice = self._ask(f"{text}: ").strip().lower()
      if choice in ("", *letters):
        return choice
      self._show(f"There is no {choice!r}.")

  def _text(self, what: str) -> str:
    self._show(f"{what}, ended by a line with a single dot:")
    lines = []
    while (line := self._ask("")) != ".":
      lines.append(line)
    return "\n".join(lines)
