"""What a training step takes, from shapes alone: for `lmops plan` and `lmops aot`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.stacks import stacks
from lmops_jax.models.universal import IMAGE_WORDS, SPAN_INPUTS, UniversalConfig, UniversalLM
from lmops_jax.models.vision import NUM_CHANNELS
from lmops_jax.sizing import activations, encoders
from lmops_jax.sizing.aot import Program
from lmops_jax.sizing.budget import Phase, check_splits, device_bytes
from lmops_jax.sizing.training import lowered_step, training_phase
from lmops_jax.sizing.universal import RowShape
from lmops_jax.systems.metalm import training
from lmops_jax.systems.metalm.arms import Arm
from lmops_jax.training import loop
from lmops_jax.training.learner import Learner


class Part(NamedTuple):
  """The rows of one kind in an example of a batch.

  Attributes:
    shape: of each. rows: their number.
    packed: whether several texts may share a row, which `segment_ids` and `positions` then tell.
    height, width: of pictures, in pixels; 0 without any.
  """

  shape: RowShape
  rows: int = 1
  packed: bool = False
  height: int = 0
  width: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step.

  Attributes:
    config: of the model, with its sizes of vocabularies.
    optimizer, num_steps, accumulate: as in `training.Training`.
    batch_size: examples of a batch.
    parts: what an example is made of: groups of rows by the name of the part, or under "" one row.
    learner: makes for a mesh what the step descends.
    setting: the name of the settings in gin files, for messages.
    size_name: that of `batch_size` among them.
  """

  config: UniversalConfig
  optimizer: optax.GradientTransformation
  num_steps: int
  batch_size: int
  accumulate: int
  parts: Mapping[str, Part]
  learner: Callable[[Partitioner], Learner]
  setting: str
  size_name: str = "batch_size"

  @property
  def flops(self) -> float:
    """Operations of the step."""
    return sum(
      training.step_flops(
        UniversalLM(self.config), self.optimizer, self.batch_size * part.rows, part.shape)
      for part in self.parts.values())

  @property
  def unit(self) -> str:
    """What an example is called."""
    return "groups" if any(self.parts) else "rows"


class Planned:
  """A system whose memory and operations are those of one training step."""

  def planned(self) -> Step:
    """The step, without reading any file but the start's."""
    raise NotImplementedError

  def phases(self, partitioner: Partitioner, memory, *, platform: str, **sizes) -> list[Phase]:
    """What training takes; see `commands.plans.Planned`."""
    return [phase(self.planned(), partitioner, platform)]

  def programs(self, partitioner: Partitioner, memory, **sizes) -> list[Program]:
    """The training step, to compile ahead of time."""
    return [program(self.planned(), partitioner)]


def of_arm(config: training.Training, arm: Arm, length: int) -> Step:
  """The step of an arm, which has a vocabulary size, on rows of a length."""
  return Step(
    arm.config, config.optimizer, config.num_steps, config.batch_size, config.accumulate,
    {"": Part(RowShape(length, arm.sampler.encoder_length(length)))},
    lambda partitioner: training.learner(
      arm.model, config.optimizer, config.accumulate, partitioner),
    "metalm.Training")


def phase(step: Step, partitioner: Partitioner, platform: str) -> Phase:
  """Training by a step. Activations are the estimate of `sizing.activations`.

  Args:
    platform: decides the size of a chunk of logits.

  Raises:
    ConfigError: when the mesh does not divide the batch.
  """
  _, state, batch = _abstract(step, partitioner)
  return training_phase(
    "train", state, step.flops, step.num_steps, data=device_bytes(batch),
    kept=_activation_bytes(step, partitioner, platform), accumulate=step.accumulate,
    note=f"{step.batch_size} {step.unit} in {step.accumulate} micro-batches",
    remedies=_remedies(step, partitioner))


