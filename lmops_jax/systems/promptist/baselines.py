"""What the pictures of users' prompts score, kept on disk: a prompt is drawn once, not each visit.

A file is JSON lines: first what all of its numbers were made with, then a line a prompt, appended
when it is known. A run that is killed leaves at most one torn line at the end, which is cut off.
Numbers of other settings lie in another file, whose name is a hash of them. Of several processes
each appends to a file of its own, and reads all of them when it starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lmops_jax.host.foreign_files import printable
from lmops_jax.host.hashing import digest


class Baseline(NamedTuple):
  """Means over a user's prompt's finite pictures.

  Attributes:
    relevance, aesthetic: as in `rewards.Terms`.
    num: pictures that they are over.
  """

  relevance: float
  aesthetic: float
  num: int


class Baselines:
  """Numbers by (prompt, seed), in memory and, with a folder, on disk."""

  def __init__(
    self, settings: Mapping[str, str], folder: Path | str | None = None, process: int = 0
  ):
    """
    Args:
      settings: all that the numbers depend on besides prompt and seed: models' fingerprints,
        sampler, number of pictures.
      folder: where the files lie; it is made. None keeps nothing.
      process: the number of this process.

    Raises:
      ValueError: a file with other settings, or a line that is none of these.
    """
    self._known: dict[tuple[str, int], Baseline] = {}
    self.path: Path | None = None
    if folder is None:
      return
    text = json.dumps({"settings": dict(settings)}, sort_keys=True)
    folder, name = Path(folder).expanduser(), digest([text])
    folder.mkdir(parents=True, exist_ok=True)
    self.path = folder / f"{name}.{process}.jsonl"
    for path in sorted(folder.glob(f"{name}.*.jsonl")):
      self._read(path, text)
    if not (self.path.exists() and self.path.stat().st_size):
      self._append(text)

  def get(self, prompt: str, seed: int) -> Baseline | None:
    """The numbers of a prompt, None if they are not known."""
    return self._known.get((prompt, seed))

  def put(self, prompt: str, seed: int, found: Baseline) -> None:
    """Keeps the numbers of a prompt, on disk before this returns."""
    self._known[prompt, seed] = found
    if self.path is not None:
      self._append(json.dumps({"prompt": prompt, "seed": seed, **found._asdict()}))

  def _append(self, line: str) -> None:
    with self.path.open("ab") as file:
      file.write(line.encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())

  def _read(self, path: Path, header: str) -> None:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data) and path == self.path:
      os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
      if number == 1:
        if line.decode(errors="replace") != header:
          raise ValueError(
            f"{printable(path)} begins with other settings than its name stands for; delete "
            "it, and the prompts are drawn again."
          )
        continue
      try:
        row = json.loads(line)
        key = row.pop("prompt"), row.pop("seed")
        self._known[key] = Baseline(**row)
      except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
          f"{printable(path)}:{number} is not what was written; delete the file, and the "
          "prompts are drawn again."
        ) from error
