# ruff: noqa: E402  malloc is set before jax is imported
"""Ways to spend a chat model's tokens on arithmetic or puzzles, all through the Socratic engine.

    python tests/benchmarks/socratic_arms.py --model FILE.gguf --workdir DIR --output FILE.md

Balanced expressions of numbers from 1 to 9 with +, - and *, in plain integers; or, with `--kind
puzzles`, who of 2, 3, ... islanders always tells the truth and who always lies, by what each says
of another or of two, where exactly one answer fits: a digit for each, so that guesses are right
once in 4, 8, ... times. The arms are

* `once`: the answer without working; `vote`: the same again and again, the most frequent counts,
* `thought`: one reply with its working (the packaged deduction); `steps`: the same as a vote,
* `unchecked`: the engine without verification, `checked`: with it, `tools`: with it and with exact
  arithmetic, or satisfiability, that checks the claims of replies.

`vote`, `steps` and `unchecked` may spend the tokens that `checked` spent on the same problem, by
the rule of `lmops socratic`. Requests and temperature (0.7) are the packaged ones, but for the
answer without working. The model is served by `lmops serve` in this process, and every arm asks it
over HTTP. Of an answer the last number of its first line with one counts; without a line ANSWER
the last number of the conclusion.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import platform
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import jax

from lmops_jax.commands.serve.server import ModelServer
from lmops_jax.decoding.serving import Batcher
from lmops_jax.pretrained import model as model_lib
from lmops_jax.systems.socratic import (
  Calls,
  Engine,
  Journal,
  Limits,
  arms,
  default_patterns,
  expressions,
  study_report,
)
from lmops_jax.systems.socratic.http_backend import Http
from lmops_jax.systems.socratic.journal import read
from lmops_jax.systems.socratic.tools import named_tools

ONCE, THOUGHT, TOOLS = "once", "thought", "tools"
BUDGETED = {arms.UNCHECKED: arms.CHECKED, arms.STEPS: THOUGHT, arms.VOTE: ONCE}  # begin alike
NAMES = {  # an arm with a budget stands behind those it waits for
  arms.CHECKED: "engine with checks", ONCE: "answer at once, once", THOUGHT: "written steps, once",
  TOOLS: "engine with checks and tools", arms.UNCHECKED: "engine without checks",
  arms.STEPS: "written steps, voted", arms.VOTE: "answer at once, voted"}
AT_ONCE = ("{problem}\n\nReply with the result alone, without working, in one line:\n"
           "ANSWER: the number")
WINDOW, READ_SECONDS = 2048, 3600.0
PLENTY = 2**31 - 1
COUNTED = {"unreadable": "asked again", "without": "without ANSWER", "split": "split",
           "claims": "claims checked"}


def problems(levels: Sequence[int], num: int, seed: int) -> Iterator[arms.Asked]:
  """So many expressions of each depth."""
  generator = random.Random(seed)
  texts = [(level, expressions.balanced(generator, level, lambda: str(generator.randint(1, 9))))
           for level in levels for _ in range(num)]
  for number, (level, text) in enumerate(texts):
    yield arms.Asked(number, level, f"Compute {text}.", expressions.value(text))


PEOPLE = ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn")


def puzzles(levels: Sequence[int], num: int, seed: int) -> Iterator[arms.Asked]:
  """So many puzzles of each number of people, which is one more than the level."""
  generator = random.Random(seed)
  for number, level in enumerate(level for level in levels for _ in range(num)):
    names, fitting = PEOPLE[: level + 1], []
    while len(fitting) != 1:
      claims = [_claim(generator, me, names) for me in names]
      fitting = [tells for tells in itertools.product((0, 1), repeat=len(names)) if all(
        tells[me] == is_so(dict(zip(names, tells))) for me, (_, is_so) in enumerate(claims))]
    yield arms.Asked(number, level, "\n".join([
      "On an island each person either always tells the truth or always lies.",
      *(f"{me} says: {said}" for me, (said, _) in zip(names, claims)),
      f"Answer with a digit for each of {', '.join(names)}, in this order and without spaces: 1 "
      "for who tells the truth, 0 for who lies."]), int("".join(map(str, fitting[0]))))


def _claim(generator, me: str, names: Sequence[str]):
  """What one says of another or of two, and whether it is so, given who tells the truth."""
  is_not = generator.random() < 0.5
  if generator.random() < 0.5:
    one = generator.choice([name for name in names if name != me])
    said = f"{one} {'always lies' if is_not else 'always tells the truth'}."
    return said, lambda tells: tells[one] != is_not
  one, other = generator.sample(names, 2)
  kinds = "of different kinds" if is_not else "of the same kind"
  return f"{one} and {other} are {kinds}.", lambda tells: (tells[one] == tells[other]) != is_not


KINDS = {"arithmetic": (problems, "arithmetic", study_report.operators_of),
         "puzzles": (puzzles, "satisfiability", lambda level: f"{level + 1} people")}


def number_of(text: str) -> str | None:
  """The last number of a text, a whole one without its zeros."""
  plain = re.sub(r"\[S\d+\]", "", text).replace("\u2212", "-").replace(",", "")
  found = re.findall(r"-?\d+(?:\.\d+)?", plain)
  return f"{float(found[-1]):.12g}" if found else None


def limits_of(arm: str, arguments, repeat: int = 0) -> Limits:
  """Those of one run of an arm."""
  is_engine = arm in (arms.CHECKED, arms.UNCHECKED, TOOLS)
  return Limits(
    max_turns=arguments.turns if is_engine else 2, max_tokens=PLENTY, max_parts=2, rephrases=0,
    max_new_tokens=arguments.new, max_depth=arguments.depth if is_engine else 0,
    rounds=arguments.rounds if arm in (arms.CHECKED, TOOLS) else 0, seed=repeat)


class Watch:
  """Keeps what the target's conclusions were one after another."""

  def __init__(self):
    self.said: list[str | None] = []

  def __call__(self, event, problem, turn=None) -> None:
    if problem.depth == 0 and event in ("concluded", "refined"):
      self.said.append(answer_of(problem.conclusion))


