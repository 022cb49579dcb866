"""A trained MetaLM finetuned on one task or several: tasks, rows, train, evaluate, report.

The whole input, of words or of pictures and words, is read by the encoder, the answer is words
(arXiv:2206.06336, sections 2.4, 3.2 to 3.4 and 4.3). With the decoder frozen, only the encoder and
its connector learn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import optax

from lmops_jax.config.setting_types import Count, NonEmpty, PositiveInt, Seed, component
from lmops_jax.data import task_sets
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Rows
from lmops_jax.data.span_examples import SpecialIds
from lmops_jax.data.spans import NoSpans
from lmops_jax.data.task_records import TaskClusters, listing_options
from lmops_jax.data.tasks import Task, TaskSource
from lmops_jax.data.tasks.choice import checked, read_task
from lmops_jax.data.tasks.task import OF_BOXES
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.universal import UniversalConfig, UniversalLM
from lmops_jax.sizing.universal import RowShape
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan, prompts, training, tuning_report
from lmops_jax.systems.metalm.arms import Arm, sized
from lmops_jax.systems.metalm.evaluate import RESULTS_FILE
from lmops_jax.systems.metalm.picture_rows import (
  check_reads_words,
  positions_of_words,
  read_by,
  row_shape,
  vectors_of_picture,
)
from lmops_jax.systems.metalm.report import drawn
from lmops_jax.systems.metalm.starts import FinishedRun
from lmops_jax.systems.metalm.task_answers import TaskAnswers
from lmops_jax.training import language_models
from lmops_jax.training.sources import Endless

ROWS, TRAIN, EVALUATE, REPORT = "rows", "train", "evaluate", "report"
_MOMENTS = tuning_report.MOMENTS


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class TaskTuning(plan.Planned):
  """Finetunes a trained model on tasks, and asks it before and after.

  Attributes:
    start: the run that has trained the model, `@metalm.FinishedRun()`, or for tasks with pictures
      `@metalm.FinishedPictureRun()`.
    model: decoder and encoders, with the settings that they were trained with.
    records: what is learned, `@data.TaskClusters()` of `@data.TaskRecords()`, or of
      `@data.ImageJsonl()` with prompts and completions; each example comes equally often.
    tasks: what is asked, by options or for answers that are generated.
    optimizer: an optax transformation; with `{'text/.*': None, '.*': ...}` as the rules of
      `@optim.partition()` the decoder is frozen.
    num_steps: optimizer steps.
    batch_size: rows of a batch, each of one example or, packed, of several.
    accumulate: micro-batches of a step.
    length: predicted positions of a row; longer examples are cut at the front of their input.
    pack: put several examples into a row; not those of tasks with pictures.
    pictures: those of a row, at most, the same for all tasks; 0 for tasks of texts.
    images: how they become pixels, of any size that the encoder takes.
    generation: how open answers are generated; MetaLM takes 4 beams and a length penalty of 0.6
      for texts, and no beams for pictures.
    list_options: ask with the options in the prompt, as `data.TaskRecords.list_options` learns.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    seed: of the order.

  Raises:
    ValueError: for a model without encoders for the tasks, pictures without `images` or packed,
      rows longer than the decoder's positions, two tasks of one name, or a batch that does not
      split.
  """

  start: FinishedRun
  model: UniversalConfig
  records: TaskClusters
  tasks: Annotated[Sequence[TaskSource], NonEmpty]
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 32
  accumulate: PositiveInt = 1
  length: PositiveInt = 256
  pack: bool = False
  pictures: Count = 0
  images: ImageSettings | None = None
  generation: GenerationOptions = GenerationOptions(max_new_tokens=32)
  list_options: bool = False
  checkpoint_every: PositiveInt | None = 500
  seed: Seed = 0

  name = "metalm_task_tuning"

  def __post_init__(self):
    if self.pictures:
      if self.images is None or self.pack:
        raise ValueError(
          f"metalm.TaskTuning has pictures={self.pictures}, images={self.images} and pack="
          f"{self.pack}; rows with pictures need images=@data.ImageSettings() and pack=False."
        )
      check_reads_words(self.model, self.images, "metalm.TaskTuning.model")
    elif self.model.reader is None:
      raise ValueError(
        "metalm.TaskTuning.model has no reader; dock one with models.UniversalConfig.reader, or "
        "set pictures for tasks with some."
      )
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"metalm.TaskTuning.batch_size={self.batch_size} is not a multiple of accumulate="
        f"{self.accumulate}; choose one that divides it."
      )
    language_models.check_length(self.model.text, self.length)
    names = [task.name for task in self.tasks]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(
          f"metalm.TaskTuning.tasks has {name!r} twice; give one of them another "
          "tasks.choose.label."
        )

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system.

    Raises:
      ValueError: for a start that is not finished, or another model.
    """
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    self.start.check(self.model)
    asked = [checked(task.stage(f"tasks[{i}]"), self._check, "start", "model", "list_options",
                     "pictures", "images", "generation")
             for i, task in enumerate(self.tasks)]
    of_tasks = tuple(stage.name for stage in asked)
    inputs = (*of_tasks, ROWS, TRAIN, EVALUATE)
    return [
      *asked,
      skeleton.Stage(
        ROWS, self._rows,
        reads=("records", "start", "model.reader", "length", "pack", "pictures", "images"),
        checks=("model",), together=False),
      skeleton.Stage(
        TRAIN, functools.partial(self._train, partitioner=partitioner), inputs=(ROWS,),
        reads=("start", "model", "optimizer", "num_steps", "batch_size", "accumulate",
               "checkpoint_every", "seed", "images")),
      skeleton.Stage(
        EVALUATE, functools.partial(self._evaluate, partitioner=partitioner),
        inputs=(*of_tasks, TRAIN),
        reads=("start", "model", "num_steps", "list_options", "tasks", "images", "generation")),
      skeleton.Stage(
        REPORT, functools.partial(self._report, stages=inputs), inputs=inputs,
        reads=("start", "num_steps"), together=False)]

  @property
  def _part(self) -> plan.Part:
    if not self.pictures:
      return plan.Part(RowShape(self.length, encoder_length=self.length), packed=True)
    shape = row_shape(self.model, self.length, self.pictures, self.images)
    return plan.Part(shape, 1, True, self.images.height, self.images.width)

  @property
  def _ids(self) -> SpecialIds:
    """The special ids; a picture of another size than in training has other vectors."""
    ids = self.start.ids
    if not self.pictures:
      return ids
    return dataclasses.replace(ids, num_slots=vectors_of_picture(self.model, self.images))

  def planned(self) -> plan.Step:
    """See `plan.Planned`; the start is read if the model lacks the size of its vocabulary."""
    size = self.model.vocab_size
    config = sized(self.model, self.start.ids.vocab_size if size is None else size)
    return plan.Step(
      config, self.optimizer, self.num_steps, self.batch_size, self.accumulate,
      {"": self._part},
      lambda partitioner: training.learner(
        UniversalLM(config), self.optimizer, self.accumulate, partitioner),
      "metalm.TaskTuning")

  @property
  def _arm(self) -> Arm:
    return Arm(sized(self.model, self.start.ids.vocab_size), NoSpans())

  def _asked(self, task: Task) -> Task:
    return listing_options(task) if self.list_options else task

  def _check(self, task: Task) -> None:
    """Raises ValueError for a task that the model cannot be asked."""
    if not self.pictures:
      task.require_text()
    if task.metric in OF_BOXES or any(row.prompts or row.option_images for row in task.rows):
      raise ValueError(
        f"the task {task.name} has rows with a prompt or a picture for each option, or asks for "
        "boxes, and metalm.TaskTuning asks for an answer to one prompt; take another task or "
        "flavour, or leave it out of metalm.TaskTuning.tasks."
      )
    rows, vocabulary, ids = self._asked(task).rows, self.start.vocabulary, self._ids
    positions = positions_of_words(self.model)
    for row, example in zip(rows, prompts.asked(rows, vocabulary, ids)):
      if len(example.pictures) > self.pictures:
        raise ValueError(
          f"{example.where} {task.name} has {len(example.pictures)} pictures and "
          f"metalm.TaskTuning.pictures is {self.pictures}; raise it."
        )
      longest = max(map(len, vocabulary.encode_batch(row.options)), default=0)
      longest = longest or self.generation.max_new_tokens
      room = self.model.text.max_length + 1 - longest
      of_span = int((example.spans[:, 1] - example.spans[:, 0]).max(initial=0)) + 1
      if len(example.tokens) > room or of_span > positions:
        raise ValueError(
          f"{example.where} {task.name} has a prompt of {len(example.tokens)} tokens with its start"
          f", of which the encoder reads {of_span} at once, and the decoder takes {room} before an "
          f"answer and the encoder {positions}; leave such rows out, or start from a model of more "
          "positions (models.TransformerConfig.max_length, models.FusedEncoderConfig.max_words)."
        )

  def _rows(self, context: pipeline.StageContext) -> None:
    vocabulary, corpora = self.start.vocabulary, self.records.learned()
    if self.pictures:
      counts = task_sets.write_picture_tasks(
        context.directory, corpora, vocabulary, self._ids, self.images, self.length,
        pictures=self.pictures, encoder_positions=positions_of_words(self.model))
    else:
      counts = task_sets.write_tasks(
        context.directory, corpora, vocabulary, vocabulary, self.length,
        encoder_positions=positions_of_words(self.model), pack=self.pack, too_long="cut")
    context.extra["counts"] = counts
    for name, of in counts.items():
      context.log(f"{name}: " + ", ".join(f"{num} {what}" for what, num in of.items()))

  def sets(self, folder: Path) -> dict[str, Rows]:
    """By task its rows, as the encoders read them, from the folder of the stage `rows`."""
    names = self.records.learned()
    if not self.pictures:
      return task_sets.open_tasks(folder, names)
    found = task_sets.open_picture_tasks(folder, names, self.images)
    num_slots = vectors_of_picture(self.model, self.images)
    return {name: read_by(self.model, rows, num_slots) for name, rows in found.items()}

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    arm = self._arm
    rows = task_sets.mixed(self.sets(context.input(ROWS)), self.seed)
    result = training.run(
      context, arm.model, self.optimizer, self.num_steps, self.accumulate, self.checkpoint_every,
      self.seed, functools.partial(self.start.params, arm.model, partitioner), partitioner,
      Endless(rows.batch, self.batch_size))
    context.flops += result.step * training.step_flops(
      arm.model, self.optimizer, self.batch_size, self._part.shape)
    context.extra["num_params"] = sum(x.size for x in jax.tree.leaves(result.state.params))

  def _evaluate(self, context: pipeline.StageContext, partitioner) -> None:
    """Writes `results.json`: by task and moment what `TaskAnswers.figures` gives."""
    arm = self._arm
    tuned = functools.partial(
      language_models.load_params, context.input(TRAIN), self.num_steps, arm.model, partitioner)
    loads = (functools.partial(self.start.params, arm.model, partitioner), tuned)
    results: dict[str, dict[str, Any]] = {task.name: {} for task in self.tasks}
    with context.progress(len(loads) * len(results), "tasks") as bar:
      for moment, load in zip(_MOMENTS, loads):
        asking = TaskAnswers(
          arm, load(), self.start.vocabulary, self._ids, self.images, self.generation, partitioner)
        for name in results:
          task = self._asked(read_task(context.input(f"task/{name}")))
          results[name][moment] = asking.figures(task)
          bar.update()
    write_json(context.directory / RESULTS_FILE, results)

  def _report(self, context: pipeline.StageContext, stages) -> None:
    tuning_report.run(
      context, stages, rows=ROWS, train=TRAIN, evaluate=EVALUATE,
      excerpts=[] if self.pictures else [
        drawn(rows.batch([0]), self.start.vocabulary, name)
        for name, rows in self.sets(context.input(ROWS)).items()][:1])

  def table(self, summary: Mapping[str, Any]) -> str:
    """A line for each task, before and after."""
    return tuning_report.table(summary)
