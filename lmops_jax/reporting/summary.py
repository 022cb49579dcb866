"""summary.json: the figures of a run for programs, validated before they are written."""

import json
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmops_jax.host.manifests import verify_read
from lmops_jax.host.whole_files import write_text


def write_summary(path, summary: Mapping[str, Any], *, required: Iterable[str] = ()) -> Path:
  """Writes `summary` as indented JSON, in one atomic step, after checking all of it.

  Args:
    path: the file; its folder is made.
    summary: nested mappings, sequences, strings, numbers, booleans and None. NumPy and JAX scalars
      and arrays become plain numbers and lists; integer keys become strings; None (JSON null)
      stands for "does not apply"; NaN and infinity are refused.
    required: paths that must be there, such as "methods.*.target_test_loss" or "stages[].seconds":
      a key, `*` for every key of a mapping, `[]` for every item of a list, one or more of each.

  Returns:
    The path.

  Raises:
    ValueError: if a required path is missing, a number is not finite, or a value has no JSON form;
      the sentence names the key.
  """
  path = Path(path)
  plain = _plain(summary, "")
  for pattern in required:
    _require(plain, pattern)
  text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, text)
  return path


def read_summary(path) -> dict[str, Any]:
  """Reads what `write_summary` wrote.

  Raises:
    ValueError: if the file is not JSON or not a JSON object.
    StageError: if it belongs to a finished stage and is not what the stage wrote.
  """
  verify_read(path)
  try:
    summary = json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not a summary: {error}.") from error
  if not isinstance(summary, dict):
    raise ValueError(f"{path} is not a summary: it holds a {type(summary).__name__}, no object.")
  return summary


def _plain(value, key: str):
  if value is None or isinstance(value, (str, bool)):
    return value
  if isinstance(value, np.bool_):
    return bool(value)
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real):
    value = float(value)
    if not math.isfinite(value):
      raise ValueError(
        f"The summary's {key or 'value'} is {value}; a figure must be finite, or None where it "
        "does not apply."
      )
    return value
  if isinstance(value, Mapping):
    plain = {}
    for name, item in value.items():
      if not isinstance(name, (str, numbers.Integral)) or isinstance(name, bool):
        raise ValueError(f"The summary's {key or 'top level'} has the key {name!r}, not a string.")
      name = str(name)
      if name in plain:
        raise ValueError(f"The summary's {key or 'top level'} has the key {name!r} twice.")
      plain[name] = _plain(item, f"{key}.{name}" if key else name)
    return plain
  if hasattr(value, "_asdict"):  # a NamedTuple keeps its field names
    return _plain(value._asdict(), key)
  if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
    return [_plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
  if hasattr(value, "dtype") and hasattr(value, "shape"):
    array = np.asarray(value)
    if array.dtype.kind not in "biufU":
      array = array.astype(np.float64)  # bfloat16 and its kin
    return _plain(array.tolist(), key)
  raise ValueError(
    f"The summary's {key or 'value'} is a {type(value).__name__}, which JSON cannot hold; "
    "convert it to numbers, strings, lists and mappings."
  )


def _require(summary, pattern: str):
  steps = pattern.replace("[]", ".[]").strip(".").split(".")
  for path, present in _walk(summary, steps, ""):
    if not present:
      raise ValueError(f"The summary lacks {path} (required: {pattern}).")


def _walk(value, steps: list[str], path: str) -> Iterator[tuple[str, bool]]:
  if not steps:
    yield path, True
    return
  step, rest = steps[0], steps[1:]
  if step == "[]":
    items = (
      [(f"{path}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else []
    )
    missing = f"{path}[0]"
  elif step == "*":
    items = list(value.items()) if isinstance(value, dict) else []
    items = [(f"{path}.{name}".strip("."), item) for name, item in items]
    missing = f"{path}.*".strip(".")
  else:
    missing = f"{path}.{step}".strip(".")
    items = [(missing, value[step])] if isinstance(value, dict) and step in value else []
  if not items:
    yield missing, False
  for name, item in items:
    yield from _walk(item, rest, name)
