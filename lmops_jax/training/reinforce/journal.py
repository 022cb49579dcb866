"""Every rollout of a run as JSON lines, the same after an interruption as without one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmops_jax.host.whole_files import replacing


class Journal:
  """Rows by step in one file.

  A run that resumes makes some batches anew. The first batch that is written drops the rows of its
  step and of later ones, and what a kill left of a last line.

  Args:
    path: the file; it and its folder are made when they are needed.
  """

  def __init__(self, path: Path):
    self._path, self._is_trimmed = Path(path), False

  def write(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds the rows of a step, which get the field `step`."""
    if not self._is_trimmed:
      self._trim(step)
    text = "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
    with self._path.open("a", encoding="utf-8") as file:
      file.write(text)

  def _trim(self, step: int) -> None:
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(self._path) as partial, partial.open("w", encoding="utf-8") as file:
      for row in read_journal(self._path) if self._path.exists() else ():
        if row["step"] < step:
          file.write(json.dumps(row, ensure_ascii=False) + "\n")
    self._is_trimmed = True


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
  """The rows of a journal up to the first line that is not whole."""
  with Path(path).open(encoding="utf-8") as file:
    for line in file:
      try:
        yield json.loads(line)
      except json.JSONDecodeError:
        return
