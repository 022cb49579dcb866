"""What the requests and facts of all demos share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import annotated_types as at
import jax
import pydantic

from lmops_jax.host import progress

Prompt = Annotated[str, at.MaxLen(20_000)]  # characters, more than any context has
Seed = Annotated[int, at.Ge(0), at.Le(2**32 - 1)]
NewTokens = Annotated[int, at.Ge(1), at.Le(2**16)]


def model_facts(source, params) -> dict[str, Any]:
  """What a page says about a `PretrainedModel` with these parameters."""
  return {
    "model": Path(source.path).name, "family": source.family,
    "parameters": progress.format_count(sum(leaf.size for leaf in jax.tree.leaves(params))),
    "device": jax.devices()[0].device_kind,
    "max_length": source.decoder.config.max_length,
  }


def defaults(request: type[pydantic.BaseModel]) -> dict[str, Any]:
  """The fields of a request that have a default, which a page has a control for."""
  return {
    name: field.default for name, field in request.model_fields.items()
    if not field.is_required()}


@contextlib.contextmanager
def one_prompt() -> Iterator[None]:
  """Sentences about "prompt 0" become such about "the prompt", which a page does not number."""
  try:
    yield
  except ValueError as error:
    raise ValueError(str(error).replace("prompt 0", "the prompt")) from error
