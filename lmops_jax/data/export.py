"""A selection for other trainers: ids, a tfds dataset, JSON lines, Parquet, or MMIDIDX shards."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lmops_jax.data import shards
from lmops_jax.data.instance_writing import write_instances
from lmops_jax.data.instances import Instances
from lmops_jax.text.vocabularies import Vocabulary

FORMATS = ("ids", "tfds", "jsonl", "parquet", "mmididx")
JSONL_FILE, PARQUET_FILE = "selection.jsonl", "selection.parquet"
BLOCK = 1024  # rows of a Parquet row group


def export_selection(
  instances: Instances,
  ids,
  directory: Path | str,
  format: str = "ids",
  vocabulary: Vocabulary | None = None,
) -> int:
  """Writes the instances with the given ids, in corpus order, and returns how many there are.

  - "ids": `ids.npy`, `[n] int64`.
  - "tfds": a dataset like the corpus itself (`open_instances` or tfds read it); ids stay.
  - "jsonl": `selection.jsonl`; each line has `id`, `text`, `document_ids`. The text is the decoded
    instance with an empty line between documents.
  - "parquet": `selection.parquet` with the same columns.
  - "mmididx": `data_0.bin`, `data_0.idx`, ...: the token ids bit for bit, BOS and EOS included. The
    format holds no ids; its sequences are in the order of "ids".

  Raises:
    ValueError: an unknown format, no ids, an id twice or one that no instance has, text without a
      vocabulary or with another one than the instances were made with.
  """
  if format not in FORMATS:
    raise ValueError(f"format={format!r} is unknown; the formats are {', '.join(FORMATS)}.")
  ids = np.asarray(ids, np.int64).reshape(-1)
  if not len(ids):
    raise ValueError("the selection is empty; there is nothing to export.")
  indices = np.sort(instances.indices_of(ids))
  if len(np.unique(indices)) != len(indices):
    raise ValueError("the selection names an instance twice; each id may occur once.")
  if format in ("jsonl", "parquet"):
    check_vocabulary(instances, vocabulary, format)
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)

  if format == "ids":
    np.save(directory / "ids.npy", instances.ids[indices])
  elif format == "tfds":
    write_instances(
      directory, (instances.instance(i) for i in indices),
      **dataset_settings(instances, len(indices)),
    )
  elif format == "jsonl":
    write_jsonl(directory / JSONL_FILE, rows(instances, indices, vocabulary))
  elif format == "parquet":
    write_parquet(directory / PARQUET_FILE, tables(rows(instances, indices, vocabulary)))
  else:
    sequences = (instances.instance(i).tokens for i in indices)
    shards.write_shards(directory, sequences, vocab_size=instances.vocab_size)
  return len(indices)


def dataset_settings(instances: Instances, num_selected: int) -> dict:
  """Arguments of `write_instances` for a selection."""
  return {
    "length": instances.length, "vocab_size": instances.vocab_size, "pad_id": instances.pad_id,
    "eos_id": instances.eos_id, "bos_id": instances.bos_id,
    "vocabulary_fingerprint": instances.vocabulary_fingerprint,
    "description": f"Selection of {num_selected} of {len(instances)}: {instances.description}",
  }


def check_vocabulary(instances: Instances, vocabulary: Vocabulary | None, format: str) -> None:
  """Refuses to make text without the vocabulary that the instances were made with."""
  if vocabulary is None:
    raise ValueError(f"format={format!r} needs the vocabulary to turn token ids into text.")
  made_with = instances.vocabulary_fingerprint
  if made_with and made_with != vocabulary.fingerprint:
    raise ValueError(
      f"{instances.directory} was made with another vocabulary (fingerprint {made_with}) than "
      f"{vocabulary.directory} ({vocabulary.fingerprint})."
    )


def instance_texts(tokens: np.ndarray, vocabulary: Vocabulary) -> list[str]:
  """The texts of an instance's documents, `tokens [n]`; the first and last may be fragments."""
  pieces = np.split(tokens, np.flatnonzero(tokens == vocabulary.eos_id))
  texts = (vocabulary.decode(piece) for piece in pieces)
  return [text for text in texts if text]


def rows(instances: Instances, indices: np.ndarray, vocabulary: Vocabulary) -> Iterator[dict]:
  """What the text formats hold of each instance."""
  for index in indices:
    instance = instances.instance(index)
    yield {
      "id": instance.id,
      "text": "\n\n".join(instance_texts(instance.tokens, vocabulary)),
      "document_ids": instance.document_ids.tolist(),
    }


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
  """One row a line."""
  with path.open("w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")


def parquet_schema():
  import pyarrow

  return pyarrow.schema([
    ("id", pyarrow.int64()),
    ("text", pyarrow.string()),
    ("document_ids", pyarrow.list_(pyarrow.int64())),
  ])


def tables(rows: Iterable[dict]) -> Iterator:
  """Rows as Arrow tables of `BLOCK`; the last may be smaller."""
  import pyarrow

  rows = iter(rows)
  while block := list(itertools.islice(rows, BLOCK)):
    yield pyarrow.Table.from_pylist(block, parquet_schema())


def write_parquet(path: Path, tables: Iterable) -> None:
  """One row group a table."""
  import pyarrow.parquet

  with pyarrow.parquet.ParquetWriter(path, parquet_schema()) as writer:
    for table in tables:
      writer.write_table(table)
