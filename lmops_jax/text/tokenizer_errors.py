"""What the packages tokenizers and sentencepiece raise, as sentences that name the file.

They raise plain Exceptions, and the Rust code of tokenizers panics at what it does not check. A
panic is no Exception in Python, so it passes every handler, and is printed before it is raised.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PANIC = "PanicException"  # of pyo3_runtime, which cannot be imported
OTHER = "give another one, or fetch the file again"
_PROBES = ("", "a", "The 3 naïve cats' \n\t漢字🙂")


@contextlib.contextmanager
def named(
  where: Path | str, what: str, advice: str = "fetch it again"
) -> Iterator[None]:
  """Turns what the two packages raise within into a sentence; an error naming the file passes.

  Args:
    where: the tokenizer's file.
    what: what is wrong, worded to follow the file's name.
    advice: what to do.

  Raises:
    ValueError: with the file, `what`, and the package's reason.
  """
  try:
    yield
  except BaseException as error:
    is_ours = type(error) is ValueError and str(where) in str(error)
    if is_ours or not (isinstance(error, Exception) or _is_panic(error)):
      raise
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise ValueError(f"{where} {what} ({reason}); {advice}.") from None


def check(tokenizer, where: Path | str) -> None:
  """Tries a `tokenizers.Tokenizer` out, so that what would fail at every text fails here.

  Raises:
    ValueError: if it panics, or puts an id that it does not have around a text.
  """
  with _quiet_panics(), named(where, "makes the tokenizers package fail"):
    for text in _PROBES:
      for add_special in (True, False):
        with contextlib.suppress(Exception):  # a text may be beyond its alphabet
          tokenizer.decode(tokenizer.encode(text, add_special_tokens=add_special).ids)
    around = []
    with contextlib.suppress(Exception):
      around = tokenizer.encode("").ids
  unknown = [i for i in around if tokenizer.id_to_token(i) is None]
  if unknown:
    raise ValueError(
      f"{where} puts the id {unknown[0]} around every text, and has no such token; fetch it again."
    )


def check_distinct(vocabulary: dict[str, int], where: Path | str) -> None:
  """Checks that no two tokens have one id.

  Raises:
    ValueError: if two have.
  """
  if len(set(vocabulary.values())) == len(vocabulary):
    return
  seen: dict[int, str] = {}
  token, i = next((t, i) for t, i in sorted(vocabulary.items()) if seen.setdefault(i, t) != t)
  raise ValueError(
    f"{where} gives the tokens {seen[i]!r} and {token!r} one id, {i}; fetch it again.")


def _is_panic(error: BaseException) -> bool:
  return type(error).__name__ == _PANIC


@contextlib.contextmanager
def _quiet_panics() -> Iterator[None]:
  """Holds back what is written to standard error; drops it if a panic comes."""
  sys.stderr.flush()
  with tempfile.TemporaryFile() as held:
    kept = os.dup(2)
    os.dup2(held.fileno(), 2)
    panicked = False
    try:
      yield
    except BaseException as error:
      panicked = isinstance(error, ValueError) or _is_panic(error)
      raise
    finally:
      sys.stderr.flush()
      os.dup2(kept, 2)
      os.close(kept)
      if not panicked:
        held.seek(0)
        os.write(2, held.read())
