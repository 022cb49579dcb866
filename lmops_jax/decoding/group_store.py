"""Keys and values of groups that a model has read, on disk: what was read is not read again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from lmops_jax.host import hashing, whole_files


class GroupStore:
  """A folder of keys and values by what they are a function of.

  That is the model's settings and parameters, a group's tokens with what stands before them, and
  their positions. Numbers come back as they were, to the bit; a token takes 2 L K E of them.
  """

  def __init__(self, folder: Path | str, model, params):
    """
    Args:
      folder: made if it is missing; several models may share it.
      model: a `Transformer`.
      params: its parameters.

    Raises:
      ValueError: if the folder cannot be made.
    """
    self._folder, self._model, self._params = Path(folder), model, params
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(
        f"{folder} cannot be a folder for keys and values: {error.strerror}; name another one."
      ) from None

  @functools.cached_property
  def _identity(self) -> str:
    """A hash of the model; reading its parameters takes about a second a gigabyte."""
    def parts():
      yield repr(self._model.config)
      leaves, structure = jax.tree.flatten(nn.unbox(self._params))
      yield str(structure)
      for leaf in leaves:
        yield f"{leaf.dtype}{leaf.shape}"
        yield np.ascontiguousarray(jax.device_get(leaf)).tobytes()

    return hashing.digest(parts())

  def path(self, *parts: np.ndarray | None) -> Path:
    """The file of a group: `parts` are all that tells it from other groups of this model."""
    named = (b"none" if part is None else f"{part.dtype}{part.shape}".encode() + part.tobytes()
             for part in parts)
    return self._folder / f"{hashing.digest([self._identity, *named])}.npy"

  def write(self, path: Path, keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> None:
    """Keys and values `[K,t,E]` of each layer."""
    both = np.stack([np.stack(keys), np.stack(values)])
    with whole_files.replacing_shared(path) as partial, partial.open("wb") as file:
      np.save(file, both.view(np.uint8))

  def read(self, path: Path, num_tokens: int) -> np.ndarray:
    """Keys and values `[2,L,K,t,E]`, mapped from the disk.

    Raises:
      ValueError: for a file that `write` has not written.
    """
    c, dtype = self._model.config, np.dtype(self._model.config.dtype)
    shape = (2, c.num_layers, c.key_heads, num_tokens, c.head_width)
    try:
      found = np.load(path, mmap_mode="r", allow_pickle=False)
      if found.dtype != np.uint8 or found.shape != (*shape[:-1], shape[-1] * dtype.itemsize):
        raise ValueError
    except (ValueError, EOFError, OSError):
      raise ValueError(
        f"{path} does not hold keys and values of {num_tokens} tokens; delete it, and the group is "
        "read again."
      ) from None
    return found.view(dtype)
