"""Files that others wrote: what is no file is refused before it is opened, bad JSON with its name.

Opening a FIFO waits for a writer that never comes, and a device has no end; both are recognised
here. What Python's JSON reader raises (nesting, endless numbers) becomes one sentence, and so does
what pydantic finds if a value does not fit its schema.
"""

import functools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_origin

from lmops_jax.host.words import shortened

Made = TypeVar("Made")
_KINDS = (
  (stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
  (stat.S_ISSOCK, "a socket"),
)
_MAX_BYTES = 1 << 28
_POINTER = b"version https://git-lfs"


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
    ValueError: if the path is a FIFO, a device or a socket.
  """
  kind = special_kind(path)
  if kind is not None:
    raise ValueError(f"{printable(path)} is {kind}, not a regular file; give the file itself.")


def printable(text: Path | str) -> str:
  """Text that can be written everywhere: half characters, which names that are not UTF-8 and JSON
  escapes can hold, become escapes."""
  return str(text).encode("utf-8", "backslashreplace").decode()


def is_there(path: Path | str) -> bool:
  """Whether there is a file of that name; anything else of that name is not passed over as absent.

  Raises:
    ValueError: for a folder, a FIFO, a device, a link to nothing, or if a folder on the way may not
      be entered.
  """
  try:
    mode = os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    if not os.path.islink(path):
      return False
    raise ValueError(
      f"{path} is a link to {os.readlink(path)}, where there is nothing; fetch the file again."
    ) from None
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror or error}).") from error
  if stat.S_ISDIR(mode):
    raise ValueError(f"{path} is a folder, where a file should be; delete it or fetch the file.")
  require_regular(path)
  return True


def mapped(path: Path, mapper: Callable[[Path], Made]) -> Made:
  """What `mapper` makes of a model's file, which is there, not empty, and no pointer of Git LFS.

  Raises:
    ValueError: as `require_regular`; if the file cannot be read, is empty or is a pointer.
  """
  require_regular(path)
  try:
    with path.open("rb") as file:
      start = file.read(len(_POINTER))
    if not start:
      raise ValueError(f"{path} is empty; fetch the file again.")
    if start == _POINTER:
      raise ValueError(
        f"{path} is a pointer of Git LFS, not the weights; run git lfs pull in its folder."
      )
    return mapper(path)
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror or error}); give an existing model file."
    ) from error


def read_bytes(path: Path | str) -> bytes:
  """The whole contents of a file that is not large.

  Raises:
    ValueError: as `require_regular`; if the file has more than 256 MiB or cannot be read.
  """
  require_regular(path)
  try:
    size = os.stat(path).st_size
    if size > _MAX_BYTES:
      raise ValueError(
        f"{path} has {size:,} bytes; such a file is read as a whole, and has at most "
        f"{_MAX_BYTES:,}; fetch the file again."
      )
    return Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror or error}).") from error


def read_text(path: Path | str) -> str:
  """The text of a file, without a byte-order mark.

  Raises:
    ValueError: as `read_bytes`; if it is not UTF-8.
  """
  try:
    return read_bytes(path).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} cannot be read: it is not UTF-8 text ({error.reason}).") from error


def parse_json(text: str | bytes, where: Path | str, **options: Any) -> Any:
  """What a JSON text holds.

  Args:
    where: file, or file and line, for the message.
    options: passed on to `json.loads`.

  Raises:
    ValueError: if the text is not UTF-8, not JSON, nested too deeply, or holds an absurd number.
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
    ValueError: as `read_bytes` and `parse_json`.
  """
  return parse_json(read_bytes(path), path)


class Unfit(ValueError):
  """A value does not fit its schema.

  Attributes:
    field: the first that does not, such as `a.b[0]`; empty for the whole.
  """

  def __init__(self, sentence: str, field: str):
    super().__init__(sentence)
    self.field = field


_MAX_SHOWN = 60  # characters of a value in a sentence
_MAX_AT_ONCE = 10_000  # entries of a mapping


def checked(schema: Any, value: Any, where: Path | str) -> Any:
  """A value of a foreign file, checked strictly by its schema: no number for a text, no true for 1.

  Args:
    schema: a pydantic model, or any type that pydantic knows, such as `dict[str, int]`. A
      ValueError of its own validators becomes the sentence's second half.
    value: what the file holds.
    where: the file, for the message.

  Returns:
    What pydantic makes of it: an instance of the model.

  Raises:
    Unfit: naming the first field that does not fit, its value and what it should be.
    ValueError: for a value that is nested too deeply.
  """
  import pydantic

  if get_origin(schema) is dict and isinstance(value, dict) and len(value) > _MAX_AT_ONCE:
    pairs = list(value.items())  # pydantic lists all errors of what it is given, a kilobyte each
    parts = (pairs[i : i + _MAX_AT_ONCE] for i in range(0, len(pairs), _MAX_AT_ONCE))
    return {k: v for part in parts for k, v in checked(schema, dict(part), where).items()}
  adapter = _adapter(schema)
  try:
    return adapter.validate_python(value, strict=True)
  except pydantic.ValidationError as error:
    first = _first(error.errors(include_url=False))
  except RecursionError:
    raise ValueError(f"{where} is nested too deeply to be read.") from None
  missing = first["type"] == "missing"
  field, found, expected = _located(schema, value, first["loc"], missing)
  if first["type"] in ("value_error", "assertion_error"):
    raise Unfit(f"{where}: {first['ctx']['error']}", field)
  if missing:
    raise Unfit(f"{where} has no field {field!r}, which should be {expected}.", field)
  if not field:
    raise Unfit(f"{where} holds {shown(found)} and should hold {expected}.", field)
  raise Unfit(f"{where}: {field}={shown(found)} should be {expected}.", field)


def _first(errors: list[dict[str, Any]]) -> dict[str, Any]:
  """The first field's error; for a union, that of the branch that fits furthest."""
  field = errors[0]["loc"][:1]
  return max((e for e in errors if e["loc"][:1] == field), key=lambda e: len(e["loc"]))


def shown(value: Any) -> str:
  """A value in JSON's words, cut if it is long."""
  return shortened(json.dumps(value, ensure_ascii=False, default=repr), _MAX_SHOWN)


@functools.cache
def _adapter(schema: Any):
  import pydantic

  return pydantic.TypeAdapter(schema)


def _located(schema, value, location, missing: bool) -> tuple[str, Any, str]:
  """Where in a file pydantic stopped: the field's name, its value, what it should be in words.

  Args:
    location: the error's place: fields and entries, and branches of unions between them.
    missing: whether the last part is a field that is not there.
  """
  whole = _adapter(schema).json_schema()
  field, at = "", whole
  for i, part in enumerate(location):
    absent = missing and i == len(location) - 1
    if isinstance(value, dict) and (part in value or absent):
      field += f".{part}"
    elif isinstance(value, list) and isinstance(part, int):
      field += f"[{part}]"
    else:
      continue
    value = None if absent else value[part]
    at = _below(at, part, whole)
  return field.removeprefix("."), value, _in_words(at, whole)


def _branches(at: dict[str, Any], whole: dict[str, Any]) -> list[dict[str, Any]]:
  """The kinds of value that a part of a JSON schema allows, references followed."""
  if "$ref" in at:
    return _branches(whole["$defs"][at["$ref"].rsplit("/", 1)[1]], whole)
  kinds = at.get("anyOf") or at.get("oneOf")
  return [at] if kinds is None else [b for kind in kinds for b in _branches(kind, whole)]


def _below(at: dict[str, Any], part: str | int, whole: dict[str, Any]) -> dict[str, Any]:
  """The part of a JSON schema that is for a field or an entry; {} if it allows anything."""
  for branch in _branches(at, whole):
    if isinstance(part, int):
      entry = branch.get("items")
    else:
      entry = branch.get("properties", {}).get(part, branch.get("additionalProperties"))
    if isinstance(entry, dict):
      return entry
  return {}


def _in_words(at: dict[str, Any], whole: dict[str, Any]) -> str:
  """What a JSON schema allows, as a sentence says it."""
  kinds = [_kind_in_words(branch, whole) for branch in _branches(at, whole)]
  return " or ".join(dict.fromkeys(kinds))


def _kind_in_words(at: dict[str, Any], whole: dict[str, Any]) -> str:
  if "const" in at:
    return shown(at["const"])
  if "enum" in at:
    return f"one of {', '.join(map(shown, at['enum']))}"
  kind = at.get("type")
  if kind == "array":
    entries = _in_words(at["items"], whole) if at.get("items") else ""
    exact = at.get("minItems") if at.get("minItems") == at.get("maxItems") else None
    size = "" if exact is None else f" of {exact}"
    return f"a list{size} whose entries are each {entries}" if entries else f"a list{size}"
  words = {
    "integer": "a whole number", "number": "a finite number", "boolean": "true or false",
    "string": "a text", "null": "null", "object": "an object with fields",
  }.get(kind, "something else")
  bounds = [
    f"{bound} {at[name]}" for name, bound in (
      ("minimum", "of at least"), ("exclusiveMinimum", "above"), ("maximum", "of at most"),
      ("exclusiveMaximum", "below"),
    ) if name in at
  ]
  return " ".join([words, " and ".join(bounds)]).rstrip()
