"""Token ids of documents to training instances, in the format of the PDS code.

Every document's tokens are followed by EOS and all of them are concatenated; an instance is BOS and
the next `length` tokens. Optionally an instance is cut back to its last sentence end and the rest
opens the next one. Attention is not reset at document boundaries, as in the paper's code.

An instance is known by the place where it begins (`instance_id`), not by how many come before it.
A new document therefore changes no id of the instances before it. The instances behind it keep
their ids as soon as one begins at the same place as before: at once if the document fills whole
instances, within a few instances if they are cut at sentence ends, and never if they are packed
without gaps and the document has another length, since every later instance then holds other text
than before.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.data.documents import document_id

_OPENING, _CLOSING = "([{", ")]}"
_ENDS = ".!?;"


class Instance(NamedTuple):
  """One packed training example.

  Attributes:
    id: 0 <= id < 2^63, see `instance_id`.
    tokens: `[n] int32`, 2 <= n <= length + 1, BOS first.
    document_ids: `[k] int64`, the documents its tokens come from, in order.
    document_num_tokens: `[k] int32`, how many tokens each of them has here, its EOS included and
      BOS not; the sum is `n - 1`.
  """

  id: int
  tokens: np.ndarray
  document_ids: np.ndarray
  document_num_tokens: np.ndarray


def instance_id(document: int, offset: int) -> int:
  """The id of the instance that begins at a place of a document, the same in every corpus.

  It is a 63-bit hash of both numbers; `instance_writing` refuses a corpus in which two are equal.

  Args:
    document: id of the document that holds the instance's first token behind BOS.
    offset: how many tokens of that document come before this token. An instance may begin with the
      document's EOS, whose offset is the number of the document's own tokens.
  """
  return document_id(f"{document}:{offset}")


def pack(
  documents: Iterable[tuple[int, Sequence[int]]],
  *,
  length: int,
  bos_id: int,
  eos_id: int,
  sentence_end: "np.ndarray | SentenceEnds | Callable[[np.ndarray, int], int] | None" = None,
  counts: Counter[str] | None = None,
  skip: int = 0,
) -> Iterator[Instance]:
  """Packs documents; every token lands in exactly one instance, the last one may be shorter.

  An instance of nothing but EOS inputs (possible if BOS is EOS) has no token to learn from; it
  is left out and counted.

  Args:
    documents: (document id, token ids without BOS and EOS).
    length: tokens after BOS; an instance has at most `length + 1`.
    sentence_end: None packs without gaps. A bool array `[V]` marks tokens after which an instance
      may end (EOS always is one). Anything else is called with the tokens that follow BOS, `[m]
      int32`, and the token that comes next, and returns how many to keep; 0 keeps all.
    counts: gets "empty_instances".
    skip: number of tokens at the front, EOS included, that earlier instances hold.

  Raises:
    ValueError: for length < 1.
  """
  if length < 1:
    raise ValueError(f"length={length} is too short to pack; set it to 1 or more.")
  counts = Counter() if counts is None else counts
  cut = _cut_rule(sentence_end, eos_id)
  runs: list[_Run] = []  # what is not yet in an instance, in order
  num_waiting = 0

  def emit() -> Iterator[Instance]:
    nonlocal num_waiting
    window = _front(runs, length + 1)
    num_kept = min(length, len(window))
    if cut is not None and len(window) > length:
      num_kept = cut(window[:length], int(window[length])) or length
    tokens = np.empty(num_kept + 1, np.int32)
    tokens[0] = bos_id
    tokens[1:] = window[:num_kept]
    begin = runs[0]
    owners, shares = _take(runs, num_kept)
    num_waiting -= num_kept
    if bos_id == eos_id and not np.any(tokens[:-1] != eos_id):
      counts["empty_instances"] += 1
      return
    yield Instance(
      instance_id(begin.document, begin.offset), tokens, np.array(owners, np.int64),
      np.array(shares, np.int32),
    )

  for identifier, ids in documents:
    tokens = np.empty(len(ids) + 1, np.int32)
    tokens[:-1] = ids
    tokens[-1] = eos_id
    offset = min(skip, len(tokens))
    skip -= offset
    if offset == len(tokens):
      continue
    runs.append(_Run(identifier, offset, tokens[offset:]))
    num_waiting += len(tokens) - offset
    while num_waiting > length:
      yield from emit()
  while num_waiting:
    yield from emit()


def encoded(
  documents, vocabulary, block: int = 256, line_end_id: int | None = None
) -> Iterator[tuple[int, list[int]]]:
  """(id, token ids) of documents, as `pack` takes them.

  A block of documents is tokenised at a time, so that the tokenizer can use its threads.

  Args:
    line_end_id: the id that ends each line that is not blank, as in the text of Kosmos's code; None
      takes a document as it is.
  """
  waiting = []

  def flush():
    if line_end_id is None:
      ids = vocabulary.encode_batch([d.text for d in waiting])
    else:
      ids = _encoded_lines([d.text for d in waiting], vocabulary, line_end_id)
    yield from zip((d.id for d in waiting), ids, strict=True)
    waiting.clear()

  for document in documents:
    waiting.append(document)
    if len(waiting) == block:
      yield from flush()
  yield from flush()


def _encoded_lines(texts, vocabulary, line_end_id: int) -> list[list[int]]:
  lines = [[line for line in text.splitlines() if line.strip()] for text in texts]
  ids = iter(vocabulary.encode_batch([line for of_text in lines for line in of_text]))
  return [[i for _ in of_text for i in (*next(ids), line_end_id)] for of_text in lines]


class _Run(NamedTuple):
  """What is left of a document: its tokens from `offset` on."""

  document: int
  offset: int
  tokens: np.ndarray


def _front(runs: list[_Run], count: int) -> np.ndarray:
  """Up to `count` of the waiting tokens, without taking them away."""
  if len(runs[0].tokens) >= count:
    return runs[0].tokens[:count]
  parts, total = [], 0
  for run in runs:
    parts.append(run.tokens[: count - total])
    total += len(parts[-1])
    if total == count:
      break
  return np.concatenate(parts)


def _take(runs: list[_Run], count: int) -> tuple[list[int], list[int]]:
  """Removes `count` tokens from the front; returns their documents, and how many of each."""
  owners, counts = [], []
  num_finished = 0
  for document, offset, tokens in runs:
    taken = min(count, len(tokens))
    owners.append(document)
    counts.append(taken)
    count -= taken
    if taken < len(tokens):
      runs[num_finished] = _Run(document, offset + taken, tokens[taken:])
    else:
      num_finished += 1
    if count == 0:
      break
  del runs[:num_finished]
  return owners, counts


def _cut_rule(sentence_end, eos_id):
  ends = end_flags(sentence_end, eos_id)
  if ends is None:
    return sentence_end
  return lambda tokens, following: _last_true(ends(tokens, following))


def end_flags(sentence_end, eos_id) -> Callable[[np.ndarray, int], np.ndarray] | None:
  """The rule as `(tokens [m], the next one) -> [m] bool`, True for tokens that may end an instance.

  It is None if no rule is given, or one that cannot be told token by token.
  """
  if isinstance(sentence_end, np.ndarray):
    table = np.array(sentence_end, bool)
    table[eos_id] = True
    return lambda tokens, following: table[tokens]
  return getattr(sentence_end, "ends", None)


def _last_true(flags: np.ndarray) -> int:
  """Number of leading entries up to and including the last true one; 0 if none is."""
  return int(len(flags) - np.argmax(flags[::-1])) if flags.any() else 0


@dataclasses.dataclass(frozen=True)
class SentenceEnds:
  """The reference's rule for where an instance may end, as tables over the vocabulary.

  It may always end after EOS and after a token with a line break. If a space follows (so that
  "3.14" and "D.A." stay whole), it may also end after a token with one of `. ! ? ;` and no bracket
  left open inside.

  Attributes:
    certain: `[V] bool`, tokens after which an instance may end whatever follows.
    possible: `[V] bool`, tokens after which it may end if a space follows.
    trailing_space: `[V] bool`, tokens whose text has white space after its last end mark.
    leading_space: `[V] bool`, tokens whose text begins with white space.
  """

  certain: np.ndarray
  possible: np.ndarray
  trailing_space: np.ndarray
  leading_space: np.ndarray

  def __call__(self, tokens: np.ndarray, following: int) -> int:
    """How many of `tokens [m]` to keep if `following` comes next; 0 if no sentence ends."""
    return _last_true(self.ends(tokens, following))

  def ends(self, tokens: np.ndarray, following: int) -> np.ndarray:
    """`[m] bool`: whether an instance may end after each of `tokens [m]`, before `following`."""
    after = np.append(self.leading_space[tokens[1:]], self.leading_space[following])
    confirmed = self.possible[tokens] & (self.trailing_space[tokens] | after)
    return self.certain[tokens] | confirmed


def sentence_end_table(vocabulary) -> SentenceEnds:
  """Builds `SentenceEnds` from the texts of a vocabulary's tokens."""
  texts = vocabulary.token_texts()
  certain = np.array(["\n" in text for text in texts])
  certain[vocabulary.eos_id] = True
  return SentenceEnds(
    certain=certain,
    possible=np.array([_may_end(text) for text in texts]),
    trailing_space=np.array([_space_after_mark(text) for text in texts]),
    leading_space=np.array([text[:1].isspace() for text in texts]),
  )