def program(step: Step, partitioner: Partitioner) -> Program:
  """The step as a program; raises as `phase` does."""
  learner, state, batch = _abstract(step, partitioner)
  return Program(
    "train", functools.partial(lowered_step, learner, partitioner, state, batch), step.flops,
    remedies=_remedies(step, partitioner))


def _remedies(step: Step, partitioner) -> tuple[str, ...]:
  return (
    f"a smaller micro-batch ({step.setting}.accumulate above {step.accumulate})",
    f"more devices on mesh.make.fsdp (now {partitioner.mesh.shape['fsdp']})")


def _activation_bytes(step: Step, partitioner, platform) -> float:
  mesh = partitioner.mesh.shape
  sizes = {"platform": platform, "num_fsdp": mesh["fsdp"], "num_tensor": mesh["tensor"]}
  examples = step.batch_size / step.accumulate / partitioner.num_batch_shards
  total = 0.0
  for part in step.parts.values():
    rows, shape = examples * part.rows, part.shape
    total += activations.activation_bytes(step.config.text, rows, shape.length, **sizes)
    if shape.encoder_length:
      total += activations.activation_bytes(
        step.config.reader.encoder.trunk, rows, shape.encoder_length, unembedding=False, **sizes)
    if shape.images:
      total += _image_bytes(step.config, rows * shape.images, part, sizes)
  return total


def _image_bytes(config: UniversalConfig, images: float, part: Part, sizes) -> float:
  """Of encoder and connector of images; an expert of an MLP counts as the only one."""
  encoder, shape = config.vision.encoder, part.shape
  num = shape.image_words + shape.image_features
  of_encoder = sum(
    activations.activation_bytes(
      dataclasses.replace(stack, vocab_size=stack.vocab_size or 1), images, num,
      unembedding=False, **sizes)
    for stack in stacks(encoder.trunk, encoder.top_layers).values())
  of_input = 4.0 * NUM_CHANNELS * part.height * part.width
  return of_encoder + images * (of_input + encoders.connector_bytes(
    config.vision.connector, config.text, encoder.feature_width(), num))


def _abstract(step: Step, partitioner: Partitioner):
  """The learner, and its placed state and batch as shapes."""
  learner, batch = step.learner(partitioner), abstract_batch(step, partitioner)
  state = partitioner.placed_shapes(loop.abstract_state(learner), uneven="whole")
  return learner, state, batch


def abstract_batch(step: Step, partitioner: Partitioner) -> dict[str, jax.ShapeDtypeStruct]:
  """A placed batch of a step as shapes.

  Raises:
    ConfigError: when the mesh does not divide the batch.
  """
  check_splits(
    step.batch_size, step.unit, partitioner, f"{step.setting}.{step.size_name}")

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(
      (step.batch_size, *shape), dtype, sharding=partitioner.batch_sharding(1 + len(shape)))

  batch = {"weight": array(jnp.float32)}
  for name, part in step.parts.items():
    front, group = (f"{name}/", (part.rows,)) if name else ("", ())
    batch |= {f"{front}{field}": array(dtype, *group, *shape)
              for field, dtype, shape in _fields(part)}
  return batch


def _fields(part: Part) -> Iterator[tuple[str, type, tuple[int, ...]]]:
  """Name, type and shape of each array of a row."""
  shape = part.shape
  row = shape.length,
  yield "loss_mask", jnp.float32, row
  words = ["tokens", "targets"] + ["positions", "segment_ids"] * part.packed
  if shape.encoder_length or shape.images:
    words.append("vector_index")
  for name in words:
    yield name, jnp.int32, row
  if shape.encoder_length:
    for name in SPAN_INPUTS:
      yield name, jnp.int32, (shape.encoder_length,)
  if shape.image_words:
    for name in IMAGE_WORDS:
      yield name, jnp.int32, (shape.images, shape.image_words)
  if part.height:
    yield "images", jnp.uint8, (shape.images, part.height, part.width, NUM_CHANNELS)
