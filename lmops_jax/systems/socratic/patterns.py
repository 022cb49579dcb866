"""The five patterns as plug-ins: how a request is worded and how its reply is read.

Deduction (DED), transformation (TRA), decomposition (DEC), verification (VER) and integration
(INT) of Dong et al. 2023 (arXiv 2309.05689). VER has three requests: CHECK questions a plan, VER a
conclusion, and REFINE corrects it. ASSESS chooses the pattern, SUMMARISE shortens what does not
fit. Packages add or replace patterns through the entry-point group `lmops_jax.socratic_patterns`.
Wording lies in text files with slots and no code.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from typing import Protocol

from lmops_jax.systems.socratic import replies
from lmops_jax.systems.socratic import tools as tools_lib
from lmops_jax.systems.socratic.problems import Pin
from lmops_jax.systems.socratic.replies import Result, Unreadable
from lmops_jax.systems.socratic.settings import Cast

GROUP = "lmops_jax.socratic_patterns"
DECISIONS = ("SOLVE", "REPHRASE", "SPLIT")
QUESTIONS = (
  "Do the units, signs and orders of magnitude come out right?",
  "Count again: is every number in it, and every count of cases, correct?",
  "What happens at the edges: zero, one, the empty case, equality, infinity?",
  "Which assumption does it use that the problem does not grant?",
  "Why does its least obvious step follow? Redo that step from the beginning.",
  "Does it answer exactly what was asked, all of it?",
)


@dataclasses.dataclass(frozen=True)
class Known:
  """A part or a neighbour as a request shows it: statement, how it stands, and its conclusion."""

  label: str
  statement: str
  status: str
  text: str = ""

  def shown(self) -> str:
    """As text."""
    head = f"[{self.label}] {self.statement}\nStatus: {self.status}"
    return f"{head}\nConclusion: {self.text}" if self.text else head


@dataclasses.dataclass(frozen=True)
class View:
  """What a request may show.

  Attributes:
    problem: the statement.
    ancestors: statements of the problems above, the nearest first.
    pins: texts that the problem is built on.
    children: parts, or neighbours that it needs.
    conclusion, question, critique: of a verification; a critique may also say what was wrong with
      an earlier attempt.
    words: decisions that are offered.
    max_parts: of a decomposition.
    must_cite: numbers of the parts whose conclusion must be cited.
    tools: names of the tools that check claims.
    found: what they found, for a verification.
  """

  problem: str = ""
  ancestors: tuple[str, ...] = ()
  pins: tuple[Pin, ...] = ()
  children: tuple[Known, ...] = ()
  conclusion: str = ""
  question: str = ""
  critique: str = ""
  words: tuple[str, ...] = DECISIONS
  max_parts: int = 5
  must_cite: frozenset[int] = frozenset()
  tools: tuple[str, ...] = ()
  found: str = ""


class Pattern(Protocol):
  """A way of asking."""

  name: str
  persona: str

  def build(self, view: View) -> str:
    """The text of the request."""

  def form(self, view: View) -> str:
    """The form that the reply should have, which a retry quotes."""

  def parse(self, text: str, view: View) -> Result | Unreadable:
    """What a reply says."""

  def choices(self, view: View) -> Sequence[str]:
    """Replies to choose from by likelihood, for models that can score; none for free text."""


@dataclasses.dataclass(frozen=True)
class Template:
  """A pattern made of a template, a form and a reader.

  Attributes:
    name: of the pattern.
    persona: who speaks.
    text: the template.
    form_text: with {words} and {max_parts}.
    read: `(reply, view) -> Result | Unreadable`.
    chooses: whether the reply is one of the view's words.
    claims: whether the reply may hold claims for tools.
  """

  name: str
  persona: str
  text: str
  form_text: str
  read: Callable[[str, View], Result | Unreadable]
  chooses: bool = False
  claims: bool = False

  def build(self, view: View) -> str:
    """The template with its slots filled; paragraphs whose slots are all empty fall away."""
    return fill(self.text, view, self.form(view))

  def form(self, view: View) -> str:
    """The form for this view."""
    words = " or ".join(view.words)
    made = self.form_text.replace("{words}", words).replace("{max_parts}", str(view.max_parts))
    if view.tools and self.claims:
      forms = "\n".join(tools_lib.form_of(name) for name in view.tools)
      made = (f"What can be checked exactly, write as claims, each on a line of its own:\n{forms}"
              f"\n{made}")
    return made

  def parse(self, text: str, view: View) -> Result | Unreadable:
    """What a reply says; lines that only repeat the form, as weak models do, say nothing."""
    rest = replies.without_form(text, self.form(view))
    if text.strip() and not rest.strip():
      return Unreadable("it only repeats the form")
    return self.read(rest, view)

  def choices(self, view: View) -> Sequence[str]:
    """The view's words, of a pattern that chooses."""
    return view.words if self.chooses else ()


