"""Per-example losses, the primitive that training, control and evaluation build on.

A loss here is `(params, batch) -> [B] float32`. The objects are frozen dataclasses, equal when
model and options are equal, so that compiled functions can be shared between runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.heads import SequenceRegressor
from lmops_jax.models.partitioning import batch_shards, on_one_cpu, platform_in_use
from lmops_jax.models.perceptron import Perceptron
from lmops_jax.models.products import project_to_vocabulary
from lmops_jax.models.transformer import Transformer

# A batch's logits up to the first size, in bytes a device, are computed whole, since chunks are
# computed twice. Chunks have the second size, since products with too few rows are slow and each
# chunk adds to the whole gradient of the output matrix (tests/benchmarks/results/derivatives.md).
_CHUNK_BYTES = {"cpu": (128 << 20, 32 << 20)}
_CHUNK_BYTES_ELSEWHERE = (256 << 20, 256 << 20)
_ORDERED_BYTES = 16 << 20  # logits of fewer bytes are not worth the ordering of `_learned_first`


def lm_example_losses(model: Transformer, *, chunk: int | None = None) -> LMExampleLosses:
  """`f(params, batch) -> [B] float32`, the mean nats of a predicted token of each example.

  Args:
    model: the language model.
    chunk: positions whose logits exist at a time. None chooses from the sizes and the platform;
      the length or more keeps all logits.

  Raises:
    ValueError: for a chunk below 1.
  """
  return LMExampleLosses(model, chunk)


def weighted_example_losses(inner) -> WeightedExampleLosses:
  """`inner` times `batch["weight"] [B] float32`.

  With weights `tokens_n * B / sum(tokens)` the mean over examples is a mean over tokens.
  """
  return WeightedExampleLosses(inner)


@dataclasses.dataclass(frozen=True)
class WeightedExampleLosses:
  """Losses of `inner`, each times its example's weight."""

  inner: LMExampleLosses

  def __call__(self, params, batch: Mapping[str, jax.Array]) -> jax.Array:
    return self.inner(params, batch) * batch["weight"]

  def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
    """Refuses what `inner` refuses."""
    self.inner.check_batch(batch)


@dataclasses.dataclass(frozen=True)
class LMExampleLosses:
  """Masked token-mean cross-entropy of each example (arXiv:2410.07064; token mean, not sum).

  The batch holds `tokens`, `targets [B,S] int32` and `loss_mask [B,S] float32`, optionally
  `positions` and `segment_ids [B,S] int32`, `key [B]` of dropout (see `learner.supervised`), and
  `vectors [B,M,D]` with `vector_index [B,S] int32` (see `models.vectors`). An example whose mask
  is 0 everywhere gives 0 here, so that nothing traced can divide by zero; `check_batch` refuses it
  on the host.
  """

  model: Transformer
  chunk: int | None = None

  often_learned = 1.0  # see `of_logits`

  def __post_init__(self):
    if self.chunk is not None and self.chunk < 1:
      raise ValueError(f"chunk={self.chunk} must be at least 1, or None to choose.")

  def __call__(self, params, batch: Mapping[str, jax.Array]) -> jax.Array:
    nats = self.token_losses(params, batch, batch["loss_mask"])
    mask = batch["loss_mask"].astype(nats.dtype)
    return jnp.sum(nats * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)

  def token_losses(
    self, params, batch: Mapping[str, jax.Array], learned: jax.Array | None = None
  ) -> jax.Array:
    """Nats of every target `[B,S] float32`, or, given `learned [B,S]`, of those where it is not 0.

    Others may be 0 then.
    """
    vectors = {name: batch[name] for name in ("vectors", "vector_index") if name in batch}
    hidden = self.model.apply(
      {"params": params}, batch["tokens"], batch.get("positions"), batch.get("segment_ids"),
      keys=batch.get("key"), **vectors,
    )
    return of_logits(
      cross_entropy, self.model, params, hidden, batch["targets"], chunk=self.chunk,
      learned=learned, often_learned=self.often_learned)

  def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
    """Refuses batches on the host that would be silently wrong on the device; see `check_batch`."""
    check_batch(batch, vocab_size=self.model.config.vocab_size)


