"""What settings may hold: the types of components' parameters, checked when they are built.

A component's annotations are its rules: `num_steps: PositiveInt`, `corpus: Corpus`,
`checkpoints: Steps | None`. `component` registers it with gin and has pydantic check what it is
given against them, in strict mode: neither True nor "2" is a number, and 1e999 is no rate. Values
are checked, never converted. Rules that join several settings stay in `__post_init__`.
"""

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at
import gin
from pydantic import (
  AfterValidator,
  BeforeValidator,
  ConfigDict,
  Strict,
  TypeAdapter,
  ValidationError,
)
from pydantic.errors import PydanticUserError

from lmops_jax.config.setting_words import (
  LARGEST,
  Distinct,
  Rule,
  Words,
  described,
  hints_of,
  options,
  shown,
  without_marks,
)


def _path_exists(path: str | os.PathLike) -> bool:
  text = os.fspath(path)
  return (text.startswith("<") and text.endswith(">")) or Path(text).expanduser().exists()


def _is_name(text: str) -> bool:
  return bool(text) and not set(text) & set("/\\\0\n") and text[0] != "."


PositiveInt = Annotated[int, at.Ge(1), at.Le(LARGEST)]
Count = Annotated[int, at.Ge(0), at.Le(LARGEST)]
NonEmpty = at.MinLen(1)  # mark of a sequence
Size = Annotated[int, at.Ge(1), at.Lt(2**63)]  # a model's: its weights tell what is too large
ByteCount = Size
Seed = Annotated[int, at.Ge(0), at.Lt(2**32)]
Positive = Annotated[float, at.Gt(0)]
NonNegative = Annotated[float, at.Ge(0)]
Share = Annotated[float, at.Gt(0), at.Le(1)]  # some or all
Part = Annotated[float, at.Gt(0), at.Lt(1)]  # some, not all
Probability = Annotated[float, at.Ge(0), at.Le(1)]
Decay = Annotated[float, at.Ge(0), at.Lt(1)]
Text = Annotated[str, at.MinLen(1), Words("a text that is not empty")]
Seeds = Annotated[Sequence[Seed], NonEmpty, Distinct]
Steps = Annotated[Sequence[Count], Distinct]
# `<NAME>` stands for a path that nobody has given yet, when only sizes are asked for.
ExistingPath = Annotated[str | os.PathLike, Rule(_path_exists), Words("an existing path")]
# A name becomes a folder and a column of tables.
Name = Annotated[str, Rule(_is_name), Words('a name without "/" or a leading "."')]


def at_least(low: int) -> Any:
  """The type of integers from `low`."""
  return Annotated[int, at.Ge(low), at.Le(LARGEST)]


def component(name: str | None = None, *, module: str) -> Callable:
  """Registers a class or function with gin, and checks its arguments by its annotations.

  From Python it is called as it stands, and checked too: a ValueError names the setting, what was
  found and what was expected.

  Args:
    name: the registered name, by default the object's own.
    module: what stands before the dot, such as "pds" or "optim".
  """
  def register(made):
    full_name = f"{module}.{name or made.__name__}"
    if inspect.isclass(made):
      made.__init__ = _checked(made.__init__, made, full_name)
    else:
      made = _checked(made, made, full_name)
    return gin.register(name, module=module)(made)
  return register


def checks_itself(made: Callable) -> bool:
  """Whether `component` registered it."""
  call = made.__init__ if inspect.isclass(made) else made
  return hasattr(call, "checks_arguments")


def _checked(call: Callable, made: Callable, name: str) -> Callable:
  signature = inspect.signature(call)

  @functools.wraps(call)
  def checked(*args, **kwargs):
    try:
      arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:  # the call itself tells it better
      arguments = {}
    check_arguments(made, name, arguments)
    return call(*args, **kwargs)

  checked.checks_arguments = True
  return checked


