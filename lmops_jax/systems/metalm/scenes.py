"""Questions about pictures that are made on the spot, asked of an encoder docked to a decoder.

Stages: rows; for each arm and seed train and evaluate; report. The encoder reads a picture and the
question together, the decoder answers (arXiv:2206.06336, section 4). Arms start from the same
numbers and read the same rows in the same order: `seeing`, and `blind`, to which every picture is
black, so that only what questions tell of answers can be learned.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax

from lmops_jax.config.setting_types import Distinct, NonEmpty, PositiveInt, Seeds, component
from lmops_jax.data import picture_spans
from lmops_jax.data.image_tokens import ImageTokens, appended
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Rows
from lmops_jax.data.multimodal import Record, drawn, parts_of
from lmops_jax.data.picture_spans import PictureSpans
from lmops_jax.data.span_examples import encode, whole_input
from lmops_jax.data.spans import NoSpans
from lmops_jax.data.synthetic_pictures import Scenes, questions
from lmops_jax.data.tasks import Example
from lmops_jax.data.tasks.picture_prompts import ASKED
from lmops_jax.evaluation.over_seeds import share, shares_of
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.models.universal import UniversalConfig, UniversalLM
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.shared_stages import corpora
from lmops_jax.sizing.vocabulary import vocabulary_size
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan, training
from lmops_jax.systems.metalm.arms import Arm, sized
from lmops_jax.systems.metalm.evaluate import RESULTS_FILE, Asking
from lmops_jax.systems.metalm.picture_rows import (
  check_reads_words,
  positions_of_words,
  read_by,
  row_shape,
  vectors_of_picture,
)
from lmops_jax.systems.metalm.vision_language import IDS_FILE, read_ids
from lmops_jax.text.vocabulary_sources import VocabularySource
from lmops_jax.training import language_models, loop
from lmops_jax.training.metrics import read_records
from lmops_jax.training.sources import Epochs

ROWS, REPORT = "rows", "report"
SEEING, BLIND = "seeing", "blind"
ARMS = (SEEING, BLIND)
KINDS = ("color", "count")
GROUPS = ("seen", "held_out")  # pairs of shape and colour
_TRAIN_SEED, _TEST_SEED = 0, 1


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class SceneQuestions:
  """Questions about scenes; each is a function of (seed, index).

  Attributes:
    scenes: the world.
    kinds: what is asked, see `synthetic_pictures.Question`; kinds take turns.
    num_train: scenes to learn from, with a question each.
    num_items: scenes to ask about of each group of pairs, with a question each.
  """

  scenes: Scenes
  kinds: Annotated[Sequence[Literal[KINDS]], NonEmpty, Distinct] = KINDS
  num_train: PositiveInt = 6_000
  num_items: PositiveInt = 256

  def example(self, seed: int, index: int, held_out: bool = False) -> Example:
    """A question with its options, of which one is right; its category is its kind."""
    draws = np.random.default_rng((seed, index, 40))
    scene = self.scenes.scene(seed, index, held_out)
    kind = self.kinds[index % len(self.kinds)]
    asked, = (one for one in questions(draws, scene) if one.kind == kind)
    return Example(
      index, ASKED.format(question=asked.text), tuple(f" {option}" for option in asked.options),
      asked.options.index(asked.answer), images=(drawn(scene.picture, f"scene {index}"),),
      categories=(kind,))

  def items(self, held_out: bool) -> list[Example]:
    """What is asked of a group of pairs."""
    return [self.example(_TEST_SEED, i, held_out) for i in range(self.num_items)]

  def records(self) -> Iterator[Record]:
    """What is learned: questions, which are given, with their answers."""
    for index in range(self.num_train):
      row = self.example(_TRAIN_SEED, index)
      where = f"scene {index}"
      parts, num_given = parts_of(row.prompt, row.images, where, row.options[row.label])
      yield whole_input(Record(index, parts, num_given, where))


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Pictures(plan.Planned):
  """Trains small models that see and that do not, and asks them.

  Attributes:
    questions: about scenes.
    vocabulary: made from the questions.
    model: decoder and encoders, whose sizes of vocabularies come from the vocabulary.
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: questions of a step.
    length: predicted positions of a row.
    arms, seeds: seeds are of initialisation and order.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.

  Raises:
    ValueError: for encoders that do not read pictures and words, rows beyond the decoder's
      positions, or questions beyond a row.
  """

  questions: SceneQuestions
  vocabulary: VocabularySource
  model: UniversalConfig
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 32
  length: PositiveInt = 96
  arms: Annotated[Sequence[Literal[ARMS]], NonEmpty, Distinct] = ARMS
  seeds: Seeds = (0, 1)
  checkpoint_every: PositiveInt | None = 200

  name = "metalm_pictures"

  def __post_init__(self):
    check_reads_words(self.model, self._images, "metalm.Pictures.model")
    language_models.check_length(self.model.text, self.length)

  @property
  def _images(self) -> ImageSettings:
    side = self.questions.scenes.side
    return ImageSettings(side, side)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    stages = [skeleton.Stage(
      ROWS, self._rows, together=False, checks=("model",),
      reads=("questions", "vocabulary", "model.vision", "length"))]
    for seed in self.seeds:
      for arm in self.arms:
        train = f"train/{arm}/seed{seed}"
        bound = {"arm": arm, "partitioner": partitioner}
        stages += [
          skeleton.Stage(
            train, functools.partial(self._train, seed=seed, **bound), inputs=(ROWS,), seed=seed,
            reads=("model", "optimizer", "num_steps", "batch_size", "checkpoint_every")),
          skeleton.Stage(
            f"evaluate/{arm}/seed{seed}", functools.partial(self._evaluate, train=train, **bound),
            inputs=(ROWS, train), reads=("questions", "model", "num_steps"))]
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      REPORT, functools.partial(self._report, stages=names), inputs=names,
      reads=("questions", "arms", "seeds"), together=False))
    return stages

  def _rows(self, context: pipeline.StageContext) -> None:
    texts = (text for index in range(min(self.questions.num_train, 1000))
             for row in [self.questions.example(_TRAIN_SEED, index)]
             for text in (row.prompt, *row.options))
    vocabulary = corpora.build_vocabulary(context, self.vocabulary, texts)
    ids = appended(vocabulary, vectors_of_picture(self.model, self._images))
    write_json(context.directory / IDS_FILE, dataclasses.asdict(ids))
    counts = picture_spans.write(
      context.directory / "train", encode(self.questions.records(), vocabulary, ids), ids,
      self.length, pictures=1, encoder_positions=positions_of_words(self.model))
    if counts["cut"] or counts["dropped"]:
      raise ValueError(
        f"{counts['cut'] + counts['dropped']} questions are longer than the encoder's or the "
        "decoder's rows; raise models.FusedEncoderConfig.max_words and metalm.Pictures.length, or "
        "take a larger vocabulary."
      )
    context.extra["counts"] = counts

  def _step(self, vocab_size: int) -> plan.Step:
    config, images = sized(self.model, vocab_size), self._images
    part = plan.Part(
      row_shape(self.model, self.length, 1, images), 1, True, images.height, images.width)
    return plan.Step(
      config, self.optimizer, self.num_steps, self.batch_size, 1, {"": part},
      lambda partitioner: training.learner(UniversalLM(config), self.optimizer, 1, partitioner),
      "metalm.Pictures")

  def planned(self) -> plan.Step:
    """See `plan.Planned`: the step of either arm."""
    return self._step(vocabulary_size(
      self.model.vocab_size, self.vocabulary, "text/models.TransformerConfig.vocab_size=306"))

  def _arm(self, ids: ImageTokens) -> Arm:
    return Arm(sized(self.model, ids.vocab_size), NoSpans())

  def rows(self, folder: Path, arm: Literal[ARMS]) -> Rows:
    """What an arm learns from, from the folder of the stage `rows`."""
    num_slots = read_ids(folder).num_slots
    found = read_by(self.model, PictureSpans(folder / "train", self._images), num_slots)
    return found if arm == SEEING else BlackPictures(found)

  def _train(self, context: pipeline.StageContext, arm, seed, partitioner) -> None:
    folder = context.input(ROWS)
    rows, step = self.rows(folder, arm), self._step(read_ids(folder).vocab_size)
    model = UniversalLM(step.config)

    def initial():
      return nn.unbox(jax.jit(loop.initializer(model))(jax.random.key(seed)))

    result = training.run(
      context, model, self.optimizer, self.num_steps, 1, self.checkpoint_every, seed, initial,
      partitioner, Epochs(rows.batch, len(rows), self.batch_size, seed, whole=True))
    context.flops += result.step * step.flops
    context.extra["num_params"] = sum(x.size for x in jax.tree.leaves(result.state.params))

  def _evaluate(self, context: pipeline.StageContext, arm, train, partitioner) -> None:
    """Writes `results.json`: by group and kind `right` and `num`."""
    folder = context.input(ROWS)
    ids = read_ids(folder)
    made = self._arm(ids)
    params = language_models.load_params(
      context.input(train), self.num_steps, made.model, partitioner)
    asking = Asking(
      made, params, corpora.open_vocabulary(folder), partitioner, ids, self._images)
    results: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
      rows = self.questions.items(group == "held_out")
      shown = rows if arm == SEEING else list(map(_black, rows))
      results[group] = {}
      for kind in self.questions.kinds:  # each has options of its own
        asked = [row for row in shown if kind in row.categories]
        picks = asking.values(asked, ())[0].argmax(axis=1)
        right = int((picks == [row.label for row in asked]).sum())
        results[group][kind] = {"right": right, "num": len(asked)}
    write_json(context.directory / RESULTS_FILE, results)

  def _report(self, context: pipeline.StageContext, stages) -> None:
    report = RunReport(context, stages)
    found = {(arm, seed): json.loads(
      (context.input(f"evaluate/{arm}/seed{seed}") / RESULTS_FILE).read_text())
      for arm in self.arms for seed in self.seeds}
    figures = {
      arm: {f"{kind}/{group}": shares_of(
        [(found[arm, seed][group][kind]["right"], found[arm, seed][group][kind]["num"])
         for seed in self.seeds]) for kind in self.questions.kinds for group in GROUPS}
      for arm in self.arms}
    losses = {
      arm: [[[r["step"], r["loss"]] for r in read_records(
        context.input(f"train/{arm}/seed{seed}") / "metrics.jsonl") if "loss" in r]
        for seed in self.seeds] for arm in self.arms}
    of_train = context.manifest(f"train/{self.arms[0]}/seed{self.seeds[0]}")["extra"]
    summary = {
      "arms": list(self.arms), "seeds": list(self.seeds), "figures": figures,
      "chance": self._chance(), "num_params": of_train["num_params"],
      "num_steps": losses[self.arms[0]][0][-1][0], "stages": report.costs}
    curve = plots.curves(
      {arm: [plots.Run(*map(list, zip(*of_seed))) for of_seed in of]
       for arm, of in losses.items()},
      x_label="optimizer steps", y_label="loss (nats a learned token)")
    first = max(figures[self.arms[0]].items(), key=lambda item: item[1]["mean"])
    report.write(summary, html.Report(
      title="MetaLM: questions about pictures",
      lead=f"Of {first[0]} the arm {self.arms[0]} tells {first[1]['mean']:.1%}, where the most "
           f"frequent answer is right in {summary['chance'][first[0]]:.1%}.",
      key_figures=[html.KeyFigure(f"{of_train['num_params']:,}", "parameters"),
                   report.work_figure()],
      sections=[
        html.Section("Right answers", tables=[html.Table(
          ["question, pairs", *self.arms, "chance"], _table(summary),
          note="Percent with Wilson's 95% interval of the answers of all seeds; chance is what the "
               "most frequent answer reaches.")]),
        html.Section("Loss", figures=[report.figure("loss", curve, "Mean and span of seeds.")]),
        report.cost_section()],
      facts={"work": report.work, "versions": report.versions}),
      required=["figures.*.*.mean", "chance.*", "stages[].seconds"])

  def _chance(self) -> dict[str, float]:
    """What the most frequent answer reaches, by "kind/group"."""
    found = {}
    for group in GROUPS:
      rows = self.questions.items(group == "held_out")
      for kind in self.questions.kinds:
        labels = collections.Counter(row.label for row in rows if kind in row.categories)
        found[f"{kind}/{group}"] = max(labels.values()) / sum(labels.values())
    return found

  def table(self, summary: Mapping[str, Any]) -> str:
    """A line for each question and group of pairs, a column for each arm."""
    return text_table([["", *summary["arms"], "chance"], *_table(summary)])


class BlackPictures:
  """Rows whose pictures are black."""

  def __init__(self, rows: Rows):
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Rows as a batch."""
    batch = dict(self._rows.batch(indices))
    return batch | {"images": np.zeros_like(batch["images"])}

  def num_learned(self, indices: np.ndarray) -> np.ndarray:
    """Number of learned tokens of rows, `[n] int64`."""
    return self._rows.num_learned(indices)


def _black(row: Example) -> Example:
  """A row to be asked without its picture."""
  return row._replace(images=(drawn(np.zeros((8, 8, 3), np.uint8), "a black picture"),))


def _table(summary: Mapping[str, Any]) -> list[list[str]]:
  return [
    [name.replace("/", ", ").replace("_", " "),
     *(share(summary["figures"][arm][name]) for arm in summary["arms"]), f"{100 * chance:.1f}"]
    for name, chance in summary["chance"].items()]
