"""The parts, besides the loop, of training a language model from scratch on packed instances."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmops_jax.host import hashing
from lmops_jax.models import transformer
from lmops_jax.training import loop
from lmops_jax.training.sources import Epochs


def check_length(config: transformer.TransformerConfig, length: int) -> None:
  """Raises ValueError if instances of this length have more tokens than the model has positions."""
  if length > config.max_length:
    raise ValueError(
      f"instances of length={length} are longer than "
      f"models.TransformerConfig.max_length={config.max_length}; raise the latter."
    )


def language_model(config: transformer.TransformerConfig, vocab_size: int, length: int):
  """The model for a vocabulary; a published one keeps its own, perhaps larger, size.

  Raises:
    ValueError: if the instances are longer than its positions, or the vocabulary has more ids.
  """
  check_length(config, length)
  if config.vocab_size is not None:
    if config.vocab_size < vocab_size:
      raise ValueError(
        f"the vocabulary has {vocab_size} ids and models.TransformerConfig.vocab_size is "
        f"{config.vocab_size}; leave it out, or use the model's own vocabulary."
      )
    return transformer.Transformer(config)
  return transformer.Transformer(dataclasses.replace(config, vocab_size=vocab_size))


def batch_source(
  instances, indices: np.ndarray | None, batch_size: int, seed: int, shuffle: bool = True
) -> Epochs:
  """Batches of the instances `indices` (None: all)."""
  if indices is None:
    return Epochs(instances.batch, len(instances), batch_size, seed, shuffle)
  return Epochs(
    lambda index: instances.batch(indices[index]), len(indices), batch_size, seed, shuffle)


def selection_source(instances, indices: np.ndarray, batch_size: int, seed: int) -> Epochs:
  """Batches of the instances `indices`, ordered anew in each epoch by their ids.

  The order is a function of (seed, epoch, id): selections that share most instances train on them
  at about the same steps. By their places in the selection, one instance more would give all that
  follow it another place, and the two runs nothing in common.
  """
  ids = np.asarray(instances.ids[indices])

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return indices[np.argsort(hashing.order_keys(ids, hashing.order_key(epoch, seed)))]

  return Epochs(
    lambda index, epoch: instances.batch(order(epoch)[index]), len(indices), batch_size, seed,
    shuffle=False, by_epoch=True)


def abstract_params(init_params: Callable[[jax.Array], Any], partitioner):
  """Shapes of the parameters with their places on the mesh."""
  return partitioner.placed_shapes(jax.eval_shape(init_params, jax.random.key(0)))


def load_params(directory: Path, step: int, model, partitioner):
  """Language-model parameters that a finished stage kept at `step`, placed on the mesh."""
  abstract = abstract_params(loop.initializer(model), partitioner)
  return loop.load_kept_params(directory, step, abstract)
