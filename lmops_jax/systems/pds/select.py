"""Stage `select/<method>`: Gumbel top-k over the score shards, and the exports.

Two streaming passes over the shards with flat memory, and one before them for mean and deviation
where scores are standardised; the noise is a function of (seed, instance id), so the selection
depends on neither shard sizes nor their order (PDS, section 3; spec 4).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from pathlib import Path

import gin
import numpy as np

from lmops_jax import pipeline
from lmops_jax.data import export
from lmops_jax.systems.pds import prepare, scores, selection

IDS_FILE = "ids.npy"
FORMATS = tuple(name for name in export.FORMATS if name != "ids")  # ids are always written


@gin.register(module="pds")
@dataclasses.dataclass(frozen=True)
class Select:
  """How many instances to keep, and for whom.

  Attributes:
    ratio: share of the corpus that is kept, in (0, 1].
    tau: scale of the Gumbel noise in standard deviations of the scores; 0: plain top-k.
    seed: of the noise.
    standardize: bring the corpus's scores to deviation 1 first, so that tau means the same for
      every method and every scorer. False takes a scorer's output as it is, as the paper does; a
      scorer whose best parameters come early predicts small deviations, which tau then drowns.
    formats: further exports beside the ids: "tfds", "jsonl", "parquet", "mmididx".
  """

  ratio: float = 0.4
  tau: float = 0.1
  seed: int = 0
  standardize: bool = True
  formats: tuple[str, ...] = ()

  def __post_init__(self):
    if not 0 < self.ratio <= 1:
      raise ValueError(f"pds.Select.ratio={self.ratio} is not in (0, 1]; set a share such as 0.4.")
    if not 0 <= self.tau < math.inf:
      raise ValueError(
        f"pds.Select.tau={self.tau} is not a finite number of 0 (no noise) or more; set one."
      )
    if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral) or not (
      0 <= self.seed < 1 << 64
    ):
      raise ValueError(f"pds.Select.seed={self.seed} is not an integer in [0, 2^64); set one.")
    unknown = [f for f in self.formats if f not in FORMATS]
    if unknown:
      raise ValueError(
        f"pds.Select.formats names {unknown[0]!r}; the formats are {', '.join(FORMATS)}."
      )


def run(context: pipeline.StageContext, config: Select, annotate_stage: str) -> None:
  """Selects `floor(ratio * N)` instances."""
  prepared = prepare.Prepared(context.input("prepare"))
  corpus = prepared.corpus
  folder = context.input(annotate_stage)
  shift, scale = _moments(folder, len(corpus)) if config.standardize else (0.0, 1.0)

  def shards():
    for ids, values in scores.read_shards(folder, len(corpus)):
      yield ids, (values.astype(np.float64) - shift) / scale

  num_selected = selection.num_selected(len(corpus), ratio=config.ratio)
  with (context.directory / IDS_FILE).open("wb") as file:
    header = {"descr": "<i8", "fortran_order": False, "shape": (num_selected,)}
    np.lib.format.write_array_header_1_0(file, header)
    selection.select_stream(
      shards, num_examples=len(corpus), ratio=config.ratio, tau=config.tau, seed=config.seed,
      write=lambda ids: file.write(ids.astype("<i8").tobytes()),
    )
  if config.formats:
    ids, vocabulary = np.load(context.directory / IDS_FILE), prepared.vocabulary
    for name in config.formats:
      export.export_selection(
        corpus, ids, context.directory / name, format=name, vocabulary=vocabulary
      )
  context.extra.update(num_selected=num_selected, num_examples=len(corpus))


def _moments(folder: Path, num_examples: int) -> tuple[float, float]:
  """Mean and standard deviation over all shards; a deviation of 0 counts as 1."""
  count, mean, squares = 0, 0.0, 0.0
  for _, values in scores.read_shards(folder, num_examples):
    values = values.astype(np.float64)
    total = count + len(values)
    delta = values.mean() - mean
    squares += values.var() * len(values) + delta**2 * count * len(values) / total
    mean, count = mean + delta * len(values) / total, total
  deviation = float(np.sqrt(squares / count))
  return mean, deviation if deviation > 0 else 1.0


def selected_ids(context: pipeline.StageContext, stage: str) -> np.ndarray:
  return np.load(context.input(stage) / IDS_FILE)
