"""Stage `select/<method>`: Gumbel top-k over the score shards, and the exports.

Two streaming passes over the shards with flat memory, and one before them for mean and deviation
where scores are standardised; the noise is a function of (seed, instance id), so the selection
depends on neither shard sizes nor their order (PDS, section 3; spec 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Lt

from lmops_jax.config.setting_types import Distinct, NonNegative, Share, component
from lmops_jax.data import export
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import moments, prepare, scores, selection

IDS_FILE = "ids.npy"
FORMATS = tuple(name for name in export.FORMATS if name != "ids")  # ids are always written


@component(module="pds")
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

  ratio: Share = 0.4
  tau: NonNegative = 0.1
  seed: Annotated[int, Ge(0), Lt(2**64)] = 0
  standardize: bool = True
  formats: Annotated[Sequence[Literal[FORMATS]], Distinct] = ()


def write_ids(path: Path, folder: Path, num_examples: int, config: Select) -> None:
  """Selects from the score shards in a folder, into an array file of ascending ids."""
  shift, scale = 0.0, 1.0
  if config.standardize:
    values = (values for _, values in scores.read_shards(folder, num_examples))
    shift, scale = shift_and_scale(sum(map(moments.Moments.of, values), start=moments.Moments()))

  def shards():
    for ids, values in scores.read_shards(folder, num_examples):
      yield ids, standardized(values, shift, scale)

  with path.open("wb") as file:
    write_header(file, selection.num_selected(num_examples, ratio=config.ratio))
    selection.select_stream(
      shards, num_examples=num_examples, ratio=config.ratio, tau=config.tau, seed=config.seed,
      write=lambda ids: file.write(ids.astype("<i8").tobytes()),
    )


def write_header(file, num_selected: int) -> None:
  """The beginning of an array file of ids, after which their bytes follow."""
  header = {"descr": "<i8", "fortran_order": False, "shape": (num_selected,)}
  np.lib.format.write_array_header_1_0(file, header)


def shift_and_scale(all_scores: moments.Moments) -> tuple[float, float]:
  """Mean and standard deviation of all scores; a deviation of 0 counts as 1."""
  return all_scores.mean, all_scores.deviation or 1.0


def standardized(values: np.ndarray, shift: float, scale: float) -> np.ndarray:
  return (values.astype(np.float64) - shift) / scale


def export_ids(corpus, path: Path, directory: Path, format: str, vocabulary) -> None:
  """Exports the instances whose ids are in an array file."""
  export.export_selection(corpus, np.load(path), directory, format=format, vocabulary=vocabulary)


def run(
  context: pipeline.StageContext, config: Select, annotate_stage: str, *, write_ids=write_ids,
  export_ids=export_ids,
) -> None:
  """Selects `floor(ratio * N)` instances.

  Args:
    write_ids, export_ids: do the work, in this process unless others are given.
  """
  prepared = prepare.Prepared(context.input("prepare"))
  corpus = prepared.corpus
  num_selected = selection.num_selected(len(corpus), ratio=config.ratio)
  path = context.directory / IDS_FILE
  write_ids(path, context.input(annotate_stage), len(corpus), config)
  for name in config.formats:
    export_ids(corpus, path, context.directory / name, name, prepared.vocabulary)
  context.extra.update(num_selected=num_selected, num_examples=len(corpus))


def selected_ids(context: pipeline.StageContext, stage: str) -> np.ndarray:
  return np.load(context.input(stage) / IDS_FILE)