def answer_of(conclusion) -> str | None:
  """The number that a conclusion comes to."""
  if conclusion is None or not conclusion.answer:
    return conclusion and number_of(conclusion.text)
  return next(filter(None, map(number_of, conclusion.answer.splitlines())), None)


def solved(arm: str, asked: arms.Asked, before: Mapping[str, Future], url: str, arguments
           ) -> dict[str, Any]:
  """The row of a problem: as `arms.row_of`, and what could not be read.

  Args:
    before: rows of the same problem, by arm.

  `nodes` is the target alone, for what verification did to its conclusion. `unreadable` counts
  replies that were asked for again, `without` runs that end without a line ANSWER, `claims` what
  tools were given to check.
  """
  budget = None
  if arm in BUDGETED:
    before[BUDGETED[arm]].result()  # has the same journal
    budget = before[arms.CHECKED].result()["tokens"]
  backend = Http(url, "model", window=WINDOW, read_seconds=READ_SECONDS)
  patterns = default_patterns(texts={"DED": AT_ONCE} if arm in (ONCE, arms.VOTE) else None)
  tools = named_tools([KINDS[arguments.kind][1]] if arm == TOOLS else [])
  nodes, counts = [], collections.Counter()

  def once(repeat: int) -> arms.Run:
    watch = Watch()
    calls = Calls(backend, journal, limits_of(arm, arguments, repeat), patterns, watch=watch,
                  tools=tools)
    root = Engine(asked.statement, calls).run()
    counts["unreadable"] += sum("unreadable" in note for turn in calls.turns for note in turn.notes)
    counts["without"] += root.conclusion is None or root.conclusion.answer is None
    counts["split"] += bool(root.children)
    if not nodes:
      nodes.append({"id": "0", "state": root.state, "well_split": True,
                    "right": [said == str(asked.answer) for said in watch.said]})
    return arms.Run(answer_of(root.conclusion), calls.spent.tokens, calls.spent.turns)

  # Calls that two arms share are asked once, and cost both.
  folder = arguments.workdir / BUDGETED.get(arm, arm) / f"{asked.number:04d}"
  with Journal(folder) as journal:
    runs = arms.repeated(once, budget, arguments.most)
  counts["claims"] = sum(len(line["found"]) for line in read(folder) if line["kind"] == "tool")
  return arms.row_of(asked, runs, nodes) | {name: counts[name] for name in COUNTED}


@contextlib.contextmanager
def served(path: str, num_slots: int, most: int) -> Iterator[str]:
  """The address of a server of the model in this process, for at most that many at a time."""
  source = model_lib.load(path)
  tokenizer = source.tokenizer()
  batcher = Batcher(source.decoder, source.of_decoder(source.params()), tokenizer,
                    num_slots=num_slots, max_waiting=most, max_length=WINDOW)
  with ModelServer("127.0.0.1", 0) as server:
    thread = threading.Thread(target=server.serve, args=("model", tokenizer, batcher))
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
      server.shutdown()
      thread.join()


