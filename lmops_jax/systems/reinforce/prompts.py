"""The prompts of a run: JSON lines with a field `prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lmops_jax.data.documents import document_id
from lmops_jax.data.lines import jsonl_rows
from lmops_jax.data.supervised import encode_behind, front_ids
from lmops_jax.host.foreign_files import printable
from lmops_jax.training.reinforce.rollouts import Question


def read_prompts(
  path: Path | str, tokenizer, length: int, too_long: str = "error", ending: str = ""
) -> tuple[list[Question], Mapping[str, int]]:
  """The questions of a file (`.gz`, `.zst` or plain), and how many there are and were dropped.

  Args:
    path: the file.
    tokenizer: see `data.supervised`.
    length: the most tokens of a prompt.
    too_long: "drop" longer ones, or make them an "error".
    ending: text that the model reads behind every prompt, and rewards do not see.

  Raises:
    ValueError: for a line without such a text, an empty one, one that is too long, or no line; it
      names the line.
  """
  name, front = Path(path).name, front_ids(tokenizer)
  questions, dropped = [], 0
  for number, row in jsonl_rows(path):
    where, text = f"{printable(path)}:{number}", row.get("prompt")
    if not isinstance(text, str) or not text.strip() or "\0" in text:
      raise ValueError(f'{where} has no text in the field "prompt"; give every line one.')
    ids = encode_behind(front, tokenizer, text + ending)
    if len(ids) > length:
      if too_long == "error":
        raise ValueError(
          f"{where} has a prompt of {len(ids)} tokens, and prompt_length={length}; raise it, or "
          'set too_long to "drop".'
        )
      dropped += 1
      continue
    questions.append(Question(document_id(f"{name}:{number}"), text, ids))
  if not questions:
    raise ValueError(f"{printable(path)} has no prompt of at most {length} tokens; give some.")
  return questions, {"prompts": len(questions), "dropped": dropped}
