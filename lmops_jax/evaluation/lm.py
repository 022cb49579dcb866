"""Language-model loss on held-out documents: the mean over documents of each one's token mean.

This is the test loss of PDS (arXiv 2410.07064): one document a row, BOS + text + EOS, masked token
mean a document, plain mean over documents.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = Mapping[str, np.ndarray]
ExampleLosses = Callable[[Any, Batch], jax.Array]


def mean_loss(
  example_losses: ExampleLosses,
  params,
  batches: Iterable[Batch],
  *,
  place: Callable[[Batch], Batch] | None = None,
  multiple_of: int = 1,
) -> float:
  """Mean of per-document losses; every document counts once, whatever its length.

  Compiles once for a given `example_losses` object: a smaller last batch is filled up to the first
  one's size, and that to a multiple of `multiple_of`, with rows that do not count. All batches are
  dispatched before a value is read.

  Args:
    example_losses: `(params, batch) -> [B] float32`, nats per token. Reuse one object over calls.
    params: parameters.
    batches: dicts of arrays with leaves `[B,...]`, this process's rows, as many batches on every
      process; B may only shrink.
    place: turns such a dict into (sharded) device arrays, e.g. `Partitioner.place_batch`.
    multiple_of: what the number of a batch's rows must be a multiple of to be placed, e.g. this
      process's share of `Partitioner.num_batch_shards`.

  Returns:
    Nats per token, float.

  Raises:
    ValueError: no batch at all, a growing batch, or a document without any unmasked token.
    FloatingPointError: the loss of a batch is not finite.
  """
  sums = []
  for batch, valid in _filled(batches, multiple_of):
    batch = {name: leaf for name, leaf in batch.items() if name != "example_id"}  # 63 bits
    batch[_VALID] = valid
    batch = place(batch) if place else batch
    sums.append(_loss_sum(example_losses, params, batch))
  if not sums:
    raise ValueError("There is nothing to evaluate: the evaluation set has no batches.")
  total, count = 0.0, 0.0
  for i, (loss_sum, num_examples) in enumerate(jax.device_get(sums)):
    if not math.isfinite(loss_sum):
      raise FloatingPointError(f"The evaluation loss of batch {i} is {loss_sum}.")
    total += float(loss_sum)
    count += float(num_examples)
  return total / count


def perplexity(loss_per_token: float) -> float:
  """`exp(loss)` of a loss in nats per token; refuses NaN and a negative loss."""
  if not loss_per_token >= 0:
    raise ValueError(f"A loss in nats per token is not negative, but this one is {loss_per_token}.")
  return math.exp(loss_per_token) if loss_per_token < 700 else math.inf


_VALID = "evaluation_valid"


@functools.partial(jax.jit, static_argnums=0)
def _loss_sum(example_losses, params, batch):
  batch = dict(batch)
  valid = batch.pop(_VALID)
  losses = jnp.where(valid, example_losses(params, batch), 0.0)
  return jnp.sum(losses), jnp.sum(valid, dtype=losses.dtype)


def _filled(
  batches: Iterable[Batch], multiple_of: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
  """Yields batches of the first one's size, rounded up, and a `[B] bool` of the rows that count."""
  first = None
  for i, batch in enumerate(batches):
    num_rows = {len(leaf) for leaf in batch.values()}
    if len(num_rows) != 1 or 0 in num_rows:
      raise ValueError(
        f"Evaluation batch {i} needs leaves with one common, positive number of rows, "
        f"but they have {sorted(num_rows)}."
      )
    n = num_rows.pop()
    first = n if first is None else first
    if n > first:
      raise ValueError(
        f"Evaluation batch {i} has {n} rows, more than the first one's {first}; put it first."
      )
    size = -(-first // multiple_of) * multiple_of
    if "loss_mask" in batch:
      tokens = np.asarray(batch["loss_mask"]).reshape(n, -1).sum(-1)
      if not np.all(tokens > 0):
        row = int(np.argmin(tokens))
        name = f"example {int(batch['example_id'][row])}" if "example_id" in batch else f"row {row}"
        raise ValueError(
          f"Evaluation batch {i}: {name} has no token that counts, so its loss is undefined; "
          "drop it from the evaluation set."
        )
    index = np.minimum(np.arange(size), n - 1)
    filled = dict(batch) if n == size else {k: np.asarray(v)[index] for k, v in batch.items()}
    yield filled, np.arange(size) < n
