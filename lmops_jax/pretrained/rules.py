"""How one published tensor corresponds to parameters here, in both directions.

A family of models is a table of `Rule`s. Each names one tensor of the checkpoint and the leaves of
our tree that it holds (three for a fused query-key-value), with a pair of inverse functions. Splits
are views wherever NumPy can make them, so that slicing a memory-mapped tensor reads only the slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.models.config import TransformerConfig

Arrays = Sequence[np.ndarray]


class Rule(NamedTuple):
  """One tensor of a checkpoint, and what it is here.

  Attributes:
    theirs: its name; `{i}` stands for the layer.
    ours: paths of leaves, parts joined by `/`; those of a layer's tensor hold all layers, and
      `split` and `join` see them without that axis.
    split: their array to ours.
    join: ours to their array, the inverse of `split`.
    shape: the shape of their tensor; None is that of the one leaf.
    first: the number of the layer that comes first in the leaves.
  """

  theirs: str
  ours: tuple[str, ...]
  split: Callable[[np.ndarray], list[np.ndarray]]
  join: Callable[[Arrays], np.ndarray]
  shape: tuple[int, ...] | None = None
  first: int = 0

  @property
  def of_layers(self) -> bool:
    """Whether there is such a tensor for each layer."""
    return "{i}" in self.theirs

  def names(self, num_layers: int) -> list[str]:
    """The names of its tensors."""
    if not self.of_layers:
      return [self.theirs]
    return [self.theirs.format(i=self.first + i) for i in range(num_layers)]


def under(part: str, rules: Sequence[Rule]) -> list[Rule]:
  """The rules of a part of a model, for the whole."""
  return [rule._replace(ours=tuple(f"{part}/{path}" for path in rule.ours)) for rule in rules]


def same(theirs: str, ours: str, shape: Sequence[int] | None = None) -> Rule:
  """The same numbers in the same order; `shape` is given if ours has more axes."""

  def split(x):
    return [x if shape is None else x.reshape(shape)]

  def join(y):
    return y[0] if shape is None else y[0].reshape(-1)

  return Rule(theirs, (ours,), split, join, None if shape is None else (math.prod(shape),))


def linear(theirs: str, ours: str, inputs: Sequence[int], outputs: Sequence[int]) -> Rule:
  """torch's `[out,in]` matrix and our kernel `[*inputs,*outputs]`."""
  shape, rows, columns = (*inputs, *outputs), math.prod(inputs), math.prod(outputs)

  def join(y):
    return y[0].reshape(rows, columns).T

  return Rule(theirs, (ours,), lambda x: [x.T.reshape(shape)], join, (columns, rows))


def conv1d(theirs: str, ours: str, inputs: Sequence[int], outputs: Sequence[int]) -> Rule:
  """GPT-2's `[in,out]` matrix and our kernel `[*inputs,*outputs]`."""
  shape, rows, columns = (*inputs, *outputs), math.prod(inputs), math.prod(outputs)

  def join(y):
    return y[0].reshape(rows, columns)

  return Rule(theirs, (ours,), lambda x: [x.reshape(shape)], join, (rows, columns))


def convolution(theirs: str, ours: str, inputs: int, outputs: int, side: int) -> Rule:
  """torch's `[out,in,side,side]` kernel and ours `[side,side,in,out]`."""

  def split(x):
    return [x.transpose(2, 3, 1, 0)]

  return Rule(theirs, (ours,), split, lambda y: y[0].transpose(3, 2, 0, 1),
              (outputs, inputs, side, side))


def pointwise(theirs: str, ours: str, inputs: int, outputs: int) -> Rule:
  """torch's convolution of 1 x 1, `[out,in,1,1]`, and our kernel `[in,out]`."""
  return Rule(
    theirs, (ours,), lambda x: [x[:, :, 0, 0].T], lambda y: y[0].T[:, :, None, None],
    (outputs, inputs, 1, 1))


def attention_rules(
  config: TransformerConfig, query: str, key: str, value: str, out: str, *,
  at: str = "layers/attention", key_width: int | None = None,
) -> list[Rule]:
  """Four separate torch matrices, given by name without `.weight`, and their biases.

  Keys and values are made of vectors of `key_width` numbers, by default those of queries.
  """
  c = config
  d, e = (c.width,), c.head_width
  inputs = d if key_width is None else (key_width,)
  rules = []
  for theirs, ours, heads, width in (
    (query, "query", c.num_heads, d), (key, "key", c.key_heads, inputs),
    (value, "value", c.key_heads, inputs),
  ):
    path = f"{at}/{ours}"
    rules.append(linear(f"{theirs}.weight", f"{path}/kernel", width, (heads, e)))
    if c.qkv_bias:
      rules.append(same(f"{theirs}.bias", f"{path}/bias", (heads, e)))
  rules.append(linear(f"{out}.weight", f"{at}/out/kernel", (c.num_heads, e), d))
  if c.out_bias:
    rules.append(same(f"{out}.bias", f"{at}/out/bias"))
  return rules


def mlp_rules(config: TransformerConfig, up: str, down: str, gate: str | None = None) -> list[Rule]:
  """The MLP's torch matrices, given by name without `.weight`, and their biases."""
  c = config
  names = [(up, "up", (c.width,), (c.mlp_width,)), (down, "down", (c.mlp_width,), (c.width,))]
  if gate is not None:
    names.append((gate, "gate", (c.width,), (c.mlp_width,)))
  rules = []
  for theirs, ours, inputs, outputs in names:
    rules.append(linear(f"{theirs}.weight", f"layers/mlp/{ours}/kernel", inputs, outputs))
    if c.mlp_bias:
      rules.append(same(f"{theirs}.bias", f"layers/mlp/{ours}/bias"))
  return rules


def norm_rules(config: TransformerConfig, theirs: str, ours: str) -> list[Rule]:
  """A norm's scale, and its bias if it has one."""
  rules = [same(f"{theirs}.weight", f"{ours}/scale")]
  if config.norm == "layer":
    rules.append(same(f"{theirs}.bias", f"{ours}/bias"))
  return rules


def unembedding_rules(config: TransformerConfig, theirs: str = "lm_head") -> list[Rule]:
  """The output matrix of an untied model, and its bias."""
  c = config
  rules = []
  if not c.tied_embeddings:
    rules.append(linear(f"{theirs}.weight", "unembedding", (c.token_width,), (c.vocab_size,)))
  if c.unembedding_bias:
    rules.append(same(f"{theirs}.bias", "unembedding_bias"))
  return rules
