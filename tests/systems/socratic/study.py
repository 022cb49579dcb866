"""The 97 turns of the study (arXiv 2309.05689) as their table gives them, and a transcript of them.

The texts are made up, each unique; what is tested is how requests were put together: which earlier
replies, excerpts, edited and unrecorded texts, and pins each one held. In turns.txt a record is
turn | pattern | persona | messages | replies shown again | pins | purpose.
"""

import json
from pathlib import Path
from typing import NamedTuple

from lmops_jax.systems.socratic.settings import system_message


class Row(NamedTuple):
  turn: int
  pattern: str
  persona: str
  num_messages: int
  replies: tuple[tuple[str, int], ...]  # mode and turn, 0 for unrecorded texts
  pins: tuple[str, ...]
  purpose: str


def _replies(text):
  found = []
  for item in [] if text == "-" else text.split(","):
    first, _, last = item.partition("-")
    if last:
      found += [("whole", n) for n in range(int(first), int(last) + 1)]
    elif item == "x":
      found.append(("external", 0))
    else:
      mode = {"~": "excerpt", "e": "edited"}.get(item[-1], "whole")
      found.append((mode, int(item.rstrip("~e"))))
  return tuple(found)


def _pins(text):
  found = []
  for item in [] if text == "-" else text.split(","):
    first, _, last = item.partition("-")
    found += [str(n) for n in range(int(first), int(last) + 1)] if last else [item]
  return tuple(found)


def rows():
  records = Path(__file__).with_name("turns.txt").read_text().replace("\n", " ;; ").split(" ;; ")
  found = []
  for record in filter(None, map(str.strip, records)):
    turn, pattern, persona, count, replies, pins, purpose = record.split("|")
    found.append(Row(int(turn), pattern, persona, int(count), _replies(replies), _pins(pins),
                     purpose))
  return found


def _reply(n):
  return (f"Thinking of turn {n}.\n\nOne idea of turn {n}: unique words {n * 7919}.\n\n"
          f"And the end of turn {n}, number {n * 104729}.")


def _excerpt(n):
  return f"One idea of turn {n}: unique words {n * 7919}."


def _pin(name):
  return f"Definition {name}: a text that is quoted, with number {sum(map(ord, name)) * 31337}."


def transcript_lines():
  """JSON lines of a transcript with these 97 turns."""
  study = rows()
  prompts = {}
  lines = [json.dumps({"pin": name, "title": f"Definition {name}", "text": _pin(name),
                       "from_turn": int(name.rstrip("*"))})
           for name in sorted({name for row in study for name in row.pins})]
  unrecorded = 0
  for row in study:
    messages = [("system", system_message(row.persona))]
    for mode, n in row.replies:
      if mode == "external":
        unrecorded += 1
        messages += [("user", f"Unrecorded question {unrecorded}"),
                     ("assistant", f"A sample {unrecorded * 15485863} that nobody kept.")]
        continue
      text = {"whole": _reply(n), "excerpt": _excerpt(n),
              "edited": _reply(n).replace("And the end", "So the end")}[mode]
      messages += [("user", prompts[n]), ("assistant", text)]
    pins = "\n\n".join(map(_pin, row.pins))
    prompts[row.turn] = f"{pins}\n\nTurn {row.turn}: {row.purpose}?".strip()
    messages.append(("user", prompts[row.turn]))
    lines.append(json.dumps({
      "turn": row.turn, "pattern": row.pattern, "purpose": row.purpose, "reply": _reply(row.turn),
      "messages": [{"role": r, "content": c} for r, c in messages]}))
  return lines


def expected(row):
  """Fields of a row as an imported turn has them."""
  return (row.turn, row.pattern, row.persona, row.num_messages,
          tuple((mode, n) for mode, n in row.replies), row.pins, row.purpose)


def found(turn):
  """The same of an imported turn."""
  replies = tuple((piece.mode, piece.turn or 0) for piece in turn.replayed)
  return (turn.number, turn.pattern, turn.persona, len(turn.messages), replies, turn.pins,
          turn.purpose)


