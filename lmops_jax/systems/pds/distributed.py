"""The stages of PDS that read a whole corpus, on many workers: the same files, byte for byte.

Preparing, annotating by the fitted scorer, selecting and exporting, for corpora beyond one machine.
Each stage keeps what its workers leave in a folder of its own until all is there, so that a killed
stage goes on from there. Methods that score the corpus themselves (`score_corpus`) read it in one
process.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import optax

from lmops_jax.data import instance_writing, near_duplicates, packing
from lmops_jax.data import instances as instances_lib
from lmops_jax.data.distributed import buckets as buckets_lib
from lmops_jax.data.distributed import export
from lmops_jax.data.distributed.engine import Engine
from lmops_jax.host import seals
from lmops_jax.host.whole_files import replacing_shared
from lmops_jax.mesh import meshes
from lmops_jax.shared_stages import corpora
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import (
  moments,
  parallel_selection,
  prepare,
  pretrain,
  scorer,
  scores,
  select,
)
from lmops_jax.text import vocabularies

SCRATCH = "engine"
_SHARDS_TOGETHER = 16  # score shards that a worker reads at a time


def finished(run: Callable[[pipeline.StageContext], None], context: pipeline.StageContext) -> None:
  """Runs a stage, then removes what workers (also of an earlier attempt) left on the way."""
  run(context)
  shutil.rmtree(context.directory / SCRATCH, ignore_errors=True)


# --- prepare --------------------------------------------------------------------------------------


def run_prepare(context: pipeline.StageContext, config: prepare.Prepare, engine: Engine) -> None:
  """`prepare.run`."""
  prepare.run(context, config, write_corpus=functools.partial(_write_corpus, engine))


def _write_corpus(engine: Engine, context, config: prepare.Prepare, targets) -> prepare.Packed:
  """`prepare.write_corpus`: documents sorted, tokenised, their instances numbered, and written."""
  out, scratch = context.directory, context.directory / SCRATCH
  buckets = buckets_lib.Buckets(scratch / f"buckets-{engine.num_buckets}", engine.num_buckets)
  left_out: collections.Counter[str] = collections.Counter()
  buckets.sort(config.corpus, engine, left_out)
  context.log(f"documents sorted into {buckets.count} buckets")
  vocabulary = corpora.build_vocabulary(
    context, config.vocabulary, (d.text for d in buckets.all_documents()))

  settings = prepare.packing_settings(vocabulary, config)
  engine.each(
    functools.partial(_tokenize, buckets, settings),
    buckets.missing("totals", "tokens", "labels"),
    setup=functools.partial(_tokenizer, out / "vocabulary", targets),
  )
  engine.each(functools.partial(buckets.write_chain, settings), buckets.missing("chain"))
  entries, num = buckets.follow_chains()
  context.log(f"{num} instances to write")
  totals = _add_totals(buckets)
  num_held_out = min(config.num_held_out, num)
  prepare.check_corpus(num - num_held_out, totals, config)
  read = functools.partial(buckets.instances, settings, entries)
  num_tokens = export.write_instances(
    engine, buckets.folder / "shards", out / "corpus", num - num_held_out, read,
    length=config.length, **instance_writing.encoded_with(vocabulary),
  )
  instance_writing.write_encoded(
    out / "held_out", read(num - num_held_out, num), vocabulary, config.length
  )
  totals.num_tokens = num_tokens + instances_lib.open_instances(out / "held_out").total_tokens
  labels = (buckets.path("labels", bucket) for bucket in range(buckets.count))
  with (out / prepare.LABELS_FILE).open("wb") as file:
    export.append(file, labels)
  return prepare.Packed(num - num_held_out, num_held_out, totals, left_out)


def _tokenizer(vocabulary: Path, targets):
  """What a worker needs for any bucket."""
  return vocabularies.load_vocabulary(vocabulary), near_duplicates.OverlapIndex(targets)


def _tokenize(buckets: buckets_lib.Buckets, settings: dict, opened, bucket: int) -> None:
  """Writes a bucket's tokens, its labels and, when these are there, its totals."""
  vocabulary, index = opened
  totals = prepare.Totals()
  with seals.replacing_shared(buckets.path("labels", bucket)) as partial:
    with partial.open("w", encoding="utf-8") as labels:
      kept = prepare.without_overlap(buckets.documents(bucket), index, totals, labels)
      buckets.write_tokens(
        bucket, packing.encoded(kept, vocabulary), length=settings["length"],
        eos_id=settings["eos_id"],
      )
  with seals.replacing_shared(buckets.path("totals", bucket)) as partial:
    partial.write_text(json.dumps(dataclasses.asdict(totals)))


def _add_totals(buckets: buckets_lib.Buckets) -> prepare.Totals:
  result = prepare.Totals()
  for bucket in range(buckets.count):
    part = json.loads(buckets.path("totals", bucket).read_text())
    for name, value in part.items():
      setattr(result, name, getattr(result, name) + value)
  return result


# --- annotate -------------------------------------------------------------------------------------


