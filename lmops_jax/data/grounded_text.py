"""Texts of which stretches have boxes, and how they become tokens.

In a row of Kosmos-2 (arXiv:2306.14824, section 2) the stretch stands between `<phrase>` and
`</phrase>`, and its boxes follow: `<grounding> <phrase> a dog </phrase> <object> ul lr </object>`,
where `ul` and `lr` are the words of the cells with a box's upper left and lower right corner; a
further box stands behind `</delimiter_of_multi_objects/>`.

The text is encoded as a whole, so that it has the ids that it has without boxes, and the words of
the boxes are put between these. In use the texts between tags are encoded one by one instead
(`boxes.insert`), as in the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lmops_jax.data import boxes
from lmops_jax.data.boxes import Box
from lmops_jax.text.vocabularies import Vocabulary


class Located(NamedTuple):
  """A stretch of a text with its boxes.

  Attributes:
    start, end: characters, the end excluded; an empty stretch gives boxes without a phrase.
    boxes: fractions of the picture in front of the text; none give a phrase without boxes.
  """

  start: int
  end: int
  boxes: tuple[Box, ...]


class GroundedText(str):
  """A text that knows where what it names is; where boxes mean nothing it is the text alone.

  Attributes:
    spans: disjoint stretches in order.
    asks: whether `<grounding>` stands in front, which asks for boxes.
  """

  spans: tuple[Located, ...]
  asks: bool

  def __new__(cls, text: str, spans: Iterable[Located] = (), asks: bool = True):
    made = super().__new__(cls, text)
    made.spans, made.asks = tuple(spans), asks
    return made


class BoxWords(NamedTuple):
  """How a vocabulary writes boxes.

  Attributes:
    tags: the ids of the tags and of the first cell.
    grounding: the id of `<grounding>`.
    grid: cells in a row and in a column.
  """

  tags: boxes.BoxTokens
  grounding: int
  grid: int


def box_words(token_id: Callable[[str], int | None]) -> BoxWords:
  """The words for boxes of a vocabulary; argument and errors as for `boxes.box_tokens`."""
  tags, grid = boxes.box_tokens(token_id)
  return BoxWords(tags, token_id(boxes.GROUNDING), grid)


def appended_box_words(vocabulary: Vocabulary, words: Sequence[str]) -> BoxWords:
  """Those among the words that follow a vocabulary (`image_tokens.appended`)."""
  return box_words({word: vocabulary.vocab_size + i for i, word in enumerate(words)}.get)


def trimmed(text: str, spans: Iterable[Located]) -> GroundedText:
  """A text without the blanks at its ends, its stretches moved along."""
  start, end = len(text) - len(text.lstrip()), len(text.rstrip())
  return GroundedText(text[start:end], [
    span._replace(start=max(span.start, start) - start, end=min(span.end, end) - start)
    for span in spans])


def with_boxes(
  rows: Sequence[Sequence[object]], texts: Sequence[list[list[int]]], vocabulary: Vocabulary,
  words: BoxWords | None,
) -> list[list[list[int]] | None]:
  """The ids of texts with the words of their boxes, all texts encoded together.

  A stretch is given by the tokens of the text in front of its beginning and of its end, which have
  to be the first ones of the whole text; if a token reaches over the beginning, it belongs to the
  stretch.

  Args:
    rows: parts of records, of which those that are texts count.
    texts: the ids of each text of each row (`image_tokens.encode_texts`).
    words: None for a vocabulary without them.

  Returns:
    The ids of each text of each row; None for a row with a stretch that cannot be told from its
    tokens, such as one that ends within a token.

  Raises:
    ValueError: for boxes and a vocabulary without words for them, or boxes that are none.
  """
  grounded = [part for parts in rows for part in parts if isinstance(part, GroundedText)]
  if not grounded:
    return list(texts)
  if words is None:
    raise ValueError(
      "there are texts with boxes, and the vocabulary has no words for them; add "
      "boxes.grounding_words, or take the texts without their boxes."
    )
  front_ids = iter(vocabulary.encode_batch([
    text[:place].rstrip() for text in grounded for span in text.spans for place in span[:2]]))
  found: list[list[list[int]] | None] = []
  for parts, ids in zip(rows, texts):
    pieces = [
      _tagged(part, whole, front_ids, words) if isinstance(part, GroundedText) else whole
      for part, whole in zip((part for part in parts if isinstance(part, str)), ids)]
    found.append(None if None in pieces else pieces)
  return found


def _tagged(
  text: GroundedText, whole: list[int], front_ids: Iterator[list[int]], words: BoxWords
) -> list[int] | None:
  """The ids of a text with tags and boxes; None if a stretch cannot be told."""
  fronts = [(next(front_ids), next(front_ids)) for _ in text.spans]
  tags, ids, done = words.tags, [words.grounding] if text.asks else [], 0
  for span, (before, up_to) in zip(text.spans, fronts):
    start, end = _beginning(whole, before), len(up_to)
    if start is None or start < done or up_to != whole[:end]:
      return None
    if span.start == span.end:
      ids += whole[done:end]
    elif start < end:
      ids += [*whole[done:start], tags.phrase, *whole[start:end], tags.phrase_end]
    else:
      return None
    ids += _box_ids(span.boxes, words)
    done = end
  return [*ids, *whole[done:]]


def _beginning(whole: list[int], before: list[int]) -> int | None:
  """The number of tokens in front of a stretch, given those of the text in front of it."""
  for num in (len(before), len(before) - 1):
    if num >= 0 and whole[:num] == before[:num]:
      return num
  return None


def _box_ids(found: Sequence[Box], words: BoxWords) -> list[int]:
  if not found:
    return []
  tags, ids = words.tags, []
  for cells in boxes.encode(found, words.grid).tolist():
    ids += [tags.delimiter, *(tags.first_location + cell for cell in cells)]
  return [tags.object, *ids[1:], tags.object_end]
