"""Controlled training problems: the examples that a policy weights, those that judge it, the model.

A task has four disjoint parts. `train` is weighted; the policy lowers the loss on `dev`; `select`
chooses among the policies of an optimisation; `test` is read for figures only. The perceptron's
data are those of arXiv 2402.17759, section 4.1 and appendix; text tasks are in `language`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np

from lmops_jax.config.setting_types import Decay, Name, Positive, PositiveInt, component
from lmops_jax.host.whole_files import write_json
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.perceptron import Perceptron as PerceptronModel
from lmops_jax.models.perceptron import PerceptronConfig
from lmops_jax.models.transformer import Transformer
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.training import losses

PARTS = ("train", "dev", "select", "test")
_DATA_FILE, _TASK_FILE = "data.npz", "task.json"
Batch = dict[str, np.ndarray]


@runtime_checkable
class LearningTask(Protocol):
  """A setting that makes a `Task`, and has its `name` and its model's `config` as attributes."""

  def make(self, seed: int, *inputs: Path) -> Task:
    """The task of a seed; `inputs` is the folder of its texts, for a `TextTask`."""


@runtime_checkable
class TextTask(LearningTask, Protocol):
  """A task that reads its texts once, for all seeds."""

  def texts(self, context: pipeline.StageContext) -> None:
    """The stage that reads and tokenises the texts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """Data and model of one problem.

  Attributes:
    name: the task's name in the configuration.
    seed: seed of the data.
    parts: `train`, `dev`, `select`, `test`, each a batch with leaves `[N, ...]`.
    is_noise: `[N] bool`, training examples that were spoilt on purpose.
    difficulty: `[N]`, what a curriculum sorts by: tokens of a text, length of an input vector.
    config: the model's configuration.
  """

  name: str
  seed: int
  parts: dict[str, Batch]
  is_noise: np.ndarray
  difficulty: np.ndarray
  config: PerceptronConfig | TransformerConfig

  @property
  def num_train(self) -> int:
    return len(self.is_noise)

  @property
  def is_text(self) -> bool:
    return isinstance(self.config, TransformerConfig)

  @property
  def vocab_size(self) -> int:
    """|V|: how many outcomes each prediction chooses from."""
    return self.config.vocab_size if self.is_text else 2

  @functools.cached_property
  def model(self) -> nn.Module:
    return Transformer(self.config) if self.is_text else PerceptronModel(self.config)

  @functools.cached_property
  def example_losses(self) -> Callable[[Any, Batch], jax.Array]:
    """`(params, batch) -> [B]`, nats a label."""
    if self.is_text:
      return losses.lm_example_losses(self.model)
    return losses.binary_example_losses(self.model)

  def boxed_params(self, key: jax.Array) -> Any:
    """Fresh parameters, a transformer's with their logical axes."""
    return fresh_params(self.config, key)

  @functools.cached_property
  def forward_flops(self) -> float:
    """Operations of a forward pass on one example."""
    if not self.is_text:
      return 2.0 * self.config.dim
    length = self.parts["train"]["tokens"].shape[1]
    return length * flops.forward_flops_per_token(self.config, length)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of data and model."""
    digest = hashlib.blake2b(json.dumps(_described(self.config), sort_keys=True).encode(),
                             digest_size=16)
    for part in PARTS:
      for name, value in sorted(self.parts[part].items()):
        digest.update(f"{part}/{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()

  def check(self) -> Task:
    """Returns the task; raises ValueError for a part that no run could use."""
    sizes = {part: len(next(iter(batch.values()))) for part, batch in self.parts.items()}
    for part, size in sizes.items():
      if size < 1:
        raise ValueError(f"the part {part!r} of task {self.name!r} is empty; give it examples.")
    longest = None
    for part, batch in self.parts.items():
      try:
        self.example_losses.check_batch(batch)
      except ValueError as error:
        raise ValueError(f"part {part!r} of task {self.name!r}: {error}") from error
      if self.is_text:
        longest = longest or batch["tokens"].shape[1]
        if batch["tokens"].shape[1] != longest:
          raise ValueError(
            f"part {part!r} of task {self.name!r} has sequences of {batch['tokens'].shape[1]} "
            f"tokens, others of {longest}; all parts must have one length."
          )
    if longest is not None and longest > self.config.max_length:
      raise ValueError(
        f"task {self.name!r} has sequences of {longest} tokens, beyond the model's max_length of "
        f"{self.config.max_length}; raise it or shorten them."
      )
    return self

  def save(self, folder: Path) -> None:
    """Writes the task so that `load_task` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{part}/{name}": value for part, batch in self.parts.items()
              for name, value in batch.items()}
    with (folder / _DATA_FILE).open("wb") as file:
      np.savez_compressed(file, is_noise=self.is_noise, difficulty=self.difficulty, **arrays)
    write_json(folder / _TASK_FILE, {
      "name": self.name, "seed": self.seed, "model": _described(self.config),
      "fingerprint": self.fingerprint,
    })


