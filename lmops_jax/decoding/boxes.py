"""The grammar of texts with boxes in them (Kosmos-2, arXiv:2306.14824, section 2), as a constraint.

A text is words and groups. A group is an optional phrase, `<phrase>` words `</phrase>`, and right
behind it `<object>` box (delimiter box)* `</object>`. A box is two location tokens, cells of a
square grid in reading order: its upper left cell, and its lower right one, which is not above nor
to the left of the first. The text ends outside of groups.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.data.boxes import GROUNDING, BoxTokens, box_tokens
from lmops_jax.data.image_tokens import KOSMOS_WORDS
from lmops_jax.decoding.generate import Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.text import Generation


class Place(enum.IntEnum):
  """Where in the grammar a text is."""

  TEXT = 0
  PHRASE = 1  # right behind <phrase>
  WORDS = 2  # of a phrase, at least one
  NAMED = 3  # behind </phrase>
  OBJECT = 4  # behind <object> or a delimiter
  CORNER = 5  # behind the upper left cell
  BOX = 6  # behind the lower right cell


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoxGrammar:
  """Allows texts with well-formed boxes; see `box_grammar`.

  Attributes:
    words: `[V] bool`, tokens of texts and phrases.
    ends: `[V] bool`, tokens that end a text.
    tokens: of boxes.
    side: cells in a row and in a column of the grid.
    begins: the `Place` of prompts' ends.
    corner: if that is `Place.CORNER`, the upper left cell in front.
  """

  words: jax.Array | np.ndarray
  ends: jax.Array | np.ndarray
  tokens: BoxTokens
  side: int
  begins: int
  corner: int = 0

  def start(self) -> tuple[jax.Array, jax.Array]:
    """The place, and the latest upper left cell."""
    return jnp.asarray(self.begins, jnp.int32), jnp.asarray(self.corner, jnp.int32)

  def mask(self, state: tuple[jax.Array, jax.Array]) -> jax.Array:
    """What the grammar allows."""
    place, corner = state
    ids, t = jnp.arange(self.words.shape[0]), self.tokens
    cell = ids - t.first_location
    location = (cell >= 0) & (cell < self.side**2)
    row, column = cell // self.side, cell % self.side
    behind = (row >= corner // self.side) & (column >= corner % self.side)
    allowed = [
      self.words | self.ends | (ids == t.phrase) | (ids == t.object),
      self.words,
      self.words | (ids == t.phrase_end),
      ids == t.object,
      location,
      location & behind,
      (ids == t.delimiter) | (ids == t.object_end),
    ]
    return jnp.select([place == p for p in Place], allowed)

  def advance(self, state, token) -> tuple[jax.Array, jax.Array]:
    """The place after an allowed token."""
    place, corner = state
    t = self.tokens
    opened = jnp.where(token == t.object, Place.OBJECT, Place.TEXT)
    after = [
      jnp.where(token == t.phrase, Place.PHRASE, opened),
      Place.WORDS,
      jnp.where(token == t.phrase_end, Place.NAMED, Place.WORDS),
      Place.OBJECT,
      Place.CORNER,
      Place.BOX,
      jnp.where(token == t.delimiter, Place.OBJECT, Place.TEXT),
    ]
    corner = jnp.where(place == Place.OBJECT, token - t.first_location, corner)
    return jnp.select([place == p for p in Place], after).astype(jnp.int32), corner

  def check(self, config, options: GenerationOptions, eos_ids: Sequence[int]) -> None:
    """See `Constraint`."""
    del options
    if len(self.words) != config.vocab_size:
      raise ValueError(
        f"the grammar of boxes is made for {len(self.words)} tokens, and the model has "
        f"{config.vocab_size}; make it with the model's own tokenizer."
      )
    ends = np.flatnonzero(self.ends).tolist()
    if set(eos_ids) != set(ends):
      raise ValueError(
        f"texts of the grammar of boxes end with {ends}, and generation with {list(eos_ids)} "
        "(decoding.GenerationOptions.eos_ids); make the grammar with the same tokens."
      )


def box_grammar(
  tokens: BoxTokens, side: int, vocab_size: int, end_ids: Sequence[int], never: Sequence[int] = (),
  begins: Place = Place.TEXT, corner: int = 0,
) -> BoxGrammar:
  """The grammar over a vocabulary.

  Args:
    tokens: ids of the tags and of the first location.
    side: cells in a row and in a column of the grid (Kosmos-2: 32).
    vocab_size: V of the model.
    end_ids: all tokens that end generation.
    never: tokens that no text holds, padding or that of images for instance.
    begins: where the prompts end, all of them; `Place.NAMED` behind a phrase to be located.
    corner: see `BoxGrammar`.

  Raises:
    ValueError: a token outside of the vocabulary, or one that is two things.
  """
  cells = range(tokens.first_location, tokens.first_location + side**2)
  special = [*tokens[:-1], *end_ids, *never, *cells]
  outside = [token for token in special if not 0 <= token < vocab_size]
  if outside:
    raise ValueError(
      f"the grammar of boxes has token id {outside[0]}, outside of the model's vocabulary of "
      f"{vocab_size}; take tags and locations from the model's own tokenizer, and its side."
    )
  twice = [token for i, token in enumerate(special) if token in special[:i]]
  if twice:
    raise ValueError(
      f"the grammar of boxes has token id {twice[0]} as two things; tags, locations, ends and "
      "tokens that never come are all different."
    )
  words, ends = np.ones(vocab_size, bool), np.zeros(vocab_size, bool)
  words[special] = False
  ends[list(end_ids)] = True
  return BoxGrammar(words, ends, tokens, side, int(begins), corner)


def end_of(tokens: BoxTokens, side: int, ids: Sequence[int]) -> tuple[Place, int]:
  """Where in the grammar a prompt ends, and the upper left cell if that is `Place.CORNER`.

  A phrase without boxes, which only a prompt can have, is a text.

  Args:
    tokens, side: of the grammar.
    ids: of the prompt.
  """
  tags = tokens[:-1]
  last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in tags), None)
  if last is None or ids[last] == tokens.object_end:
    return Place.TEXT, 0
  tag, behind = ids[last], [token - tokens.first_location for token in ids[last + 1 :]]
  if tag == tokens.phrase:
    return Place.WORDS if behind else Place.PHRASE, 0
  if tag == tokens.phrase_end:
    return Place.TEXT if behind else Place.NAMED, 0
  if len(behind) > 2 or any(not 0 <= cell < side**2 for cell in behind):
    return Place.TEXT, 0
  return (Place.OBJECT, Place.CORNER, Place.BOX)[len(behind)], behind[0] if len(behind) == 1 else 0


def generate(
  generator: Generator, tokenizer, texts: Sequence[str | Prompt], ids: Sequence[Sequence[int]],
  options: GenerationOptions, stop: Sequence[str] = (), *,
  callback: Callable[[int, str], bool | None] | None = None, add_special: bool = True,
) -> list[Generation]:
  """Continues texts with well-formed boxes only, each from where in the grammar it ends.

  Prompts that end at different places run apart; each gets what it gets alone.

  Args:
    generator, texts, options, stop, callback, add_special: see `Generator.generate`.
    tokenizer: the model's.
    ids: of each text, as it is continued.

  Raises:
    ValueError: as `Generator.generate`; or the tokenizer has no words for boxes.
  """
  tokens, side = box_tokens(tokenizer.token_id)
  ends = collections.defaultdict(list)  # prompts by the place in the grammar where they end
  for i, row in enumerate(ids):
    ends[end_of(tokens, side, row)].append(i)
  each = options.num_return_sequences
  found: list[Generation | None] = [None] * (len(texts) * each)
  for end, rows in ends.items():
    places = [i * each + k for i in rows for k in range(each)]
    watch = callback and (lambda i, piece, places=places: callback(places[i], piece))
    answers = generator.generate(
      [texts[i] for i in rows], options, stop, watch, rows, add_special=add_special,
      constraint=_of_tokenizer(tokenizer, generator.vocab_size, *end))
    for place, answer in zip(places, answers, strict=True):
      found[place] = answer
  return found


def _of_tokenizer(tokenizer, vocab_size: int, begins: Place, corner: int) -> BoxGrammar:
  """The grammar over a model's `vocab_size` tokens, behind prompts that end there."""
  never = {tokenizer.token_id(word) for word in (*KOSMOS_WORDS, GROUNDING)}
  never |= {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id}
  never |= set(range(tokenizer.vocab_size, vocab_size))
  never -= {None, *tokenizer.stop_ids}
  return box_grammar(
    *box_tokens(tokenizer.token_id), vocab_size, tokenizer.stop_ids, sorted(never), begins, corner)
