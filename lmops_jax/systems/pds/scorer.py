"""Stages `scorer/<method>` and `annotate/<method>`: from scores of a few to scores of all.

The scorer is the same transformer with mean pooling and a linear head, fitted to the standardised
proxy scores by squared error; the parameters with the best validation Spearman are kept (PDS,
section 3).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from lmops_jax.config.setting_types import Part, Positive, PositiveInt, Seed, component
from lmops_jax.evaluation import correlation, examples
from lmops_jax.host.whole_files import write_arrays
from lmops_jax.mesh import checkpoints, processes
from lmops_jax.models import heads
from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import convert, prepare, pretrain, scores
from lmops_jax.text import vocabularies
from lmops_jax.text.vocabulary_sources import VocabularySource
from lmops_jax.training import language_models, loop, losses
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Epochs

PARAMS_FOLDER, VOCABULARY_FOLDER = "scorer", "vocabulary"
VALIDATION_FILE = "validation.npz"
_NUM_COMPARED = 64  # instances whose conversion is read back and compared


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Scorer:
  """How the proxy scores are learned and applied to the corpus.

  Attributes:
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: that of the training.
    eval_every: steps between two validations; the best by Spearman is kept.
    validation_fraction: share of the proxy set, drawn by `seed`, that is never trained on.
    clip: largest absolute standardised score.
    ranks: learn the normal quantiles of the scores' ranks instead of the scores.
    model: `models.TransformerConfig` of the trunk; None takes the proxy's.
    vocabulary: an existing vocabulary for the scorer (`data.SentencePieceFile`, ...), to which
      instances are converted; None takes the corpus's.
    from_proxy: start the trunk from the proxy's last parameters.
    init: a published model to start the trunk from, `@pretrained.load()`, instead of `model`; the
      scorer's vocabulary must be its own.
    pooling: "mean" over positions, or the "last" or "first" one.
    inference_batch_size: batch size of the annotation.
    shard_size: instances of a score shard; an interrupted annotation resumes at a shard.
    seed: seed of split, initialisation and order.
  """

  optimizer: optax.GradientTransformation
  num_steps: PositiveInt = 300
  batch_size: PositiveInt = 32
  eval_every: PositiveInt = 50
  validation_fraction: Part = 0.1
  clip: Positive | None = 3.0
  ranks: bool = False
  model: TransformerConfig | None = None
  vocabulary: VocabularySource | None = None
  from_proxy: bool = True
  init: PretrainedModel | None = None
  pooling: Literal[heads.POOLINGS] = "mean"
  inference_batch_size: PositiveInt = 64
  shard_size: PositiveInt = 8192
  seed: Seed = 0

  def __post_init__(self):
    for name in ("model", "vocabulary", "init"):
      if getattr(self, name) is not None and self.from_proxy:
        raise ValueError(
          f"pds.Scorer.{name} is set, so its trunk cannot start from the proxy's parameters; set "
          "pds.Scorer.from_proxy=False."
        )
    if self.init is not None:
      object.__setattr__(self, "model", self.init.config)

  def trunk(self, proxy: pretrain.Pretrain):
    return proxy.model if self.model is None else self.model


def split(num: int, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Random (train, validation) positions, both ascending; at least two of each."""
  num_validation = max(2, round(validation_fraction * num))
  if num - num_validation < 2:
    raise ValueError(
      f"{num} scored proxies are too few to split; raise num_proxies or lower "
      "pds.Scorer.validation_fraction."
    )
  order = np.random.default_rng(seed).permutation(num)
  return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def scorer_model(config: Scorer, proxy: pretrain.Pretrain, view: View) -> heads.SequenceRegressor:
  trunk = language_models.language_model(config.trunk(proxy), view.vocab_size, view.length)
  return heads.SequenceRegressor(trunk.config, pooling=config.pooling)


class View:
  """Instances as the scorer sees them: all real tokens, BOS and separators included.

  Args:
    prepared: the finished stage `prepare`.
    vocabulary: that of a scorer with a vocabulary of its own; tokens are then converted.

  Raises:
    ValueError: if converted instances do not read like the originals.
  """

  def __init__(self, prepared: prepare.Prepared, vocabulary=None):
    self.instances, self.vocabulary = prepared.corpus, vocabulary
    self.length = self.instances.length
    self.vocab_size = self.instances.vocab_size if vocabulary is None else vocabulary.vocab_size
    if vocabulary is not None:
      self._source = prepared.vocabulary
      sample = np.random.default_rng(0).choice(
        len(self.instances), min(_NUM_COMPARED, len(self.instances)), replace=False
      )
      convert.check_same_text(
        (self._source.decode(row.tolist()) for row in self._originals(sample)),
        (vocabulary.decode(row.tolist()) for row in self._converted(sample)),
      )

  def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """`tokens [n,S] int32`, `mask [n,S] float32`, `example_id [n] int64`."""
    if self.vocabulary is None:
      tokens = self.instances.tokens(indices)[:, : self.length]
      # Padding stands at the end only, and may share its id with EOS.
      lengths = np.minimum(self.instances.num_tokens(indices), self.length)
    else:
      converted = self._converted(indices)
      lengths = np.array([len(row) for row in converted])
      tokens = np.full((len(indices), self.length), self.vocabulary.pad_id, np.int32)
      for i, row in enumerate(converted):
        tokens[i, : len(row)] = row
    mask = (np.arange(self.length)[None] < lengths[:, None]).astype(np.float32)
    return {"tokens": tokens, "mask": mask, "example_id": np.array(self.instances.ids[indices])}

  def _originals(self, indices) -> list[np.ndarray]:
    rows = zip(self.instances.tokens(indices), self.instances.num_tokens(indices), strict=True)
    return [row[:num] for row, num in rows]

  def _converted(self, indices) -> list[np.ndarray]:
    return [
      convert.convert_tokens(row, self._source, self.vocabulary, self.length)
      for row in self._originals(indices)
    ]


