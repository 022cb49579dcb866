"""Vocabularies: text to token ids and back, without TensorFlow; the same as seqio vocabularies.

A gin file names a spec: train a SentencePiece model on a sample of the corpus, take an existing
SentencePiece model, a Hugging Face `tokenizer.json`, or whatever tokenizer a published model has.
`spec.build` writes the vocabulary into a folder, `load_vocabulary` opens that folder, `as_seqio`
gives the seqio object for tasks.
A missing BOS or pad token is EOS, as with GPT-2 and as in the PDS code.
"""

import abc
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from lmops_jax.config.setting_types import ByteCount, Seed, Text, at_least, component
from lmops_jax.data.hashing import order_key
from lmops_jax.host.foreign_files import require_regular
from lmops_jax.host.manifests import verify_read
from lmops_jax.text import tokenizer_errors

METADATA_FILE = "vocabulary.json"
_SENTENCEPIECE_FILE = "sentencepiece.model"
_TOKENIZER_FILE = "tokenizer.json"
_FAIRSEQ_UNK = 3
_MAX_LINE_BYTES = 4000  # the trainer leaves out longer ones
_COMMON_NAMES = {
  "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
  "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
  "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
}


@runtime_checkable
class VocabularySource(Protocol):
  """A setting that makes a vocabulary: it trains one, or brings that of an existing file."""

  def fingerprint(self) -> str:
    """Hash of what the vocabulary is made from."""

  def build(self, texts: Iterable[str], directory: Path | str) -> "Vocabulary":
    """Writes the vocabulary into `directory`, for `load_vocabulary`."""


class Vocabulary(abc.ABC):
  """Text to ids and back. Encoding adds neither BOS nor EOS, decoding leaves them and pad out.

  Attributes:
    vocab_size: number of ids; every id is in `0 .. vocab_size - 1`.
    pad_id, bos_id, eos_id: always set; may coincide. unk_id: None where there is no such token.
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
    """Ids of many texts; several threads, which do not change the result."""

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
    self.file = directory / _SENTENCEPIECE_FILE
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

  It begins with <s>, <pad>, </s>, <unk>; a SentencePiece model with <unk>, <s>, </s>. What follows
  is the same, one further.
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
    self.file = directory / _TOKENIZER_FILE
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
  "sentencepiece": (SentencePieceVocabulary, _SENTENCEPIECE_FILE),
  "fairseq_sentencepiece": (FairseqVocabulary, _SENTENCEPIECE_FILE),
  "hugging_face": (HuggingFaceVocabulary, _TOKENIZER_FILE),
}


def load_vocabulary(directory: Path | str) -> Vocabulary:
  """Opens a vocabulary that a spec's `build` has written.

  Raises:
    ValueError: no vocabulary in `directory`, or its model is not the one that was written.
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


