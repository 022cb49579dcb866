"""The two engines behind `tokenizer.Tokenizer`: the tokenizers package, and SentencePiece.

Both take special tokens where they stand in a text, add those of the model around it, and decode as
transformers does with `clean_up_tokenization_spaces=False`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lmops_jax.text import tokenizer_errors, vocabularies

_BLANK = "\u2581"
# Appended to a serialized model it overrides one field, as protocol buffers merge what comes later:
# normalizer_spec (3) { add_dummy_prefix (3): false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class FastBackend:
  """A `tokenizers.Tokenizer`."""

  def __init__(
    self, tokenizer, *, where: Path | str = "the tokenizer", word_end: str | None = None
  ):
    """Tries the tokenizer out.

    Raises:
      ValueError: if it can encode nothing or has an id twice; the sentence names `where`.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer_errors.check(tokenizer, where)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer_errors.check_distinct(ids, where)
    self.tokenizer = tokenizer
    self.vocab_size = max(ids.values(), default=-1) + 1
    self._where = where
    self._word_end = word_end  # CLIP's decoder leaves it in

  def token_to_id(self, text: str) -> int | None:
    return self.tokenizer.token_to_id(text)

  def id_to_token(self, identifier: int) -> str | None:
    return self.tokenizer.id_to_token(identifier)

  def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
    with tokenizer_errors.named(self._where, "cannot encode a text", tokenizer_errors.OTHER):
      encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special)
    return [encoding.ids for encoding in encodings]

  def encode_typed(self, firsts: Sequence[str], seconds: Sequence[str] | None, most: int | None):
    rows = list(firsts if seconds is None else zip(firsts, seconds, strict=True))
    with tokenizer_errors.named(self._where, "cannot encode a text", tokenizer_errors.OTHER):
      tokenizer = self.tokenizer
      if most is not None:  # of a copy, since others may be reading with this one
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        tokenizer.encode_special_tokens = self.tokenizer.encode_special_tokens
        tokenizer.enable_truncation(most)
      encodings = tokenizer.encode_batch_fast(rows)
    return [e.ids for e in encodings], [e.type_ids for e in encodings]

  def decode(self, ids: list[int], skip_special: bool) -> str:
    with tokenizer_errors.named(self._where, "cannot decode ids", tokenizer_errors.OTHER):
      text = self.tokenizer.decode(ids, skip_special_tokens=skip_special)
    return text if self._word_end is None else text.replace(self._word_end, " ").strip()

  def behind(self, text: str, num_tokens: int) -> str:
    with tokenizer_errors.named(self._where, "cannot encode a text", tokenizer_errors.OTHER):
      offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
    return text[offsets[num_tokens][0] :] if num_tokens < len(offsets) else ""

  def fingerprint(self) -> bytes:
    return hashlib.blake2b(self.tokenizer.to_str().encode(), digest_size=16).digest()

  def vocabulary(self, directory: Path, ids: dict) -> vocabularies.Vocabulary:
    return vocabularies.write_vocabulary(
      directory, "hugging_face", self.tokenizer.to_str().encode(), ids
    )


def surround(
  tokenizer, before: Sequence[str], after: Sequence[str] = (),
  between: Sequence[str] | None = None, second_type: int = 0,
) -> None:
  """Sets which tokens a `tokenizers.Tokenizer` puts around a text, and in a pair of texts.

  Args:
    between: what stands between the texts of a pair; None is `after` and then `before`.
    second_type: token type of a pair's second text and of what follows it.
  """
  from tokenizers import processors

  between = [*after, *before] if between is None else between
  tokenizer.post_processor = processors.TemplateProcessing(
    single=[*before, "$A", *after],
    pair=[*before, "$A", *between, *(f"{part}:{second_type}" for part in ("$B", *after))],
    special_tokens=[
      (token, tokenizer.token_to_id(token)) for token in {*before, *after, *between}],
  )


class Added(NamedTuple):
  """A token outside of a SentencePiece model's own segmentation.

  Attributes:
    text, id: the token's own.
    special: whether decoded text leaves it out.
    lstrip, rstrip: whether it takes the blanks on that side with it.
  """

  text: str
  id: int
  special: bool = True
  lstrip: bool = False
  rstrip: bool = False