_SLOT = re.compile(r"\{(problem|ancestors|pins|children|conclusion|question|critique|found|form)\}")


def fill(template: str, view: View, form: str) -> str:
  """A template's text: what is in a slot is put there as it is, and not read as a template.

  A paragraph falls away if it has slots and all of them are empty.
  """
  values = {
    "problem": view.problem,
    "ancestors": "\n".join(f"- {' '.join(text.split())}" for text in view.ancestors),
    "pins": "\n\n".join(f"{pin.title}: {pin.text}" for pin in view.pins),
    "children": "\n\n".join(known.shown() for known in view.children),
    "conclusion": view.conclusion, "question": view.question, "critique": view.critique,
    "found": view.found, "form": form,
  }
  kept, pending = [], ""
  for paragraph in template.strip().split("\n\n"):
    slots = _SLOT.findall(paragraph)
    if slots and not any(values[slot] for slot in slots):
      pending = ""  # with the line that leads to it
      continue
    if pending:
      kept.append(pending)
    pending = _SLOT.sub(lambda match: values[match[1]], paragraph)
    if not (paragraph.endswith(":") and not slots):
      kept.append(pending)
      pending = ""
  return "\n\n".join([*kept, pending] if pending else kept)


def _read_assess(text: str, view: View) -> Result | Unreadable:
  found = replies.fields(text, ("DECISION", "REASON"))
  word = replies.word_of(found.get("DECISION", text), view.words)
  if word is None:
    return Unreadable(f"no single word of {', '.join(view.words)}")
  return Result(found.get("REASON", ""), word)


def _read_conclusion(text: str, view: View) -> Result | Unreadable:
  if not text.strip():
    return Unreadable("it is empty")
  claims, rest = tools_lib.claims_of(text, view.tools) if view.tools else ((), text)
  found = replies.fields(rest, ("CONCLUSION", "ANSWER"))
  said = found.get("CONCLUSION") or rest.strip() or text.strip()
  return Result(said, answer=found.get("ANSWER") or None, cited=replies.cited(text),
                fallback="CONCLUSION" not in found, claims=claims)


def _read_integration(text: str, view: View) -> Result | Unreadable:
  found = _read_conclusion(text, view)
  missing = sorted(view.must_cite - found.cited) if isinstance(found, Result) else ()
  if missing:
    return Unreadable(f"it does not cite {', '.join(f'[S{k}]' for k in missing)}", found)
  return found


def _read_transform(text: str, view: View) -> Result | Unreadable:
  found = replies.fields(text, ("PROBLEM", "BRIDGE"))
  if not found.get("PROBLEM"):
    return Unreadable("it has no line PROBLEM:")
  return Result(found["PROBLEM"], bridge=found.get("BRIDGE", ""))


def _read_parts(text: str, view: View) -> Result | Unreadable:
  parts = replies.parts_of(text, view.max_parts)
  if parts is None:
    return Unreadable(f"it has no lines PART 1: to at most PART {view.max_parts}:, at least two")
  return Result(parts=parts, fallback=not re.search(r"\bPART\b", text, re.I))


