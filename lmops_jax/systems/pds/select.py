"""Stage `select/<method>`: Gumbel top-k over the score shards, and the exports.

The shards are read a few times with flat memory, and once before that for their mean and deviation
when scores are standardised. The noise is a function of (seed, instance id), so the selection
depends on neither shard sizes nor their order, and an instance's noise does not depend on the rest
of the corpus (PDS, section 3).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Lt

from lmops_jax.config.setting_types import Distinct, NonNegative, Share, component
from lmops_jax.data import export
from lmops_jax.data.growing_arrays import growing
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import moments, parallel_selection, prepare, scores, selection

# The selected instances: their rows in the corpus, ascending, and their ids, a number each.
INDICES_FILE, IDS_FILE = "indices.npy", "ids.npy"
FORMATS = tuple(name for name in export.FORMATS if name != "ids")  # ids are always written


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Select:
  """How many instances to keep, and for whom.

  Attributes:
    ratio: share of the corpus that is kept, in (0, 1].
    tau: scale of the Gumbel noise in standard deviations of the scores; 0: plain top-k.
    seed: seed of the noise.
    standardize: bring the corpus's scores to deviation 1 first, so that tau means the same for
      every method and every scorer. False takes a scorer's output as it is, as the paper does; a
      scorer whose best parameters come early predicts small deviations, which tau then drowns.
    formats: exports beside the indices and ids: "tfds", "jsonl", "parquet", "mmididx".
  """

  ratio: Share = 0.4
  tau: NonNegative = 0.1
  seed: Annotated[int, Ge(0), Lt(2**64)] = 0
  standardize: bool = True
  formats: Annotated[Sequence[Literal[FORMATS]], Distinct] = ()


def write_selected(directory: Path, folder: Path, num_examples: int, config: Select) -> None:
  """Selects from the score shards in a folder and writes indices and ids into a directory."""
  shift, scale = 0.0, 1.0
  if config.standardize:
    values = (values for _, values in scores.read_shards(folder, num_examples))
    shift, scale = shift_and_scale(sum(map(moments.Moments.of, values), start=moments.Moments()))

  def shards():
    for ids, values in scores.read_shards(folder, num_examples):
      yield ids, standardized(values, shift, scale)

  with writing_selected(directory) as append:
    parallel_selection.select_in_process(
      shards, append, num_examples=num_examples, ratio=config.ratio, tau=config.tau,
      seed=config.seed,
    )


@contextlib.contextmanager
def writing_selected(directory: Path) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
  """Yields a function that appends `(indices [n], ids [n])` to the files of a selection."""
  with growing(directory / INDICES_FILE) as indices, growing(directory / IDS_FILE) as ids:

    def append(some_indices: np.ndarray, some_ids: np.ndarray) -> None:
      indices(some_indices)
      ids(some_ids)

    yield append


def shift_and_scale(all_scores: moments.Moments) -> tuple[float, float]:
  """Mean and standard deviation of all scores; a deviation of 0 counts as 1."""
  return all_scores.mean, all_scores.deviation or 1.0


def standardized(values: np.ndarray, shift: float, scale: float) -> np.ndarray:
  return (values.astype(np.float64) - shift) / scale


def export_selected(corpus, selected: Path, directory: Path, format: str, vocabulary) -> None:
  """Exports the instances that `write_selected` has put into the folder `selected`."""
  ids = np.load(selected / IDS_FILE)
  export.export_selection(corpus, ids, directory, format=format, vocabulary=vocabulary)


def run(
  context: pipeline.StageContext, config: Select, annotate_stage: str, *,
  write_selected=write_selected, export_selected=export_selected,
) -> None:
  """Selects `floor(ratio * N)` instances.

  Args:
    write_selected, export_selected: do the work, in this process unless others are given.
  """
  prepared = prepare.Prepared(context.input("prepare"))
  corpus = prepared.corpus
  num_selected = selection.num_selected(len(corpus), ratio=config.ratio)
  out = context.directory
  write_selected(out, context.input(annotate_stage), len(corpus), config)
  for name in config.formats:
    export_selected(corpus, out, out / name, name, prepared.vocabulary)
  context.extra.update(num_selected=num_selected, num_examples=len(corpus))


def selected_indices(context: pipeline.StageContext, stage: str) -> np.ndarray:
  """Rows of the corpus that a finished stage has selected, `[n] int64`, ascending."""
  return np.load(context.input(stage) / INDICES_FILE)