class SentencePieceBackend:
  """A SentencePiece model with the tokens that a checkpoint puts around it."""

  def __init__(
    self,
    model: bytes,
    *,
    added: Mapping[str, Added],
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    between: Sequence[int] = (),
    fairseq: bool = False,
    prefix_every_part: bool = True,
  ):
    """Opens the model.

    Args:
      model: contents of the `.model` file.
      added: special tokens and those that the checkpoint added, by text.
      before, after: ids that encoding puts around a text.
      between: ids that it puts between the texts of a pair.
      fairseq: ids are those of fairseq's dictionary, see `vocabularies.fairseq_ids`.
      prefix_every_part: whether the part of a text that follows an added token begins a word, as
        the whole text does if the model says so.
    """
    self.model = model
    self._processor = _open(model)
    self._inner = self._processor if prefix_every_part else _open(model + _NO_DUMMY_PREFIX)
    self._fairseq = fairseq
    self._added = dict(added)
    self._longest_first = sorted(added.values(), key=lambda token: -len(token.text))
    self._by_id = {token.id: token for token in added.values()}
    self._before, self._after, self._between = list(before), list(after), list(between)
    self._pattern = _pattern(self._longest_first)
    first, = self._processor.encode("a", out_type=str)[:1]
    self._begins_word = first.startswith(_BLANK)

  @property
  def vocab_size(self) -> int:
    pieces = self._processor.get_piece_size() + self._fairseq
    return max([pieces - 1, *self._by_id]) + 1

  def token_to_id(self, text: str) -> int | None:
    if text in self._added:
      return self._added[text].id
    piece = self._processor.piece_to_id(text)
    if self._processor.id_to_piece(piece) != text:
      return None
    return vocabularies.fairseq_ids([piece])[0] if self._fairseq else piece

  def id_to_token(self, identifier: int) -> str | None:
    if identifier in self._by_id:
      return self._by_id[identifier].text
    piece = vocabularies.fairseq_piece(identifier) if self._fairseq else identifier
    if piece is None or not 0 <= piece < self._processor.get_piece_size():
      return None
    return self._processor.id_to_piece(piece)

  def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
    if self._pattern is None or not any(map(self._pattern.search, texts)):
      rows = self._processor.encode(list(texts), out_type=int)
      rows = [self._ids(row) for row in rows]
    else:
      rows = [[i for part in self._parts(text) for i in part] for text in texts]
    return [[*self._before, *row, *self._after] for row in rows] if add_special else rows

  def encode_typed(self, firsts: Sequence[str], seconds: Sequence[str] | None, most: int | None):
    ids = self.encode_batch(firsts, False)
    others = [[]] * len(ids) if seconds is None else self.encode_batch(seconds, False)
    between = [] if seconds is None else self._between
    pairs = list(zip(ids, others, strict=True))
    if most is not None:
      room = most - len(self._before + between + self._after)
      pairs = [_within(room, *pair) for pair in pairs]
    rows = [[*self._before, *a, *between, *b, *self._after] for a, b in pairs]
    return rows, [[0] * len(row) for row in rows]

  def _parts(self, text: str) -> Iterator[list[int]]:
    at = 0
    for match in self._pattern.finditer(text):
      if match.start() > at:
        yield self._encode(text[at : match.start()], at)
      yield [self._longest_first[match.lastindex - 1].id]
      at = match.end()
    if at < len(text):
      yield self._encode(text[at:], at)

  def _encode(self, part: str, at: int) -> list[int]:
    return self._ids((self._inner if at else self._processor).encode(part, out_type=int))

  def _ids(self, pieces: list[int]) -> list[int]:
    return vocabularies.fairseq_ids(pieces) if self._fairseq else pieces

  def decode(self, ids: list[int], skip_special: bool) -> str:
    tokens = []
    for i in ids:
      special = i in self._by_id and self._by_id[i].special
      text = None if special and skip_special else self.id_to_token(i)
      if text is not None:
        tokens.append(text)
    return self._decoder.decode(tokens)

  @functools.cached_property
  def _decoder(self):
    from tokenizers import decoders

    steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if self._begins_word:
      steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)

  def behind(self, text: str, num_tokens: int) -> str:
    return self.decode(self.encode_batch([text], False)[0][num_tokens:], False)

  def fingerprint(self) -> bytes:
    state = hashlib.blake2b(self.model, digest_size=16)
    state.update(repr((
      sorted(self._by_id.values()), self._before, self._after, self._between, self._fairseq,
      self._inner is self._processor,
    )).encode())
    return state.digest()

  def vocabulary(self, directory: Path, ids: dict) -> vocabularies.Vocabulary:
    kind = "fairseq_sentencepiece" if self._fairseq else "sentencepiece"
    return vocabularies.write_vocabulary(directory, kind, self.model, ids)


def _within(room: int, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
  """Two texts cut to so many ids together, the longer one first."""
  of_shorter = min(len(first), len(second), room // 2)
  if len(first) <= len(second):
    return first[:of_shorter], second[: room - of_shorter]
  return first[: room - of_shorter], second[:of_shorter]


def _open(model: bytes):
  import sentencepiece

  return sentencepiece.SentencePieceProcessor(model_proto=model)


def _pattern(added: Sequence[Added]) -> re.Pattern | None:
  """Finds added tokens; the number of the group that matches is the token's, from one."""
  alternatives = [
    (r"\s*" if token.lstrip else "") + f"({re.escape(token.text)})"
    + (r"\s*" if token.rstrip else "")
    for token in added
  ]
  return re.compile("|".join(alternatives)) if alternatives else None
