"""Vocabularies: text to token ids and back, without TensorFlow.

`write_vocabulary` writes one into a folder, `load_vocabulary` opens that folder. What a gin file
names to get one is in `vocabulary_sources`.
A missing BOS or pad token is EOS, as with GPT-2 and as in the PDS code.
"""

import abc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lmops_jax.host.hashing import digest
from lmops_jax.text import tokenizer_errors

METADATA_FILE = "vocabulary.json"
SENTENCEPIECE_FILE = "sentencepiece.model"
TOKENIZER_FILE = "tokenizer.json"
_FAIRSEQ_UNK = 3
FAIRSEQ_SPECIAL = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": _FAIRSEQ_UNK}


class Vocabulary(abc.ABC):
  """Text to ids and back. Encoding adds neither BOS nor EOS, decoding leaves them and pad out.

  Attributes:
    vocab_size: number of ids; every id is in `0 .. vocab_size - 1`.
    pad_id, bos_id, eos_id: always set; may coincide. unk_id: None if there is no such token.
    fingerprint: hash of the model and of the special ids: two vocabularies with the same one give
      the same ids.
  """

  def __init__(self, directory: Path, metadata: dict):
    self.directory = directory
    self.vocab_size: int = metadata["vocab_size"]
    self.pad_id: int = metadata["pad_id"]
    self.bos_id: int = metadata["bos_id"]
    self.eos_id: int = metadata["eos_id"]
    self.unk_id: int | None = metadata["unk_id"]
    self.fingerprint: str = metadata["fingerprint"]

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of many texts, made by several threads, which do not change the result."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids, special ones left out.

    Raises:
      ValueError: an id outside of the vocabulary.
    """
    return self._decode(self._plain(ids))

  def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
    return [self.decode(row) for row in rows]

  def token_texts(self) -> list[str]:
    """What each id stands for inside a text, `[vocab_size]`; "" for the special ones."""
    special = {self.pad_id, self.bos_id, self.eos_id, self.unk_id}
    return ["" if i in special else self._token_text(i) for i in range(self.vocab_size)]

  def _plain(self, ids: Iterable[int]) -> list[int]:
    ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64)
    if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
      worst = int(ids.min() if ids.min() < 0 else ids.max())
      raise ValueError(
        f"token id {worst} is not in the vocabulary of {self.vocab_size} ids in {self.directory}."
      )
    special = (ids == self.pad_id) | (ids == self.bos_id) | (ids == self.eos_id)
    return ids[~special].tolist()

  @abc.abstractmethod
  def _decode(self, ids: list[int]) -> str: ...

  @abc.abstractmethod
  def _token_text(self, identifier: int) -> str: ...


class SentencePieceVocabulary(Vocabulary):
  """A SentencePiece model (Kudo and Richardson, EMNLP 2018).

  A published model may have tokens after those of the SentencePiece model; no text has them.

  Attributes:
    file: the serialized model.
  """

  def __init__(self, directory: Path, metadata: dict):
    super().__init__(directory, metadata)
    self.file = directory / SENTENCEPIECE_FILE
    self._processor = _sentencepiece(self.file)

  @property
  def num_pieces(self) -> int:
    """Ids that the SentencePiece model itself has."""
    return self._processor.get_piece_size()

  def encode_batch(self, texts):
    return self._processor.encode(list(texts), out_type=int)

  def _decode(self, ids):
    ids = [i for i in ids if i < self.num_pieces]
    return self._processor.decode(ids) if ids else ""

  def _token_text(self, identifier):
    if identifier >= self.num_pieces:
      return ""
    piece = self._processor.id_to_piece(identifier)
    if self._processor.is_byte(identifier):
      byte = bytes([int(piece[3:-1], 16)])
      return byte.decode("ascii") if byte.isascii() else ""
    return piece.replace("\u2581", " ")


class FairseqVocabulary(SentencePieceVocabulary):
  """A SentencePiece model with fairseq's ids, as XGLM and XLM-R have them; see `fairseq_ids`."""

  def encode_batch(self, texts):
    return [fairseq_ids(ids) for ids in super().encode_batch(texts)]

  def _decode(self, ids):
    return super()._decode([p for p in map(fairseq_piece, ids) if p is not None])

  def _token_text(self, identifier):
    piece = fairseq_piece(identifier)
    return "" if piece is None else super()._token_text(piece)


