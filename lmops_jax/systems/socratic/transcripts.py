"""Recorded dialogues: import with provenance, and strict replay.

A transcript is JSON lines. A turn has `messages` (role and content), `reply`, and perhaps `turn`,
`pattern`, `purpose` and `problem`; a line with `pin` names a text that prompts quote. Import finds
out where every text of a request comes from: an earlier reply as a whole, an excerpt of one, an
edited one, an earlier prompt, a pin, or none of these. So it becomes a graph of texts, and replay
builds every request again from that graph and compares it with what was recorded.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from lmops_jax.host import foreign_files
from lmops_jax.systems.socratic.backends import Place, Recorded, Sampling, Scripted, ScriptMismatch
from lmops_jax.systems.socratic.context import Messages
from lmops_jax.systems.socratic.problems import Pin
from lmops_jax.systems.socratic.settings import persona_code

_EDITED = 0.8  # share of a text that an edited one keeps
_MIN_EXCERPT = 20  # characters; shorter ones are found by chance
_Text = Annotated[str, pydantic.Field(strict=True)]


class _Message(pydantic.BaseModel):
  role: _Text
  content: _Text


class _Turn(pydantic.BaseModel):
  messages: Annotated[list[_Message], pydantic.Field(min_length=1)]
  reply: _Text
  turn: int | None = None
  pattern: str | None = None
  purpose: str = ""


class _Pin(pydantic.BaseModel):
  pin: _Text
  text: Annotated[str, pydantic.Field(min_length=1)]
  title: str = ""
  from_turn: int | None = None
  kind: str = "result"


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a message and where it comes from.

  Attributes:
    mode: whole or excerpt (of `turn`'s reply), prompt (`turn`'s), pin, edited (near `turn`'s
      reply) or external; the last two keep their text.
    span: half-open characters of an excerpt.
  """

  mode: str
  turn: int | None = None
  span: tuple[int, int] | None = None
  pin: str | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class ImportedTurn:
  """A turn as a graph: each message as its role and its pieces."""

  number: int
  pattern: str | None
  purpose: str
  messages: tuple[tuple[str, tuple[Piece, ...]], ...]
  reply: str

  @property
  def persona(self) -> str | None:
    """The code of the persona, None for another system message."""
    role, pieces = self.messages[0]
    return persona_code(pieces[0].text) if role == "system" else None

  @property
  def replayed(self) -> tuple[Piece, ...]:
    """Where the assistant's messages come from, in order."""
    return tuple(pieces[0] for role, pieces in self.messages if role == "assistant")

  @property
  def pins(self) -> tuple[str, ...]:
    """Pins in the request, in the order in which they stand there."""
    return tuple(piece.pin for role, pieces in self.messages[-1:] for piece in pieces if piece.pin)


@dataclasses.dataclass(frozen=True)
class Transcript:
  """What a file holds: turns as recorded, the same as a graph, and pins."""

  recorded: tuple[Recorded, ...]
  turns: tuple[ImportedTurn, ...]
  pins: dict[str, Pin]


def load(path: Path | str) -> Transcript:
  """Imports a transcript.

  Raises:
    ValueError: a line of another form, by its number; turns out of order; no turn.
  """
  pins: dict[str, Pin] = {}
  recorded: list[Recorded] = []
  turns: list[ImportedTurn] = []
  prompts: dict[int, str] = {}
  for where, line in _rows(path):
    if "pin" in line:
      found = foreign_files.checked(_Pin, line, where)
      pins[found.pin] = Pin(found.pin, found.title, found.text, found.from_turn, found.kind)
      continue
    turn = foreign_files.checked(_Turn, line, where)
    number = len(turns) + 1
    if turn.turn not in (None, number):
      raise ValueError(f"{where} is turn {turn.turn}, and turn {number} should come next; give the "
                       "turns in order from 1.")
    messages = tuple((m.role, m.content) for m in turn.messages)
    graph = _graph(messages, turns, prompts, pins.values())
    recorded.append(Recorded(f"turn {number}", messages, turn.reply))
    turns.append(ImportedTurn(number, turn.pattern, turn.purpose, graph, turn.reply))
    prompts[number] = messages[-1][1]
  if not turns:
    raise ValueError(f"{path} holds no turn; give JSON lines with messages and reply.")
  return Transcript(tuple(recorded), tuple(turns), pins)


