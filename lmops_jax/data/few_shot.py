"""Prompts with whole examples in front of the question (kosmos1 sections 7.1 and 7.2).

Demonstrations are records with their answers, pictures and all; `tasks.demonstrations` draws them.
What stands between them is not published, so it is a setting. A prompt that is too long loses its
oldest demonstrations, counted, and never anything of the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmops_jax.data.image_tokens import Encoded, ImageTokens, encode_texts, lay_out
from lmops_jax.data.multimodal import Part, Record
from lmops_jax.text.vocabularies import Vocabulary


class Prompt(NamedTuple):
  """A question with demonstrations in front.

  Attributes:
    encoded: `<s>`, demonstrations, question; no `</s>`, and nothing is learned.
    num_shots: demonstrations that stand in it.
    num_dropped: demonstrations that had no room.
  """

  encoded: Encoded
  num_shots: int
  num_dropped: int


def few_shot(
  query: Record, shots: Sequence[Record], vocabulary: Vocabulary, ids: ImageTokens, *,
  length: int, num_pictures: int, separator: str = "",
) -> Prompt:
  """A question with demonstrations in front, as tokens.

  Args:
    query: of whose parts the given ones are the question, or all if none is.
    shots: the demonstrations, the oldest first; all of their parts.
    vocabulary: of the texts. ids: of what is not text.
    length: tokens that a prompt may have; what a model adds comes on top.
    num_pictures: pictures that it may have.
    separator: text behind each demonstration; "" is none.

  Raises:
    ValueError: the question alone is too long, has too many pictures, or is empty.
  """
  asked = query.parts[: query.num_given] if query.num_given else query.parts
  if not asked:
    raise ValueError(f"{query.source} has neither a text nor a picture to ask about.")
  between = (separator,) if separator else ()
  shown = [(*shot.parts, *between) for shot in shots]
  texts = encode_texts([*shown, asked], vocabulary)
  sizes = [_size(parts, pieces, ids) for parts, pieces in zip([*shown, asked], texts)]
  needed = [1 + sizes[-1][0], sizes[-1][1]]  # <s> in front
  if needed[0] > length or needed[1] > num_pictures:
    raise ValueError(
      f"{query.source} has a question of {needed[0]} tokens and {needed[1]} pictures, and a prompt "
      f"takes {length} and {num_pictures}; shorten it, or raise the limits."
    )
  first = len(shown)
  while first and all(
    has + more <= most
    for has, more, most in zip(needed, sizes[first - 1], (length, num_pictures))
  ):
    first -= 1
    needed = [has + more for has, more in zip(needed, sizes[first])]
  parts: list[Part] = [part for members in (*shown[first:], asked) for part in members]
  pieces = [piece for pieces in texts[first:] for piece in pieces]
  encoded = lay_out(query.id, parts, pieces, len(parts), ids, end=False)
  return Prompt(encoded, len(shown) - first, first)


def _size(parts: Sequence[Part], pieces: Sequence[Sequence[int]], ids: ImageTokens):
  """Tokens and pictures of a row."""
  num_pictures = len(parts) - len(pieces)
  return sum(map(len, pieces)) + num_pictures * len(ids.block), num_pictures
