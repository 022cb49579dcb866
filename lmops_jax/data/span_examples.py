"""Examples of parts that an encoder reads and parts that the decoder reads (MetaLM, 2206.06336).

    <s> [instruction and input] answer </s>
    <s> [first input] first answer </s> [second input] second answer </s> [input] answer </s>
    <s> <image> slots </image> [question] answer </s>

What stands in brackets are spans: a whole input is read by the encoder, and the answer follows as
words (section 3 of the paper). Tokens are the same with an encoder and without one, so that models
of both kinds are compared on equal inputs. A picture and the text that is read right behind it make
up one segment of the encoder; a picture without such a text has a segment of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lmops_jax.data import image_tokens
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.multimodal import Picture, Record
from lmops_jax.data.span_rows import encoded_spans
from lmops_jax.text.vocabularies import Vocabulary

_BLOCK = 256  # records that are encoded together


class Read(str):
  """A text that the encoder reads, among the parts of a `Record`."""


def whole_input(record: Record) -> Record:
  """A prompt with its completion, of which the encoder reads the prompt (MetaLM, section 3).

  Raises:
    ValueError: for a record without a prompt.
  """
  given = record.parts[: record.num_given]
  if not given:
    raise ValueError(
      f"{record.source} has no prompt for the encoder to read; give prompt and completion.")
  parts = [Read(part) if isinstance(part, str) else part for part in given]
  return record._replace(parts=(*parts, *record.parts[record.num_given :]))


class SpecialIds(Protocol):
  """A vocabulary, or `ImageTokens`, which texts with pictures need."""

  bos_id: int
  eos_id: int
  pad_id: int


class SpanExample(NamedTuple):
  """A record as tokens.

  Attributes:
    id: the record's.
    tokens: `[n] int32`, from `<s>` on.
    learned: `[n] bool`, for each token whether its prediction counts.
    vectors: `[n] int32`, the number of the picture's vector at a slot, else -1, as in `Encoded`.
    pictures: the record's, in order.
    spans: `[k,2] int32`, what the encoder reads; empty ones are of pictures alone.
    picture_segments: the segment, from 1 on, of each picture.
    where: names the record in errors.
  """

  id: int
  tokens: np.ndarray
  learned: np.ndarray
  vectors: np.ndarray
  pictures: tuple[Picture, ...]
  spans: np.ndarray
  picture_segments: tuple[int, ...]
  where: str

  @property
  def num_places(self) -> int:
    """Places of the encoder that the spans take, with a start token in front of each."""
    return int((self.spans[:, 1] - self.spans[:, 0] + 1).sum())


def lay_out(
  record: Record, texts: Iterable[Sequence[int]], ids: SpecialIds | ImageTokens, *,
  end: bool = True,
) -> SpanExample:
  """The tokens of a record whose texts are read by the encoder where they are `Read`.

  Learned are the tokens behind the given parts, as `image_tokens.lay_out` has it; of a span only
  the first one, and none of a span right behind a picture, with which it is read together.

  Args:
    record: see `Record`.
    texts: the ids of each text among its parts, in order.
    ids: the special ids; `ImageTokens` for a record with pictures.
    end: whether `</s>` follows; a prompt that a model goes on with has none.

  Raises:
    ValueError: for a text without tokens for the encoder.
  """
  texts = list(texts)
  plain = image_tokens.lay_out(record.id, record.parts, texts, record.num_given, ids, end=end)
  learned, lengths = plain.learned.copy(), iter(map(len, texts))
  spans: list[tuple[int, int]] = []
  picture_segments: list[int] = []
  place, behind_picture = 1, False

  def add(start: int, stop: int) -> None:
    spans.append((start, stop))
    if behind_picture:
      picture_segments.append(len(spans))

  for part in record.parts:
    is_text = isinstance(part, str)
    stop = place + (next(lengths) if is_text else len(ids.block))
    if isinstance(part, Read):
      if stop == place:
        raise ValueError(
          f"{record.source} has a part for the encoder without any token; leave it out.")
      add(place, stop)
      learned[place + (not behind_picture) : stop] = False
    elif behind_picture:
      add(place, place)
    place, behind_picture = stop, not is_text
  if behind_picture:
    add(place, place)
  return SpanExample(
    record.id, plain.tokens, learned, plain.vectors, plain.pictures,
    np.array(spans, np.int32).reshape(-1, 2), tuple(picture_segments), record.source)


def encode(
  records: Iterable[Record], vocabulary: Vocabulary, ids: SpecialIds | ImageTokens, *,
  end: bool = True,
) -> Iterator[SpanExample]:
  """Records as examples, in order; a block at a time, so that the tokenizer can use its threads.

  Arguments as for `lay_out`.
  """
  records = iter(records)
  while block := list(itertools.islice(records, _BLOCK)):
    texts = image_tokens.encode_texts([record.parts for record in block], vocabulary)
    for record, of_record in zip(block, texts):
      yield lay_out(record, of_record, ids, end=end)


def behind(
  shots: Sequence[SpanExample], example: SpanExample, ids: SpecialIds | ImageTokens
) -> SpanExample:
  """An example behind demonstrations, of which nothing is learned.

  Args:
    shots: with answer and `</s>`, the first one farthest from the example.
    example: with an answer, or a prompt.
    ids: the special ids.
  """
  whole = [*shots, example]
  num_slots = ids.num_slots if any(one.pictures for one in whole) else 0
  starts = np.cumsum([0] + [len(one.tokens) - 1 for one in whole])  # one `<s>` is for all
  vectors, segments, spans = [], [], []
  num_vectors = 0
  for start, one in zip(starts, whole):
    segments += [segment + sum(map(len, spans)) for segment in one.picture_segments]
    spans.append(one.spans + start)
    vectors.append(np.where(one.vectors < 0, -1, one.vectors + num_vectors))
    num_vectors += num_slots * len(one.pictures)
  first = [slice(min(i, 1), None) for i in range(len(whole))]  # without the other `<s>`
  learned = [*(np.zeros(len(shot.tokens), bool) for shot in shots), example.learned]
  return SpanExample(
    example.id,
    np.concatenate([one.tokens[part] for one, part in zip(whole, first)]).astype(np.int32),
    np.concatenate([flags[part] for flags, part in zip(learned, first)]),
    np.concatenate([index[part] for index, part in zip(vectors, first)]).astype(np.int32),
    tuple(picture for one in whole for picture in one.pictures),
    np.concatenate(spans).astype(np.int32), tuple(segments), example.where)


def fitted(
  example: SpanExample, length: int, encoder_positions: int | None = None
) -> SpanExample | None:
  """An example with as much of its spans, from their ends, as there is room for.

  The longest span is cut first, at its front, since the end of an input asks for the answer. What
  the decoder reads as words is never cut.

  Args:
    length: the most places of the decoder that predict something, one fewer than tokens.
    encoder_positions: the most positions of a span with its start token; None: no limit.

  Returns:
    The example itself if it fits, and None if it does not even with one token in each span.
  """
  sizes = example.spans[:, 1] - example.spans[:, 0]
  kept = sizes.copy()
  if encoder_positions is not None:
    kept = np.minimum(kept, encoder_positions - 1)
  too_many = len(example.tokens) - 1 - int((sizes - kept).sum()) - length
  while too_many > 0:
    if not len(kept) or kept.max() <= 1:
      return None
    longest = int(np.argmax(kept))
    cut = min(too_many, int(kept[longest]) - 1)
    kept[longest] -= cut
    too_many -= cut
  if (kept == sizes).all():
    return example
  stays = np.ones(len(example.tokens), bool)
  for (start, stop), num in zip(example.spans.tolist(), kept.tolist()):
    stays[start : stop - num] = False
  place = np.concatenate([[0], np.cumsum(stays)])  # of each token among those that stay
  return example._replace(
    tokens=example.tokens[stays], learned=example.learned[stays], vectors=example.vectors[stays],
    spans=place[example.spans].astype(np.int32))


class EncodedPrompts(NamedTuple):
  """Prompts for `decoding.prompts.Prompt`, whose vectors are not made yet.

  Attributes:
    inputs: `encoder_tokens`, `encoder_positions`, `encoder_segments [N,E] int32`.
    ids: the token ids of each prompt.
    index: for each prompt which vector stands at each id, -1 for a word: those of the encoder's row
      come first, E of them, and then those of the prompt's pictures.
    image_segments: `[N,I] int32`, the encoder's segment of each picture, 0 for those that a prompt
      lacks; I is the largest number of pictures.
  """

  inputs: Mapping[str, np.ndarray]
  ids: list[list[int]]
  index: list[np.ndarray]
  image_segments: np.ndarray


def encoded_prompts(
  examples: Sequence[SpanExample], ids: SpecialIds | ImageTokens, length: int | None = None
) -> EncodedPrompts:
  """What the encoder reads of prompts, and where its vectors stand in each.

  Args:
    examples: laid out without an end.
    ids: the special ids.
    length: E; None takes the places that the longest of them needs.

  Raises:
    ValueError: if a prompt needs more than E places; the sentence names it.
  """
  most = max((example.num_places for example in examples), default=0)
  length = most if length is None else length
  if most > length:
    worst = max(examples, key=lambda example: example.num_places)
    raise ValueError(
      f"{worst.where} takes {most} places of the encoder, start tokens included, and it has "
      f"{length}; give more, or shorten the input."
    )
  sizes = [len(example.tokens) for example in examples]
  tokens = np.full((len(examples), max(sizes, default=0)), ids.pad_id, np.int32)
  for row, example in zip(tokens, examples):
    row[: len(example.tokens)] = example.tokens
  inputs = encoded_spans(
    tokens, [example.spans for example in examples], length, bos_id=ids.bos_id, pad_id=ids.pad_id)
  of_words = inputs.pop("vector_index")
  index = [
    np.where(example.vectors < 0, row[:size], length + example.vectors).astype(np.int32)
    for example, row, size in zip(examples, of_words, sizes)]
  most_pictures = max((len(example.pictures) for example in examples), default=0)
  segments = np.zeros((len(examples), most_pictures), np.int32)
  for row, example in zip(segments, examples):
    row[: len(example.pictures)] = example.picture_segments
  return EncodedPrompts(
    inputs, [example.tokens.tolist() for example in examples], index, segments)
