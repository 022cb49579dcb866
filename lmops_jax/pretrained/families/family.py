"""What a family of published models is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.host.foreign_files import checked
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.explicit import explicit
from lmops_jax.pretrained.rules import Rule

Schema = TypeVar("Schema")

# Names of activations in `config.json` and here.
ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_accurate": "gelu_tanh",
  "gelu_python_tanh": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
}


class Sizes(NamedTuple):
  """What the configuration of one stack of layers declares, by the fields of its file.

  Attributes:
    layers: field with the number of layers.
    num_layers: that number.
    axes: by field, numbers that some tensor has an axis of, or a longer one.
    part: where in our tree the stack is, such as "text/".
  """

  layers: str
  num_layers: int
  axes: dict[str, int]
  part: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
  """How to read and write the models of one kind.

  Attributes:
    name: the `model_type` of its `config.json`.
    architecture: the class that transformers loads an exported model with.
    prefix: what its body's tensor names start with; checkpoints of the bare body lack it.
    schema: of its `config.json`.
    read_config: `ConfigReader` to the module's configuration.
    write_config: the configuration to the fields of `config.json`.
    rules: the configuration to the table of tensors, names with prefix.
    tied: names of the output matrix, each with that of the embedding, which it repeats when
      embeddings are tied.
    same: names of tensors that always repeat another, each with that other's.
    head: patterns of full names of the head; a checkpoint without any of them is a bare body.
    sizes: the configuration to what it declares about the tensors' sizes.
    ignored: patterns of tensors that are no parameters, or belong to heads not modelled here.
    module: the configuration to the Linen module.
    inputs: the configuration to shapes of inputs that the module can be initialised with.
    with_choices: configuration and execution choices (`dtype=`, ...) to a configuration.
    config: class of the configuration.
    text: the configuration to that of its transformer over tokens.
    decoder: the configuration to that of the transformer that continues a text, or to None.
    decoder_part: name of that transformer's part of the parameters; "" for all of them.
    image_size: the configuration to the sides in pixels of pictures that stand among the words; to
      None if none can.
    explicit: the configuration to that of the same function with every width written out, without
      how it runs, starts or is trained.
  """

  name: str
  architecture: str
  prefix: str
  schema: type[published.AnyModel]
  read_config: Callable[[ConfigReader], Any]
  write_config: Callable[[Any], dict[str, Any]]
  rules: Callable[[Any], list[Rule]]
  tied: Mapping[str, str]
  sizes: Callable[[Any], tuple[Sizes, ...]]
  same: Mapping[str, str] = dataclasses.field(default_factory=dict)
  head: tuple[str, ...] = (r"lm_head\.",)
  ignored: tuple[str, ...] = ()
  module: Callable[[Any], nn.Module] = Transformer
  inputs: Callable[[Any], tuple] = lambda config: (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
  with_choices: Callable[..., Any] = dataclasses.replace
  config: type = TransformerConfig
  text: Callable[[Any], TransformerConfig] = lambda config: config
  decoder: Callable[[Any], TransformerConfig | None] = lambda config: (
    config if config.causal else None)
  decoder_part: str = ""
  image_size: Callable[[Any], int | None] = lambda config: None
  explicit: Callable[[Any], Any] = explicit


class ConfigReader:
  """A `config.json`, read by its family's schema, with errors that name file and field."""

  def __init__(self, fields: Mapping[str, Any], where: str):
    self.fields, self.where = fields, where

  def read(self, schema: type[Schema]) -> Schema:
    """The fields as a class of `families.published` has them."""
    return checked(schema, dict(self.fields), self.where)

  def activation(self, name: str, value: str) -> str:
    """The activation that a field names, by its name here."""
    if value not in ACTIVATIONS:
      raise self.error(
        f"{name}={value!r}; the activations that lmops_jax has are {', '.join(ACTIVATIONS)}."
      )
    return ACTIVATIONS[value]

  def error(self, found: str) -> ValueError:
    """That the file has something that no model here has."""
    return ValueError(f"{self.where} has {found}")


def written_activation(name: str) -> str:
  """The activation's name in `config.json`."""
  return {"gelu_tanh": "gelu_new"}.get(name, name)
