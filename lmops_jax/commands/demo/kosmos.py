"""The demo of Kosmos: a picture and a prompt in, a text with its boxes out.

Everything about the model is what `lmops generate --image` does.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import annotated_types as at
import pydantic

from lmops_jax.commands import grounding, models
from lmops_jax.commands.demo.requests import (
  NewTokens,
  Prompt,
  Seed,
  defaults,
  model_facts,
  one_prompt,
)
from lmops_jax.commands.demo.server import read_pages
from lmops_jax.commands.prompts import PromptRow
from lmops_jax.data.boxes import GROUNDING, TAG, Grounded
from lmops_jax.data.multimodal import Picture
from lmops_jax.data.supervised import encode_behind, front_ids
from lmops_jax.decoding import GenerationOptions, Generator, image_prompts
from lmops_jax.decoding.generate import checked_prompts
from lmops_jax.host.foreign_files import checked, printable
from lmops_jax.host.words import shortened

MAX_PICTURE_BYTES = 24 << 20
_VECTOR_BYTES = 1 << 26  # of pictures whose vectors are kept for further prompts


class Upload(pydantic.BaseModel, extra="forbid"):
  """A picture file: its name, and its contents in base64."""

  name: Annotated[str, at.MaxLen(1000)]
  base64: str


class Request(pydantic.BaseModel, extra="forbid"):
  """What the page asks.

  Attributes:
    prompt: a picture stands in front of it, or where it has `<image>`.
    picture: None for none.
    search: "beams" and "sampling" take the numbers that are named so; see `GenerationOptions`.
    grammar: allow well-formed boxes only.
  """

  prompt: Prompt
  picture: Upload | None = None
  search: Literal["greedy", "beams", "sampling"] = "beams"
  num_beams: Annotated[int, at.Ge(2), at.Le(10)] = 5
  temperature: Annotated[float, at.Ge(0.05), at.Le(5)] = 0.7
  top_p: Annotated[float, at.Ge(0.01), at.Le(1)] = 0.9
  seed: Seed = 0
  max_new_tokens: NewTokens = 128
  no_repeat_ngram: Annotated[int, at.Ge(0), at.Le(20)] = 3
  grammar: bool = False

  def options(self) -> GenerationOptions:
    """How tokens are chosen."""
    chosen: dict[str, Any] = {
      "greedy": {},
      "beams": {"num_beams": self.num_beams},
      "sampling": {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed},
    }[self.search]
    return GenerationOptions(
      max_new_tokens=self.max_new_tokens, no_repeat_ngram=self.no_repeat_ngram, **chosen)

  def row(self) -> PromptRow:
    """The prompt as `lmops generate` has it.

    Raises:
      ValueError: the picture's contents are no base64.
    """
    if self.picture is None:
      return PromptRow(self.prompt)
    name = shortened(printable(self.picture.name), 60) or "the picture"
    try:
      data = base64.b64decode(self.picture.base64, validate=True)
    except (binascii.Error, ValueError) as error:
      raise ValueError(f"{name} did not arrive as base64 ({error}); send it again.") from error
    if len(data) > MAX_PICTURE_BYTES:
      raise ValueError(
        f"{name} has {len(data):,} bytes, more than the {MAX_PICTURE_BYTES:,} of this demo; make "
        "it smaller.")
    return PromptRow(self.prompt, (Picture(name, data=data),))


class KosmosDemo:
  """A model that is loaded once and answers what the page asks; see `server.Demo`."""

  max_request_bytes = MAX_PICTURE_BYTES * 4 // 3 + (1 << 18)

  def __init__(self, source, tokenizer, partitioner=None):
    """
    Args:
      source: a `PretrainedModel` with a decoder.
      tokenizer: its tokenizer.
      partitioner: the mesh; None is the default device.
    """
    self.pages = read_pages("kosmos.html", "kosmos.js", "demo.js", "demo.css")
    self._source, self._tokenizer = source, tokenizer
    self._settings = source.image_settings()
    params = source.params(partitioner)
    self._facts = model_facts(source, params)
    self._encoder = None if self._settings is None else image_prompts.PictureEncoder(
      source.model, params, self._settings, partitioner, cache_bytes=_VECTOR_BYTES)
    self._generator = Generator(source.decoder, source.of_decoder(params), tokenizer, partitioner)

  @classmethod
  def load(cls, arguments: argparse.Namespace) -> KosmosDemo:
    """Reads the model that the command line names.

    Raises:
      ValueError: what `lmops generate` refuses about a model.
    """
    return cls(*models.load(arguments))

  def facts(self) -> dict[str, Any]:
    """What the page says about the model, and what it offers."""
    offered = defaults(Request)
    del offered["picture"]  # which is chosen otherwise
    return self._facts | {
      "sees": self._settings is not None,
      "grounds": self._tokenizer.token_id(GROUNDING) is not None,
      "max_picture_bytes": MAX_PICTURE_BYTES, "defaults": offered,
    }

  def answer(
    self, request: Any, write: Callable[[str], bool] | None = None
  ) -> dict[str, Any]:
    """The text to a request of the form of `Request`, with what it locates.

    Args:
      request: of that form.
      write: gets the continuation without tags as it is written, from a search with beams at once;
        it ends the text by returning True.

    Raises:
      ValueError: what is wrong with the request, the picture or the prompt.
    """
    asked = checked(Request, request, "the request")
    with one_prompt():
      return self._answer(asked, write)

  def _answer(self, asked: Request, write: Callable[[str], bool] | None) -> dict[str, Any]:
    begun = time.perf_counter()
    row, options, tokenizer = asked.row(), asked.options(), self._tokenizer
    how = argparse.Namespace(grammar=asked.grammar, boxes=None, draw=None, stop=(), chat=False)
    words = grounding.find(how, [row], tokenizer)
    seen, = models.lay_out([row], self._source, tokenizer, self._settings is not None)
    front = front_ids(tokenizer)
    ids = encode_behind(front, tokenizer, row.text) if seen is None else seen.tokens.tolist()
    checked_prompts(self._source.decoder.config, [ids], options, tokenizer.bos_id)
    sizes = grounding.sizes(row.pictures)
    prompts = [row.text] if seen is None else self._encoder.prompts([seen])
    found, = grounding.generate(
      how, self._generator, prompts, options, words, [ids],
      write and _untagged(write))
    located, = grounding.read(words, [row], [ids], [found], how, sizes)
    grounded = Grounded(found.text, ()) if located is None else located.grounded
    width, height = sizes[row.pictures[0]] if row.pictures else (None, None)
    return {
      "pieces": pieces(grounded),
      "entities": [
        {"name": entity.name, "boxes": [*map(list, entity.boxes)]} for entity in grounded.entities],
      "num_malformed": grounded.num_malformed, "width": width, "height": height,
      "prompt": row.text, "written": tokenizer.decode(found.ids, False),
      "num_tokens": len(found.ids), "is_whole": found.finish_reason != "length",
      "seconds": time.perf_counter() - begun,
    }


def _untagged(write: Callable[[str], bool]) -> Callable[[int, str], bool]:
  """A callback of a generator that passes on what is no tag, once that is known."""
  held = ""

  def show(_: int, piece: str) -> bool:
    nonlocal held
    held += piece
    front, begin, rest = held.rpartition("<")
    is_open = bool(begin) and not set(rest) & set(">\n")  # perhaps a tag whose end comes
    ready, held = (front, begin + rest) if is_open else (held, "")
    ready = TAG.sub("", ready)
    return bool(ready) and write(ready)

  return show


def pieces(grounded: Grounded) -> list[dict[str, Any]]:
  """A clean text cut where its entities begin and end: `text`, and `entity`, its number or None.

  The texts together are the clean text. An entity without phrase has an empty piece.
  """
  found, at_character = [], 0
  for number, entity in enumerate(grounded.entities):
    start = max(entity.start, at_character)
    end = max(entity.end, start)
    found += [
      {"text": grounded.text[at_character:start], "entity": None},
      {"text": grounded.text[start:end], "entity": number}]
    at_character = end
  found.append({"text": grounded.text[at_character:], "entity": None})
  return [piece for piece in found if piece["text"] or piece["entity"] is not None]
