"""Which examples make up the batch of a step: pure functions of (seed, step).

Nothing is carried from batch to batch, so a run resumes in mid-epoch by asking for its step, and
the examples of a step do not depend on the number of hosts. Only integer arithmetic is used, so the
order is the same on every platform and with every version of NumPy.
"""

import functools

import numpy as np

from lmops_jax.host.hashing import GOLDEN, mix64, order_key


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The order of an epoch, `[num_examples] int64`, read-only; another one for each epoch.

  Sorts the examples by a hash of (seed, epoch, index). The last few results are kept, since the
  steps of an epoch all ask for the same one.
  """
  start = np.uint64(order_key(epoch, seed))
  keys = mix64(start + np.arange(num_examples, dtype=np.uint64) * np.uint64(GOLDEN))
  order = np.argsort(keys, kind="stable")
  order.setflags(write=False)
  return order


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
  """Whole batches in an epoch.

  Raises:
    ValueError: for a batch size below 1, or fewer examples than one batch needs.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} is not positive; set it to 1 or more.")
  if num_examples < batch_size:
    raise ValueError(
      f"{num_examples} examples are fewer than one batch of batch_size={batch_size}; set the batch "
      "size to at most the number of examples, or give more text."
    )
  return num_examples // batch_size


def batch_indices(
  num_examples: int, batch_size: int, seed: int, step: int, shuffle: bool = True
) -> np.ndarray:
  """Indices of the examples of a step, `[batch_size] int64`.

  Each epoch goes once through a permutation of its own and leaves out the tail that fills no batch;
  without `shuffle` every epoch is in corpus order and leaves out the last examples.
  """
  per_epoch = num_steps_per_epoch(num_examples, batch_size)
  if step < 0:
    raise ValueError(f"step={step} is negative.")
  epoch, position = divmod(step, per_epoch)
  rows = slice(position * batch_size, (position + 1) * batch_size)
  if not shuffle:
    return np.arange(rows.start, rows.stop, dtype=np.int64)
  return epoch_permutation(seed, epoch, num_examples)[rows]


def host_rows(
  batch_size: int, process_index: int, process_count: int, name: str = "batch_size"
) -> slice:
  """The rows of a global batch that one process reads.

  Args:
    name: the setting's name, for errors.

  Raises:
    ValueError: if the number of processes does not divide the batch, or there is no such process.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(f"process {process_index} is not one of {process_count} processes.")
  if batch_size % process_count:
    raise ValueError(
      f"{name}={batch_size} is not a multiple of the number of processes ({process_count}); "
      f"set it to a multiple of {process_count}."
    )
  rows = batch_size // process_count
  return slice(process_index * rows, (process_index + 1) * rows)


def token_weights(loss_mask: np.ndarray) -> np.ndarray:
  """Weights that make the mean over a batch's rows one over its learned tokens.

  Args:
    loss_mask: `[B,S]`.

  Returns:
    `[B] float32`, whose mean is 1.
  """
  learned = loss_mask.sum(axis=1)
  return (learned * len(learned) / learned.sum()).astype(np.float32)