def _read_verdict(text: str, view: View) -> Result | Unreadable:
  found = replies.fields(text, ("VERDICT", "ISSUE"))
  verdict = re.match(r"[\W_]{0,20}(OK|ISSUE|CHILD)\b[^\d\n]{0,20}(\d{0,2})",
                     found.get("VERDICT", ""), re.I)
  if verdict is None:
    return Unreadable("it has no line VERDICT: with OK, ISSUE or CHILD and a number")
  word, number = verdict[1].upper(), int(verdict[2] or 0)
  issue = found.get("ISSUE", "")
  if word == "OK":
    return Result(word="OK")
  if not issue:
    issue = " ".join(text[start:end] for start, end in replies.key_span(text))
  if word == "CHILD" and not 1 <= number <= len(view.children):
    word = "ISSUE"
  return Result(issue, word, child=number if word == "CHILD" else 0)


_CONCLUDES = ("End your reply with:\nCONCLUSION: the conclusion, complete in itself\n"
              "ANSWER: the short value that was asked for, or none")
_VERDICT = "End your reply with:\nVERDICT: OK or ISSUE{child}\nISSUE: what is wrong, if anything"
_FORMS = {
  "ASSESS": ("End your reply with:\nDECISION: {words}\nREASON: one sentence", _read_assess),
  "DED": (_CONCLUDES, _read_conclusion),
  "TRA": ("End your reply with:\nPROBLEM: the new problem, complete in itself\n"
          "BRIDGE: why solving it solves the old one", _read_transform),
  "DEC": ("End your reply with 2 to {max_parts} lines:\nPART 1: the first part\n"
          "PART 2: (needs 1) a part that builds on part 1", _read_parts),
  "CHECK": (_VERDICT.replace("{child}", ""), _read_verdict),
  "VER": (_VERDICT.replace("{child}", " or CHILD k, if part k is at fault"), _read_verdict),
  "REFINE": (_CONCLUDES, _read_conclusion),
  "INT": (_CONCLUDES, _read_integration),
  "SUMMARISE": ("End your reply with:\nCONCLUSION: the shortened conclusion", _read_conclusion),
}
_FILES = {"ASSESS": "assess", "DED": "deduce", "TRA": "transform", "DEC": "decompose",
          "CHECK": "check", "VER": "critique", "REFINE": "refine", "INT": "integrate",
          "SUMMARISE": "summarise"}


@functools.cache
def template_text(name: str) -> str:
  """The packaged template of a pattern."""
  folder = resources.files("lmops_jax.systems.socratic") / "templates"
  return (folder / f"{_FILES[name]}.txt").read_text(encoding="utf-8")


def default_patterns(cast: Cast = Cast(), texts: Mapping[str, str] | None = None  # noqa: B008
                     ) -> dict[str, Pattern]:
  """The packaged patterns by name.

  Args:
    texts: templates to take instead of the packaged ones.

  Raises:
    ValueError: for a template of no pattern, or a persona that there is not.
  """
  from lmops_jax.systems.socratic.settings import described

  texts = dict(texts or {})
  for name in texts:
    if name not in _FILES:
      raise ValueError(f"there is no pattern {name!r}; there are {', '.join(_FILES)}.")
  speaks = {"ASSESS": cast.assess, "DED": cast.deduce, "TRA": cast.transform,
            "DEC": cast.decompose, "CHECK": cast.verify, "VER": cast.verify,
            "REFINE": cast.deduce, "INT": cast.integrate, "SUMMARISE": cast.integrate}
  for persona in speaks.values():
    described(persona)
  return {name: Template(name, speaks[name], texts.get(name) or template_text(name), form, read,
                         name == "ASSESS", name in ("DED", "INT", "REFINE"))
          for name, (form, read) in _FORMS.items()}


def named_patterns(names: Sequence[str]) -> dict[str, Pattern]:
  """Patterns that installed packages register, by the names of their entry points.

  Raises:
    ValueError: for a name that no package registers.
  """
  there = {point.name: point for point in metadata.entry_points(group=GROUP)}
  found = {}
  for name in names:
    if name not in there:
      known = ", ".join(sorted(there)) or "none"
      raise ValueError(f"no installed package registers the pattern {name!r} in the entry-point "
                       f"group {GROUP}; registered: {known}.")
    made = there[name].load()()
    found[made.name] = made
  return found
