"""Files that others wrote: what is no file is refused before it is opened, JSON by its name.

Opening a FIFO waits for a writer that never comes, and a device has no end; both are told apart
here. What Python's JSON reader raises (nesting, numbers of thousands of digits) becomes one
sentence.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

_KINDS = (
  (stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
  (stat.S_ISSOCK, "a socket"),
)


def special_kind(path: Path | str) -> str | None:
  """"a FIFO", "a device" or "a socket", links followed; None for files, folders and nothing."""
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):
    return None
  return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)


def require_regular(path: Path | str) -> None:
  """Refuses what would hang or never end when it is read; what is not there passes.

  Raises:
    ValueError: the path is a FIFO, a device or a socket.
  """
  kind = special_kind(path)
  if kind is not None:
    raise ValueError(f"{printable(path)} is {kind}, not a regular file; give the file itself.")


def printable(text: Path | str) -> str:
  """Text that can be written everywhere: halves of characters, as names that are not UTF-8 and JSON
  escapes have them, become their escapes."""
  return str(text).encode("utf-8", "backslashreplace").decode()


def parse_json(text: str | bytes, where: Path | str, **options: Any) -> Any:
  """What a JSON text holds.

  Args:
    where: file, or file and line, for the message.
    options: of `json.loads`.

  Raises:
    ValueError: `where` is not UTF-8, not JSON, nested too deeply, or holds an absurd number.
  """
  try:
    return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, **options)
  except RecursionError:
    raise ValueError(f"{where} is JSON nested too deeply to be read.") from None
  except UnicodeDecodeError as error:
    raise ValueError(f"{where} is not UTF-8 text ({error.reason}).") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"{where} is not valid JSON: {error.msg}.") from error
  except ValueError as error:
    if "integer string conversion" not in str(error):
      raise
    raise ValueError(f"{where} holds a whole number of thousands of digits.") from error


def read_json(path: Path | str) -> Any:
  """What a JSON file holds.

  Raises:
    ValueError: as `require_regular` and `parse_json`, or the file cannot be read.
  """
  require_regular(path)
  try:
    content = Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror or error}).") from error
  return parse_json(content, path)
