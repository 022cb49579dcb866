"""The small JSON files of a workdir: each is checked whole before a value of it is used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from lmops_jax.host import foreign_files
from lmops_jax.host.hashing import digest
from lmops_jax.host.whole_files import write_json

_Text = Annotated[str, pydantic.Field(strict=True)]
_Number = Annotated[float, pydantic.Field(strict=True)]
_Finite = Annotated[float, pydantic.Field(strict=True, ge=0, allow_inf_nan=False)]
_Count = Annotated[int, pydantic.Field(strict=True, ge=0)]
_Positive = Annotated[int, pydantic.Field(strict=True, ge=1)]


class _Identity(pydantic.BaseModel):
  fingerprint: _Text
  settings: dict[_Text, _Text]
  inputs: dict[_Text, _Text]
  checksum: _Text


class Attempt(_Identity):
  """An unfinished stage: what it is, how often it was begun, seconds and FLOPs so far."""
  attempts: _Positive
  started: _Text
  seconds: _Finite
  flops: _Finite


class Manifest(_Identity):
  """A finished stage, see `manifests`."""
  stage: _Text
  system: _Text
  attempts: _Positive
  started: _Text
  finished: _Text
  seconds: _Finite
  flops: _Number
  versions: dict[_Text, _Text]
  files: dict[_Text, tuple[_Count, _Text]]
  extra: dict[_Text, Any]


class Marker(pydantic.BaseModel):
  """What marks a folder as a workdir."""
  system: _Text


def checksum(record: Mapping[str, Any]) -> str:
  """Hash of what a record holds besides its checksum."""
  body = {key: value for key, value in record.items() if key != "checksum"}
  return digest([json.dumps(body, sort_keys=True)])


def read(path: Path, schema: type[pydantic.BaseModel]) -> dict[str, Any]:
  """What a record's file holds, with the checksum that belongs to it if it has one.

  Raises:
    ValueError: if it is not what was written.
    OSError: if it cannot be read.
  """
  foreign_files.require_regular(path)
  record = foreign_files.parse_json(path.read_bytes(), path)
  schema.model_validate(record)
  if "checksum" in record and record["checksum"] != checksum(record):
    raise ValueError(f"{path} is not what was written.")
  return record


def write(path: Path, record: dict[str, Any]) -> dict[str, Any]:
  """Writes a record with its checksum, and returns it."""
  record = {**record, "checksum": checksum(record)}
  write_json(path, record)
  return record
