"""A selection for other trainers: ids, a tfds dataset, JSON lines, Parquet, or MMIDIDX shards."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmops_jax.data import shards
from lmops_jax.data.instances import Instances, write_instances
from lmops_jax.data.vocabularies import Vocabulary

FORMATS = ("ids", "tfds", "jsonl", "parquet", "mmididx")
_BLOCK = 1024


def export_selection(
  instances: Instances,
  ids,
  directory: Path | str,
  format: str = "ids",
  vocabulary: Vocabulary | None = None,
) -> int:
  """Writes the instances with the given ids, in corpus order, and returns how many there are.

  - "ids": `ids.npy`, `[n] int64`, ascending as in the corpus.
  - "tfds": a dataset like the corpus itself (`open_instances` or tfds read it); ids stay.
  - "jsonl": `selection.jsonl`; each line has `id`, `text`, `document_ids`. The text is the decoded
    instance with an empty line between documents.
  - "parquet": `selection.parquet` with the same columns.
  - "mmididx": `data_0.bin`, `data_0.idx`, ...: the token ids bit for bit, BOS and EOS included.

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
    _check_vocabulary(instances, vocabulary, format)
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)

  if format == "ids":
    np.save(directory / "ids.npy", instances.ids[indices])
  elif format == "tfds":
    write_instances(
      directory, (instances.instance(i) for i in indices), length=instances.length,
      vocab_size=instances.vocab_size, pad_id=instances.pad_id, eos_id=instances.eos_id,
      bos_id=instances.bos_id, vocabulary_fingerprint=instances.vocabulary_fingerprint,
      description=f"Selection of {len(indices)} of {len(instances)}: {instances.description}",
    )
  elif format == "jsonl":
    with (directory / "selection.jsonl").open("w", encoding="utf-8") as file:
      for row in _rows(instances, indices, vocabulary):
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
  elif format == "parquet":
    _write_parquet(directory / "selection.parquet", _rows(instances, indices, vocabulary))
  else:
    sequences = (instances.instance(i).tokens for i in indices)
    shards.write_shards(directory, sequences, vocab_size=instances.vocab_size)
  return len(indices)


def _check_vocabulary(instances: Instances, vocabulary: Vocabulary | None, format: str) -> None:
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


def _rows(instances: Instances, indices: np.ndarray, vocabulary: Vocabulary) -> Iterator[dict]:
  for index in indices:
    instance = instances.instance(index)
    yield {
      "id": instance.id,
      "text": "\n\n".join(instance_texts(instance.tokens, vocabulary)),
      "document_ids": instance.document_ids.tolist(),
    }


def _write_parquet(path: Path, rows: Iterator[dict]) -> None:
  import pyarrow
  import pyarrow.parquet

  schema = pyarrow.schema([
    ("id", pyarrow.int64()),
    ("text", pyarrow.string()),
    ("document_ids", pyarrow.list_(pyarrow.int64())),
  ])
  with pyarrow.parquet.ParquetWriter(path, schema) as writer:
    block = []
    for row in rows:
      block.append(row)
      if len(block) == _BLOCK:
        writer.write_table(pyarrow.Table.from_pylist(block, schema))
        block.clear()
    if block:
      writer.write_table(pyarrow.Table.from_pylist(block, schema))