def load_task(folder: Path) -> Task:
  """What `Task.save` wrote.

  Raises:
    ValueError: if the folder holds no task, or data that do not fit their description.
  """
  for file in (_TASK_FILE, _DATA_FILE):
    if not (folder / file).is_file():
      raise ValueError(f"{folder} holds no task: {file} is missing.")
  about = json.loads((folder / _TASK_FILE).read_text())
  parts: dict[str, Batch] = {part: {} for part in PARTS}
  with np.load(folder / _DATA_FILE, allow_pickle=False) as arrays:
    for key in arrays.files:
      part, _, name = key.partition("/")
      if name:
        parts[part][name] = arrays[key]
    is_noise, difficulty = arrays["is_noise"], arrays["difficulty"]
  task = Task(about["name"], about["seed"], parts, is_noise, difficulty,
              _config_of(about["model"]))
  if task.fingerprint != about["fingerprint"]:
    raise ValueError(f"the data in {folder} are not those that {_TASK_FILE} describes.")
  return task


def fresh_params(config: PerceptronConfig | TransformerConfig, key: jax.Array) -> Any:
  """Parameters of a model, a transformer's with their logical axes."""
  if isinstance(config, TransformerConfig):
    return Transformer(config).init(key, np.zeros((1, 1), np.int32))["params"]
  return PerceptronModel(config).init(key, np.zeros((1, config.dim), np.float32))["params"]


def _described(config) -> dict[str, Any]:
  kind = "transformer" if isinstance(config, TransformerConfig) else "perceptron"
  return {"kind": kind, **dataclasses.asdict(config)}


def _config_of(described: dict[str, Any]):
  fields = dict(described)
  kind = fields.pop("kind")
  return TransformerConfig(**fields) if kind == "transformer" else PerceptronConfig(**fields)


# ------------------------------------------------------------------------------------- perceptron


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Perceptron:
  """The paper's linearly separable data, whose training inputs differ from the desired ones.

  Attributes:
    name: the task's name in stages and reports.
    dim: D, the width of an input.
    num_train, num_desired, num_select: examples of train, of dev and test (each), of select.
    train_variance: that of the training inputs `N(0, variance I)` (the paper's 3 read as variance).
    shift: mean of every desired input `N(shift, I)`.
    label_flip: share of training labels that are wrong.

  Raises:
    ValueError: for values out of range.
  """

  name: Name = "perceptron"
  dim: PositiveInt = 128
  num_train: PositiveInt = 4096
  num_desired: PositiveInt = 512
  num_select: PositiveInt = 512
  train_variance: Positive = 3.0
  shift: float = 0.5
  label_flip: Decay = 0.0

  @property
  def config(self) -> PerceptronConfig:
    """The model's configuration."""
    return PerceptronConfig(self.dim)

  def make(self, seed: int) -> Task:
    """The task of a seed."""
    parts, is_noise = perceptron_data(
      seed, self.dim, self.num_train, self.num_desired, self.num_select,
      train_variance=self.train_variance, shift=self.shift, label_flip=self.label_flip,
    )
    difficulty = np.linalg.norm(parts["train"]["inputs"], axis=1)
    return Task(self.name, seed, parts, is_noise, difficulty, self.config).check()


def perceptron_data(
  seed: int, dim: int, num_train: int, num_desired: int, num_select: int, *,
  train_variance: float = 3.0, shift: float = 0.5, label_flip: float = 0.0,
) -> tuple[dict[str, Batch], np.ndarray]:
  """Inputs and the labels `[teacher . input > 0]` of a random teacher.

  Returns:
    The parts of a task, `inputs [n,D]` and `labels [n]` float32; and `[N] bool`, the training
    examples whose label was flipped.
  """
  rng = np.random.default_rng(seed)
  teacher = rng.normal(size=dim)

  def labelled(inputs):
    labels = (inputs @ teacher > 0).astype(np.float32)
    return {"inputs": inputs.astype(np.float32), "labels": labels}

  parts = {"train": labelled(math.sqrt(train_variance) * rng.normal(size=(num_train, dim)))}
  for part, num in (("dev", num_desired), ("test", num_desired), ("select", num_select)):
    parts[part] = labelled(rng.normal(size=(num, dim)) + shift)
  is_flipped = rng.random(num_train) < label_flip
  labels = parts["train"]["labels"]
  parts["train"]["labels"] = np.where(is_flipped, 1 - labels, labels)
  return {part: parts[part] for part in PARTS}, is_flipped