def own_view(
  context: pipeline.StageContext, config: Scorer, prepared: prepare.Prepared
) -> View:
  """Instances as a scorer that the stage is to fit sees them; leaves its own vocabulary, if any."""
  if config.vocabulary is None:
    return View(prepared)
  folder = context.directory / VOCABULARY_FOLDER
  if context.writes:
    config.vocabulary.build((), folder)
  context.group.barrier(f"vocabulary of {context.name}")
  return View(prepared, vocabularies.load_vocabulary(folder))


def first_params(
  config: Scorer, model: heads.SequenceRegressor, proxy_params: Callable[[], Any], partitioner
):
  """What a scorer starts from: the proxy's trunk, a published one, or None for one of its own."""
  key = jax.random.key(config.seed)
  if config.from_proxy:
    return heads.regressor_params(model, key, proxy_params())
  if config.init is not None:
    return heads.regressor_params(model, key, config.init.params(partitioner))
  return None


def fit(
  context: pipeline.StageContext, config: Scorer, proxy: pretrain.Pretrain, partitioner,
  solve_stage: str,
) -> None:
  """Fits the scorer; leaves its parameters, and its validation predictions for the report."""
  view = own_view(context, config, prepare.Prepared(context.input("prepare")))
  scored = scores.load_proxy_scores(context.input(solve_stage))
  targets = scores.standardize(scored.scores, clip=config.clip, ranks=config.ranks)
  train, validation = split(len(targets), config.validation_fraction, config.seed)
  rows = view.rows(scored.indices) | {"score": targets.astype(np.float32)}
  if config.batch_size > len(train):
    raise ValueError(
      f"pds.Scorer.batch_size={config.batch_size} exceeds the {len(train)} proxies to train on; "
      "lower it or raise num_proxies."
    )

  model = scorer_model(config, proxy, view)
  example_losses = losses.regression_example_losses(model)
  predict = jax.jit(example_losses.predict)
  held_out = {k: v[validation] for k, v in rows.items()}

  def validate(params) -> dict[str, float]:
    predicted = examples.map_examples(
      predict, params, held_out, config.inference_batch_size, partitioner
    )
    return {
      "spearman": correlation.spearman(predicted, targets[validation]),
      "squared_error": float(np.mean((predicted - targets[validation]) ** 2)),
    }

  def proxy_params():
    language_model = language_models.language_model(proxy.model, view.vocab_size, view.length)
    return language_models.load_params(
      context.input("proxy"), proxy.num_steps, language_model, partitioner)

  every = range(config.eval_every, config.num_steps + 1, config.eval_every)
  result = loop.train(
    supervised(
      initializer(model), example_losses, config.optimizer,
      check_batch=example_losses.check_batch, partitioner=partitioner),
    Epochs(lambda index: {k: v[train[index]] for k, v in rows.items()}, len(train),
           config.batch_size, config.seed),
    config.num_steps, config.seed, context.directory / "training", partitioner,
    initial_params=first_params(config, model, proxy_params, partitioner),
    hooks=[loop.Evaluate("validation", config.eval_every, validate)],
    records=loop.Records(
      checkpoint_every=config.eval_every, params_at=sorted({0, *every, config.num_steps}),
      description=context.name),
  )
  curve = {
    row["step"]: row["validation/spearman"]
    for row in result.history if "validation/spearman" in row
  }
  best = max(curve, key=lambda step: (curve[step], -step))
  params = loop.load_kept_params(
    context.directory / "training", best,
    language_models.abstract_params(initializer(model), partitioner),
  )
  checkpoints.save_params(context.directory / PARAMS_FOLDER, params)
  predicted = examples.map_examples(
    predict, params, held_out, config.inference_batch_size, partitioner
  )
  if context.writes:
    write_arrays(context.directory / VALIDATION_FILE, {
      "indices": scored.indices[validation], "ids": scored.ids[validation],
      "target": targets[validation], "predicted": predicted,
    })
  threshold = correlation.top_fraction_metrics(predicted, targets[validation], fraction=0.3)
  context.extra.update(
    validation_spearman=curve[best], best_step=best, num_train=len(train),
    num_validation=len(validation), validation_curve=sorted(curve.items()),
    top_30_percent=threshold,
  )
  per_token = flops.forward_flops_per_token(model.config, view.length, unembedding=False)
  context.flops += 3 * config.num_steps * config.batch_size * view.length * per_token


