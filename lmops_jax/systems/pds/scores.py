"""Score files: what the solving and annotating stages leave, and how it is checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from lmops_jax.host import seals
from lmops_jax.host.whole_files import write_arrays

PROXY_FILE = "proxy_scores.npz"
SHARD_PATTERN = "scores_*.npz"


class ProxyScores(NamedTuple):
  """Scores of the proxy set.

  Attributes:
    indices: rows of the corpus, `[M] int64`, ascending. ids: the instances' ids, `[M] int64`.
    scores: `[C,M]`, a row a checkpoint.
  """

  indices: np.ndarray
  ids: np.ndarray
  scores: np.ndarray


class Shard(NamedTuple):
  """Scores of consecutive instances of the corpus.

  Attributes:
    start: index of the first one. ids: their ids, `[n] int64`. scores: `[n] float32`.
  """

  start: int
  ids: np.ndarray
  scores: np.ndarray


def standardize(
  scores: np.ndarray, *, clip: float | None = 3.0, ranks: bool = False
) -> np.ndarray:
  """z-scores of the mean of each checkpoint's z-scores, clipped (PDS, section 3).

  Args:
    scores: `[C,M]` or `[M]`; a row a checkpoint. Rows are standardised before they are averaged
      because the length of the gradient, and so the scale of the scores, differs between them.
    clip: largest absolute value kept; None clips nothing.
    ranks: replace each mean by the normal quantile of its rank, so that no score is an outlier and
      only the order counts; equal scores share their average rank.

  Returns:
    `[M] float64` of mean 0 and standard deviation 1 before the clipping.

  Raises:
    ValueError: if scores are not finite, or all the same.
  """
  rows = np.atleast_2d(np.asarray(scores, np.float64))
  if not np.isfinite(rows).all():
    raise ValueError(
      f"{np.count_nonzero(~np.isfinite(rows))} of {rows.size} proxy scores are not finite; lower "
      "the inner learning rate of the solve."
    )

  def z_score(row):
    deviation = row.std()
    if deviation <= 1e-12 * max(np.abs(row).max(), 1e-300):
      raise ValueError(
        f"all {row.size} proxy scores equal {row.flat[0]:g}; a scorer can learn nothing from them."
      )
    return (row - row.mean()) / deviation

  mean = np.mean([z_score(row) for row in rows], axis=0)
  if ranks:
    mean = special.ndtri((stats.rankdata(mean) - 0.5) / len(mean))
  z = z_score(mean)
  return z if clip is None else np.clip(z, -clip, clip)


def save_proxy_scores(directory: Path, proxy: ProxyScores) -> None:
  write_arrays(directory / PROXY_FILE, proxy._asdict())


def load_proxy_scores(directory: Path) -> ProxyScores:
  with np.load(directory / PROXY_FILE) as arrays:
    return ProxyScores(**arrays)


def shard_path(directory: Path, shard: int) -> Path:
  return directory / f"scores_{shard:06d}.npz"


def save_shard(directory: Path, number: int, shard: Shard) -> None:
  """Writes the scores of a shard and seals them."""
  save_scores(shard_path(directory, number), shard)
  seals.seal(shard_path(directory, number))


def missing_shards(directory: Path, num: int) -> list[int]:
  """Which of `num` shards an interrupted attempt has not left whole."""
  whole = seals.all_whole([shard_path(directory, shard)] for shard in range(num))
  return [shard for shard in range(num) if not whole[shard]]


def save_scores(path: Path, shard: Shard) -> None:
  """`save_shard` to a path of any name, without a seal."""
  start, ids, scores = shard
  write_arrays(
    path, {"start": np.int64(start), "ids": ids, "scores": scores.astype(np.float32)}
  )


def load_shard(directory: Path, number: int) -> Shard:
  """What `save_shard` wrote.

  Raises:
    ValueError: if a score is not finite, or the ids are missing.
  """
  path = shard_path(directory, number)
  with np.load(path) as arrays:
    if "ids" not in arrays:
      raise ValueError(f"{path} holds no ids of its instances; annotate again.")
    shard = Shard(int(arrays["start"]), arrays["ids"], arrays["scores"])
  if not np.isfinite(shard.scores).all():
    bad = shard.start + int(np.flatnonzero(~np.isfinite(shard.scores))[0])
    raise ValueError(f"{path} holds a score that is not finite (instance {bad}); annotate again.")
  return shard


def read_shards(directory: Path, num_examples: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (ids, scores) shard by shard in corpus order.

  Raises:
    ValueError: if a shard is missing, out of order or not finite, or the count is not
      `num_examples`.
  """
  for shard in in_order(directory, num_examples, functools.partial(load_shard, directory)):
    yield shard.ids, shard.scores


def in_order(
  directory: Path, num_examples: int, load: Callable[[int], Shard]
) -> Iterator[Shard]:
  """Yields `load(number)` of all shards, after a look at each one's start and length.

  Raises:
    ValueError: if a shard is missing or out of order, or the count is not `num_examples`.
  """
  next_index, number = 0, 0
  while next_index < num_examples:
    path = shard_path(directory, number)
    if not path.exists():
      raise ValueError(
        f"{path} is missing: scores end at instance {next_index} of {num_examples}; annotate again."
      )
    shard = load(number)
    if shard.start != next_index:
      raise ValueError(
        f"{path} starts at instance {shard.start}, expected {next_index}: shards are missing or "
        "reordered; annotate again."
      )
    yield shard
    next_index, number = next_index + len(shard.ids), number + 1
  if next_index != num_examples or shard_path(directory, number).exists():
    raise ValueError(
      f"{directory} holds scores of more than the corpus's {num_examples} instances; annotate "
      "again."
    )
