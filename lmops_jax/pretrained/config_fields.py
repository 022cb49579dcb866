"""A model's configuration as JSON, without how it runs, and back.

What stands in a field follows from its type, a part's too. Where the type is a Protocol with
several kinds of parts, the JSON of a part begins with the name of its class.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from lmops_jax.models import connectors

EXECUTION = ("attention", "attention_chunk", "scan_layers", "remat", "dtype", "param_dtype")
_KINDS = {
  connectors.ConnectorConfig: (
    connectors.ResamplerConfig, connectors.LinearConnectorConfig,
    connectors.FeedForwardConnectorConfig,
  ),
}
_TYPE = "type"  # name of a part's class


def to_fields(config) -> dict[str, Any]:
  """The JSON of a configuration.

  Args:
    config: a frozen dataclass of numbers, texts, sequences of them, and parts like itself.

  Raises:
    ValueError: a part of a kind that `from_fields` does not know.
  """
  parts = _parts(type(config))
  fields = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name in EXECUTION:
      continue
    if dataclasses.is_dataclass(value):
      kinds = parts[field.name]
      if type(value) not in kinds:
        raise ValueError(
          f"{type(config).__name__}.{field.name} is a {type(value).__name__}, which a model's "
          f"description cannot name; it can name {', '.join(kind.__name__ for kind in kinds)}."
        )
      tag = {_TYPE: type(value).__name__} if len(kinds) > 1 else {}
      value = {**tag, **to_fields(value)}
    fields[field.name] = value
  return fields


def from_fields(kind: type, fields: dict[str, Any]):
  """The configuration that `to_fields` gave the JSON of.

  Args:
    kind: its class.

  Raises:
    ValueError, TypeError: not the fields of such a configuration.
  """
  parts = _parts(kind)
  return kind(**{name: _value(value, parts.get(name, ())) for name, value in fields.items()})


def _value(value: Any, kinds: tuple[type, ...]):
  if isinstance(value, list):
    return tuple(value)
  if not isinstance(value, dict) or not kinds:
    return value
  named = {kind.__name__: kind for kind in kinds}
  if len(kinds) == 1:
    return from_fields(kinds[0], value)
  rest = dict(value)
  name = rest.pop(_TYPE, None)
  if not isinstance(name, str) or name not in named:
    raise ValueError(f"a part has the {_TYPE} {name!r}, which is not one of {', '.join(named)}")
  return from_fields(named[name], rest)


def _parts(kind: type) -> dict[str, tuple[type, ...]]:
  """The classes that may stand in each field for a part."""
  found = {}
  for name, hint in typing.get_type_hints(kind).items():
    for option in (hint, *typing.get_args(hint)):
      if dataclasses.is_dataclass(option):
        found[name] = (option,)
      elif isinstance(option, type) and option in _KINDS:
        found[name] = _KINDS[option]
  return found
