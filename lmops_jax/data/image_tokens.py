"""Records of texts and pictures to token ids: the layout of Kosmos-1 and 2 (arXiv:2306.14824).

    <s> <image> slots </image> caption </s>
    <s> text <image> slots </image> text ... </s>

A slot is a place whose word embedding an image vector replaces. The texts between pictures are
encoded one by one, as a prompt's are in use. A token is learned if it follows an input other than
`<s>`, `<image>` and a slot, unless it is part of a prompt. So `</image>` is never a target, the
first target of a caption is its first word, and `<image>` behind a text is a target.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.config.setting_types import Count, PositiveInt, component
from lmops_jax.data.boxes import grounding_words
from lmops_jax.data.grounded_text import BoxWords, with_boxes
from lmops_jax.data.multimodal import LeftOut, Part, Picture, Record
from lmops_jax.text.vocabularies import Vocabulary

KOSMOS_WORDS = ("<mask>", "</doc>", "<image>", "</image>", "</chunk>", "</line>")
_BLOCK = 256  # records that are encoded together


@component(module="data")
@dataclasses.dataclass(frozen=True)
class ImageTokens:
  """The ids of a vocabulary that a layout with pictures needs. The defaults are Kosmos-1's.

  Attributes:
    vocab_size: number of ids, the added ones included.
    bos_id, eos_id, pad_id: the vocabulary's.
    image_id, image_end_id: `<image>` and `</image>`.
    line_end_id: `</line>`, which ends the lines of texts without pictures (`packing.encoded`).
    num_slots: vectors of a picture.
    first_slot_id: slots hold the ids from this one on, as in use of the published model (4); None
      repeats `<image>`, as in its training. Which ids they are changes no result.

  Raises:
    ValueError: for an id outside the vocabulary, or the pad id in a slot, which it would hide from
      models that tell padding by its id.
  """

  vocab_size: PositiveInt = 64007
  bos_id: Count = 0
  pad_id: Count = 1
  eos_id: Count = 2
  image_id: Count = 64003
  image_end_id: Count = 64004
  line_end_id: Count = 64006
  num_slots: PositiveInt = 64
  first_slot_id: Count | None = None

  def __post_init__(self):
    fields = ("bos_id", "pad_id", "eos_id", "image_id", "image_end_id", "line_end_id")
    largest = {name: getattr(self, name) for name in fields}
    if self.first_slot_id is not None:
      largest["first_slot_id + num_slots - 1"] = self.first_slot_id + self.num_slots - 1
    for name, value in largest.items():
      if value >= self.vocab_size:
        raise ValueError(
          f"data.ImageTokens.{name}={value} is not below vocab_size={self.vocab_size}; take the "
          "ids of the vocabulary that is used."
        )
    if self.pad_id in self.block[1:-1]:
      raise ValueError(
        f"data.ImageTokens.pad_id={self.pad_id} is the id of a slot; set first_slot_id to None or "
        "to where no slot is the pad."
      )

  @functools.cached_property
  def block(self) -> list[int]:
    """The ids of a picture: `<image>`, the slots, `</image>`."""
    if self.first_slot_id is None:
      slots = [self.image_id] * self.num_slots
    else:
      slots = list(range(self.first_slot_id, self.first_slot_id + self.num_slots))
    return [self.image_id, *slots, self.image_end_id]


def appended(
  vocabulary: Vocabulary, num_slots: int, words: Sequence[str] = KOSMOS_WORDS
) -> ImageTokens:
  """The ids of special words that follow those of a vocabulary, in order.

  For the published SentencePiece model, whose own ids end at 64,000, they are the published ids.

  Args:
    num_slots: vectors of a picture.
    words: the special words, `<image>`, `</image>` and `</line>` among them.

  Raises:
    ValueError: if one of these three is missing, or a word comes twice.
  """
  if len(set(words)) < len(words) or not {"<image>", "</image>", "</line>"} <= set(words):
    raise ValueError(
      f"the special words {', '.join(words)} must be different, with <image>, </image> and </line> "
      "among them."
    )
  ids = {word: vocabulary.vocab_size + i for i, word in enumerate(words)}
  return ImageTokens(
    vocab_size=vocabulary.vocab_size + len(words), bos_id=vocabulary.bos_id,
    pad_id=vocabulary.pad_id, eos_id=vocabulary.eos_id, image_id=ids["<image>"],
    image_end_id=ids["</image>"], line_end_id=ids["</line>"], num_slots=num_slots,
  )


def special_words(grid: int | None) -> tuple[str, ...]:
  """The words that follow a vocabulary: Kosmos-1's, and with a grid of cells those of Kosmos-2.

  Args:
    grid: cells in a row and in a column, 32 in the published model; None: no words for boxes.
  """
  return KOSMOS_WORDS if grid is None else (*KOSMOS_WORDS, *grounding_words(grid))


class Encoded(NamedTuple):
  """A record as tokens.

  Attributes:
    id: the record's.
    tokens: `[n] int32`, from `<s>` to `</s>`.
    learned: `[n] bool`, for each token whether its prediction counts.
    vectors: `[n] int32`, -1 at a word, else the number of the image vector in its place: vectors
      `k * num_slots ...` are those of picture k.
    pictures: the record's pictures, in order.
  """

  id: int
  tokens: np.ndarray
  learned: np.ndarray
  vectors: np.ndarray
  pictures: tuple[Picture, ...]


def lay_out(
  identifier: int, parts: Sequence[Part], texts: Iterable[Sequence[int]], num_given: int,
  ids: ImageTokens, *, end: bool = True,
) -> Encoded:
  """The tokens of a record.

  Args:
    identifier: the record's id.
    parts: see `Record`.
    texts: the ids of each text among the parts, in order.
    num_given: number of parts at the front that are a prompt, of which nothing is learned.
    ids: the special ids.
    end: whether `</s>` follows; a prompt that a model goes on with has none.
  """
  tokens, given, vectors, pictures = [ids.bos_id], [True], [-1], []
  texts = iter(texts)
  for number, part in enumerate(parts):
    if isinstance(part, str):
      new, places = next(texts), None
    else:
      start = len(pictures) * ids.num_slots
      new, places = ids.block, [-1, *range(start, start + ids.num_slots), -1]
      pictures.append(part)
    tokens += new
    given += [number < num_given] * len(new)
    vectors += places or [-1] * len(new)
  if end:
    tokens, given, vectors = [*tokens, ids.eos_id], [*given, False], [*vectors, -1]
  tokens, vectors = np.array(tokens, np.int32), np.array(vectors, np.int32)
  learned = ~np.array(given)
  is_slot = vectors >= 0
  learned[1:] &= ~is_slot[:-1]
  learned[1:] &= ~is_slot[1:]  # after <image>
  learned[:2] = False  # <s>, and what follows it
  return Encoded(identifier, tokens, learned, vectors, tuple(pictures))


def encode_records(
  records: Iterable[Record], vocabulary: Vocabulary, ids: ImageTokens, *,
  words: BoxWords | None = None, left_out: LeftOut | None = None,
) -> Iterator[Encoded]:
  """Records as tokens, in order; a block at a time, so that the tokenizer can use its threads.

  Args:
    words: those of boxes, for texts that have some (`grounded_text.GroundedText`).
    left_out: gets records with boxes that stand inside of tokens ("split_token").

  Raises:
    ValueError: for boxes without `words`.
  """
  left_out = LeftOut() if left_out is None else left_out
  records = iter(records)
  while block := list(itertools.islice(records, _BLOCK)):
    rows = [record.parts for record in block]
    found = with_boxes(rows, encode_texts(rows, vocabulary), vocabulary, words)
    for record, texts in zip(block, found):
      if texts is None:
        left_out.add("split_token", record.source)
      else:
        yield lay_out(record.id, record.parts, texts, record.num_given, ids)


def encode_texts(
  rows: Sequence[Sequence[Part]], vocabulary: Vocabulary
) -> list[list[list[int]]]:
  """The ids of each text of each row, all encoded together, without boxes."""
  texts = [part for parts in rows for part in parts if isinstance(part, str)]
  ids = iter(vocabulary.encode_batch(texts))
  return [[next(ids) for part in parts if isinstance(part, str)] for parts in rows]


def cut(example: Encoded, num_tokens: int, num_pictures: int, ids: ImageTokens) -> Encoded | None:
  """The beginning of an example, cut neither inside a picture nor right behind one.

  Args:
    num_tokens, num_pictures: the most that are kept.

  Returns:
    None if nothing of it is learned.
  """
  starts = np.flatnonzero(example.vectors >= 0)[:: ids.num_slots] - 1  # of the pictures' blocks
  end = min(num_tokens, len(example.tokens))
  if len(starts) > num_pictures:
    end = min(end, int(starts[num_pictures]))
  size = ids.num_slots + 2
  for start in starts[::-1]:
    if start < end <= start + size:
      end = int(start)
  if not example.learned[:end].any():
    return None
  return Encoded(
    example.id, example.tokens[:end], example.learned[:end], example.vectors[:end],
    example.pictures[: int((starts < end).sum())])