def measured(arguments) -> study_report.Rows:
  """The rows of all arms."""
  asked = list(KINDS[arguments.kind][0](
    range(1, arguments.levels + 1), arguments.problems, arguments.seed))
  most = len(NAMES) * len(asked)
  running: dict[str, list[Future]] = {}
  with served(arguments.model, arguments.slots, most) as url, ThreadPoolExecutor(most) as pool:
    for arm in NAMES:
      running[arm] = [
        pool.submit(solved, arm, one, {name: of[one.number] for name, of in running.items()}, url,
                    arguments) for one in asked]
    return {(arm, 0): [one.result() for one in of] for arm, of in running.items()}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
  """The lines of a table."""
  return [f"| {' | '.join(map(str, row))} |"
          for row in (header, ["---"] * len(header), *rows)]


def report(rows: study_report.Rows, rounds: int, name_of: Callable[[int], str]) -> list[str]:
  """The tables, `name_of` naming their levels."""
  summary = study_report.summarised(rows, [0], rounds)
  levels = [*map(str, summary["levels"])]
  (first, *_), *right = study_report.accuracy_rows(summary, NAMES)
  named = [name_of(level) for level in summary["levels"]]
  lines = ["Right answers in %, with Wilson's interval of 95 %:", "",
           *table([first, *named], right), "",
           "Percentage points of the engine with checks above another arm, paired over problems, "
           "with the bootstrap's interval of 95 %:", "",
           *table(["engine with checks, less", *named, "all"], (
             [NAMES[arm], *(study_report.points(of[level]) for level in (*levels, "all"))]
             for arm, of in summary["compared"].items())), "",
           "Cost, means a problem, all repeats together:", "",
           *table(["calls / tokens / repeats", *named], (
             [NAMES[arm], *(" / ".join(f"{summary[name][arm][level]:,.0f}"
                                       for name in ("calls", "tokens", "repeats"))
                            for level in levels)] for arm in summary["arms"])), "",
           "Sums over all problems. A reply that cannot be read is asked for once again:", "",
           *table(["", "runs", "calls", *COUNTED.values()], (
             [NAMES[arm], sum(len(row["answers"]) for row in of), sum(row["calls"] for row in of),
              *(sum(row[name] for row in of) for name in COUNTED)]
             for (arm, _), of in rows.items())), ""]
  for arm in (arms.CHECKED, TOOLS):
    found = study_report.verified(node for row in rows[arm, 0] for node in row["nodes"])
    shares = {name: "none to count" if found[name] is None else
              f"{100 * found[name]:.0f} % of {found['num'][name]}"
              for name in ("error", "accept", "catch", "mended")}
    lines.append(
      f"Verification of the whole's conclusion, {NAMES[arm]}: wrong at first {shares['error']}; "
      f"right ones that pass {shares['accept']}; wrong ones that are caught {shares['catch']}; of "
      f"those caught, right afterwards {shares['mended']}.")
  return lines


def main() -> None:
  """Prints the tables, and writes them if asked to."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--model", required=True, help="a model's folder or .gguf file, with a chat template")
  add("--name", help="of the model in the table (default: its family)")
  add("--workdir", type=Path, required=True, help="journals; what is answered there is not asked")
  add("--kind", choices=KINDS, default="arithmetic", help="of problems")
  add("--levels", type=int, default=3, help="of the deepest expressions; of puzzles, people less 1")
  add("--problems", type=int, default=5, help="of each depth")
  add("--depth", type=int, default=1, help="levels of problems below the first")
  add("--rounds", type=int, default=1, help="of verification")
  add("--turns", type=int, default=16, help="most calls of a run of the engine")
  add("--new", type=int, default=128, help="most new tokens of a reply")
  add("--most", type=int, default=64, help="most repeats of an arm")
  add("--slots", type=int, default=32, help="requests that are answered side by side")
  add("--seed", type=int, default=0, help="of the expressions")
  add("--output", type=Path)
  arguments = parser.parse_args()
  lines = report(measured(arguments), arguments.rounds, KINDS[arguments.kind][2])
  numbers = " ".join(f"--{name} {value}" for name, value in vars(arguments).items()
                     if isinstance(value, int))
  text = "\n".join([
    "# Ways to spend a chat model's tokens", "",
    f"{arguments.name or Path(arguments.model).stem} in float32; {platform.machine()}, "
    f"{os.cpu_count()} cores, jax {jax.__version__}; {time.process_time() / 60:.0f} minutes of "
    f"processor time beyond what journals held. Written by `tests/benchmarks/socratic_arms.py "
    f"--model FILE.gguf --kind {arguments.kind} {numbers}`.",
    "", *lines]) + "\n"
  sys.stdout.write(text)
  if arguments.output:
    arguments.output.write_text(text)


if __name__ == "__main__":
  main()
