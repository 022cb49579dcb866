"""Corpora that another library knows by name: tfds datasets and seqio tasks.

tfds reads datasets that are stored as ArrayRecord without TensorFlow; other formats, and seqio
always, need it, and it is imported only then.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lmops_jax.config.setting_types import PositiveInt, Text, component
from lmops_jax.data.documents import Corpus, Document, document_id, given_id, kind_label
from lmops_jax.host.hashing import digest

_PIECE = 100_000  # rows that are read together


@component(module="data")
@dataclasses.dataclass(frozen=True)
class Tfds(Corpus):
  """A tfds dataset, by name ("lm1b", "wiki40b/en:1.3.0") or by the folder that holds it.

  Attributes:
    name: what `tfds.builder` takes, or a folder with a `dataset_info.json`.
    split: a split or a slice of one, "train[:1%]".
    text_field: the feature that holds the text; `/` leads into nested ones.
    id_field: a feature with the id; None: a hash of dataset, split and row in storage order.
    kind_field: a feature with the kind; None: the dataset's name.
    data_dir: where tfds keeps datasets; None: its own default.
    download: whether tfds may download and prepare what is missing.
  """

  name: Text
  split: Text = "train"
  text_field: Text = "text"
  id_field: Text | None = None
  kind_field: Text | None = None
  data_dir: Text | None = None
  download: bool = False

  def fingerprint(self) -> str:
    info = self.builder.info
    sizes = {name: list(split.shard_lengths) for name, split in sorted(info.splits.items())}
    state = f"{dataclasses.astuple(self)} {info.full_name} {info.dataset_size} {sizes}"
    return digest([state])

  @functools.cached_property
  def builder(self):
    """tfds's own description and reader of the dataset.

    Raises:
      ValueError: tfds does not know it, or it is not prepared.
    """
    import os

    import tensorflow_datasets as tfds

    try:
      if os.path.isfile(os.path.join(self.name, "dataset_info.json")):
        builder = tfds.builder_from_directory(self.name)
      else:
        builder = tfds.builder(self.name, data_dir=self.data_dir)
    except tfds.core.DatasetNotFoundError as error:
      reason = str(error).strip().splitlines()[0]
      raise ValueError(f"tfds knows no dataset data.Tfds.name={self.name!r}: {reason}") from error
    if not builder.is_prepared():
      if not self.download:
        raise ValueError(
          f"the tfds dataset {self.name!r} is not prepared in {builder.data_dir}; prepare it "
          "there, or set data.Tfds.download=True."
        )
      # Readable without TensorFlow, unlike tfds's default.
      builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
      builder.download_and_prepare()
    return builder

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    return self._documents(enumerate(self.examples()), counts)

  def pieces(self):
    """Rows by the hundred thousand, where the dataset's files can be read from anywhere."""
    examples = self.examples()
    if not hasattr(examples, "__getitem__"):
      return [self]
    own = dataclasses.replace(self)  # without the builder, which does not travel
    starts = range(0, len(examples), _PIECE)
    return [_Rows(own, start, min(start + _PIECE, len(examples))) for start in starts]

  def read_rows(self, rows: range, counts: Counter[str]) -> Iterator[Document]:
    """The documents of some rows of a dataset with random access."""
    examples = self.examples()
    return self._documents(((row, examples[row]) for row in rows), counts)

  def _documents(self, examples, counts: Counter[str]) -> Iterator[Document]:
    name = self.builder.info.full_name
    for row, example in examples:
      where = f"{name}[{self.split}]:{row}"
      text = as_text(feature_at(example, self.text_field, where, "data.Tfds.text_field"), counts)
      if text is None:
        continue
      kind = self.builder.info.name
      if self.kind_field is not None:
        try:
          kind = kind_label(feature_at(example, self.kind_field, where, "data.Tfds.kind_field"))
        except UnicodeDecodeError:
          counts["undecodable"] += 1
          continue
      identifier = document_id(where)
      if self.id_field is not None:
        given = feature_at(example, self.id_field, where, "data.Tfds.id_field")
        given = given.item() if getattr(given, "ndim", None) == 0 else given
        identifier = given_id(given, where, self.id_field)
      yield Document(identifier, text, kind, where)

  def examples(self, decoders: Mapping[str, Any] | None = None):
    """The examples of the split in storage order; a list where the format has random access.

    Args:
      decoders: of features, as tfds takes them.

    Raises:
      ValueError: no such split.
    """
    import tensorflow_datasets as tfds

    try:
      if self.builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return self.builder.as_data_source(split=self.split, decoders=decoders)
      config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
      return tfds.as_numpy(
        self.builder.as_dataset(
          split=self.split, shuffle_files=False, read_config=config, decoders=decoders)
      )
    except (KeyError, ValueError) as error:
      splits = ", ".join(sorted(self.builder.info.splits)) or "none"
      raise ValueError(
        f"data.Tfds.split={self.split!r} is no split of {self.name!r}; its splits are {splits}."
      ) from error