@functools.lru_cache
def initializer(model: heads.SequenceRegressor):
  """`key -> parameters` (with their logical axes); one object a model, so that it compiles once."""
  one = np.ones((1, 1), np.int32)
  return lambda key: model.init(key, one, one)["params"]


def annotated_view(prepared: Path, fitted: Path) -> View:
  """The corpus as a fitted scorer sees it."""
  own = fitted / VOCABULARY_FOLDER
  vocabulary = vocabularies.load_vocabulary(own) if own.exists() else None
  return View(prepare.Prepared(prepared), vocabulary)


def flops_per_instance(config: Scorer, proxy: pretrain.Pretrain, view: View) -> float:
  """Floating-point operations of scoring one instance."""
  model = scorer_model(config, proxy, view)
  return view.length * flops.forward_flops_per_token(model.config, view.length, unembedding=False)


class Annotator:
  """A fitted scorer over the instances of a corpus.

  Args:
    view: the corpus as the scorer sees it. fitted: folder of the stage `scorer`.
    config: the scorer's settings. proxy: the proxy's settings.
    partitioner: that of the job.
    alone: score on this process's devices, whatever the job's other processes do.
  """

  def __init__(
    self, view: View, fitted: Path, config: Scorer, proxy: pretrain.Pretrain, partitioner,
    alone: bool = False,
  ):
    self._view = view
    model = scorer_model(config, proxy, view)
    self._params = checkpoints.load_params(
      fitted / PARAMS_FOLDER, language_models.abstract_params(initializer(model), partitioner)
    )
    if alone:
      partitioner = partitioner.local()
      self._params = jax.device_put(processes.fetch(self._params), partitioner.shardings(
        jax.eval_shape(initializer(model), jax.random.key(0))))
    self._predict = jax.jit(losses.regression_example_losses(model).predict)
    self._batch_size, self._partitioner = config.inference_batch_size, partitioner

  def shard(self, start: int, stop: int) -> scores.Shard:
    """The scores of the instances `start .. stop`."""
    rows = self._view.rows(np.arange(start, stop, dtype=np.int64))
    values = examples.map_examples(
      self._predict, self._params, rows, self._batch_size, self._partitioner
    )
    return scores.Shard(start, rows["example_id"], values)


def annotate(
  context: pipeline.StageContext, config: Scorer, proxy: pretrain.Pretrain, partitioner,
  scorer_stage: str,
) -> None:
  """Scores every instance of the corpus, shard by shard; finished shards are not done again.

  Of several processes each reads and scores shards of its own, on its own devices.
  """
  fitted = context.input(scorer_stage)
  view = annotated_view(context.input("prepare"), fitted)
  annotator = Annotator(
    view, fitted, config, proxy, partitioner, alone=context.group.count > 1
  )
  num = len(view.instances)
  shards = {
    shard: (start, min(start + config.shard_size, num))
    for shard, start in enumerate(range(0, num, config.shard_size))
  }
  missing = set(scores.missing_shards(context.directory, len(shards)))
  with context.progress(num, "instances", context.name) as bar:
    for shard, (start, stop) in shards.items():
      context.group.check()
      if shard in missing and shard % context.group.count == context.group.index:
        scores.save_shard(context.directory, shard, annotator.shard(start, stop))
      bar.update(stop - start)
  num_new = sum(stop - start for start, stop in map(shards.get, missing))
  context.flops += num_new * flops_per_instance(config, proxy, view)


def write_scores(
  context: pipeline.StageContext, ids: np.ndarray, values, shard_size: int
) -> None:
  """Writes a corpus method's score blocks as shards of `shard_size`.

  Of several processes all compute the blocks, on their common devices, and the first one writes.

  Args:
    ids: ids of all instances of the corpus, `[N] int64`.
  """
  waiting = np.zeros(0)
  shard = 0

  def save(values: np.ndarray) -> None:
    start = shard * shard_size
    if context.writes:
      own = np.array(ids[start : start + len(values)])
      scores.save_shard(context.directory, shard, scores.Shard(start, own, values))

  for block in values:
    waiting = np.concatenate([waiting, np.asarray(block, np.float64)])
    while len(waiting) >= shard_size:
      save(waiting[:shard_size])
      waiting, shard = waiting[shard_size:], shard + 1
  if len(waiting):
    save(waiting)
  written = shard * shard_size + len(waiting)
  if written != len(ids):
    raise ValueError(
      f"{context.name} gave {written} scores for {len(ids)} instances; the method must yield "
      "one score an instance, in corpus order."
    )