def _may_end(text: str) -> bool:
  depth = 0
  for character in text:
    depth += (character in _OPENING) - (character in _CLOSING)
  return depth <= 0 and any(mark in text for mark in _ENDS)


def _space_after_mark(text: str) -> bool:
  last = max((text.rfind(mark) for mark in _ENDS), default=-1)
  return last >= 0 and any(character.isspace() for character in text[last + 1 :])


def one_per_document(
  documents: Iterable[tuple[int, Sequence[int]]],
  *,
  length: int,
  bos_id: int,
  eos_id: int,
  counts: Counter[str] | None = None,
) -> Iterator[Instance]:
  """One instance a document: BOS, its tokens, EOS, cut to `length + 1`.

  Args:
    counts: gets "cut_documents" and "cut_tokens", which tell what did not fit.

  Raises:
    ValueError: for length < 1.
  """
  if length < 1:
    raise ValueError(f"length={length} is too short; set it to 1 or more.")
  counts = Counter() if counts is None else counts
  for identifier, ids in documents:
    tokens = np.array([bos_id, *ids, eos_id], np.int32)
    if len(tokens) > length + 1:
      counts["cut_documents"] += 1
      counts["cut_tokens"] += len(tokens) - (length + 1)
      tokens = tokens[: length + 1]
    yield Instance(
      instance_id(identifier, 0), tokens, np.array([identifier], np.int64),
      np.array([len(tokens) - 1], np.int32),
    )
