"""A run as a page, as Markdown and as JSON: outline, a card a problem, every request and reply.

All of it is text that a machine wrote; it is escaped, and says so. The same run gives the same
bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmops_jax.host.whole_files import json_text, write_text
from lmops_jax.host.words import shortened
from lmops_jax.reporting import html
from lmops_jax.systems.socratic.calls import Turn
from lmops_jax.systems.socratic.problems import Problem, Tree
from lmops_jax.systems.socratic.runs import Outcome
from lmops_jax.systems.socratic.settings import PERSONAS
from lmops_jax.systems.socratic.transcripts import Transcript

NOTICE = ("A machine wrote the conclusions on this page. \"Verified\" means that a model found no "
          "fault with one; nobody has checked that it is true.")
_WHOLE = 1 << 40  # characters of an excerpt: all of them
_MARKS = {"verified": "✓", "unverified": "?", "concluded": "·", "abandoned": "–", "failed": "×"}
_MODES = {"whole": "", "excerpt": " in part", "edited": " edited", "external": ""}
Texts = Callable[[Turn], tuple[list[tuple[str, str]], str]]


def write(path: Path | str, outcome: Outcome, texts: Texts) -> Path:
  """Writes .html, .md or .json, as the name ends.

  Args:
    texts: messages and reply of a turn.

  Raises:
    ValueError: for another ending.
  """
  path = Path(path)
  made = {".html": as_html, ".md": as_markdown, ".json": as_json}.get(path.suffix)
  if made is None:
    raise ValueError(f"--to {path} must end in .html, .md or .json.")
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, made(outcome, texts))
  return path


def outline(tree: Tree) -> str:
  """The tree, a line a problem."""
  lines = []

  def visit(problem: Problem, lead: str, stem: str) -> None:
    mark = _MARKS.get(problem.state, "…")
    said = shortened(" ".join(html.visible(problem.statement).split()), 90)
    state = problem.state + (f" ({shortened(problem.reason, 60)})" if problem.reason else "")
    lines.append(f"{lead}{mark} {problem.id}  {said}  [{state}]")
    children = tree.children(problem)
    for i, child in enumerate(children):
      last = i == len(children) - 1
      visit(child, f"{stem}{'└─' if last else '├─'} ", f"{stem}{'   ' if last else '│  '}")

  visit(tree.root, "", "")
  return "\n".join(lines)


def as_json(outcome: Outcome, texts: Texts) -> str:
  """Plan, tree, turns and spending, without requests and replies."""
  return json_text({
    "notice": NOTICE, "plan": outcome.plan.record(), "tree": outcome.tree.record(),
    "digest": outcome.digest, "spent": dataclasses.asdict(outcome.spent),
    "turns": [turn._asdict() | {"usage": dataclasses.asdict(turn.usage)}
              for turn in outcome.turns],
  })


def as_html(outcome: Outcome, texts: Texts) -> str:
  """One self-contained page."""
  tree, spent, root = outcome.tree, outcome.spent, outcome.tree.root
  answer = root.conclusion.answer if root.conclusion else None
  figures = [
    html.KeyFigure(root.state, "the target", shortened(answer, 40) if answer else root.reason),
    html.KeyFigure(f"{len(tree.problems):,}", "problems",
                   f"{_depth(tree)} levels below the target"),
    html.KeyFigure(f"{spent.turns:,}", "calls", f"of at most {outcome.plan.limits.max_turns:,}"),
    html.KeyFigure(f"{spent.tokens:,}", "tokens", _cost(outcome)),
  ]
  return html.render(html.Report(
    title=shortened(" ".join(tree.root.statement.split()), 120),
    lead=NOTICE, key_figures=figures, facts=_facts(outcome),
    sections=[
      html.Section("The target", excerpts=list(_card(root))),
      html.Section("Outline", "✓ verified, ? unverified, · concluded, – abandoned, × failed, "
                   "… not finished",
                   listings=[html.Listing(outline(tree))]),
      html.Section("Problems", sections=[
        html.Section(f"{p.id}  {shortened(' '.join(p.statement.split()), 80)}",
                     excerpts=list(_card(p)))
        for p in tree.problems.values() if p.parent is not None]),
      *([html.Section("Definitions and results given", excerpts=[
        html.Excerpt(pin.text, pin.title, {"kind": pin.kind}, _WHOLE) for pin in tree.pins])]
        if tree.pins else []),
      html.Section("Turns", tables=[_turn_table(outcome)]),
      html.Section("Every request and reply", "As they were sent and received, in order.",
                   sections=[_turn_section(turn, *texts(turn)) for turn in outcome.turns]),
    ]))


def _facts(outcome: Outcome) -> dict[str, Any]:
  limits = outcome.plan.limits
  facts = {"backend": ", ".join(f"{k} {v}" for k, v in outcome.plan.backend.items() if v),
           "temperature": limits.temperature, "top-p": limits.top_p, "seed": limits.seed,
           "rounds": limits.rounds, "samples": limits.samples, "tree": outcome.digest[:16]}
  return facts


def _cost(outcome: Outcome) -> str:
  spent = outcome.spent
  counted = "estimated in part" if spent.estimated else "as the model counted"
  return f"cost {spent.cost:.4g}, {counted}" if spent.cost else counted


def _depth(tree: Tree) -> int:
  return max(problem.depth for problem in tree.problems.values())


def _card(problem: Problem) -> Iterator[html.Excerpt]:
  facts = {"state": problem.state, "calls": problem.turns_used}
  if problem.needs:
    facts["needs"] = ", ".join(problem.needs)
  if problem.reason:
    facts["because"] = shortened(problem.reason, 120)
  yield html.Excerpt(problem.statement, f"Problem {problem.id}", facts, _WHOLE)
  if problem.bridge:
    yield html.Excerpt(problem.bridge, "Why this solves the problem above", {}, _WHOLE)
  found = problem.conclusion
  if found is None:
    return
  for i, critique in enumerate(found.critiques, 1):
    yield html.Excerpt(critique, f"Objection {i}", {}, _WHOLE)
  facts = {"status": found.status, "turns": ", ".join(map(str, found.turns)) or "none"}
  if found.answer:
    facts["answer"] = shortened(found.answer, 80)
  if found.uses:
    facts["joins"] = ", ".join(found.uses)
  yield html.Excerpt(found.text, "Conclusion", facts, _WHOLE)


def _turn_table(outcome: Outcome) -> html.Table:
  """The turns; seven columns are as many as the page is wide for."""
  rows = [(turn.number, turn.problem, turn.pattern, turn.persona, _context(turn),
           f"{turn.usage.prompt:,} + {turn.usage.reply:,}", _notes(turn))
          for turn in outcome.turns]
  codes = sorted({turn.persona for turn in outcome.turns} & PERSONAS.keys())
  return html.Table(
    ("turn", "problem", "pattern", "persona", "context", html.Column(
      "tokens in + out", align="right"), "notes"), rows,
    note="; ".join(f"{code}: {PERSONAS[code]}" for code in codes))


def _notes(turn: Turn) -> str:
  ends = () if turn.finish == "stop" else (f"ended by {turn.finish}",)
  return "; ".join((*ends, *turn.notes))


def _context(turn: Turn) -> str:
  def shown(reference) -> str:
    if "pin" in reference:
      return f"pin {reference['pin']}"
    return f"{reference['turn']}{'' if reference['mode'] == 'whole' else ' in part'}"
  return ", ".join(map(shown, turn.references))


def _turn_section(turn: Turn, messages, reply: str) -> html.Section:
  excerpts = [html.Excerpt(content, role, {}, _WHOLE) for role, content in messages]
  return html.Section(f"Turn {turn.number}: {turn.pattern} on {turn.problem}", excerpts=[
    *excerpts, html.Excerpt(reply, "reply", {"end": turn.finish}, _WHOLE)])


def as_markdown(outcome: Outcome, texts: Texts) -> str:
  """The same as Markdown; what a model wrote stands in fences."""
  parts = [f"# {_line(outcome.tree.root.statement)}", f"> {NOTICE}",
           "\n".join(f"- {name}: {_line(str(value))}" for name, value in _facts(outcome).items()),
           f"{outcome.spent.turns} calls, {outcome.spent.tokens} tokens, {_cost(outcome)}.",
           "## Outline", _fenced(outline(outcome.tree))]
  for problem in outcome.tree.problems.values():
    parts.append(f"## Problem {problem.id}")
    for excerpt in _card(problem):
      facts = ", ".join(f"{name} {_line(str(value))}" for name, value in excerpt.facts.items())
      parts += [f"**{excerpt.title}** {facts}".rstrip(), _fenced(html.visible(excerpt.text))]
  parts.append("## Every request and reply")
  for turn in outcome.turns:
    messages, reply = texts(turn)
    parts.append(f"### Turn {turn.number}: {turn.pattern} on {turn.problem}")
    for role, content in (*messages, ("reply", reply)):
      parts += [f"**{role}**", _fenced(html.visible(content))]
  return "\n\n".join(parts) + "\n"


def _line(text: str) -> str:
  """A text of a model in a line of Markdown: short, without signs that Markdown or HTML read."""
  plain = shortened(" ".join(html.visible(text).split()), 120)
  return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!&" else c for c in plain)


def _fenced(text: str) -> str:
  """A text between fences longer than any that it holds."""
  longest, run = 2, 0
  for c in text:
    run = run + 1 if c == "`" else 0
    longest = max(longest, run)
  fence = "`" * (longest + 1)
  return f"{fence}\n{text}\n{fence}"


def transcript_html(transcript: Transcript) -> str:
  """An imported dialogue as a page: where each text comes from, every request and reply."""
  rows = [(turn.number, turn.pattern or "", turn.persona or "own", len(turn.messages),
           ", ".join(f"{piece.turn or 'unrecorded'}{_MODES[piece.mode]}"
                     for piece in turn.replayed), ", ".join(turn.pins), turn.purpose)
          for turn in transcript.turns]
  table = html.Table(("turn", "pattern", "persona", "messages", "replies shown again", "pins",
                      "purpose"), rows)
  turns = [html.Section(f"Turn {turn.number}", excerpts=[
    *(html.Excerpt(content, role, {}, _WHOLE) for role, content in recorded.messages),
    html.Excerpt(recorded.reply, "reply", {}, _WHOLE)])
    for turn, recorded in zip(transcript.turns, transcript.recorded)]
  return html.render(html.Report(
    title=f"A dialogue of {len(rows)} turns", lead=NOTICE,
    key_figures=[html.KeyFigure(f"{len(rows)}", "turns"),
                 html.KeyFigure(f"{len(transcript.pins)}", "pins")],
    sections=[
      html.Section("Turns", tables=[table]),
      html.Section("Pins", excerpts=[html.Excerpt(pin.text, pin.title or pin.id, {"pin": pin.id},
                                                  _WHOLE) for pin in transcript.pins.values()]),
      html.Section("Every request and reply", sections=turns)]))
