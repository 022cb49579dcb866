"""What a pickle asks for, counted before it is run: 300 bytes can keep a processor for years.

A pickle can name again a tuple that it made, and so write in 60 lines a tuple that holds the first
one 2^60 times. Hashing that, as a dict does with its keys, never ends.
"""

from __future__ import annotations

import pickletools
from typing import BinaryIO, NamedTuple

_MAX_VALUES = 1 << 22  # as many as a file of 30,000 tensors takes
_NEEDLESS = ("EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_INTO = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # into what lies below
_MARK = pickletools.markobject


class _Step(NamedTuple):
  """What an opcode takes from the stack (all above a mark, then `taken` more) and leaves there."""

  above_mark: bool
  taken: int
  leaves: str | None  # "mark", "value", "below" (what lies below grows)


def _step_of(opcode) -> _Step:
  before, after = opcode.stack_before, opcode.stack_after
  above_mark = _MARK in before
  taken = before.index(_MARK) if above_mark else len(before)
  if opcode.name in _INTO:
    return _Step(above_mark, taken - 1, "below")
  return _Step(above_mark, taken, "mark" if _MARK in after else "value" if after else None)


_STEPS = {opcode.name: _step_of(opcode) for opcode in pickletools.opcodes}


def check(file: BinaryIO) -> None:
  """Follows one pickle with a stack that holds, for each value, only how many it is made of.

  The file is left at the end of the pickle.

  Raises:
    ValueError: for an opcode or a memo index that `torch.save` does not write, for more values than
      any checkpoint has, or for a stack that does not work out.
  """
  stack: list[list[int] | None] = []  # None is a mark
  memo: dict[int, list[int]] = {}
  total = 0
  for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
    name = opcode.name
    if name in _NEEDLESS or name in _PUTS and argument > count:  # high indices would fill memory
      raise ValueError(f"the opcode {name}, or its argument, is none of torch.save")
    if name in _PUTS or name == "MEMOIZE":
      memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
      value = None
    elif name in _GETS:
      value = memo[argument]
    elif name == "DUP":
      value = stack[-1]
    else:
      value = _made(_STEPS[name], stack)
    total += 1
    if value is not None:
      stack.append(value)
      total += value[0]
    if total > _MAX_VALUES:
      raise ValueError(f"it asks for more than {_MAX_VALUES:,} values")


def _made(step: _Step, stack: list[list[int] | None]) -> list[int] | None:
  """Takes a step's values from the stack; returns the new value that the step makes, if any."""
  held = 1
  if step.above_mark:
    while (value := stack.pop()) is not None:
      held += value[0]
  for _ in range(step.taken):
    value = stack.pop()
    held += 0 if value is None else value[0]
  if step.leaves == "value":
    return [held]
  if step.leaves == "below":
    stack[-1][0] += held
  elif step.leaves == "mark":
    stack.append(None)
  return None
