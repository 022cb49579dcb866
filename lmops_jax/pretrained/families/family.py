"""What a family of published models is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained.rules import Rule

# How a model runs, which no `config.json` says.
PLAIN = dict(
  attention="xla", scan_layers=True, remat="none", dtype="float32", param_dtype="float32"
)
# Names of activations in `config.json` and here.
ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Family:
  """How to read and write the models of one kind.

  Attributes:
    name: the `model_type` of its `config.json`.
    architecture: the class that transformers loads an exported model with.
    prefix: what its body's tensor names start with; checkpoints of the bare body lack it.
    read_config: `ConfigReader` to the module's configuration.
    write_config: the configuration to the fields of `config.json`.
    rules: the configuration to the table of tensors, names with prefix.
    tied: tensor names that repeat the embedding when embeddings are tied.
    head: patterns of full names of the head; a checkpoint without any of them is a bare body.
    ignored: patterns of tensors that are no parameters, or belong to heads not modelled here.
    module: the configuration to the Linen module.
    inputs: the configuration to inputs that the module can be initialised with.
    with_choices: configuration and execution choices (`dtype=`, ...) to a configuration.
  """

  name: str
  architecture: str
  prefix: str
  read_config: Callable[[ConfigReader], Any]
  write_config: Callable[[Any], dict[str, Any]]
  rules: Callable[[Any], list[Rule]]
  tied: tuple[str, ...] = ("lm_head.weight",)
  head: tuple[str, ...] = (r"lm_head\.",)
  ignored: tuple[str, ...] = ()
  module: Callable[[Any], nn.Module] = Transformer
  inputs: Callable[[Any], tuple] = lambda config: (jnp.zeros((1, 1), jnp.int32),)
  with_choices: Callable[..., Any] = dataclasses.replace


class ConfigReader:
  """Fields of a `config.json`, with errors that name file and field."""

  def __init__(self, fields: Mapping[str, Any], where: str):
    self.fields, self.where = fields, where

  def get(self, name: str, default: Any = None) -> Any:
    """The field, or `default` where it is absent or null."""
    value = self.fields.get(name)
    return default if value is None else value

  def need(self, name: str) -> Any:
    """The field; raises ValueError where it is absent."""
    value = self.fields.get(name)
    if value is None:
      raise ValueError(f"{self.where} has no field {name!r}, which this kind of model needs.")
    return value

  def activation(self, name: str, default: str) -> str:
    """The activation named in a field, by its name here."""
    value = self.get(name, default)
    if value not in ACTIVATIONS:
      raise ValueError(
        f"{self.where} has {name}={value!r}; the activations that lmops_jax has are "
        f"{', '.join(ACTIVATIONS)}."
      )
    return ACTIVATIONS[value]

  def refuse(self, name: str, *allowed: Any) -> None:
    """Raises ValueError where the field is set to something not modelled here."""
    value = self.fields.get(name)
    if value is not None and value not in allowed:
      raise ValueError(
        f"{self.where} has {name}={value!r}, which lmops_jax does not model; it reads models with "
        f"{name} {' or '.join(map(repr, allowed)) if allowed else 'absent'}."
      )


def written_activation(name: str) -> str:
  """The activation's name in `config.json`."""
  return {"gelu_tanh": "gelu_new"}.get(name, name)
