"""The embedded corpora as tfds datasets: `installed_text` and `python_reference`.

Importing this module registers them with tfds (which does not import TensorFlow until it reads
TFRecords), so that

    import lmops_jax.data.tfds_builders
    builder = tfds.builder("installed_text", data_dir=...)
    builder.download_and_prepare(file_format="array_record")
    builder.as_data_source("train")[0]  # {"id": ..., "text": ..., "kind": ..., "source": ...}

stores the documents with their ids, kinds and paths; nothing is downloaded. Documents are stored in
the order that tfds gives them, a hash of their id.
"""

import dataclasses
from collections import Counter

import numpy as np
import tensorflow_datasets as tfds

from lmops_jax.data import installed_text, python_reference


def _features(kinds: tuple[str, ...]) -> tfds.features.FeaturesDict:
  """`kind` is stored as text, not as a class number, so that it can be read without the builder."""
  described = tfds.features.Text(doc=f"One of {', '.join(kinds)}.")
  return tfds.features.FeaturesDict(
    {"id": np.int64, "text": tfds.features.Text(), "kind": described, "source": np.str_}
  )


@dataclasses.dataclass(eq=False, kw_only=True)
class InstalledTextConfig(tfds.core.BuilderConfig):
  """How much to take, and from where; see `installed_text.InstalledText`."""

  max_bytes: int | None = 18_000_000
  roots: tuple[str, ...] | None = None


class _Embedded(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset that is made from what is on this machine: no downloads, no checksums beside it."""

  # Here tfds would look for checksums, through importlib_resources, which may not be installed.
  code_path = None

  def _split_generators(self, dl_manager):
    del dl_manager
    return {"train": self._generate_examples()}


class InstalledText(_Embedded):
  """The text heap of this interpreter's site-packages, as labelled documents."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [
    InstalledTextConfig(name="default", description="18 MB, every kind of text."),
    InstalledTextConfig(name="all", description="Everything.", max_bytes=None),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Code, docstrings, headers, licences, tables, markup and prose of the installed "
      "Python packages: a varied and noisy text corpus that needs no download.",
      features=_features(installed_text.KINDS),
    )

  def _generate_examples(self):
    config = self.builder_config
    corpus = installed_text.InstalledText(max_bytes=config.max_bytes, roots=config.roots)
    return _examples(corpus)


class PythonReference(_Embedded):
  """The topics of the Python language reference, as documents."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="The English of the Python language reference that every CPython carries.",
      features=_features(("reference",)),
    )

  def _generate_examples(self):
    return _examples(python_reference.PythonReference())


def _examples(corpus):
  dropped: Counter[str] = Counter()
  for document in corpus.documents(dropped):
    yield document.id, document._asdict()