def of_logits(
  function, model: Transformer, params, hidden: jax.Array, targets: jax.Array, *,
  chunk: int | None = None, learned: jax.Array | None = None, often_learned: float = 1.0,
):
  """`function(logits [B,c,V] float32, targets [B,c])` at all positions, some of them at a time.

  Args:
    function: returns a pytree of leaves `[B,c]`.
    model, params: of the head.
    hidden: `[B,S,D]`, after the last norm.
    targets: `[B,S] int32`.
    chunk: positions whose logits exist at a time; None chooses from the sizes and the platform.
    learned: `[B,S]`, 0 where the result does not matter and may be 0; None: it always matters.
    often_learned: the share of its positions that a row seldom exceeds in `learned`. A CPU computes
      many logits of that share alone, and the others if a row of the batch exceeds it.

  Returns:
    A pytree of leaves `[B,S]`.
  """
  hidden, matrix, bias = model.apply({"params": params}, hidden, method=_output_parts)

  def of_chunk(hidden, targets):
    return function(project_to_vocabulary(hidden, matrix, bias), targets)

  def of_positions(hidden, targets):
    of_one = chunk or _default_chunk(*targets.shape, model.config.vocab_size)
    return map_sequence_chunks(of_chunk, hidden, targets, of_one)

  rows, length = targets.shape
  num_first = math.ceil(often_learned * length)
  is_small = 4 * rows * length * model.config.vocab_size < _ORDERED_BYTES
  if learned is None or num_first == length or is_small or not on_one_cpu():
    return of_positions(hidden, targets)
  return _learned_first(of_positions, hidden, targets, learned != 0, num_first)


def _learned_first(function, hidden, targets, learned, num_first):
  """`function` at the first positions of each row with the learned ones in front.

  It is 0 at the others, unless one of them is learned.
  """
  order = jnp.argsort(~learned, axis=1)  # stable
  hidden = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
  targets, learned = (jnp.take_along_axis(x, order, axis=1) for x in (targets, learned))
  first = function(hidden[:, :num_first], targets[:, :num_first])
  rest = hidden[:, num_first:], targets[:, num_first:]

  def nothing(*rest):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *rest))

  # Computed anew backwards, so that nothing is kept for the usual case, where it is left out.
  second = jax.lax.cond(
    jnp.any(learned[:, num_first:]), jax.checkpoint(function), nothing, *rest)
  place = jnp.argsort(order, axis=1)

  def placed(first, second):
    return jnp.take_along_axis(jnp.concatenate([first, second], axis=1), place, axis=1)

  return jax.tree.map(placed, first, second)


def _output_parts(model: Transformer, hidden):
  return model.readout(hidden), model.output_matrix(), model.output_bias()


def regression_example_losses(model: SequenceRegressor) -> RegressionExampleLosses:
  """`f(params, batch) -> [B] float32`, the squared error against `batch["score"]`."""
  return RegressionExampleLosses(model)