def annotate(
  context: pipeline.StageContext, config: scorer.Scorer, proxy: pretrain.Pretrain, engine: Engine,
  scorer_stage: str,
) -> None:
  """`scorer.annotate`; every worker scores on the first device that it has."""
  prepared, fitted = context.input("prepare"), context.input(scorer_stage)
  view = scorer.annotated_view(prepared, fitted)
  num, size = len(view.instances), config.shard_size
  shards = scores.missing_shards(context.directory, -(-num // size))
  (context.directory / SCRATCH).mkdir(exist_ok=True)
  context.log(f"{len(shards)} shards of {size} instances to score")
  # What trains the scorer stays here: workers need the model alone, and closures do not travel.
  inference = dataclasses.replace(
    config, optimizer=optax.GradientTransformation(None, None), model=config.trunk(proxy),
    vocabulary=None, init=None, from_proxy=False,
  )
  engine.each(
    functools.partial(_annotate, context.directory, num, size), shards,
    setup=functools.partial(_annotator, prepared, fitted, inference),
  )
  num_new = sum(min(size, num - shard * size) for shard in shards)
  context.flops += num_new * scorer.flops_per_instance(config, proxy, view)


def _annotator(prepared: Path, fitted: Path, config: scorer.Scorer) -> scorer.Annotator:
  view = scorer.annotated_view(prepared, fitted)
  return scorer.Annotator(view, fitted, config, None, meshes.single_device())


def _annotate(directory: Path, num: int, size: int, annotator: scorer.Annotator, shard) -> None:
  start = shard * size
  values = annotator.shard(start, min(start + size, num))
  path = scores.shard_path(directory, shard)
  with seals.replacing_shared(path, directory / SCRATCH) as partial:
    scores.save_scores(partial, values)


# --- select ---------------------------------------------------------------------------------------


def run_select(
  context: pipeline.StageContext, config: select.Select, annotate_stage: str, engine: Engine
) -> None:
  """`select.run`."""
  scratch = context.directory / SCRATCH
  scratch.mkdir(exist_ok=True)
  select.run(
    context, config, annotate_stage,
    write_selected=functools.partial(_write_selected, engine, scratch),
    export_selected=functools.partial(_export_selected, engine, scratch),
  )


@dataclasses.dataclass(frozen=True)
class _Survey:
  """Of score shards: `(shard, first index, count)` of each, and the moments of all."""

  shards: tuple[tuple[int, int, int], ...] = ()
  moments: moments.Moments = moments.Moments()

  def __add__(self, other: _Survey) -> _Survey:
    return _Survey(self.shards + other.shards, self.moments + other.moments)


def _write_selected(
  engine: Engine, scratch: Path, directory: Path, folder: Path, num_examples: int,
  config: select.Select,
) -> None:
  """`select.write_selected`."""
  numbers = sorted(int(p.stem.rsplit("_", 1)[1]) for p in folder.glob(scores.SHARD_PATTERN))
  items = [
    numbers[i : i + _SHARDS_TOGETHER] for i in range(0, len(numbers), _SHARDS_TOGETHER)
  ]
  total = functools.partial(engine.total, folder=scratch)
  survey = total(functools.partial(_survey, folder), items, _Survey())
  found = {
    shard: scores.Shard(start, range(size), None) for shard, start, size in survey.shards
  }
  collections.deque(scores.in_order(folder, num_examples, found.__getitem__), maxlen=0)

  shift, scale = (0.0, 1.0)
  if config.standardize:
    shift, scale = select.shift_and_scale(survey.moments)
  parallel_selection.select(
    total, items, functools.partial(_read, folder, shift, scale),
    functools.partial(_write_chosen, scratch), num_examples=num_examples, ratio=config.ratio,
    tau=config.tau, seed=config.seed,
  )
  with select.writing_selected(directory) as append:
    for item in items:
      rows, ids = np.load(_chosen(scratch, item))
      append(rows + found[item[0]].start, ids)


def _survey(folder: Path, shards: list[int]) -> _Survey:
  result = _Survey()
  for shard in shards:
    start, ids, values = scores.load_shard(folder, shard)
    result += _Survey(((shard, start, len(ids)),), moments.Moments.of(values))
  return result


def _read(folder: Path, shift: float, scale: float, shards: list[int]) -> Iterator:
  for shard in shards:
    _, ids, values = scores.load_shard(folder, shard)
    yield ids, select.standardized(values, shift, scale)


def _chosen(scratch: Path, shards: list[int]) -> Path:
  return scratch / f"chosen-{shards[0]:06d}"


def _write_chosen(
  scratch: Path, shards: list[int], chosen: Iterable[tuple[np.ndarray, np.ndarray]]
) -> None:
  """Writes rows of these shards and ids, `[2,n] int64`."""
  pairs = np.concatenate([np.zeros((2, 0), np.int64), *map(np.stack, chosen)], axis=1)
  with replacing_shared(_chosen(scratch, shards)) as partial, partial.open("wb") as file:
    np.save(file, pairs)


def _export_selected(
  engine: Engine, scratch: Path, corpus, selected: Path, directory: Path, format: str, vocabulary
) -> None:
  """`select.export_selected`."""
  export.export_selection(
    engine, scratch / format, corpus, selected / select.INDICES_FILE, directory, format, vocabulary
  )
