"""Rows of tasks as tokens: what is given becomes spans for an encoder, answers stay words.

A model with an encoder reads `<s> [given]` and then the answer; behind demonstrations it reads
`<s> [given] answer </s> [given] answer </s> ... [given]`, each given part a span of its own
(MetaLM, arXiv:2206.06336, section 2.4). One without reads the same tokens as words.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lmops_jax.data import span_examples, span_sets
from lmops_jax.data.fused_rows import beside_pictures
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.multimodal import Record, parts_of
from lmops_jax.data.span_examples import Read, SpanExample, SpecialIds, whole_input
from lmops_jax.data.span_sets import SpanSet
from lmops_jax.data.tasks import Example
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.evaluation.seeing import picture_at
from lmops_jax.models.universal import UniversalLM
from lmops_jax.text.vocabularies import Vocabulary

_AT_ONCE = 32  # prompts whose spans are encoded together


def answered(rows: Iterable[Example], vocabulary: Vocabulary) -> list[SpanExample]:
  """Rows with their right answers and an end, of which these are learned."""
  return list(span_examples.encode(
    (_record(row, row.options[row.label]) for row in rows), vocabulary, vocabulary))


def asked(
  rows: Iterable[Example], vocabulary: Vocabulary, ids: SpecialIds | None = None
) -> list[SpanExample]:
  """Rows without an answer.

  Args:
    ids: the special ones of rows with pictures; None takes the vocabulary's.
  """
  return list(span_examples.encode(
    (_pictured(row) if row.images else _record(row) for row in rows), vocabulary,
    vocabulary if ids is None else ids, end=False))


def _pictured(row: Example) -> Record:
  where = f"row {row.id} of a task"
  parts, _ = parts_of(row.prompt, list(map(picture_at, row.images)), where)
  return whole_input(Record(row.id, parts, len(parts), where))


def _record(row: Example, *answer: str) -> Record:
  return Record(row.id, (Read(row.prompt), *answer), 1, f"row {row.id} of a task")


def fitted(
  shown: Sequence[SpanExample], row: SpanExample, options: Sequence[Sequence[int]],
  special: SpecialIds, max_length: int,
) -> tuple[SpanExample, int]:
  """A row behind as many demonstrations as have room, the first of which go first.

  Args:
    shown: demonstrations. row: the row. options: ids of what may follow it.
    special: the special ids.
    max_length: positions of the model.

  Returns:
    The prompt, and how many demonstrations were left out.

  Raises:
    ValueError: if the row alone is too long.
  """
  longest = max(map(len, options))
  for dropped in range(len(shown) + 1):
    prompt = span_examples.behind(shown[dropped:], row, special)
    # An option's last token is predicted and never read.
    if len(prompt.tokens) + longest - 1 <= max_length:
      return prompt, dropped
  raise ValueError(
    f"{row.where} has {len(row.tokens)} tokens and options of up to {longest}, and the model "
    f"{max_length} positions; ask for shorter passages (metalm.Tasks) or raise "
    "models.TransformerConfig.max_length."
  )


def tuning_rows(
  rows: Sequence[Example], vocabulary: Vocabulary, length: int, encoder_positions: int
) -> SpanSet:
  """Rows of a task to finetune on, several in a sequence.

  Args:
    length: of a sequence. encoder_positions: those of the encoder.

  Raises:
    ValueError: for a row that does not fit.
  """
  return span_sets.build(
    answered(rows, vocabulary), vocabulary, length, encoder_positions=encoder_positions,
    too_long="error")


class SpanReader:
  """Turns prompts into those that decoding takes; spans and pictures become vectors.

  Spans are read with the other spans of their prompt, or with their picture, in batches of one
  shape.
  """

  def __init__(
    self, model: UniversalLM, params: Any, ids: SpecialIds, images: ImageSettings | None = None
  ):
    """
    Args:
      ids: the special ones; `ImageTokens` for prompts with pictures.
      images: how pictures become pixels; None for prompts without any.
    """
    self._model, self._params, self._ids, self._images = model, params, ids, images

  def prompts(self, examples: Sequence[SpanExample]) -> list[Prompt]:
    """Prompts with vectors in their spans; of words alone for a model without an encoder."""
    config = self._model.config
    if config.reader is None and config.vision is None:
      return [Prompt(example.tokens.tolist()) for example in examples]
    found = span_examples.encoded_prompts(examples, self._ids)
    inputs, index = found.inputs, found.index
    if config.reader is None:
      beside = beside_pictures(
        inputs, found.image_segments if found.image_segments.size else None,
        self._ids.num_slots if found.image_segments.size else 0,
        config.vision.encoder.longest_text(),
        max(len(example.spans) for example in examples))
      inputs = {"image_tokens": beside.tokens, "image_segments": beside.segments}
      index = beside.renumbered_lists(index)
    vectors = self._vectors(inputs, examples, found.image_segments.shape[1])
    return [Prompt(*parts) for parts in zip(found.ids, vectors, index)]

  def _vectors(
    self, inputs: Mapping[str, np.ndarray], examples: Sequence[SpanExample], num_images: int
  ) -> np.ndarray:
    """`[num,M,W]` of examples with at most so many pictures."""
    found = []
    for start in range(0, len(examples), _AT_ONCE):
      some = {name: value[start : start + _AT_ONCE] for name, value in inputs.items()}
      if num_images:
        some["images"] = self._pixels(examples[start : start + _AT_ONCE], num_images)
      missing = _AT_ONCE - min(_AT_ONCE, len(examples) - start)
      filled = {name: np.pad(value, ((0, missing), *((0, 0),) * (value.ndim - 1)))
                for name, value in some.items()}
      found.append(np.asarray(_encode(self._model, self._params, filled))[: _AT_ONCE - missing])
    return np.concatenate(found)

  def _pixels(self, examples: Sequence[SpanExample], num_images: int) -> np.ndarray:
    """`[n,num_images,height,width,3] uint8`, 0 for pictures that an example lacks."""
    shape = len(examples), num_images, self._images.height, self._images.width, 3
    pixels = np.zeros(shape, np.uint8)
    for into, example in zip(pixels, examples):
      for i, picture in enumerate(example.pictures):
        into[i] = self._images.pixels(picture.read(), picture.where)
    return pixels


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: UniversalLM, params, inputs):
  return model.apply({"params": params}, **inputs, method="row_vectors")
