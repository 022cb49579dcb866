"""Replaced-token detection (ELECTRA, arXiv:2003.10555), which MetaLM's text encoder comes from.

A small generator predicts masked tokens. Samples from it take their places, and the discriminator
tells at every position whether the token was replaced. The loss is the generator's plus `weight`
times the discriminator's. Samples are token ids, so nothing of the discriminator's loss reaches
what only the generator has. Section 3.2: the two share the embeddings of tokens, positions and
types.

Parameters: `discriminator/` is a whole `Transformer`, which `pretrained` can export as it is, and
`generator/` one without the tables that the discriminator has, see `generator_params`.

Choices where the paper's text and its authors' code differ follow the text: `ceil(rate * n)` of a
row's n tokens are masked, and every one of them is replaced by the mask.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Gt, Lt

from lmops_jax.config.setting_types import Positive, component
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.dropout import folded
from lmops_jax.models.transformer import Transformer
from lmops_jax.training.losses import check_batch

SHARED = ("embedding", "position_embedding", "token_type_embedding", "embedding_norm")
_TABLES = (  # what both must have alike, so that they can share tables
  "vocab_size", "token_width", "table_width", "max_length", "positions", "position_offset",
  "num_token_types", "embedding_norm", "embedding_scale", "norm", "param_dtype",
)
_MASKS, _SAMPLES, _GENERATOR, _DISCRIMINATOR = range(4)  # numbers folded into an example's key


@component(module="training")
@dataclasses.dataclass(frozen=True)
class ReplacedTokens:
  """The two networks and how they are trained.

  Attributes:
    generator: an encoder with a masked-LM head; the paper's are 1/4 to 1/2 of the discriminator's
      size. Its `embedding_width` is that of the discriminator.
    discriminator: an encoder with `detector=True`.
    rate: share of a row's tokens that are masked.
    weight: factor of the discriminator's loss.

  Raises:
    ValueError: for networks that cannot share their embeddings, or lack their heads.
  """

  generator: TransformerConfig
  discriminator: TransformerConfig
  rate: Annotated[float, Gt(0), Lt(1)] = 0.15
  weight: Positive = 50.0

  def __post_init__(self):
    name = "training.ReplacedTokens"
    for part in ("generator", "discriminator"):
      if getattr(self, part).causal:
        raise ValueError(f"{name}.{part} has causal=True; it is an encoder, set it to False.")
    if not self.discriminator.detector:
      raise ValueError(
        f"{name}.discriminator has detector=False, so it tells nothing; set it to True."
      )
    if not self.generator.tied_embeddings:
      raise ValueError(
        f"{name}.generator has tied_embeddings=False; its output matrix is the embedding that both "
        "share, set it to True."
      )
    if self.generator.narrow_embeddings and not self.generator.head_transform:
      raise ValueError(
        f"{name}.generator has narrow_embeddings=True and head_transform=False, so nothing leads "
        "back to the embeddings; set the latter to True."
      )
    for field in _TABLES:
      ours, theirs = getattr(self.generator, field), getattr(self.discriminator, field)
      if ours != theirs:
        raise ValueError(
          f"{name}.generator has {field}={ours!r} and the discriminator {theirs!r}; the two share "
          "their embeddings, so give both the same."
        )


class Parts(NamedTuple):
  """What replaced-token detection finds in each example, `[B]` each.

  Attributes:
    masked_nats: the generator's mean nats of a masked token.
    detector_nats: the discriminator's mean nats of a position.
    num_masked: masked tokens.
    num_replaced: those whose sample is another token.
    num_real: positions that are no padding.
    num_right: those that the discriminator tells right.
  """

  masked_nats: jax.Array
  detector_nats: jax.Array
  num_masked: jax.Array
  num_replaced: jax.Array
  num_real: jax.Array
  num_right: jax.Array


class Corrupted(NamedTuple):
  """A batch after the generator.

  Attributes:
    index: `[B,K] int32`, positions that were chosen; a row's first `num_masked` count.
    counts: `[B,K] bool`, those.
    masked: `[B,S] int32`, tokens with masks in these positions, the generator's input.
    nats: `[B,K] float32`, the generator's of the tokens that stood there.
    tokens: `[B,S] int32`, with samples in these positions, the discriminator's input.
  """

  index: jax.Array
  counts: jax.Array
  masked: jax.Array
  nats: jax.Array
  tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class ReplacedTokenLosses:
  """`f(params, batch) -> [B] float32`: masked-LM nats plus `weight` times detection nats.

  The batch holds `tokens [B,S] int32`, `key [B]` (see `learner.supervised(keyed=True)`; a function
  of seed, step and row), and optionally `positions` and `segment_ids [B,S] int32`, 0 being
  padding. All draws of an example depend on its key and the length S alone.

  Attributes:
    config: the networks, with `vocab_size` set.
    mask_id: id of the mask.
    never_masked: ids that are never chosen, such as those of sequence starts and ends.

  Raises:
    ValueError: for an id outside the vocabulary, or networks without `vocab_size`.
  """

  config: ReplacedTokens
  mask_id: int
  never_masked: tuple[int, ...] = ()

  def __post_init__(self):
    size = self.config.generator.vocab_size
    if size is None:
      raise ValueError(
        "training.ReplacedTokens.generator and discriminator need vocab_size; take it from the "
        "vocabulary with dataclasses.replace."
      )
    for name, ids in (("mask_id", (self.mask_id,)), ("never_masked", self.never_masked)):
      wrong = [i for i in ids if not 0 <= i < size]
      if wrong:
        raise ValueError(f"{name} holds id {wrong[0]}, outside the vocabulary of {size}.")

  @property
  def generator(self) -> Transformer:
    """The module of `generator_params`."""
    return Transformer(self.config.generator)

  @property
  def discriminator(self) -> Transformer:
    """The module of `params["discriminator"]`."""
    return Transformer(self.config.discriminator, with_unembedding=False)

  def init_params(self, key: jax.Array) -> dict[str, Any]:
    """New parameters of both, with Linen's boxes."""
    tokens, keys = jnp.zeros((1, 1), jnp.int32), jax.random.split(key)
    own = self.generator.init(keys[0], tokens)["params"]
    return {
      "generator": {name: leaf for name, leaf in own.items() if name not in SHARED},
      "discriminator": self.discriminator.init(keys[1], tokens)["params"],
    }

  def __call__(self, params, batch: Mapping[str, jax.Array]) -> jax.Array:
    found = self.parts(params, batch)
    return found.masked_nats + self.config.weight * found.detector_nats

  def parts(self, params, batch: Mapping[str, jax.Array]) -> Parts:
    """What the loss is made of, and counts; arguments as for the loss."""
    corrupted, tokens = self.corrupted(params, batch), batch["tokens"]
    hidden = self.discriminator.apply(
      {"params": params["discriminator"]}, corrupted.tokens, batch.get("positions"),
      batch.get("segment_ids"), keys=folded(batch["key"], _DISCRIMINATOR))
    logits = self.discriminator.apply(
      {"params": params["discriminator"]}, hidden, method="detected")
    replaced, real = corrupted.tokens != tokens, _real(batch)
    nats = jax.nn.softplus(logits) - replaced * logits
    return Parts(
      masked_nats=_mean(corrupted.nats, corrupted.counts), detector_nats=_mean(nats, real),
      num_masked=corrupted.counts.sum(1), num_replaced=replaced.sum(1), num_real=real.sum(1),
      num_right=(((logits > 0) == replaced) & real).sum(1),
    )

  def corrupted(self, params, batch: Mapping[str, jax.Array]) -> Corrupted:
    """Masks tokens, lets the generator predict them, and puts its samples in their places."""
    tokens, keys = batch["tokens"], batch["key"]
    can_mask = _real(batch) & ~jnp.isin(tokens, np.array(self.never_masked, np.int32))
    index, counts = jax.vmap(functools.partial(chosen_positions, rate=self.config.rate))(
      folded(keys, _MASKS), can_mask)
    original = jnp.take_along_axis(tokens, index, axis=1)
    masked = _placed(tokens, index, jnp.where(counts, self.mask_id, original))
    logits = self._logits(generator_params(params), batch, masked, index)
    samples = jax.vmap(jax.random.categorical)(folded(keys, _SAMPLES), logits)
    log_probs = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_probs, original[..., None], axis=2)[..., 0]
    samples = jnp.where(counts, samples.astype(tokens.dtype), original)
    return Corrupted(index, counts, masked, nats, _placed(tokens, index, samples))

  def _logits(self, params, batch, masked, index):
    """The generator's logits `[B,K,V] float32` at some positions only."""
    hidden = self.generator.apply(
      {"params": params}, masked, batch.get("positions"), batch.get("segment_ids"),
      keys=folded(batch["key"], _GENERATOR))
    hidden = jnp.take_along_axis(hidden, index[..., None], axis=1)
    return self.generator.apply({"params": params}, hidden, method="unembed")

  def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
    """Refuses tokens outside the vocabulary, and rows without a token that could be masked."""
    tokens = np.asarray(batch["tokens"])
    can_mask = ~np.isin(tokens, self.never_masked)
    if "segment_ids" in batch:
      can_mask &= np.asarray(batch["segment_ids"]) != 0
    named = {name: batch[name] for name in ("tokens", "example_id") if name in batch}
    check_batch(
      {**named, "can_mask": can_mask}, vocab_size=self.config.generator.vocab_size,
      mask="can_mask")


