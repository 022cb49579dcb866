"""Stage `train`: groups of rows through the one loop, with the tower frozen, for each arm.

Arms start from the same numbers and the same tower, and read the same rows in the same order:

- full: as Kosmos-1.
- blind: every picture is black, so that only what texts tell of pictures can be learned.
- shuffled: each picture is replaced by that of another example of the batch.
- text: the texts alone, the paper's baseline "LLM".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data.image_tokens import KOSMOS_WORDS
from lmops_jax.evaluation import lm
from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.pretrained import trained_vocabulary
from lmops_jax.shared_stages.grouped_rows import VALIDATION
from lmops_jax.sizing import docked as docked_sizes
from lmops_jax.stages import pipeline
from lmops_jax.systems.kosmos.features import NUMBERS, Features
from lmops_jax.systems.kosmos.prepare import Prepared, RowShape
from lmops_jax.systems.kosmos.world import PARTS, TEXT, Weights
from lmops_jax.text.vocabularies import Vocabulary
from lmops_jax.training import language_models, loop
from lmops_jax.training.group_losses import GroupLosses
from lmops_jax.training.learner import supervised
from lmops_jax.training.losses import LMExampleLosses
from lmops_jax.training.sources import Ahead, Source

FULL = "full"
_VALIDATION_ROWS = 32  # of each part


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Training:
  """How the docked model is trained.

  Attributes:
    optimizer: an optax transformation that freezes the tower, such as `@optim.partition()`.
    text, pairs, interleaved: the rows of each part of a group.
    num_steps: optimizer steps.
    num_groups: of a step.
    accumulate: micro-batches of a step.
    eval_every: steps between two validations.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.

  Raises:
    ValueError: a number of groups that `accumulate` does not divide.
  """

  optimizer: optax.GradientTransformation
  text: RowShape
  pairs: RowShape
  interleaved: RowShape
  num_steps: PositiveInt
  num_groups: PositiveInt = 8
  accumulate: PositiveInt = 1
  eval_every: PositiveInt = 100
  checkpoint_every: PositiveInt | None = 100

  def __post_init__(self):
    if self.num_groups % self.accumulate:
      raise ValueError(
        f"kosmos.Training.num_groups={self.num_groups} is not a multiple of accumulate="
        f"{self.accumulate}; choose one that divides it."
      )

  @property
  def shapes(self) -> dict[str, RowShape]:
    """By part."""
    return {part: getattr(self, part) for part in PARTS}


def _as_they_are(images: np.ndarray, used: np.ndarray) -> np.ndarray:
  return images


def _black(images: np.ndarray, used: np.ndarray) -> np.ndarray:
  return np.zeros_like(images)


def _exchanged(images: np.ndarray, used: np.ndarray) -> np.ndarray:
  """Each used picture in the place of the one before, the last one in that of the first."""
  found = images.copy()
  found[used] = np.roll(images[used], 1, axis=0)
  return found


class Arm(NamedTuple):
  """What a model is given.

  Attributes:
    parts: of a group.
    trained_on: `(images [...,I,height,width,3], used [...,I] bool) -> images`; and the same for
      the numbers `[...,I]` of `features`, of which 0 is black.
    shown: the same when it is evaluated; None leaves pictures out of prompts.
  """

  parts: tuple[str, ...]
  trained_on: Callable[[np.ndarray, np.ndarray], np.ndarray]
  shown: Callable[[np.ndarray, np.ndarray], np.ndarray] | None

  @property
  def sees(self) -> bool:
    """Whether it is evaluated on pictures as they are."""
    return self.shown is _as_they_are


ARMS: Mapping[str, Arm] = {
  FULL: Arm(PARTS, _as_they_are, _as_they_are),
  "blind": Arm(PARTS, _black, _black),
  "shuffled": Arm(PARTS, _exchanged, _as_they_are),
  "text": Arm((TEXT,), _as_they_are, None),
}


@dataclasses.dataclass(frozen=True)
class WithPictures:
  """The batches of groups with what an arm makes of their pictures.

  Attributes:
    inner: batches of groups, with numbers in the place of pictures if there are features.
    arm: what the model is given.
    num_slots: vectors of a picture.
    features: of all pictures; None: batches have pixels.
  """

  inner: Source
  arm: Arm
  num_slots: int
  features: Features | None = None
  reads_params: ClassVar[bool] = False

  def batch(self, step: int, params=None) -> Mapping[str, np.ndarray]:
    """See `training.sources.Source`."""
    return changed(self.inner.batch(step), self.arm, self.num_slots, self.features)


def changed(
  batch: Mapping[str, np.ndarray], arm: Arm, num_slots: int, features: Features | None = None
) -> dict[str, np.ndarray]:
  """A batch of groups with the pictures that an arm is trained on.

  Returns:
    The batch with other `<part>/images`; or, with features, with `<part>/features
    [B,rows_per_group,I,P,width]`, what the connector reads, in the place of `<part>/pictures`.
  """
  batch = dict(batch)
  for part in arm.parts:
    name = f"{part}/images" if features is None else f"{part}/{NUMBERS}"
    if name in batch:
      pictures = batch.pop(name)
      num_used = 1 + batch[f"{part}/vector_index"].max(axis=-1) // num_slots
      used = np.arange(pictures.shape[2]) < num_used[..., None]
      pictures = arm.trained_on(pictures, used)
      if features is None:
        batch[name] = pictures
      else:
        batch[f"{part}/features"] = features.of(pictures)
  return batch


@dataclasses.dataclass(frozen=True)
class PictureLosses(LMExampleLosses):
  """`LMExampleLosses` of rows with `images`, or with `features` computed before, see `changed`."""

  model: DockedLM

  def token_losses(
    self, params, batch: Mapping[str, jax.Array], learned: jax.Array | None = None
  ) -> jax.Array:
    """See `LMExampleLosses`."""
    for name, method in (("images", "row_vectors"), ("features", "connect_rows")):
      if name in batch:
        vectors = self.model.apply(
          {"params": params}, batch[name], batch.get("key"), method=method)
        batch = {**batch, "vectors": vectors}
    return super().token_losses(params, batch, learned)


def group_losses(model: DockedLM, parts: tuple[str, ...]) -> GroupLosses:
  """Nats a learned token of each group of some parts."""
  return GroupLosses(PictureLosses(model), parts)


def docked_model(config: DockedConfig, vocab_size: int) -> DockedLM:
  """The model for a vocabulary; a published one keeps its own, perhaps larger, size.

  Raises:
    ValueError: the vocabulary has more ids than the model.
  """
  text = language_models.language_model(config.text, vocab_size, config.text.max_length).config
  return DockedLM(dataclasses.replace(config, text=text))


def check_sizes(
  model: DockedConfig, shapes: Mapping[str, RowShape], sides: Mapping[str, int]
) -> None:
  """Holds a model against what it is trained on.

  Args:
    shapes: of rows.
    sides: of the pictures of each setting of `kosmos.World`.

  Raises:
    ValueError: pictures of another size than the tower's, rows longer than the model's, or a model
      that sees what it is to predict.
  """
  size, text = model.vision.image_size, model.text
  for name, side in sides.items():
    if side != size:
      raise ValueError(
        f"kosmos.World.{name} draws pictures of side={side} and models.VisionConfig.image_size "
        f"is {size}; give both one size."
      )
  longest = max(shape.length for shape in shapes.values())
  if longest > text.max_length:
    raise ValueError(
      f"a row of kosmos.Training has length={longest} and models.TransformerConfig.max_length is "
      f"{text.max_length}; raise the latter."
    )
  if not text.causal:
    raise ValueError("models.TransformerConfig.causal must be True: it predicts next tokens.")


def learner(model: DockedLM, config: Training, arm: Arm, partitioner):
  """What `config` makes of a model: the one that the stage trains and that plans compile."""
  losses = group_losses(model, arm.parts)
  return supervised(
    loop.initializer(model), losses, config.optimizer, accumulate=config.accumulate,
    keyed=True, check_batch=losses.check_batch, partitioner=partitioner)


def run(
  context: pipeline.StageContext, *, config: Training, docked: DockedLM, arm: Arm, seed: int,
  source: Source, vocabulary: Vocabulary, tower: Callable[[], Any] | None, partitioner,
  hooks: Sequence[loop.Evaluate] = (), words: Sequence[str] = KOSMOS_WORDS,
  features: Features | None = None,
) -> None:
  """Trains one arm into a model folder, which `pretrained.load` and `lmops generate` open.

  Args:
    source: groups of rows.
    vocabulary: of their texts, without the special tokens.
    tower: makes the parameters that the tower starts from; None draws them.
    hooks: see `loop.train`.
    words: the special tokens, in order.
    features: of the pictures that the source numbers; None if it has pixels.
  """
  shown = WithPictures(source, arm, docked.config.vectors_per_image, features)

  def initial():
    drawn = jax.jit(loop.initializer(docked))(jax.random.key(seed))
    return {**nn.unbox(drawn), "vision": tower()}

  result = loop.train(
    learner(docked, config, arm, partitioner), Ahead(shown), config.num_steps, seed,
    context.directory, partitioner, initial_params=None if tower is None else initial, hooks=hooks,
    records=loop.Records(
      checkpoint_every=config.checkpoint_every, params_at=(config.num_steps,),
      description=context.name, progress=context.progress),
  )
  shapes = {part: config.shapes[part] for part in arm.parts}
  context.flops += result.step * config.num_groups * docked_sizes.group_flops(
    docked.config, shapes.values(), encoded=features is not None)
  if context.writes:
    trained_vocabulary.describe_trained(
      context.directory, docked.config, vocabulary, params=f"params/{config.num_steps}",
      log=context.log, words=words)


def validation(
  docked, prepared: Prepared, weights: Weights, arm: Arm, every: int, partitioner,
  features: Features | None = None,
) -> loop.Evaluate:
  """A hook: the nats a learned token of each part's rows of validation.

  Args:
    weights: of the parts' sources.
    features: of the pictures of the rows; None: the tower sees them at each validation.
  """
  side = docked.config.vision.image_size
  rows = {
    part: changed(
      prepared.validation(part, weights, side, _VALIDATION_ROWS, features), arm,
      docked.config.vectors_per_image, features)
    for part in arm.parts}

  def figures(params):
    return {
      part: lm.mean_loss(
        group_losses(docked, (part,)), params, [batch], place=partitioner.place_batch,
        multiple_of=partitioner.num_batch_shards)
      for part, batch in rows.items()}

  return loop.Evaluate(VALIDATION, every, figures)


def load(folder, config: Training, model: DockedLM, partitioner):
  """The parameters that the stage kept."""
  return language_models.load_params(folder, config.num_steps, model, partitioner)