@dataclasses.dataclass(frozen=True)
class RegressionExampleLosses:
  """Squared error of a regressor.

  The batch holds `tokens [B,S] int32`, `score [B] float32` and `mask [B,S]`, nonzero at real
  positions.
  """

  model: SequenceRegressor

  def __call__(self, params, batch: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.square(self.predict(params, batch) - batch["score"])

  def predict(self, params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Predictions `[B] float32`."""
    return self.model.apply(
      {"params": params}, batch["tokens"], batch["mask"], batch.get("positions"),
      batch.get("segment_ids"),
    )

  def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
    """Refuses rows without a real position and tokens outside the vocabulary."""
    check_batch(batch, vocab_size=self.model.config.vocab_size, mask="mask")


def binary_example_losses(model: Perceptron) -> BinaryExampleLosses:
  """`f(params, batch) -> [B] float32`, cross-entropy (nats) of the labels 0 and 1."""
  return BinaryExampleLosses(model)


@dataclasses.dataclass(frozen=True)
class BinaryExampleLosses:
  """Binary cross-entropy of a classifier's logits.

  The batch holds `inputs [B,D] float32` and `labels [B] float32`, each 0 or 1.
  """

  model: Perceptron

  def __call__(self, params, batch: Mapping[str, jax.Array]) -> jax.Array:
    logits = self.model.apply({"params": params}, batch["inputs"])
    return jax.nn.softplus(logits) - batch["labels"] * logits

  def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
    """Refuses labels other than 0 and 1."""
    labels = np.asarray(batch["labels"])
    bad = np.flatnonzero((labels != 0) & (labels != 1))
    if bad.size:
      raise ValueError(f"the label of row {bad[0]} is {labels[bad[0]]}; labels must be 0 or 1.")


def check_batch(
  batch: Mapping[str, np.ndarray], *, vocab_size: int | None = None, mask: str = "loss_mask"
) -> None:
  """Raises ValueError for a batch that cannot be learned from, and names the example.

  Args:
    batch: host arrays; `example_id [B]`, if there, names examples.
    vocab_size: if given, `tokens` and `targets` must be in [0, vocab_size).
    mask: the field that must not be 0 in a whole row.
  """

  def name(row):
    return f"example {batch['example_id'][row]}" if "example_id" in batch else f"row {row}"

  if mask in batch:
    real = np.asarray(batch[mask])
    empty = np.flatnonzero(~(real != 0).any(axis=1))
    if empty.size:
      raise ValueError(
        f"{mask} is 0 at every position of {name(empty[0])} ({empty.size} such in the batch), so "
        "it has no loss; drop examples without a single token to predict."
      )
  if vocab_size is not None:
    for field in ("tokens", "targets"):
      if field not in batch:
        continue
      ids = np.asarray(batch[field])
      if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
        row, column = np.argwhere((ids < 0) | (ids >= vocab_size))[0]
        raise ValueError(
          f"{field} of {name(row)} holds id {ids[row, column]} at position {column}, outside the "
          f"vocabulary of {vocab_size}; the data was made with another vocabulary."
        )


def map_sequence_chunks(function, hidden: jax.Array, targets: jax.Array, chunk: int):
  """`function(hidden [B,c,D], targets [B,c]) -> [B,c]` over chunks of the sequence, rematerialised.

  Only one chunk's intermediate values exist at a time, forwards, backwards and under `jax.jvp`.

  Args:
    function: applied to each chunk; it may return a pytree of such leaves.
    hidden: `[B,S,D]`.
    targets: `[B,S]`.
    chunk: positions at a time; `S` or more calls the function once and keeps what it computes.

  Returns:
    `[B,S]`, or a pytree of such leaves.
  """
  b, s = targets.shape
  if chunk >= s:
    return function(hidden, targets)
  num_chunks = -(-s // chunk)
  padding = num_chunks * chunk - s

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, num_chunks, chunk, *x.shape[2:]), 1, 0)

  body = jax.checkpoint(lambda inputs: function(*inputs))
  out = jax.lax.map(body, (split(hidden), split(targets)))
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(b, num_chunks * chunk)[:, :s], out)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """`[...,V]` and `[...]` to nats."""
  # A gather from a vocabulary that lies on several devices would bring all of it together.
  target_logit = _gathered if on_one_cpu() else _compared
  return jax.nn.logsumexp(logits, axis=-1) - target_logit(logits, targets)


def _compared(logits, targets):
  """Each target's logit by a comparison, since a gather's transpose is a scatter."""
  chosen = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
  return jnp.sum(jnp.where(chosen, logits, 0), axis=-1)


@jax.custom_jvp
def _gathered(logits, targets):
  """`_compared`, but for its derivatives without another pass over the logits."""
  return jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]


@_gathered.defjvp
def _(primals, tangents):
  return _gathered(*primals), _compared(tangents[0], primals[1])


def _default_chunk(batch_size: int, length: int, vocab_size: int) -> int:
  return default_chunk(batch_size / batch_shards(), length, vocab_size, platform_in_use())


def default_chunk(rows: float, length: int, vocab_size: int, platform: str) -> int:
  """Positions whose logits exist at a time by default.

  Args:
    rows: rows of the batch on one device. platform: the device's, "cpu", "gpu" or "tpu".
  """
  whole, chunked = _CHUNK_BYTES.get(platform, _CHUNK_BYTES_ELSEWHERE)
  position_bytes = math.ceil(4 * rows * vocab_size)
  if length * position_bytes <= whole:
    return length
  chunk = max(1, chunked // position_bytes)
  num_chunks = -(-length // chunk)
  return -(-length // num_chunks)  # even chunks, so that little is padded
