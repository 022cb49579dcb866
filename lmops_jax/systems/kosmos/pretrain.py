"""Kosmos-1 trained on data of one's own, at any size, as stages: rows, train, report.

Each part of a group has sources with weights: corpora of texts; pairs of a picture and its caption;
documents with pictures among their text; instructions, which tune a trained model (section 3.3 of
arXiv:2302.14045) while the others go on. A part without a source is left out: with texts alone it
is the paper's baseline "LLM". The stage `train` is a model folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at
import flax.linen as nn
import jax

from lmops_jax.config.setting_types import (
  Decay,
  ExistingPath,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.data.boxes import LARGEST_GRID
from lmops_jax.data.grounded_text import appended_box_words
from lmops_jax.data.image_tokens import KOSMOS_WORDS, ImageTokens, appended, special_words
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.supervised import TOO_LONG
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.docked import DockedConfig
from lmops_jax.pretrained import trained_vocabulary
from lmops_jax.shared_stages import corpora, group_report, held_out
from lmops_jax.shared_stages.grouped_rows import GroupedSources
from lmops_jax.shared_stages.row_sources import RowSource, Side
from lmops_jax.sizing import docked as docked_sizes
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.kosmos import plan, starts, training
from lmops_jax.systems.kosmos.prepare import RowShape
from lmops_jax.systems.kosmos.sources import Instructions, Pictures, Texts
from lmops_jax.systems.kosmos.world import INTERLEAVED, PAIRS, PARTS, TEXT
from lmops_jax.text.vocabulary_sources import VocabularySource
from lmops_jax.training import loop
from lmops_jax.training.sources import Ahead, Groups

INSTRUCTIONS = "instructions"
_IDS_FILE = "ids.json"


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Pretrain:
  """Trains a docked language model.

  Attributes:
    texts, pairs, documents: the sources of each part of a group; a part without one is left out.
    vocabulary: to which the special tokens are added.
    model: of the docked language model.
    training: of which `text`, `pairs` and `interleaved` shape the rows.
    instructions: sources of a fourth part; rows of `instruction_rows`.
    instruction_rows: their shape, without pictures.
    images: how pictures become pixels.
    clip: a published CLIP model whose vision tower is the first one; None draws it.
    start: the model folder of an earlier run to go on from, with fresh optimizer state; words for
      boxes that it lacks, as Kosmos-1's does, are drawn.
    too_long: what becomes of records beyond a row, see `image_rows.write_rows`.
    pictures_per_document: at most.
    grid: cells in a row of the words for boxes, which follow the special tokens (Kosmos-2: 32);
      None: a vocabulary without them, as that of Kosmos-1.
    held_out: share of each source's records that nothing is learned from; their loss is measured
      every `kosmos.Training.eval_every` steps. See `shared_stages.row_sources`.
    held_out_rows: of each source, the most that are measured.
    seed: of initialisation and order.

  Raises:
    ValueError: no source, rows longer than the model's positions, pictures of another size than the
      tower's, two sources of one part with one name, instructions without the shape of their rows
      or with pictures, or two models to start from.
  """

  texts: Sequence[Texts]
  pairs: Sequence[Pictures]
  documents: Sequence[Pictures]
  vocabulary: VocabularySource
  model: DockedConfig
  training: training.Training
  instructions: Sequence[Instructions] = ()
  instruction_rows: RowShape | None = None
  images: ImageSettings = ImageSettings(fit="crop")
  clip: ExistingPath | None = None
  start: ExistingPath | None = None
  too_long: Literal[TOO_LONG] = "cut"
  pictures_per_document: PositiveInt = 5
  grid: Annotated[int, at.Ge(1), at.Le(LARGEST_GRID)] | None = None
  held_out: Decay = 0.0
  held_out_rows: PositiveInt = 256
  seed: Seed = 0

  name = "kosmos_pretrain"

  def __post_init__(self):
    self._grouped.check("kosmos.Pretrain")
    if bool(self.instructions) != (self.instruction_rows is not None):
      raise ValueError(
        f"kosmos.Pretrain has {len(self.instructions)} instructions and instruction_rows="
        f"{self.instruction_rows}; give both or neither."
      )
    if self.instruction_rows is not None and self.instruction_rows.pictures:
      raise ValueError(
        f"kosmos.Pretrain.instruction_rows has pictures={self.instruction_rows.pictures}; set it "
        "to 0, since instructions have none."
      )
    if self.clip is not None and self.start is not None:
      raise ValueError(
        "kosmos.Pretrain has both clip and start; leave clip out, since start brings a tower.")
    training.check_sizes(self.model, self.shapes, {})
    size = self.model.vision.image_size
    if {self.images.height, self.images.width} != {size}:
      raise ValueError(
        f"data.ImageSettings makes pictures of {self.images.height} x {self.images.width} and "
        f"models.VisionConfig.image_size is {size}; give both one size."
      )

  @property
  def words(self) -> tuple[str, ...]:
    """The special tokens, which follow those of the vocabulary."""
    return special_words(self.grid)

  @property
  def sources(self) -> dict[str, Sequence[RowSource]]:
    """By part, of the parts that have any."""
    parts = {TEXT: self.texts, PAIRS: self.pairs, INTERLEAVED: self.documents,
             INSTRUCTIONS: self.instructions}
    return {part: sources for part, sources in parts.items() if sources}

  @property
  def _grouped(self) -> GroupedSources:
    return GroupedSources(
      self.sources, self.shapes, self.images, self.too_long, self.pictures_per_document,
      self.held_out)

  @property
  def shapes(self) -> dict[str, RowShape]:
    """Of the rows of each part that has sources."""
    shapes = {**self.training.shapes, INSTRUCTIONS: self.instruction_rows}
    return {part: shapes[part] for part in self.sources}

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system.

    Raises:
      ValueError: for a model to start from that does not fit.
    """
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    if self.clip is not None:
      starts.check_clip(self.clip, self.model.vision)
    return [
      skeleton.Stage(
        "rows", self._rows, together=False,
        reads=("texts", "pairs", "documents", "instructions", "vocabulary", "model.connector",
               "images", *(f"training.{part}" for part in PARTS), "instruction_rows", "too_long",
               "pictures_per_document", "grid", "held_out"), checks=("model", "start")),
      skeleton.Stage(
        "train", functools.partial(self._train, partitioner=partitioner), inputs=("rows",),
        reads=("training", "model", "clip", "start", "seed", "images", "held_out_rows"),
        result="model"),
      skeleton.Stage(
        "report", functools.partial(
          group_report.run, title="Kosmos: training on texts, pairs and documents with pictures"),
        inputs=("rows", "train"), together=False),
    ]

  def _rows(self, context: pipeline.StageContext) -> None:
    vocabulary = corpora.build_vocabulary(context, self.vocabulary, self._all_texts())
    ids = appended(vocabulary, self.model.vectors_per_image, self.words)
    box_words = None if self.grid is None else appended_box_words(vocabulary, self.words)
    self._check_start(ids)
    write_json(context.directory / _IDS_FILE, dataclasses.asdict(ids))
    self._grouped.write(context, vocabulary, ids, self.words, box_words)

  def _check_start(self, ids: ImageTokens) -> None:
    if self.start is not None:
      starts.check_folder(
        self.start, training.docked_model(self.model, ids.vocab_size).config,
        len(self.words) - len(KOSMOS_WORDS))

  def _all_texts(self) -> Iterator[str]:
    """The texts that the vocabulary may be made from."""
    for source in self.texts:
      side = Side(f"{TEXT}/{source.name}", self.held_out, False, Counter())
      yield from (document.text for document in source.documents(side))

  def _groups(self, folder: Path) -> Groups:
    grouped = self._grouped
    return grouped.groups(grouped.opened(folder), self.training.num_groups, self.seed)

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    folder, config = context.input("rows"), self.training
    ids = ImageTokens(**json.loads((folder / _IDS_FILE).read_text()))
    self._check_start(ids)
    docked = training.docked_model(self.model, ids.vocab_size)
    grouped, hooks = self._grouped, []
    if self.held_out:
      hooks.append(held_out.validation(
        lambda part: training.group_losses(docked, (part,)), grouped.opened_held_out(folder),
        self.held_out_rows, config.eval_every, partitioner))
    result = loop.train(
      training.learner(docked, config, self._arm, partitioner), Ahead(self._groups(folder)),
      config.num_steps, self.seed, context.directory, partitioner, hooks=hooks,
      initial_params=self._initial(docked),
      records=loop.Records(
        checkpoint_every=config.checkpoint_every, params_at=(config.num_steps,),
        description=context.name, progress=context.progress))
    context.flops += result.step * config.num_groups * docked_sizes.group_flops(
      docked.config, self.shapes.values(),
      docked_sizes.trains_whole_tower(
        config.optimizer, jax.eval_shape(loop.initializer(docked), jax.random.key(0))))
    if context.writes:
      trained_vocabulary.describe_trained(
        context.directory, docked.config, corpora.open_vocabulary(folder),
        params=f"params/{config.num_steps}", log=context.log, words=self.words)

  @property
  def _arm(self) -> training.Arm:
    return training.ARMS[training.FULL]._replace(parts=tuple(self.sources))

  def _initial(self, docked):
    """A function that makes the first parameters, or None to draw them."""
    if self.start is not None:
      return lambda: starts.folder_params(self.start, docked, self.seed)
    if self.clip is None:
      return None

    def with_clip():
      drawn = nn.unbox(jax.jit(loop.initializer(docked))(jax.random.key(self.seed)))
      return {**drawn, "vision": starts.clip_tower(self.clip, self.model.vision)}

    return with_clip

  def phases(self, partitioner, memory, *, platform: str, **sizes):
    """What training takes, from shapes alone; see `plan.phase`."""
    return [plan.phase(
      self.training, self.model, self.vocabulary, partitioner, platform, self.shapes, self.words)]

  def programs(self, partitioner, memory, **sizes):
    """The training step, to compile ahead of time."""
    return [plan.program(
      self.training, self.model, self.vocabulary, partitioner, self.shapes, self.words)]

  def table(self, summary: Mapping[str, Any]) -> str:
    """The losses and the rows of a finished run, for the terminal."""
    return group_report.table(summary)