def generator_params(params) -> dict[str, Any]:
  """All parameters of the generator, those that it shares among them."""
  shared = {
    name: leaf for name, leaf in params["discriminator"].items() if name in SHARED}
  return {**params["generator"], **shared}


def chosen_positions(
  key: jax.Array, can_mask: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
  """Positions to mask: `ceil(rate * n)` of the n that may be, each set as likely as any other.

  Args:
    key: a typed key. can_mask: `[S] bool`.
    rate: a share; `ceil` is of the decimal number as it is written.

  Returns:
    `[K] int32` different positions, K being `ceil(rate * S)`, and `[K] bool`, those that count.
  """
  length = can_mask.shape[0]
  share = Fraction(repr(float(rate)))
  num = np.array([math.ceil(share * n) for n in range(length + 1)], np.int32)
  order = jnp.where(can_mask, jax.random.uniform(key, (length,)), 2)
  _, index = jax.lax.top_k(-order, int(num[length]))
  return index, jnp.arange(num[length]) < jnp.asarray(num)[can_mask.sum()]


def _real(batch) -> jax.Array:
  """Positions `[B,S] bool` that are no padding."""
  if "segment_ids" in batch:
    return batch["segment_ids"] != 0
  return jnp.ones(batch["tokens"].shape, bool)


def _placed(tokens: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
  return jax.vmap(lambda row, at, value: row.at[at].set(value))(tokens, index, values)


def _mean(values: jax.Array, counts: jax.Array) -> jax.Array:
  """Means over axis 1 of what counts; 0 for a row in which nothing does."""
  counts = counts.astype(values.dtype)
  return jnp.sum(values * counts, axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1)
