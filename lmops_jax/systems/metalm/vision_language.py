"""Vision-language training (arXiv:2206.06336, section 4.1), as stages: rows, train, report.

A group of rows has pairs of a picture and its text, and texts alone. A picture and a beginning of
its text, of random length, are read in both directions, and the decoder predicts the rest; so are
texts alone. Pictures and words are read together by one encoder (`models.fused_encoder`), or apart
by two.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optax

from lmops_jax.config.setting_types import Decay, PositiveInt, Seed, component
from lmops_jax.data.image_tokens import KOSMOS_WORDS, ImageTokens, appended
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.prefix_rows import Prefix, PrefixRows, RandomPrefix
from lmops_jax.data.supervised import TOO_LONG
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.universal import UniversalConfig, UniversalLM
from lmops_jax.shared_stages import corpora, group_report, held_out
from lmops_jax.shared_stages.grouped_rows import GroupedSources, Opened
from lmops_jax.shared_stages.row_sources import RowSource, Side
from lmops_jax.sizing.vocabulary import vocabulary_size
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan
from lmops_jax.systems.metalm.arms import sized
from lmops_jax.systems.metalm.picture_rows import (
  Pairs,
  PairShape,
  PlainTexts,
  check_reads_words,
  positions_of_words,
  read_by,
  row_shape,
  vectors_of_picture,
)
from lmops_jax.systems.metalm.training import SpanLosses
from lmops_jax.text.vocabulary_sources import VocabularySource
from lmops_jax.training import language_models, loop
from lmops_jax.training.group_losses import GroupLosses
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Ahead, Groups

ROWS, TRAIN, REPORT = "rows", "train", "report"
PAIRS, TEXTS = "pairs", "texts"
IDS_FILE = "ids.json"


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class GroupTraining:
  """How a model is trained on groups of rows.

  Attributes:
    optimizer: an optax transformation.
    pairs, texts: the rows of each part of a group; those of texts have no pictures.
    num_steps: optimizer steps.
    num_groups: of a step.
    accumulate: micro-batches of a step.
    eval_every: steps between two measurements of what is held out.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.

  Raises:
    ValueError: a number of groups that `accumulate` does not divide, or texts with pictures.
  """

  optimizer: optax.GradientTransformation
  pairs: PairShape
  texts: PairShape
  num_steps: PositiveInt
  num_groups: PositiveInt = 8
  accumulate: PositiveInt = 1
  eval_every: PositiveInt = 100
  checkpoint_every: PositiveInt | None = 100

  def __post_init__(self):
    if self.num_groups % self.accumulate:
      raise ValueError(
        f"metalm.GroupTraining.num_groups={self.num_groups} is not a multiple of accumulate="
        f"{self.accumulate}; choose one that divides it."
      )
    if self.texts.pictures or not self.pairs.pictures:
      raise ValueError(
        f"metalm.GroupTraining has pairs of {self.pairs.pictures} pictures a row and texts of "
        f"{self.texts.pictures}; give the former at least one and the latter none."
      )


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class VisionLanguage(plan.Planned):
  """Trains a decoder that reads pictures and beginnings of texts through encoders.

  Attributes:
    pairs, texts: the sources of each part of a group; a part without one is left out.
    vocabulary: to which the special tokens of pictures are added.
    model: decoder and encoders; sizes of vocabularies that it lacks come from the vocabulary.
    training: how, and the shape of rows.
    prefix: how much of each text is read; the paper does not tell.
    images: how pictures become pixels.
    too_long: what becomes of pairs beyond a row, see `image_rows.write_rows`.
    held_out: share of each source's records that nothing is learned from; their loss is measured.
      See `shared_stages.row_sources`.
    held_out_rows: of each source, the most that are measured.
    seed: of initialisation, order, and what is read.

  Raises:
    ValueError: no source, two of one part with one name, encoders that do not read pictures and
      words, rows longer than the decoder's positions, or pictures of another size than the
      encoder's.
  """

  pairs: Sequence[Pairs]
  texts: Sequence[PlainTexts]
  vocabulary: VocabularySource
  model: UniversalConfig
  training: GroupTraining
  prefix: Prefix = RandomPrefix()
  images: ImageSettings = ImageSettings(fit="crop")
  too_long: Literal[TOO_LONG] = "cut"
  held_out: Decay = 0.0
  held_out_rows: PositiveInt = 256
  seed: Seed = 0

  name = "metalm_vision_language"

  def __post_init__(self):
    self._grouped.check("metalm.VisionLanguage")
    check_reads_words(self.model, self.images, "metalm.VisionLanguage.model")
    for shape in self._shapes.values():
      language_models.check_length(self.model.text, shape.length)

  @property
  def _sources(self) -> dict[str, Sequence[RowSource]]:
    parts = {PAIRS: self.pairs, TEXTS: self.texts}
    return {part: sources for part, sources in parts.items() if sources}

  @property
  def _shapes(self) -> dict[str, PairShape]:
    return {part: getattr(self.training, part) for part in self._sources}

  @property
  def _num_slots(self) -> int:
    return vectors_of_picture(self.model, self.images)

  @property
  def _grouped(self) -> GroupedSources:
    return GroupedSources(
      self._sources, self._shapes, self.images, self.too_long, 1, self.held_out)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    return [
      skeleton.Stage(
        ROWS, self._rows, together=False, checks=("model",),
        reads=("pairs", "texts", "vocabulary", "model.vision", "images", "training.pairs",
               "training.texts", "too_long", "held_out")),
      skeleton.Stage(
        TRAIN, functools.partial(self._train, partitioner=partitioner), inputs=(ROWS,),
        reads=("training", "model", "prefix", "seed", "images", "held_out_rows")),
      skeleton.Stage(
        REPORT, functools.partial(group_report.run, title="MetaLM: training on pictures and texts"),
        inputs=(ROWS, TRAIN), together=False),
    ]

  def _rows(self, context: pipeline.StageContext) -> None:
    vocabulary = corpora.build_vocabulary(context, self.vocabulary, self._all_texts())
    ids = appended(vocabulary, self._num_slots)
    sized(self.model, ids.vocab_size)  # refuses a vocabulary that the model has no room for
    write_json(context.directory / IDS_FILE, dataclasses.asdict(ids))
    self._grouped.write(context, vocabulary, ids, KOSMOS_WORDS)

  def _all_texts(self) -> Iterator[str]:
    """What the vocabulary may be made from: texts, and if there are none those of pairs."""
    for source in self.texts:
      side = Side(f"{TEXTS}/{source.name}", self.held_out, False, Counter())
      yield from (document.text for document in source.documents(side))
    for source in () if self.texts else self.pairs:
      side = Side(f"{PAIRS}/{source.name}", self.held_out, False, Counter())
      yield from (part for record in source.records(side) for part in record.parts
                  if isinstance(part, str))

  def _read(self, opened: Opened) -> Opened:
    positions = positions_of_words(self.model)
    return {part: {
      name: read_by(
        self.model, PrefixRows(rows, self.prefix, self.seed, encoder_positions=positions),
        self._num_slots)
      for name, rows in of_part.items()} for part, of_part in opened.items()}

  def groups(self, folder: Path) -> Groups:
    """The batches of groups from the folder of the stage `rows`."""
    grouped = self._grouped
    return grouped.groups(
      self._read(grouped.opened(folder)), self.training.num_groups, self.seed, by_epoch=True)

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    folder, config = context.input(ROWS), self.training
    step = self._step(read_ids(folder).vocab_size)
    hooks = [held_out.validation(
      lambda part: GroupLosses(SpanLosses(UniversalLM(step.config)), (part,)),
      self._read(self._grouped.opened_held_out(folder)), self.held_out_rows, config.eval_every,
      partitioner)] if self.held_out else []
    result = loop.train(
      step.learner(partitioner), Ahead(self.groups(folder)), config.num_steps, self.seed,
      context.directory, partitioner, hooks=hooks, records=loop.Records(
        checkpoint_every=config.checkpoint_every, params_at=(config.num_steps,),
        description=context.name, progress=context.progress))
    context.flops += result.step * step.flops

  def _step(self, vocab_size: int) -> plan.Step:
    config, of = sized(self.model, vocab_size), self.training
    parts = {}
    for part, shape in self._shapes.items():
      size = (self.images.height, self.images.width) if shape.pictures else (0, 0)
      row = row_shape(self.model, shape.length, shape.pictures, self.images)
      parts[part] = plan.Part(row, shape.rows, True, *size)
    losses = GroupLosses(SpanLosses(UniversalLM(config)), tuple(parts))

    def learner(partitioner):
      return supervised(
        loop.initializer(losses.of_rows.model), losses, of.optimizer, accumulate=of.accumulate,
        keyed=True, check_batch=losses.check_batch, partitioner=partitioner)

    return plan.Step(
      config, of.optimizer, of.num_steps, of.num_groups, of.accumulate, parts, learner,
      "metalm.GroupTraining", "num_groups")

  def planned(self) -> plan.Step:
    """See `plan.Planned`."""
    return self._step(vocabulary_size(
      self.model.vocab_size, self.vocabulary, "text/models.TransformerConfig.vocab_size=50263",
      more=len(KOSMOS_WORDS)))

  def table(self, summary: Mapping[str, Any]) -> str:
    """The losses and the rows of a finished run, for the terminal."""
    return group_report.table(summary)


def read_ids(folder: Path) -> ImageTokens:
  """The special ids in the folder of the stage `rows`."""
  return ImageTokens(**json.loads((folder / IDS_FILE).read_text()))