def check_arguments(made: Callable, name: str, arguments: Mapping[str, Any]) -> None:
  """Checks arguments against the annotations of a function or class.

  Args:
    made: its annotations count; parameters without one take anything.
    name: the component's, for the message.
    arguments: what was given, by parameter; defaults are taken to be right.

  Raises:
    ValueError: naming the first argument that is not what its annotation says.
  """
  for param, value in arguments.items():
    if param in hints_of(made) and not _test_of(made, param)(value):
      place, found, wanted = _innermost_fault(hints_of(made)[param], value, f"{name}.{param}")
      raise ValueError(f"{place}={shown(found)} must be {described(wanted)}.")


@functools.cache
def _test_of(made: Callable, param: str) -> Callable[[Any], bool]:
  return _test(hints_of(made)[param])


def _test(annotation: Any) -> Callable[[Any], bool]:
  """The test whether a value is what an annotation says."""
  config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
  try:
    validate = TypeAdapter(_schema(annotation), config=config).validate_python
  except (PydanticUserError, TypeError):  # one that only type checkers read
    return lambda value: True

  def fits(value: Any) -> bool:
    try:
      validate(value)
    except (ValidationError, OverflowError):
      return False
    return True

  return fits


def _schema(annotation: Any) -> Any:
  """The annotation as pydantic takes it, without conversions and without a look into objects."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is Annotated:
    schema = _schema(arguments[0])
    for mark in arguments[1:]:
      if isinstance(mark, Rule):
        schema = Annotated[schema, AfterValidator(_keeping(mark.holds))]
      elif mark is Distinct:
        schema = Annotated[schema, AfterValidator(_keeping(_are_distinct))]
      elif not isinstance(mark, Words):
        schema = Annotated[schema, mark]
    return schema
  if origin in (typing.Union, types.UnionType):
    return typing.Union[tuple(map(_schema, arguments))]  # noqa: UP007
  if origin is Literal:
    return Annotated[Any, AfterValidator(_keeping(
      lambda value: any(type(value) is type(choice) and value == choice for choice in arguments)))]
  if origin is tuple and arguments[-1] is not Ellipsis:
    return Annotated[tuple[tuple(map(_schema, arguments))], Strict(False)]
  if origin in (list, tuple, Sequence):
    return Sequence[_schema(arguments[0])]
  if origin in (dict, Mapping):
    return Mapping[tuple(map(_schema, arguments))]
  if origin is Callable or annotation is Callable:
    return Callable
  if annotation in (int, float):
    return Annotated[annotation, BeforeValidator(_plain_number)]
  if annotation in (Any, None, type(None), bool, str, bytes):
    return annotation
  kind = origin or annotation
  only_for_checkers = getattr(kind, "_is_protocol", False) and not getattr(
    kind, "_is_runtime_protocol", False)
  if not inspect.isclass(kind) or only_for_checkers:
    return Any
  return Annotated[Any, AfterValidator(_keeping(lambda value: isinstance(value, kind)))]


def _plain_number(value: Any) -> Any:
  """NumPy's scalars as Python's, for callers from Python."""
  return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _keeping(holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
  def check(value):
    if not holds(value):
      raise ValueError
    return value
  return check


def _are_distinct(values: Sequence) -> bool:
  return all(value not in values[:i] for i, value in enumerate(values))


def _innermost_fault(annotation: Any, value: Any, place: str) -> tuple[str, Any, Any]:
  """Place, value and annotation at fault: if a list's third item is wrong, those of that item."""
  for option in options(annotation):
    bare = without_marks(option)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if not isinstance(value, list | tuple) or origin not in (list, tuple, Sequence):
      continue
    if origin is not tuple or arguments[-1] is Ellipsis:
      arguments = arguments[:1] * len(value)
    for i, (wanted, item) in enumerate(zip(arguments, value)):
      if not _test(wanted)(item):
        return _innermost_fault(wanted, item, f"{place}[{i}]")
  return place, value, annotation