@dataclasses.dataclass(frozen=True)
class _Rows(Corpus):
  """Rows `start .. stop` of a tfds dataset."""

  corpus: Tfds
  start: int
  stop: int

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    return self.corpus.read_rows(range(self.start, self.stop), counts)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class SeqioTask(Corpus):
  """A registered seqio task or mixture: the text that its preprocessors give.

  The module that registers the task has to be imported, by an `import` line in the gin file. Rows
  are read unshuffled and numbered; tasks whose preprocessors draw random numbers do not repeat.

  Attributes:
    name: of the task or mixture.
    split: one of its splits.
    text_feature: the field that holds the text after preprocessing ("targets", "text"), or the
      token ids of one that the task has tokenised, which its own vocabulary turns into text.
    sequence_length: what the task's trimming gets for this feature; None does not trim.
  """

  name: Text
  split: Text = "train"
  text_feature: Text = "targets"
  sequence_length: PositiveInt | None = None

  def fingerprint(self) -> str:
    """A hash of the settings and of what the task reads (file names), as far as seqio can tell."""
    task = self._task
    sources = []
    for part in getattr(task, "tasks", [task]):
      try:
        sources.append((part.name, sorted(part.source.list_shards(self.split))))
      except (NotImplementedError, ValueError, AttributeError):
        sources.append((part.name, ()))
    state = repr((dataclasses.astuple(self), sources))
    return digest([state])

  @property
  def _task(self):
    import seqio

    try:
      task = seqio.get_mixture_or_task(self.name)
    except (KeyError, ValueError) as error:
      raise ValueError(
        f"seqio knows no task or mixture data.SeqioTask.name={self.name!r}; import the module that "
        "registers it in the gin file."
      ) from error
    if self.split not in task.splits:
      raise ValueError(
        f"data.SeqioTask.split={self.split!r} is no split of {self.name!r}; its splits are "
        f"{', '.join(sorted(task.splits))}."
      )
    return task

  def read(self, counts: Counter[str]) -> Iterator[Document]:
    import numpy as np

    task = self._task
    lengths = None
    if self.sequence_length is not None:
      lengths = {name: self.sequence_length for name in task.output_features}
    rows = task.get_dataset(lengths, split=self.split, shuffle=False, num_epochs=1)
    for row, example in enumerate(rows.as_numpy_iterator()):
      where = f"{self.name}[{self.split}]:{row}"
      value = feature_at(example, self.text_feature, where, "data.SeqioTask.text_feature")
      if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        feature = task.output_features.get(self.text_feature)
        if feature is None:
          raise ValueError(f"{where}: field {self.text_feature!r} holds numbers, not a text.")
        text = feature.vocabulary.decode(value.tolist())
      else:
        text = as_text(value, counts)
      if text is not None:
        yield Document(document_id(where), text, self.name, where)


def feature_at(example: Mapping[str, Any], path: str, where: str, parameter: str) -> Any:
  """A field of an example; `a/b` is field b of field a, unless a field is called so."""
  if path in example:
    return example[path]
  value: Any = example
  for part in path.split("/"):
    if not isinstance(value, Mapping) or part not in value:
      fields = ", ".join(sorted(value)) if isinstance(value, Mapping) else "none"
      raise ValueError(
        f"{where} has no field {path!r} (there are {fields}); set {parameter} to one of them."
      )
    value = value[part]
  return value


def as_text(value: Any, counts: Counter[str]) -> str | None:
  """A text of a dataset; None for one that is not UTF-8, which is counted as "undecodable".

  Raises:
    ValueError: anything else than a text.
  """
  if isinstance(value, str):
    return value
  if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
    value = value.item()
  if not isinstance(value, (bytes, str)):
    raise ValueError(f"a text was expected, but the field holds a {type(value).__name__}.")
  try:
    return value.decode("utf-8") if isinstance(value, bytes) else value
  except UnicodeDecodeError:
    counts["undecodable"] += 1
    return None