def as_seqio(vocabulary: Vocabulary):
  """The same vocabulary as a `seqio.Vocabulary`; imports seqio and with it TensorFlow."""
  import seqio

  plain = type(vocabulary) is SentencePieceVocabulary
  if plain and vocabulary.vocab_size == vocabulary.num_pieces:
    return seqio.SentencePieceVocabulary(str(vocabulary.directory / _SENTENCEPIECE_FILE))
  from lmops_jax.text import seqio_vocabulary

  return seqio_vocabulary.TokenizerVocabulary(vocabulary)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TrainSentencePiece:
  """Trains a SentencePiece model on a sample of the corpus; lossless, bytes for what is rare.

  Text is taken as it is: no Unicode normalisation, no added space, runs of spaces and line breaks
  are tokens, so that decoding gives the text back. pad 0, EOS 1, unk 2, BOS 3, as seqio likes it.
  The same texts in the same order give the same file, byte for byte.

  Attributes:
    vocab_size: number of ids, special ones and the 256 bytes included.
    sample_bytes: text to train on, chosen among the first `16 * sample_bytes` that are offered.
    seed: of that choice.
    model_type: "bpe" or "unigram".
  """

  vocab_size: at_least(300) = 4096  # 256 bytes, 4 special tokens and some
  sample_bytes: ByteCount = 6_000_000
  seed: Seed = 0
  model_type: Literal["bpe", "unigram"] = "bpe"

  def fingerprint(self) -> str:
    return repr(self)

  def build(self, texts: Iterable[str], directory: Path | str) -> Vocabulary:
    """Trains on `texts` (no more of them are read than are needed) and writes the model.

    Raises:
      ValueError: too little text for the size.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = list(_training_lines(self._sample(texts)))
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=self.model_type,
        vocab_size=self.vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        character_coverage=0.9995,
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=3,
        max_sentence_length=2 * _MAX_LINE_BYTES,
        input_sentence_size=0,
        shuffle_input_sentence=False,
        num_threads=2,  # fixed: the unigram trainer sums floats by thread
        minloglevel=2,
      )
    except (RuntimeError, OSError) as error:
      num_bytes = sum(len(line.encode()) for line in lines)
      raise ValueError(
        f"data.TrainSentencePiece cannot make vocab_size={self.vocab_size} from {num_bytes:,} "
        f"bytes of text ({_last_clause(error)}); set a smaller vocab_size or give more text."
      ) from error
    return write_vocabulary(
      directory, "sentencepiece", model.getvalue(),
      _sentencepiece_ids(model.getvalue(), "data.TrainSentencePiece"),
    )

  def _sample(self, texts: Iterable[str]) -> list[str]:
    """Whole texts, at least `sample_bytes` where there are so many, by a hash of (seed, text)."""
    offered: list[tuple[int, str]] = []
    total = 0
    for text in texts:
      digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
      offered.append((order_key(int.from_bytes(digest, "little"), self.seed), text))
      total += len(text.encode("utf-8", "replace"))
      if total > 16 * self.sample_bytes:
        break
    offered.sort()
    chosen, total = [], 0
    for _, text in offered:
      chosen.append(text)
      total += len(text.encode("utf-8", "replace"))
      if total >= self.sample_bytes:
        break
    return chosen


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
  """Lines of the texts, long ones cut into pieces that the trainer takes."""
  for text in texts:
    for line in text.split("\n"):
      if len(line) <= _MAX_LINE_BYTES:
        if line and "\0" not in line:
          yield line
      else:
        for start in range(0, len(line), _MAX_LINE_BYTES // 4):
          yield line[start : start + _MAX_LINE_BYTES // 4].replace("\0", " ")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class SentencePieceFile:
  """An existing SentencePiece model, for instance of Llama, Mistral or T5.

  Attributes:
    path: the `.model` file.
  """

  path: Text

  def fingerprint(self) -> str:
    return hashlib.blake2b(self._read(), digest_size=16).hexdigest()

  def build(self, texts: Iterable[str], directory: Path | str) -> Vocabulary:
    """Copies the model; `texts` are not read."""
    del texts
    data = self._read()
    ids = _sentencepiece_ids(data, f"data.SentencePieceFile.path={self.path!r}")
    return write_vocabulary(directory, "sentencepiece", data, ids)

  def _read(self) -> bytes:
    return _read_model(self.path, "data.SentencePieceFile.path")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
  """A Hugging Face fast tokenizer.

  Attributes:
    path: a `tokenizer.json`, or a folder with one.
    bos, eos, pad: the texts of these tokens; None looks for the usual names. Without BOS or pad
      token EOS serves.
  """

  path: Text
  bos: Text | None = None
  eos: Text | None = None
  pad: Text | None = None

  def fingerprint(self) -> str:
    state = hashlib.blake2b(repr((self.bos, self.eos, self.pad)).encode(), digest_size=16)
    state.update(self._read())
    return state.hexdigest()

  def build(self, texts: Iterable[str], directory: Path | str) -> Vocabulary:
    """Copies the tokenizer; `texts` are not read.

    Raises:
      ValueError: no such file, not a tokenizer, or a special token that it does not have.
    """
    del texts
    import tokenizers

    data = self._read()
    where = f"data.HuggingFaceTokenizer.path={self.path!r}"
    with tokenizer_errors.named(where, "is not a tokenizer.json"):
      tokenizer = tokenizers.Tokenizer.from_buffer(data)
    tokenizer_errors.check(tokenizer, where)
    found = {name: self._special(tokenizer, name) for name in ("bos", "eos", "pad")}
    if found["eos"] is None:
      raise ValueError(
        f"the tokenizer {self.path!r} has none of the usual end tokens "
        f"({', '.join(_COMMON_NAMES['eos'])}); set data.HuggingFaceTokenizer.eos."
      )
    unknown = getattr(tokenizer.model, "unk_token", None)
    used = tokenizer.get_vocab(with_added_tokens=True)
    ids = {
      "vocab_size": max(used.values()) + 1,
      "pad_id": found["eos"] if found["pad"] is None else found["pad"],
      "bos_id": found["eos"] if found["bos"] is None else found["bos"],
      "eos_id": found["eos"],
      "unk_id": None if unknown is None else tokenizer.token_to_id(unknown),
    }
    return write_vocabulary(directory, "hugging_face", data, ids)

  def _special(self, tokenizer, name: str) -> int | None:
    given = getattr(self, name)
    if given is not None:
      identifier = tokenizer.token_to_id(given)
      if identifier is None:
        raise ValueError(
          f"data.HuggingFaceTokenizer.{name}={given!r} is no token of {self.path!r}."
        )
      return identifier
    identifiers = map(tokenizer.token_to_id, _COMMON_NAMES[name])
    return next((i for i in identifiers if i is not None), None)

  def _read(self) -> bytes:
    path = Path(self.path).expanduser()
    path = path / _TOKENIZER_FILE if path.is_dir() else path
    return _read_model(str(path), "data.HuggingFaceTokenizer.path")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class ModelTokenizer:
  """The tokenizer of a published model, in whatever form the model brings it.

  Attributes:
    path: the model's folder, or its `.gguf` file.
  """

  path: Text

  def fingerprint(self) -> str:
    return self._load().fingerprint

  def build(self, texts: Iterable[str], directory: Path | str) -> Vocabulary:
    """Writes the vocabulary; `texts` are not read.

    Raises:
      ValueError: no tokenizer there, one of an unknown kind, or one without an end token.
    """
    del texts
    return self._load().vocabulary(directory)

  def _load(self):
    from lmops_jax.text import tokenizer

    verify_read(Path(self.path).expanduser())
    try:
      return tokenizer.load_tokenizer(Path(self.path).expanduser())
    except ValueError as error:
      raise ValueError(f"data.ModelTokenizer.path={self.path!r}: {error}") from error


def _read_model(path: str, parameter: str) -> bytes:
  require_regular(Path(path).expanduser())
  verify_read(Path(path).expanduser())
  try:
    return Path(path).expanduser().read_bytes()
  except OSError as error:
    raise ValueError(f"{parameter}={path!r} cannot be read: {error.strerror}.") from error


def _sentencepiece(path: Path):
  import sentencepiece

  return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _sentencepiece_ids(data: bytes, where: str) -> dict:
  import sentencepiece

  with tokenizer_errors.named(where, "is not a SentencePiece model"):
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    vocab_size = processor.get_piece_size()
  eos_id, bos_id, pad_id = processor.eos_id(), processor.bos_id(), processor.pad_id()
  if eos_id < 0:
    raise ValueError(f"{where} has no EOS token, which separates documents; use another model.")
  return {
    "vocab_size": vocab_size,
    "pad_id": pad_id if pad_id >= 0 else eos_id,
    "bos_id": bos_id if bos_id >= 0 else eos_id,
    "eos_id": eos_id,
    "unk_id": processor.unk_id(),
  }


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
    directory: made where it is missing.
    kind: "sentencepiece", "fairseq_sentencepiece" or "hugging_face".
    data: the SentencePiece model, or the `tokenizer.json`.
    ids: `vocab_size`, `pad_id`, `bos_id`, `eos_id` and `unk_id` of `Vocabulary`.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / _KINDS[kind][1]).write_bytes(data)
  metadata = {"kind": kind, **ids}
  metadata["fingerprint"] = _fingerprint(data, metadata)
  (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
  return load_vocabulary(directory)


def _fingerprint(data: bytes, metadata: dict) -> str:
  ids = [metadata[name] for name in ("kind", "vocab_size", "pad_id", "bos_id", "eos_id", "unk_id")]
  state = hashlib.blake2b(json.dumps(ids).encode(), digest_size=16)
  state.update(data)
  return state.hexdigest()


def _last_clause(error: Exception) -> str:
  """The part of a SentencePiece error that says what is wrong."""
  return re.sub(r"^.*\)\s*\[.*\]\s*", "", str(error).strip().replace("\n", " ")).rstrip(". ")
