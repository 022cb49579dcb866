"""Kosmos-1 trained on data of one's own, at any size, as stages: rows, train, report.

Each part of a group has sources with weights: corpora of texts; pairs of a picture and its caption;
documents with pictures among their text. The stage `train` keeps the parameters.
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

from lmops_jax.config.setting_types import (
  ExistingPath,
  Name,
  NonEmpty,
  Positive,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.data import instance_writing, instances, packing
from lmops_jax.data.documents import Corpus
from lmops_jax.data.grounded_crops import fitted
from lmops_jax.data.grounded_text import appended_box_words
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import ImageTokens, appended, encode_records, special_words
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Mixture
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, sound
from lmops_jax.data.supervised import TOO_LONG
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.docked import DockedConfig
from lmops_jax.models.vision import with_top
from lmops_jax.pretrained import model as model_lib
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.shared_stages import corpora
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.kosmos import plan, training
from lmops_jax.systems.kosmos.world import INTERLEAVED, PAIRS, PARTS, TEXT
from lmops_jax.text.vocabulary_sources import VocabularySource
from lmops_jax.training.metrics import read_records
from lmops_jax.training.sources import Groups, Part

_IDS_FILE = "ids.json"


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Texts:
  """A source of texts: a corpus of module `data`, and how often its rows come."""

  name: Name
  corpus: Corpus
  weight: Positive = 1.0


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Pictures:
  """A source of records with pictures, and how often its rows come."""

  name: Name
  corpus: ImageCorpus
  weight: Positive = 1.0


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Pretrain:
  """Trains a docked language model.

  Attributes:
    texts, pairs, documents: the sources of each part of a group.
    vocabulary: to which the special tokens are added.
    model: of the docked language model.
    training: of which `text`, `pairs` and `interleaved` shape the rows.
    images: how pictures become pixels.
    clip: a published CLIP model whose vision tower is the first one; None draws it.
    too_long: what becomes of records beyond a row, see `image_rows.write_rows`.
    pictures_per_document: at most.
    grid: cells in a row of the words for boxes, which follow the special tokens (Kosmos-2: 32);
      None: a vocabulary without them, as that of Kosmos-1.
    seed: of initialisation and order.

  Raises:
    ValueError: rows longer than the model's positions, pictures of another size than the tower's,
      or two sources of one part with one name.
  """

  texts: Annotated[Sequence[Texts], NonEmpty]
  pairs: Annotated[Sequence[Pictures], NonEmpty]
  documents: Annotated[Sequence[Pictures], NonEmpty]
  vocabulary: VocabularySource
  model: DockedConfig
  training: training.Training
  images: ImageSettings = ImageSettings(fit="crop")
  clip: ExistingPath | None = None
  too_long: Literal[TOO_LONG] = "cut"
  pictures_per_document: PositiveInt = 5
  grid: Annotated[int, at.Ge(1), at.Le(100)] | None = None
  seed: Seed = 0

  name = "kosmos_pretrain"

  def __post_init__(self):
    longest = max(shape.length for shape in self.training.shapes.values())
    if longest > self.model.text.max_length:
      raise ValueError(
        f"a row of kosmos.Training has length={longest} and models.TransformerConfig.max_length is "
        f"{self.model.text.max_length}; raise the latter."
      )
    size = self.model.vision.image_size
    if {self.images.height, self.images.width} != {size}:
      raise ValueError(
        f"data.ImageSettings makes pictures of {self.images.height} x {self.images.width} and "
        f"models.VisionConfig.image_size is {size}; give both one size."
      )
    for part, sources in self.sources.items():
      names = Counter(source.name for source in sources)
      name, num = names.most_common(1)[0]
      if num > 1:
        raise ValueError(
          f"{num} sources of the part {part!r} are called {name!r}; give them different names.")

  @property
  def words(self) -> tuple[str, ...]:
    """The special tokens, which follow those of the vocabulary."""
    return special_words(self.grid)

  @property
  def sources(self) -> dict[str, Sequence[Texts] | Sequence[Pictures]]:
    """By part."""
    return {TEXT: self.texts, PAIRS: self.pairs, INTERLEAVED: self.documents}

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    shapes = tuple(f"training.{part}" for part in PARTS)
    return [
      skeleton.Stage(
        "rows", self._rows, together=False,
        reads=("texts", "pairs", "documents", "vocabulary", "model.connector", "images", *shapes,
               "too_long", "pictures_per_document", "grid"), checks=("model",)),
      skeleton.Stage(
        "train", functools.partial(self._train, partitioner=partitioner), inputs=("rows",),
        reads=("training", "model", "clip", "seed", "images"), result="model"),
      skeleton.Stage("report", self._report, inputs=("rows", "train"), together=False),
    ]

  def _rows(self, context: pipeline.StageContext) -> None:
    vocabulary = corpora.build_vocabulary(context, self.vocabulary, self._all_texts())
    ids = appended(vocabulary, self.model.vectors_per_image, self.words)
    box_words = None if self.grid is None else appended_box_words(vocabulary, self.words)
    write_json(context.directory / _IDS_FILE, dataclasses.asdict(ids))
    counts: dict[str, Mapping[str, int]] = {}
    for source in self.texts:
      documents = packing.encoded(
        source.corpus.documents(), vocabulary, line_end_id=ids.line_end_id)
      length = self.training.text.length
      packed = packing.pack(documents, length=length, bos_id=ids.bos_id, eos_id=ids.eos_id)
      folder = context.directory / TEXT / source.name
      instance_writing.write_instances(folder, packed, length=length, **{
        **instance_writing.encoded_with(vocabulary), "vocab_size": ids.vocab_size})
      counts[f"{TEXT}/{source.name}"] = {"rows": len(instances.open_instances(folder))}
    for part, sources in ((PAIRS, self.pairs), (INTERLEAVED, self.documents)):
      shape = getattr(self.training, part)
      for source in sources:
        left_out = LeftOut()
        found = sound(source.corpus.records(left_out), self.images, left_out)
        encoded = encode_records(
          fitted(found, self.images, left_out), vocabulary, ids, words=box_words,
          left_out=left_out)
        counts[f"{part}/{source.name}"] = write_rows(
          context.directory / part / source.name, encoded, ids,
          length=shape.length, pictures_per_row=shape.pictures,
          pictures_per_example=min(shape.pictures, self.pictures_per_document),
          too_long=self.too_long) | dict(left_out.counts)
        for reason, names in left_out.named.items():
          context.log(f"{part}/{source.name}: {left_out.counts[reason]} {reason}, {names[0]} first")
    context.extra["counts"] = counts

  def _all_texts(self) -> Iterator[str]:
    for source in self.texts:
      yield from (document.text for document in source.corpus.documents())

  def _groups(self, folder: Path) -> Groups:
    parts = {}
    for part, sources in self.sources.items():
      opened = {
        source.name: instances.open_instances(folder / part / source.name) if part == TEXT
        else ImageRows(folder / part / source.name, self.images) for source in sources}
      weights = {source.name: source.weight for source in sources}
      parts[part] = Part(
        Mixture(opened, weights, seed=self.seed), getattr(self.training, part).rows)
    return Groups(parts, self.training.num_groups)

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    folder = context.input("rows")
    ids = ImageTokens(**json.loads((folder / _IDS_FILE).read_text()))
    training.run(
      context, config=self.training, docked=training.docked_model(self.model, ids.vocab_size),
      arm=training.ARMS[training.FULL], seed=self.seed, source=self._groups(folder),
      vocabulary=corpora.open_vocabulary(folder),
      tower=None if self.clip is None else self._tower, partitioner=partitioner, words=self.words)

  def _tower(self) -> Any:
    """The tower of the published model, with the top layers that are trained in a stack apart."""
    found = model_lib.load(self.clip).params(None)["vision"]
    top = self.model.vision.top_layers
    return with_top(found, top) if top else found

  def _report(self, context: pipeline.StageContext) -> None:
    report = RunReport(context, ("rows", "train"))
    records = [r for r in read_records(context.input("train") / "metrics.jsonl") if "loss" in r]
    counts = context.manifest("rows")["extra"]["counts"]
    last = records[-1]["loss"]
    figure = plots.curves(
      {"training": [plots.Run([r["step"] for r in records], [r["loss"] for r in records])]},
      x_label="optimizer steps", y_label="loss (nats a learned token)")
    rows = [[source, name, num] for source, of in counts.items() for name, num in of.items()]
    report.write(
      {"train_loss": last, "num_steps": records[-1]["step"], "counts": counts,
       "stages": report.costs},
      html.Report(
        title="Kosmos-1: training on texts, pairs and documents with pictures",
        lead=f"The training loss is {last:.3f} nats a learned token after {records[-1]['step']} "
             "steps.",
        key_figures=[html.KeyFigure(f"{last:.3f}", "training loss", "nats a learned token"),
                     report.work_figure()],
        sections=[
          html.Section("Loss", figures=[report.figure("loss", figure, "Training loss by step.")]),
          html.Section("Data", "What became of each source, and what was left out.", tables=[
            html.Table(["source", "what", html.Column("number", ",d")], rows)]),
          report.cost_section()],
        facts={"work": report.work, "versions": report.versions}),
      required=["train_loss", "counts.*.rows"])

  def phases(self, partitioner, memory, *, platform: str, **sizes):
    """What training takes, from shapes alone; see `plan.phase`."""
    return [plan.phase(
      self.training, self.model, self.vocabulary, partitioner, platform, self.words)]

  def programs(self, partitioner, memory, **sizes):
    """The training step, to compile ahead of time."""
    return [plan.program(self.training, self.model, self.vocabulary, partitioner, self.words)]

  def table(self, summary: Mapping[str, Any]) -> str:
    """The loss and the rows of a finished run, for the terminal."""
    rows = [("", "rows"), *((name, f"{of['rows']:,}") for name, of in summary["counts"].items())]
    return f"training loss at the end: {summary['train_loss']:.4f}\n{text_table(rows)}"
