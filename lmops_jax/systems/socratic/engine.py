"""The control loop: assess, then deduce, transform or decompose, integrate, and verify.

The loop decides from replies and counts alone: no clock, no randomness of its own, parts in order.
So the same replies give the same run. Of Dong et al. 2023 (arXiv 2309.05689), where a person did
this by hand; the form of the loop is ours.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from lmops_jax.systems.socratic.calls import Calls, Said, Spent
from lmops_jax.systems.socratic.context import ContextOverflow, Past
from lmops_jax.systems.socratic.patterns import DECISIONS, QUESTIONS, Known, View
from lmops_jax.systems.socratic.problems import (
  Conclusion,
  Pin,
  Problem,
  Tree,
  normalised,
  with_answer,
)
from lmops_jax.systems.socratic.replies import Result
from lmops_jax.systems.socratic.settings import MAX_PROBLEM_CHARS, control_character, repaired
from lmops_jax.systems.socratic.tools import Claim

_BUDGET = "budget"


def checked_statement(text: str, where: str = "the problem", *, repair: bool = False) -> str:
  """A text that may go into prompts.

  Args:
    repair: take control characters out instead of refusing them.

  Raises:
    ValueError: if it is empty, too long, or holds a control character.
  """
  if repair:
    text = repaired(text)[0]
  if not text.strip():
    raise ValueError(f"{where} is empty; write the problem into it.")
  if len(text) > MAX_PROBLEM_CHARS:
    raise ValueError(f"{where} has {len(text):,} characters, and at most {MAX_PROBLEM_CHARS:,} are "
                     "taken; shorten it, or give long texts as pins.")
  found = control_character(text)
  if found is not None:
    raise ValueError(f"{where} holds the control character {found!r} at character "
                     f"{text.index(found)}; write the text without it, or run with --repair.")
  return text.strip()


class Engine:
  """Works on one problem.

  Attributes:
    tree: problems and conclusions so far.
    calls: turns and spending so far.
  """

  def __init__(self, statement: str, calls: Calls, pins: tuple[Pin, ...] = ()):
    """
    Raises:
      ValueError: for a statement or a pin that cannot go into a prompt.
    """
    pins = tuple(dataclasses.replace(
      pin, text=checked_statement(pin.text, f"pin {pin.id}")) for pin in pins)
    self.tree = Tree(checked_statement(statement), pins)
    self.calls = calls
    self._limits = calls.limits
    self._past: dict[str, list[Past]] = {}
    self._num_critiques = 0
    self._summaries: dict[str, str] = {}
    self._claims: dict[str, tuple[Claim, ...]] = {}  # of each problem's conclusion

  def run(self) -> Problem:
    """Works until the target has a conclusion or a reason why not; returns it."""
    self._solve(self.tree.root)
    self.tree.check()
    return self.tree.root

  # ------------------------------------------------------------------------------ one problem

  def _solve(self, p: Problem) -> None:
    self._event("begin", p)
    try:
      if self._spare(p) < 1:
        raise Spent
      self._conclude(p)
      if p.conclusion is not None:
        self._verify(p)
      if p.state in ("failed", "unverified"):
        self._stuck(p)
    except Spent:
      if p.conclusion is None:
        p.state, p.reason = "abandoned", _BUDGET
      else:
        self._settle(p, "unverified")
    except ContextOverflow as error:
      if p.conclusion is None:
        p.state, p.reason = "failed", str(error)
      else:
        self._settle(p, "unverified")
    self._past.pop(p.id, None)
    self._event("end", p)

  def _conclude(self, p: Problem) -> None:
    """Brings a problem to its first conclusion, or to a reason why it has none."""
    word = "SOLVE"
    if p.depth < self._limits.max_depth and self._spare(p) >= 2:
      word = self._assess(p)
      p.state = "assessed"
      self._event("assessed", p)
    if word == "SPLIT" and self._split(p) or word == "REPHRASE" and self._rephrase(p):
      p.state = "open"
      self._event("open", p)
      for child in self.tree.children(p):
        self._solve(child)
      self._integrate(p)
    else:
      p.state = "deducing"
      self._event("deducing", p)
      self._deduce(p)

  def _assess(self, p: Problem) -> str:
    words = tuple(word for word in DECISIONS if word != "REPHRASE" or self._may_rephrase(p))
    said = self._ask(p, "ASSESS", dataclasses.replace(self._view(p), words=words), keep=1)
    return said.parsed.word if isinstance(said.parsed, Result) else "SOLVE"

  def _may_rephrase(self, p: Problem) -> bool:
    chain = 0
    for problem in (p, *self.tree.ancestors(p)):
      if problem.origin != "transform":
        break
      chain += 1
    return chain < self._limits.rephrases

  def _deduce(self, p: Problem) -> None:
    """A conclusion by deduction; fails after `attempts` refusals."""
    p.pattern, critique = "DED", ""
    for _ in range(self._limits.attempts):
      drawn = self._drawn(p, "DED", dataclasses.replace(self._view(p), critique=critique))
      if isinstance(drawn.parsed, Result):
        self._take(p, drawn)
        return
      reason = drawn.parsed.reason
      critique = f"(An earlier reply could not be used: {reason}. Answer the problem itself.)"
    p.state, p.reason = "failed", reason

  def _drawn(self, p: Problem, name: str, view: View) -> Said:
    """One of `samples` replies: the majority's answer, else what stands up to a critique."""
    drawn: list[Said] = []
    for sample in range(self._limits.samples):
      if drawn and self._spare(p) < 1:
        break
      drawn.append(self._ask(p, name, view, sample=sample))
    usable = [said for said in drawn if isinstance(said.parsed, Result)]
    if len(usable) < 2:
      return (usable or drawn)[0]
    counts = collections.Counter(
      normalised(said.parsed.answer) for said in usable if said.parsed.answer)
    ranked = counts.most_common(2)
    if ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]):
      return next(said for said in usable
                  if said.parsed.answer and normalised(said.parsed.answer) == ranked[0][0])
    for said in usable:
      if self._spare(p) < 1:
        break
      verdict = self._critique(
        p, with_answer(said.parsed.text, said.parsed.answer), said.parsed.claims).parsed
      if isinstance(verdict, Result) and verdict.word == "OK":
        return said
    return usable[0]

  # ------------------------------------------------------------------------- parts and transforms

  def _split(self, p: Problem) -> bool:
    """Adds parts that pass their check; False if there are none."""
    def proposed(result: Result):
      return [(statement, needs, "") for statement, needs in result.parts]
    return self._new_problems(p, "DEC", "part", proposed)

  def _rephrase(self, p: Problem) -> bool:
    """Adds a transform that passes its check; False if there is none."""
    def proposed(result: Result):
      return [(result.text, (), result.bridge)]
    return self._new_problems(p, "TRA", "transform", proposed)

  def _new_problems(self, p: Problem, name: str, origin: str, proposed) -> bool:
    p.pattern, critique, repairs = name, "", 0
    for _ in range(self._limits.attempts):
      if self._spare(p) < 4:  # this call, its check, a part, and the integration
        return False
      view = dataclasses.replace(self._view(p), critique=critique,
                                 max_parts=self._limits.max_parts)
      said = self._ask(p, name, view, past=self._past.get(p.id, ()), keep=3)
      self._past.setdefault(p.id, []).append(said.past)
      if not isinstance(said.parsed, Result):
        critique = f"(An earlier reply could not be used: {said.parsed.reason}.)"
        continue
      new = proposed(said.parsed)
      repeated = [text for text, *_ in new if self.tree.repeats(p, text)]
      if repeated:
        critique = ("(An earlier proposal only repeated a problem that is being worked on: "
                    f"{' '.join(repeated[0].split())[:200]})")
        continue
      issue = self._check_problems(p, [text for text, *_ in new])
      if issue is None:
        return self._add(p, new, origin)
      repairs += 1
      if repairs > 1:
        return False
      critique = f"An earlier proposal was objected to:\n{issue}"
    return False

  def _check_problems(self, p: Problem, statements: Sequence[str]) -> str | None:
    """What is wrong with new problems; None if they will do."""
    known = tuple(Known(f"S{i}", text, "proposed") for i, text in enumerate(statements, 1))
    view = View(p.statement, pins=self.tree.pins, children=known)
    said = self._ask(p, "CHECK", view, keep=2)
    if isinstance(said.parsed, Result) and said.parsed.word == "ISSUE":
      return said.parsed.text
    return None

  def _add(self, p: Problem, new, origin: str) -> bool:
    key = f"on_problem {p.id} {len(self.calls.turns)}"
    action = self.calls.human("on_problem", key, lambda person: person.on_problem(
      p.id, [text for text, *_ in new])) or {"do": "keep"}
    if action["do"] == "parts":
      new = [(text, tuple(needs), "") for text, needs in action["parts"]]
    for text, needs, bridge in new:
      self._event("new", self.tree.add(p, text, origin=origin, bridge=bridge, needs=needs))
    return True

  # ------------------------------------------------------------------------------- conclusions

  def _integrate(self, p: Problem, earlier: Conclusion | None = None) -> None:
    """Joins the conclusions of all parts into one for the problem."""
    p.integrating = True
    children = self.tree.children(p)
    uses = tuple(child.id for child in children if child.conclusion is not None)
    cite = frozenset(i for i, child in enumerate(children, 1) if child.conclusion is not None)
    critique = ""
    for _ in range(self._limits.attempts):
      view = dataclasses.replace(self._view(p), children=self._known(p), critique=critique,
                                 must_cite=cite)
      said = self._drawn(p, "INT", view)
      if isinstance(said.parsed, Result):
        self._take(p, said, uses, earlier)
        return
      reason = said.parsed.reason
      critique = f"(An earlier reply could not be used: {reason}. Answer the problem itself.)"
      if self._spare(p) < 1:
        break
    if p.conclusion is None:
      p.state, p.reason = "failed", reason

  def _take(self, p: Problem, said: Said, uses: tuple[str, ...] = (),
            earlier: Conclusion | None = None) -> None:
    children = self.tree.children(p)
    whole = len(uses) == len(children) and all(
      child.conclusion.status != "partial" for child in children)
    turns = earlier.turns if earlier else ()
    p.conclusion = Conclusion(
      said.parsed.text, said.parsed.answer, "unverified" if whole else "partial", uses,
      (*turns, said.past.number), earlier.critiques if earlier else ())
    self._claims[p.id] = said.parsed.claims
    p.state = "concluded"
    self._event("concluded", p)

  def _verify(self, p: Problem) -> None:
    for _ in range(self._limits.rounds):
      if self._spare(p) < 1:
        break
      said = self._critique(p, p.conclusion.shown, self._claims.get(p.id, ()))
      verdict = said.parsed
      if not isinstance(verdict, Result):
        continue
      if verdict.word == "OK":
        self._settle(p, "verified")
        return
      p.conclusion = dataclasses.replace(
        p.conclusion, critiques=(*p.conclusion.critiques, verdict.text))
      child = self._reopened(p, verdict)
      if child is not None:
        self._refine(child, verdict.text)
        self._integrate(p, p.conclusion)
      elif self._spare(p) >= 1:
        self._refine(p, verdict.text)
    self._settle(p, "unverified")

  def _critique(self, p: Problem, text: str, claims: Sequence[Claim]) -> Said:
    question = QUESTIONS[self._num_critiques % len(QUESTIONS)]
    self._num_critiques += 1
    view = View(p.statement, pins=self.tree.pins, children=self._known(p), conclusion=text,
                question=question, found=self.calls.checked(p, claims))
    return self._ask(p, "VER", view)

  def _reopened(self, p: Problem, verdict: Result) -> Problem | None:
    """The part that a verdict finds at fault, once in a run."""
    if verdict.word != "CHILD" or self._spare(p) < 2:  # to correct it and to integrate
      return None
    child = self.tree.children(p)[verdict.child - 1]
    if child.conclusion is None or child.reopened:
      return None
    child.reopened = True
    return child

  def _refine(self, p: Problem, issue: str) -> None:
    view = View(p.statement, pins=self.tree.pins, conclusion=p.conclusion.shown, critique=issue,
                tools=self.calls.tools)
    said = self._ask(p, "REFINE", view)
    if isinstance(said.parsed, Result):
      status = "partial" if p.conclusion.status == "partial" else "unverified"
      p.conclusion = dataclasses.replace(
        p.conclusion, text=said.parsed.text, answer=said.parsed.answer, status=status,
        turns=(*p.conclusion.turns, said.past.number))
      self._claims[p.id] = said.parsed.claims
      if p.state == "verified":
        p.state = "unverified"
    self._event("refined", p)

  def _settle(self, p: Problem, status: str) -> None:
    if p.conclusion.status == "partial":
      p.state = "unverified"
      return
    p.state = status
    p.conclusion = dataclasses.replace(p.conclusion, status=status)

  def _stuck(self, p: Problem) -> None:
    key = f"on_stuck {p.id} {len(self.calls.turns)}"
    reason = p.reason or "its conclusion is unverified"
    action = self.calls.human("on_stuck", key, lambda person: person.on_stuck(p.id, reason))
    if action is not None and action["do"] == "conclude":
      uses = tuple(c.id for c in self.tree.children(p) if c.conclusion is not None)
      earlier = p.conclusion
      p.conclusion = Conclusion(
        action["text"], action.get("answer"),
        "unverified", uses, earlier.turns if earlier else (), earlier.critiques if earlier else ())
      p.integrating, p.state, p.reason = bool(p.children), "unverified", "concluded by a person"

  # --------------------------------------------------------------------------------- requests

  def _view(self, p: Problem) -> View:
    needed = [self.tree.problems[name] for name in p.needs]
    return View(
      p.statement, tuple(a.statement for a in self.tree.ancestors(p)), self.tree.pins,
      tuple(self._shown(f"S{problem.id.rpartition('.')[2]}", problem) for problem in needed),
      tools=self.calls.tools)

  def _known(self, p: Problem) -> tuple[Known, ...]:
    return tuple(self._shown(f"S{i}", child)
                 for i, child in enumerate(self.tree.children(p), 1))

  def _shown(self, label: str, p: Problem) -> Known:
    if p.conclusion is None:
      return Known(label, p.statement, f"{p.state}, no conclusion ({p.reason or 'not finished'})")
    text = p.conclusion.shown
    return Known(label, p.statement, p.conclusion.status, self._summaries.get(text, text))

  def _ask(self, p: Problem, name: str, view: View, *, past: Sequence[Past] = (), keep: int = 0,
           sample: int = 0) -> Said:
    """Asks; if the request does not fit, conclusions of other problems are shortened once."""
    p.persona = self.calls.pattern(name).persona
    try:
      return self.calls.ask(p, name, view, past=past, keep=keep, sample=sample)
    except ContextOverflow:
      long = [known for known in view.children
              if known.text and known.text not in self._summaries.values()]
      if not long:
        raise
      shorter = {known.text: self._summary(p, known.text) for known in long}
      self._summaries.update(shorter)
      children = tuple(dataclasses.replace(known, text=shorter.get(known.text, known.text))
                       for known in view.children)
      return self.calls.ask(p, name, dataclasses.replace(view, children=children), past=past,
                            keep=keep, sample=sample)

  def _summary(self, p: Problem, text: str) -> str:
    said = self.calls.ask(p, "SUMMARISE", View(conclusion=text))
    return said.parsed.text if isinstance(said.parsed, Result) else text

  def _spare(self, p: Problem) -> int:
    return self.calls.spare(p)

  def _event(self, kind: str, p: Problem) -> None:
    self.tree.check_one(p)
    self.calls.event(kind, p)
