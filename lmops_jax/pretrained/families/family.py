"""What a family of published models is."""

from __future__ import annotations

import dataclasses
import re
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
    axes: sizes by field; some tensor must have an axis at least that long.
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
    schema: the schema of its `config.json`.
    read_config: makes the module's configuration from a `ConfigReader`.
    write_config: makes the fields of `config.json` from the configuration.
    rules: makes the table of tensors, names with prefix, from the configuration.
    tied: names of the output matrix, each with the name of the embedding, which it repeats if
      embeddings are tied.
    same: names of tensors that always repeat another, each with the other's name.
    head: patterns of full names of the head; a checkpoint without any of them is a bare body.
    sizes: tells what a configuration declares about the tensors' sizes.
    ignored: patterns of tensors that are no parameters, or belong to heads not modelled here.
    module: makes the Linen module from the configuration.
    inputs: gives shapes of inputs that a configuration's module can be initialised with.
    with_choices: changes the execution choices (`dtype=`, ...) of a configuration.
    config: the class of the configuration.
    text: gives the configuration of the transformer over tokens, or None.
    decoder: gives the configuration of the transformer that continues a text, or None.
    decoder_part: the name of that transformer's part of the parameters; "" for all of them.
    image_size: gives the sides in pixels of pictures that stand among the words; None if none can.
    explicit: writes every width out, and leaves out how a model runs, starts and is trained.
    originals: patterns of names in its authors' own files, each with what the match becomes in the
      published names; the first that matches a name's beginning counts.
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
  text: Callable[[Any], TransformerConfig | None] = lambda config: config
  decoder: Callable[[Any], TransformerConfig | None] = lambda config: (
    config if config.causal else None)
  decoder_part: str = ""
  image_size: Callable[[Any], int | None] = lambda config: None
  explicit: Callable[[Any], Any] = explicit
  originals: tuple[tuple[str, str], ...] = ()

  def ties(self, config: Any) -> bool:
    """Whether a model's output matrix is its embedding."""
    text = self.text(config)
    return text is not None and text.tied_embeddings

  def published_name(self, name: str) -> str:
    """The published name of a tensor of its authors' own file; another name stays."""
    for pattern, replacement in self.originals:
      if match := re.match(pattern, name):
        return match.expand(replacement) + name[match.end() :]
    return name


class ConfigReader:
  """A `config.json`, read by its family's schema, with errors that name file and field."""

  def __init__(self, fields: Mapping[str, Any], where: str):
    self.fields, self.where = fields, where

  def read(self, schema: type[Schema]) -> Schema:
    """The fields, checked against and held in a class of `families.published`."""
    return checked(schema, dict(self.fields), self.where)

  def activation(self, name: str, value: str) -> str:
    """The activation that a field names, by its name here."""
    if value not in ACTIVATIONS:
      raise self.error(
        f"{name}={value!r}; the activations that lmops_jax has are {', '.join(ACTIVATIONS)}."
      )
    return ACTIVATIONS[value]

  def error(self, found: str) -> ValueError:
    """The error that the file has something that no model here has."""
    return ValueError(f"{self.where} has {found}")


def written_activation(name: str) -> str:
  """The activation's name in `config.json`."""
  return {"gelu_tanh": "gelu_new"}.get(name, name)
