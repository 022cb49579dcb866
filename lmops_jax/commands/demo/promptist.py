"""The demo of Promptist: a prompt in, the policy's prompts out, and pictures of both.

Rewriting is what `lmops promptist rewrite` does, the first picture that of `lmops imagine --images
1`. The pictures of the rewritten prompts start from the same noise as that of the user's prompt.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import annotated_types as at
import pydantic
from PIL import Image

from lmops_jax.commands import imagine, models
from lmops_jax.commands.demo.requests import (
  NewTokens,
  Prompt,
  Seed,
  defaults,
  model_facts,
  one_prompt,
)
from lmops_jax.commands.demo.server import read_pages
from lmops_jax.data.prompt_pairs import checked_prompt
from lmops_jax.decoding import Generator
from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer, image_keys
from lmops_jax.decoding.diffusion.samplers import DpmSolver
from lmops_jax.host.foreign_files import checked
from lmops_jax.pretrained.pipelines import Pipeline, load_pipeline
from lmops_jax.systems.promptist.rewriting import RECIPE, beam_options, rewrite
from lmops_jax.text.clip import clip_texts

_PROGRAMS = 4  # settings of steps and guidance whose compiled programs are kept


class Request(pydantic.BaseModel, extra="forbid"):
  """What the page asks; without a model that draws the last three have no effect.

  Attributes:
    num_rewrites: the best of a search with 8 beams.
    max_new_tokens: of a rewritten prompt.
    steps, guidance: of DPM-Solver++(2M).
    seed: of the noise that all pictures start from.
  """

  prompt: Prompt
  num_rewrites: Annotated[int, at.Ge(1), at.Le(4)] = 1
  max_new_tokens: NewTokens = RECIPE.max_new_tokens
  steps: Annotated[int, at.Ge(1), at.Le(100)] = 20
  guidance: Annotated[float, at.Ge(1), at.Le(30)] = 7.5
  seed: Seed = 0


class PromptistDemo:
  """A policy and perhaps a model that draws, loaded once; see `server.Demo`."""

  max_request_bytes = 1 << 18

  def __init__(self, source, tokenizer, partitioner=None, painter: Painter | None = None):
    """
    Args:
      source: a `PretrainedModel` with a decoder that rewrites prompts.
      tokenizer: its tokenizer.
      partitioner: the mesh; None is the default device.
      painter: draws; None shows rewritten prompts alone.
    """
    self.pages = read_pages("promptist.html", "promptist.js", "demo.js", "demo.css")
    params = source.params(partitioner)
    self._facts, self._painter = model_facts(source, params), painter
    self._generator = Generator(source.decoder, source.of_decoder(params), tokenizer, partitioner)

  @classmethod
  def load(cls, arguments: argparse.Namespace) -> PromptistDemo:
    """Reads the models that the command line names.

    Raises:
      ValueError: what `lmops generate` or `lmops imagine` refuse about a model, or a size.
    """
    loaded = models.load(arguments)
    if arguments.images is None:
      return cls(*loaded)
    size = imagine.size_of(arguments.size)
    pipeline = load_pipeline(
      arguments.images, dtype=arguments.dtype, param_dtype=arguments.param_dtype)
    painter = Painter(Path(arguments.images).name, pipeline, size, loaded[-1])
    return cls(*loaded, painter)

  def facts(self) -> dict[str, Any]:
    """What the page says about the models, and what it offers."""
    draws = None if self._painter is None else {
      "model": self._painter.name, "height": self._painter.size[0],
      "width": self._painter.size[1]}
    return self._facts | {"draws": draws, "defaults": defaults(Request)}

  def answer(
    self, request: Any, write: Callable[[str], bool] | None = None
  ) -> dict[str, Any]:
    """The rewritten prompts to a request of the form of `Request`, and pictures.

    Args:
      request: of that form.
      write: gets the rewritten prompts as soon as they are found, and which picture is drawn; it
        ends the drawing by returning True.

    Raises:
      ValueError: what is wrong with the request or the prompt.
    """
    asked, begun = checked(Request, request, "the request"), time.perf_counter()
    options = beam_options(num_return=asked.num_rewrites, max_new_tokens=asked.max_new_tokens)
    with one_prompt():
      prompt = checked_prompt(asked.prompt, "the prompt")
      found, = rewrite(self._generator, [prompt], options)
    texts = [prompt, *(one.text for one in found)]
    write = write or (lambda text: False)
    is_over = write("".join(f"{text}\n" for text in dict.fromkeys(texts[1:])))
    pictures = {}
    if self._painter is not None and not is_over:
      pictures = self._painter.draw(list(dict.fromkeys(texts)), asked, write)
    return {
      "prompt": {"text": prompt, "picture": pictures.get(prompt)},
      "rewrites": [
        {"text": one.text, "is_unchanged": one.is_unchanged,
         "is_whole": one.finish_reason != "length", "score": one.score,
         "picture": pictures.get(one.text)}
        for one in found],
      "seconds": time.perf_counter() - begun,
    }


class Painter:
  """Draws one picture at a time, all from the noise of the first text.

  Attributes:
    name: of the model, for the page.
    size: height and width in pixels.
  """

  def __init__(self, name: str, pipeline: Pipeline, size: tuple[int, int], partitioner=None):
    """
    Args:
      pipeline: the model.
      partitioner: mesh to run on; None is the default device.

    Raises:
      ValueError: for a size that the model does not draw.
    """
    self.name, self.size = name, size
    self._pipeline, self._partitioner = pipeline, partitioner
    self._params = pipeline.params
    self._imaginer = functools.lru_cache(_PROGRAMS)(self._made)
    fields = Request.model_fields
    first = self._imaginer(fields["steps"].default, fields["guidance"].default)
    self._params = first.params  # placed and cast once; further ones share them

  def draw(
    self, texts: list[str], asked: Request, write: Callable[[str], bool]
  ) -> dict[str, dict[str, Any]]:
    """Pictures by text: `png`, base64 or None if its numbers are not finite, and what was `cut`.

    Args:
      texts: each once; all pictures start from the noise of the first one.
      asked: steps, guidance and seed.
      write: see `PromptistDemo.answer`.
    """
    read = clip_texts(self._pipeline.tokenizer, ["", *texts], self._pipeline.text.max_length)
    key = image_keys(texts[:1], 1, asked.seed)
    imaginer, found = self._imaginer(asked.steps, asked.guidance), {}
    for i, text in enumerate(texts, 1):
      if write(f"Picture {i} of {len(texts)} is being drawn.\n"):
        break
      drawn = imaginer(read.tokens[i : i + 1], key, read.tokens[0])
      found[text] = {"png": _png(drawn.images[0]) if drawn.finite[0] else None, "cut": read.cut[i]}
    return found

  def _made(self, steps: int, guidance: float) -> Imaginer:
    parts = self._pipeline
    return Imaginer(
      DiffusionModels.of(parts.text, parts.unet, parts.autoencoder, parts.schedule), self._params,
      DpmSolver(steps), guidance, self.size, self._partitioner, batch_size=1)


def _png(pixels) -> str:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()