def fairseq_ids(pieces: Iterable[int]) -> list[int]:
  """Ids of fairseq's dictionary for pieces of a text.

  The dictionary begins with <s>, <pad>, </s>, <unk>; a SentencePiece model begins with <unk>, <s>,
  </s>. All later pieces have ids that are one larger.
  """
  return [_FAIRSEQ_UNK if piece == 0 else piece + 1 for piece in pieces]


def fairseq_piece(identifier: int) -> int | None:
  """The piece behind an id of fairseq's dictionary; None for a special one."""
  if identifier == _FAIRSEQ_UNK:
    return 0
  return identifier - 1 if identifier > _FAIRSEQ_UNK else None


class HuggingFaceVocabulary(Vocabulary):
  """A fast tokenizer of Hugging Face.

  Attributes:
    file: its `tokenizer.json`.
  """

  def __init__(self, directory: Path, metadata: dict):
    super().__init__(directory, metadata)
    self.file = directory / TOKENIZER_FILE
    self._tokenizer = _hugging_face(self.file)

  def encode_batch(self, texts):
    with tokenizer_errors.named(self.file, "cannot encode a text", tokenizer_errors.OTHER):
      encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def _decode(self, ids):
    with tokenizer_errors.named(self.file, "cannot decode ids", tokenizer_errors.OTHER):
      return self._tokenizer.decode(ids, skip_special_tokens=False)

  def _token_text(self, identifier):
    piece = self._tokenizer.id_to_token(identifier)
    if piece is None:
      return ""
    if piece.startswith("\u2581"):
      return piece.replace("\u2581", " ")  # decoding it alone would lose the space
    return self._tokenizer.decode([identifier], skip_special_tokens=False)


_KINDS = {
  "sentencepiece": (SentencePieceVocabulary, SENTENCEPIECE_FILE),
  "fairseq_sentencepiece": (FairseqVocabulary, SENTENCEPIECE_FILE),
  "hugging_face": (HuggingFaceVocabulary, TOKENIZER_FILE),
}


def load_vocabulary(directory: Path | str) -> Vocabulary:
  """Opens a vocabulary that `write_vocabulary` has written.

  Raises:
    ValueError: if `directory` holds no vocabulary, or its model is not the one that was written.
  """
  directory = Path(directory)
  try:
    metadata = json.loads((directory / METADATA_FILE).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{directory} holds no vocabulary ({METADATA_FILE}: {error}).") from error
  cls, name = _KINDS[metadata["kind"]]
  model = directory / name
  if not model.is_file() or _fingerprint(model.read_bytes(), metadata) != metadata["fingerprint"]:
    raise ValueError(f"{model} is missing or is not the model that {METADATA_FILE} describes.")
  return cls(directory, metadata)


def _sentencepiece(path: Path):
  import sentencepiece

  return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _hugging_face(path: Path):
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  tokenizer.encode_special_tokens = True  # "</s>" inside a document is text, not an end
  return tokenizer


def write_vocabulary(directory: Path | str, kind: str, data: bytes, ids: dict) -> Vocabulary:
  """Writes a vocabulary into a folder and opens it.

  Args:
    directory: made if it is missing.
    kind: "sentencepiece", "fairseq_sentencepiece" or "hugging_face".
    data: the SentencePiece model, or the `tokenizer.json`.
    ids: `vocab_size`, `pad_id`, `bos_id`, `eos_id` and `unk_id` of `Vocabulary`; EOS stands for a
      pad or BOS that is None.
  """
  ids = ids | {name: ids["eos_id"] for name in ("pad_id", "bos_id") if ids[name] is None}
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / _KINDS[kind][1]).write_bytes(data)
  metadata = {"kind": kind, **ids}
  metadata["fingerprint"] = _fingerprint(data, metadata)
  (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
  return load_vocabulary(directory)


def _fingerprint(data: bytes, metadata: dict) -> str:
  ids = [metadata[name] for name in ("kind", "vocab_size", "pad_id", "bos_id", "eos_id", "unk_id")]
  return digest([json.dumps(ids), data])
