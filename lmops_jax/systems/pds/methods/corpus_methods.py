"""Methods that score every instance of the corpus directly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from lmops_jax.config.setting_types import (
  Name,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.data import export
from lmops_jax.systems.pds import dsir
from lmops_jax.systems.pds.methods.bench import Bench


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Random:
  """Uniform selection: every score is 0 and the selection's Gumbel noise decides."""

  name: Name = "random"

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    return (np.zeros(len(indices)) for indices in blocks(len(bench.corpus), 65_536))


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Length:
  """Prefers instances with many real tokens; tells whether length alone explains a gain."""

  name: Name = "length"

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    for indices in blocks(len(bench.corpus), 4096):
      yield bench.corpus.batch(indices)["loss_mask"].sum(axis=1)


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Filters by the proxy's loss on each instance.

  Attributes:
    prefer: "low" keeps what the proxy predicts best, "middle" what is nearest the median loss.
  """

  name: Name = "perplexity"
  prefer: Literal["low", "middle"] = "low"
  batch_size: PositiveInt = 64

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    corpus, params = bench.corpus, bench.proxy_params()
    all_losses = []
    with bench.context.progress(len(corpus), "instances", self.name) as bar:
      for indices in blocks(len(corpus), 4096):
        all_losses.append(bench.losses_of(params, corpus.batch(indices), self.batch_size))
        bar.update(len(indices))
    bench.add_flops(len(corpus) * corpus.length, 1)
    values = np.concatenate(all_losses)
    yield -values if self.prefer == "low" else -np.abs(values - np.median(values))


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class DSIR:
  """Importance weights of hashed n-grams, target against raw (see `dsir`).

  Attributes:
    num_raw: corpus instances that estimate the raw distribution, drawn by `seed`.
  """

  name: Name = "dsir"
  num_raw: PositiveInt = 20_000
  seed: Seed = 0

  def score_corpus(self, bench: Bench) -> Iterator[np.ndarray]:
    corpus, vocabulary = bench.corpus, bench.prepared.vocabulary
    target = bench.prepared.target_dev
    rng = np.random.default_rng(self.seed)
    raw = np.sort(rng.choice(len(corpus), min(self.num_raw, len(corpus)), replace=False))
    log_ratio = dsir.fit(
      texts_of(target, np.arange(len(target)), vocabulary), texts_of(corpus, raw, vocabulary)
    )
    with bench.context.progress(len(corpus), "instances", self.name) as bar:
      for indices in blocks(len(corpus), 4096):
        yield dsir.scores(texts_of(corpus, indices, vocabulary), log_ratio)
        bar.update(len(indices))


def blocks(num: int, size: int) -> Iterator[np.ndarray]:
  """Consecutive indices `0 .. num` in blocks of `size`."""
  for start in range(0, num, size):
    yield np.arange(start, min(start + size, num), dtype=np.int64)


def texts_of(instances, indices: np.ndarray, vocabulary) -> list[str]:
  """The instances as text, an empty line between documents."""
  rows = zip(instances.tokens(indices), instances.num_tokens(indices), strict=True)
  return ["\n\n".join(export.instance_texts(row[:num], vocabulary)) for row, num in rows]
