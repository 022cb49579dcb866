"""`lmops socratic ...`: work on a problem with a model, resume, look, export, replay, simulate.

They are actions of the system `socratic` that have options of their own instead of a gin file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lmops_jax.commands import socratic_view

SYSTEM = "socratic"
PAUSED = 3  # exit code of a run whose time is up
_EPILOG = """\
examples:
  lmops socratic solve --problem problem.txt --endpoint http://localhost:8080/v1 --model NAME
  lmops socratic solve --problem problem.txt --model DIR_OR_GGUF --workdir DIR
  lmops socratic resume DIR
  lmops socratic show DIR
  lmops socratic export DIR --to page.html
  lmops socratic replay transcript.jsonl
  lmops socratic import transcript.jsonl --to page.html
  lmops socratic simulate --error 0.05 --rounds 2

What comes out is text that a machine wrote. It is not established by having come out.
"""


def _describe(parser: argparse.ArgumentParser, text: str) -> None:
  parser.description, parser.epilog = text, _EPILOG


def _running_options(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("--minutes", type=float, metavar="N", help="pause after this time (exit code 3); the run can "
      "be resumed, and its decisions do not depend on it")
  add("--read-seconds", type=float, metavar="N", help="longest wait for the next piece of an "
      "endpoint's reply (default 120); a server that does not stream sends it whole")
  people = parser.add_mutually_exclusive_group()
  people.add_argument("--interactive", action="store_true", help="ask at every step: edit "
                      "requests, select, reject or ask on, change parts, conclude")
  people.add_argument("--confirm", action="store_true", help="ask before each call")
  add("--stream", action="store_true", help="show replies as they come")
  add("--plain", action="store_true", help="lines instead of a tree that is drawn again")


def _solve_options(parser: argparse.ArgumentParser) -> None:
  _describe(parser, "Work on a problem with a model.")
  add = parser.add_argument
  add("--problem", required=True, metavar="FILE", help="a text file with the problem")
  add("--pins", metavar="FILE", help='definitions and results to build on: JSON lines with "id", '
      '"title" and "text"')
  add("--model", required=True, metavar="NAME", help="name at the endpoint; without an endpoint a "
      "model folder or .gguf file that runs in this process")
  add("--endpoint", metavar="URL", help="base address of an OpenAI-compatible server")
  add("--key-env", metavar="VARIABLE", help="environment variable that holds the endpoint's key")
  add("--requests-per-minute", type=float, metavar="N", help="most requests to the endpoint")
  add("--window", type=int, metavar="N", help="tokens of prompt and reply together (default: 8192 "
      "at an endpoint, all that the model has in this process)")
  add("--workdir", default="lmops_runs/socratic", metavar="DIR", help="where the log of the run is "
      "(default lmops_runs/socratic)")
  add("--repair", action="store_true", help="take control characters out of the problem and pins")
  add("--fork", action="store_true", help="go on in a folder whose run has other settings; replies "
      "to the same calls are kept")
  _limit_options(parser)
  for role in _ROLES:
    add(f"--{role}", metavar="PERSONA", help=f"who speaks to {role}: W, C, T, P, N or a "
        "description")
  add("--template", action="append", default=[], metavar="PATTERN=FILE", help="another wording of "
      "a pattern: ASSESS, DED, TRA, DEC, CHECK, VER, REFINE, INT or SUMMARISE")
  add("--pattern", action="append", default=[], metavar="NAME", help="a pattern that an installed "
      "package offers, instead of ours")
  add("--tools", default="", metavar="NAMES", help="exact tools that check claims for "
      "verification: arithmetic, satisfiability, or both with a comma between; off by default")
  _running_options(parser)


_ROLES = ("assess", "deduce", "transform", "decompose", "verify", "integrate")
_LIMITS = {
  "max_turns": (int, "calls"), "max_tokens": (int, "tokens of all prompts and replies"),
  "max_cost": (float, "cost, in the unit of the prices"),
  "price_in": (float, "price of a million tokens of prompts"),
  "price_out": (float, "price of a million tokens of replies"),
  "max_new_tokens": (int, "tokens of a reply"), "max_depth": (int, "levels below the problem"),
  "max_parts": (int, "parts of a problem"), "attempts": (int, "calls of a pattern that may fail"),
  "rounds": (int, "rounds of verification"), "rephrases": (int, "transforms in a row"),
  "samples": (int, "answers that are drawn for a conclusion"),
  "temperature": (float, "of the decoding"), "top_p": (float, "of the decoding"),
  "seed": (int, "of the decoding"),
}


def _limit_options(parser: argparse.ArgumentParser) -> None:
  for name, (kind, text) in _LIMITS.items():
    parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)


def _solve(arguments) -> int:
  from lmops_jax.host import foreign_files
  from lmops_jax.systems.socratic import Cast, Limits, default_patterns, runs
  from lmops_jax.systems.socratic.engine import checked_statement
  from lmops_jax.systems.socratic.patterns import named_patterns
  from lmops_jax.systems.socratic.tools import named_tools

  def given(names):
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}

  statement = checked_statement(
    foreign_files.read_text(arguments.problem), arguments.problem, repair=arguments.repair)
  pins = _pins(arguments.pins, arguments.repair) if arguments.pins else ()
  limits, cast = Limits(**given(_LIMITS)), Cast(**given(_ROLES))
  texts = {}
  for text in arguments.template:
    name, equals, file = text.partition("=")
    if not equals:
      raise ValueError(f"--template {text} must be PATTERN=FILE.")
    texts[name] = foreign_files.read_text(file)
  tools = tuple(name.strip() for name in arguments.tools.split(",") if name.strip())
  default_patterns(cast, texts), named_patterns(arguments.pattern), named_tools(tools)
  _refuse_useless(arguments)
  backend = ({"kind": "http", "endpoint": arguments.endpoint, "model": arguments.model,
              "key_env": arguments.key_env, "window": arguments.window or 8192,
              "requests_per_minute": arguments.requests_per_minute} if arguments.endpoint else
             {"kind": "model", "model": arguments.model, "window": arguments.window})
  plan = runs.Plan(statement, limits, cast, backend, pins, texts, tuple(arguments.pattern), tools)
  return _run(arguments.workdir, plan, arguments, fork=arguments.fork)


def _refuse_useless(arguments) -> None:
  for name in ("key_env", "requests_per_minute"):
    if getattr(arguments, name) is not None and not arguments.endpoint:
      raise ValueError(f"--{name.replace('_', '-')} belongs to --endpoint URL.")
  _require_positive(arguments, "window", "requests_per_minute")


def _require_positive(arguments, *names: str) -> None:
  for name in names:
    value = getattr(arguments, name)
    if value is not None and not value > 0:
      raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0.")


def _pins(path: str, repair: bool):
  from lmops_jax.data.lines import jsonl_rows
  from lmops_jax.systems.socratic import Pin
  from lmops_jax.systems.socratic.engine import checked_statement

  pins = []
  for number, row in jsonl_rows(Path(path)):
    where = f"{path}:{number}"
    if not all(isinstance(row.get(name), str) for name in ("id", "title", "text")):
      raise ValueError(f'{where} must have texts in its fields "id", "title" and "text".')
    pins.append(Pin(row["id"], row["title"], checked_statement(row["text"], where, repair=repair)))
  return tuple(pins)


def _run(folder: str, plan, arguments, *, fork: bool = False) -> int:
  from lmops_jax.systems.socratic import backend_of, runs
  from lmops_jax.systems.socratic.calls import Paused
  from lmops_jax.systems.socratic.hooks import Terminal

  _require_positive(arguments, "minutes", "read_seconds")
  asks = "interactive" if arguments.interactive else "confirm" if arguments.confirm else None
  backend = backend_of.backend_of(plan.backend, arguments.read_seconds)
  is_over = _clock(arguments.minutes)
  limits = plan.limits
  print(f"lmops: at most {limits.max_turns:,} calls, {limits.max_tokens:,} tokens and a cost of "
        f"{limits.most_cost:.4g}, in {folder}", file=sys.stderr)
  with socratic_view.view(limits, plain=arguments.plain or asks is not None
                          or arguments.stream) as watch:
    try:
      outcome = runs.run(
        folder, plan, backend, fork=fork, watch=watch,
        person=Terminal(asks, input) if asks else None,
        stream=_printed if arguments.stream else None, is_over=is_over)
    except Paused:
      outcome = None
  if outcome is None:
    print(f"lmops: the time is up; go on with lmops socratic resume {folder}.", file=sys.stderr)
    return PAUSED
  _show_outcome(outcome)
  print(f"\nlmops socratic export {folder} --to page.html writes all of it.")
  return 0


def _printed(piece: str) -> None:
  sys.stderr.write(piece)
  sys.stderr.flush()


def _clock(minutes: float | None) -> Callable[[], bool]:
  import time

  if minutes is None:
    return lambda: False
  end = time.monotonic() + minutes * 60
  return lambda: time.monotonic() >= end


def _show_outcome(outcome) -> None:
  from lmops_jax.reporting.html import visible
  from lmops_jax.systems.socratic import export

  root, spent = outcome.tree.root, outcome.spent
  print(export.outline(outcome.tree))
  print(f"\n{spent.turns} calls, {spent.tokens:,} tokens"
        f"{' (estimated in part)' if spent.estimated else ''}, cost {spent.cost:.4g}")
  if root.conclusion is not None:
    print(f"\n{root.state}, by the model's own checks only:\n{visible(root.conclusion.text)}")
    if root.conclusion.answer:
      print(f"\nanswer: {visible(root.conclusion.answer)}")


def _resume_options(parser: argparse.ArgumentParser) -> None:
  _describe(parser, "Go on with a run; replies that are there are not paid again.")
  parser.add_argument("folder", metavar="DIR")
  parser.add_argument("--salvage", action="store_true", help="keep the lines of a damaged log "
                      "before the damage; the old file stays as log.damaged")
  _running_options(parser)


def _resume(arguments) -> int:
  from lmops_jax.systems.socratic import journal, runs

  if arguments.salvage:
    kept = journal.salvage(arguments.folder)
    print(f"lmops: {kept} lines of the log are kept.", file=sys.stderr)
  return _run(arguments.folder, runs.plan_of(arguments.folder), arguments)


def _folder_options(text: str) -> Callable[[argparse.ArgumentParser], None]:
  def add(parser: argparse.ArgumentParser) -> None:
    _describe(parser, text)
    parser.add_argument("folder", metavar="DIR")
  return add


def _export_options(parser: argparse.ArgumentParser) -> None:
  _folder_options("Write a run as a page, as Markdown or as JSON.")(parser)
  parser.add_argument("--to", required=True, metavar="FILE", help="ends in .html, .md or .json")


def _looked_at(folder: str):
  from lmops_jax.systems.socratic import backend_of, runs

  return runs.looked_at(folder, backend_of.counting(runs.plan_of(folder).backend))


def _show(arguments) -> int:
  with _looked_at(arguments.folder) as (outcome, journal):
    _show_outcome(outcome)
    if journal.end is None:
      print(f"\nnot finished; go on with lmops socratic resume {arguments.folder}")
  return 0


def _export(arguments) -> int:
  from lmops_jax.systems.socratic import export, runs

  with _looked_at(arguments.folder) as (outcome, journal):
    print(export.write(arguments.to, outcome, runs.texts_of(journal)))
  return 0


def _replay_options(parser: argparse.ArgumentParser) -> None:
  _describe(parser, "Build every request of a recorded dialogue, or of a run, again, strictly.")
  parser.add_argument("transcript", metavar="FILE_OR_DIR", help="JSON lines with messages and "
                      "reply, or the folder of a run")


def _import_options(parser: argparse.ArgumentParser) -> None:
  _describe(parser, "Find out where every text of a recorded dialogue comes from.")
  parser.add_argument("transcript", metavar="FILE", help="JSON lines with messages and reply")
  parser.add_argument("--to", metavar="FILE", help=".html for a page, .jsonl for the graph of "
                      "texts")


def _import(arguments) -> int:
  from lmops_jax.host.whole_files import write_text
  from lmops_jax.systems.socratic import export, transcripts

  found = transcripts.load(arguments.transcript)
  modes = [piece.mode for turn in found.turns for piece in turn.replayed]
  counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes)) or "none"
  print(f"{len(found.turns)} turns, {len(found.pins)} pins; replies shown again: {counts}")
  if arguments.to:
    made = {".html": export.transcript_html, ".jsonl": transcripts.records}.get(
      Path(arguments.to).suffix)
    if made is None:
      raise ValueError(f"--to {arguments.to} must end in .html or .jsonl.")
    write_text(Path(arguments.to), made(found))
    print(arguments.to)
  return 0


def _replay(arguments) -> int:
  from lmops_jax.systems.socratic import transcripts

  if Path(arguments.transcript).is_dir():
    return _replay_run(arguments.transcript)
  found = transcripts.load(arguments.transcript)
  differing = transcripts.replay(found)
  for _, message in differing:
    print(message)
  print(f"{len(found.turns) - len(differing)} of {len(found.turns)} requests were built again "
        "exactly")
  return 1 if differing else 0


def _replay_run(folder: str) -> int:
  """Executes a finished run again on its log: a request that differs would find no reply there."""
  with _looked_at(folder) as (outcome, journal):
    if journal.end is None:
      raise ValueError(f"{folder} holds a run that is not finished; resume it first.")
    is_same = journal.end["digest"] == outcome.digest
    word = "the same" if is_same else "another"
    print(f"{outcome.spent.turns} of {journal.end['turns']} requests were built again exactly; "
          f"the tree is {word}")
  return 0 if is_same else 1


def _simulate_options(parser: argparse.ArgumentParser) -> None:
  _describe(parser, "Compare the engine with the closed form of errors, with a simulated solver.")
  add = parser.add_argument
  add("--error", type=float, required=True, help="chance that one operator is answered wrongly")
  add("--rounds", type=int, default=2, help="of verification (default 2)")
  add("--accept", type=float, default=0.95, help="chance that a critique accepts what is right")
  add("--catch", type=float, default=0.8, help="chance that it catches what is wrong")
  add("--levels", type=int, default=4, help="of the expressions (default 4: 15 operators)")
  add("--problems", type=int, default=400)
  add("--seed", type=int, default=0)
  add("--json", action="store_true")


def _simulate(arguments) -> int:
  from lmops_jax.systems.socratic import simulate as lib

  found = lib.simulate(
    arguments.error, arguments.rounds, accept=arguments.accept, catch=arguments.catch,
    levels=arguments.levels, problems=arguments.problems, seed=arguments.seed)
  want = lib.expected(arguments.error, arguments.rounds, arguments.accept, arguments.catch)
  whole = want.node**found.operators
  if arguments.json:
    print(json.dumps({**found._asdict(), "expected_all_right": whole,
                      "expected_node": want.node, "expected_tries": want.tries}))
    return 0
  nodes = found.problems * found.operators
  rows = [
    ("", "engine", "closed form", "standard error"),
    ("all operators right", f"{found.all_right:.4f}", f"{whole:.4f}",
     f"{lib.standard_error(whole, found.problems):.4f}"),
    ("an operator right", f"{found.nodes_right:.4f}", f"{want.node:.4f}",
     f"{lib.standard_error(want.node, nodes):.4f}"),
    ("tries an operator", f"{found.tries:.4f}", f"{want.tries:.4f}", ""),
  ]
  from lmops_jax.reporting.run_report import text_table
  print(text_table(rows))
  word = "helps" if lib.helps(arguments.accept, arguments.catch) else "does not help"
  print(f"\n{found.problems} problems of {found.operators} operators, {found.calls:,} calls; "
        f"verification {word}: accept + catch = {arguments.accept + arguments.catch:g}")
  return 0


ACTIONS: dict[str, Sequence] = {
  "solve": (_solve_options, _solve),
  "resume": (_resume_options, _resume),
  "show": (_folder_options("Show the tree of a run and what it cost, also while it runs."), _show),
  "export": (_export_options, _export),
  "replay": (_replay_options, _replay),
  "import": (_import_options, _import),
  "simulate": (_simulate_options, _simulate),
}
