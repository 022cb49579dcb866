"""What a gin file names to get a vocabulary: each source makes one, or brings that of a file.

A source trains a SentencePiece model on a sample of the corpus, or takes an existing SentencePiece
model, a Hugging Face `tokenizer.json`, or whatever tokenizer a published model has. Its `build`
writes the vocabulary into a folder, which `vocabularies.load_vocabulary` opens.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from lmops_jax.config.setting_types import ByteCount, Seed, Text, at_least, component
from lmops_jax.host.foreign_files import require_regular
from lmops_jax.host.hashing import digest, order_key
from lmops_jax.host.manifests import verify_read
from lmops_jax.text import tokenizer_errors
from lmops_jax.text.tokenizer import Tokenizer, load_tokenizer
from lmops_jax.text.vocabularies import (
  FAIRSEQ_SPECIAL,
  TOKENIZER_FILE,
  Vocabulary,
  write_vocabulary,
)

_MAX_LINE = 4000  # characters, at most 4 bytes each
_MAX_LINE_BYTES = 8000  # the trainer leaves out longer ones
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

  def build(self, texts: Iterable[str], directory: Path | str) -> Vocabulary:
    """Writes the vocabulary into `directory`, for `load_vocabulary`."""


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TrainSentencePiece:
  """Trains a SentencePiece model on a sample of the corpus; lossless, rare characters are bytes.

  Text is taken as it is: no Unicode normalisation, no added space, runs of spaces and line breaks
  are tokens, so that decoding gives the text back. Pad is 0, EOS 1, unk 2, BOS 3, as seqio has it.
  The same texts in the same order give the same file, byte for byte.

  Attributes:
    vocab_size: number of ids, special ones and the 256 bytes included.
    sample_bytes: text to train on, chosen among the first `16 * sample_bytes` that are offered.
    seed: the seed of that choice.
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
        max_sentence_length=_MAX_LINE_BYTES,
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
    """Whole texts, at least `sample_bytes` if there are so many, by a hash of (seed, text)."""
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
      if len(line) <= _MAX_LINE and len(line.encode("utf-8", "replace")) <= _MAX_LINE_BYTES:
        if line and "\0" not in line:
          yield line
      else:
        for start in range(0, len(line), _MAX_LINE // 4):
          yield line[start : start + _MAX_LINE // 4].replace("\0", " ")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class SentencePieceFile:
  """An existing SentencePiece model, for instance of Llama, Mistral or T5.

  Attributes:
    path: the `.model` file.
    fairseq: whether ids are those of fairseq's dictionary, as in Kosmos, XGLM and XLM-R:
      `<s>`, `<pad>`, `</s>`, `<unk>`, then all pieces but the first three.
  """

  path: Text
  fairseq: bool = False

  def fingerprint(self) -> str:
    return digest([self._read(), *(["fairseq"] if self.fairseq else [])])

  def build(self, texts: Iterable[str], directory: Path | str) -> Vocabulary:
    """Copies the model; `texts` are not read.

    Raises:
      ValueError: if it is no SentencePiece model, or for fairseq's ids one that does not begin with
        `<unk>`, `<s>` and `</s>`.
    """
    del texts
    data, where = self._read(), f"data.SentencePieceFile.path={self.path!r}"
    ids = _sentencepiece_ids(data, where)
    if not self.fairseq:
      return write_vocabulary(directory, "sentencepiece", data, ids)
    first = ids["unk_id"], ids["bos_id"], ids["eos_id"]
    if first != (0, 1, 2):
      raise ValueError(
        f"{where} has <unk>, <s> and </s> at {first}, and fairseq's dictionary is made from models "
        "that have them at (0, 1, 2); set data.SentencePieceFile.fairseq to False."
      )
    return write_vocabulary(directory, "fairseq_sentencepiece", data, {
      "vocab_size": ids["vocab_size"] + 1, **FAIRSEQ_SPECIAL})

  def _read(self) -> bytes:
    return _read_model(self.path, "data.SentencePieceFile.path")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
  """A Hugging Face fast tokenizer.

  Attributes:
    path: a `tokenizer.json`, or a folder with one.
    bos, eos, pad: the texts of these tokens; None looks for the usual names. EOS serves if
      there is no BOS or pad token.
  """

  path: Text
  bos: Text | None = None
  eos: Text | None = None
  pad: Text | None = None

  def fingerprint(self) -> str:
    return digest([repr((self.bos, self.eos, self.pad)), self._read()])

  def build(self, texts: Iterable[str], directory: Path | str) -> Vocabulary:
    """Copies the tokenizer; `texts` are not read.

    Raises:
      ValueError: if the file is missing, is no tokenizer, or lacks one of the given tokens.
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
      "pad_id": found["pad"],
      "bos_id": found["bos"],
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
    path = path / TOKENIZER_FILE if path.is_dir() else path
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

  def _load(self) -> Tokenizer:
    verify_read(Path(self.path).expanduser())
    try:
      return load_tokenizer(self.path)
    except ValueError as error:
      raise ValueError(f"data.ModelTokenizer.path={self.path!r}: {error}") from error


def _read_model(path: str, parameter: str) -> bytes:
  require_regular(Path(path).expanduser())
  verify_read(Path(path).expanduser())
  try:
    return Path(path).expanduser().read_bytes()
  except OSError as error:
    raise ValueError(f"{parameter}={path!r} cannot be read: {error.strerror}.") from error


def _sentencepiece_ids(data: bytes, where: str) -> dict:
  import sentencepiece

  with tokenizer_errors.named(where, "is not a SentencePiece model"):
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    vocab_size = processor.get_piece_size()
  if processor.eos_id() < 0:
    raise ValueError(f"{where} has no EOS token, which separates documents; use another model.")
  return {
    "vocab_size": vocab_size,
    "pad_id": processor.pad_id() if processor.pad_id() >= 0 else None,
    "bos_id": processor.bos_id() if processor.bos_id() >= 0 else None,
    "eos_id": processor.eos_id(),
    "unk_id": processor.unk_id(),
  }


def _last_clause(error: Exception) -> str:
  """The part of a SentencePiece error that says what is wrong."""
  return re.sub(r"^.*\)\s*\[.*\]\s*", "", str(error).strip().replace("\n", " ")).rstrip(". ")