def _rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
  for number, line in enumerate(foreign_files.read_text(path).split("\n"), 1):
    if line.strip():
      value = foreign_files.parse_json(line, f"{path}:{number}")
      if not isinstance(value, dict):
        raise ValueError(f"{path}:{number} holds {type(value).__name__}, which should be a JSON "
                         "object: a turn or a pin.")
      yield f"{path}:{number}", value


def _graph(messages: Messages, turns: Sequence[ImportedTurn], prompts: dict[int, str], pins):
  graph = []
  for i, (role, content) in enumerate(messages):
    if role == "assistant":
      pieces = (_of_reply(content, turns),)
    elif role == "user" and i < len(messages) - 1:
      number = next((n for n in reversed(prompts) if prompts[n] == content), None)
      pieces = (Piece("external", text=content) if number is None else Piece("prompt", number),)
    elif role == "user":
      pieces = _with_pins(content, list(pins))
    else:
      pieces = (Piece("external", text=content),)
    graph.append((role, pieces))
  return tuple(graph)


def _of_reply(text: str, turns: Sequence[ImportedTurn]) -> Piece:
  """Where an assistant's message comes from; the latest turn that fits."""
  for turn in reversed(turns):
    if turn.reply == text:
      return Piece("whole", turn.number)
  if len(text) >= _MIN_EXCERPT:
    for turn in reversed(turns):
      start = turn.reply.find(text)
      if start >= 0:
        return Piece("excerpt", turn.number, (start, start + len(text)))
  best, near = _EDITED, None
  for turn in reversed(turns):
    matcher = difflib.SequenceMatcher(None, turn.reply, text, autojunk=False)
    if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best:
      ratio = matcher.ratio()
      if ratio > best:
        best, near = ratio, turn.number
  if near is not None:
    return Piece("edited", near, text=text)
  return Piece("external", text=text)


def _with_pins(text: str, pins: Sequence[Pin]) -> tuple[Piece, ...]:
  """A prompt cut where pins stand in it, the longest ones first."""
  pieces = [Piece("external", text=text)]
  for pin in sorted(pins, key=lambda pin: -len(pin.text)):
    for i, piece in enumerate(pieces):
      before, found, behind = piece.text.partition(pin.text)
      if found and piece.mode == "external":
        parts = (Piece("external", text=before), Piece("pin", pin.from_turn, pin=pin.id),
                 Piece("external", text=behind))
        pieces[i : i + 1] = [part for part in parts if part.pin or part.text]
        break
  return tuple(pieces)


def replay(transcript: Transcript, recorded: Sequence[Recorded] | None = None
           ) -> list[tuple[int, str]]:
  """Builds every request again from the graph and compares it with what was recorded.

  Args:
    recorded: to compare with; None is the transcript's own.

  Returns:
    The turns whose request differs, and how.
  """
  backend = Scripted(recorded or transcript.recorded)
  prompts: dict[int, str] = {}
  replies: dict[int, str] = {}
  differing = []
  for turn in transcript.turns:
    messages = rebuilt(turn, replies, prompts, transcript.pins)
    try:
      replies[turn.number] = backend.complete(
        messages, Sampling(), Place("", turn.pattern or "", turn.number)).text
    except ScriptMismatch as error:
      differing.append((turn.number, str(error)))
      replies[turn.number] = turn.reply
    prompts[turn.number] = messages[-1][1]
  return differing


def rebuilt(turn: ImportedTurn, replies: dict[int, str], prompts: dict[int, str],
            pins: dict[str, Pin]) -> Messages:
  """The messages of a turn, from the texts of earlier ones."""
  def text(piece: Piece) -> str:
    if piece.mode == "whole":
      return replies[piece.turn]
    if piece.mode == "excerpt":
      return replies[piece.turn][slice(*piece.span)]
    if piece.mode == "prompt":
      return prompts[piece.turn]
    return pins[piece.pin].text if piece.mode == "pin" else piece.text

  return tuple((role, "".join(map(text, pieces))) for role, pieces in turn.messages)


def records(transcript: Transcript) -> str:
  """The graph as JSON lines."""
  lines = [{"pin": pin.id, **dataclasses.asdict(pin)} for pin in transcript.pins.values()]
  lines += [dataclasses.asdict(turn) | {"persona": turn.persona} for turn in transcript.turns]
  return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
