"""The standard harness (lm-evaluation-harness) on our models; needs the extra `lm-eval`.

    import lm_eval
    from lmops_jax.evaluation.lm_eval_adapter import LmopsLM
    lm_eval.simple_evaluate(LmopsLM("DIR"), tasks=["lambada_openai"])

or, once this module is imported, by the harness's own name "lmops" with `pretrained=DIR`.

Requests become tokens as in the harness's own models of class `hf`, so that figures compare. White
space at a context's end goes to the continuation. A continuation's tokens are those that the whole
text has beyond as many as the context has by itself, even if the vocabulary merges the end of a
context with what follows. Only if nothing is left then, which ends the harness's run, is the
continuation encoded by itself, with the white space in front of it. (`lmops score` always encodes
such an option by itself, see `in_context.Encoder`: there each of its characters counts once.) A
context that is too long loses its beginning, BOS included.

Some things differ from there on purpose:
  - What a tokenizer puts in front of a text, BOS mostly, stands there once. `hf` looks for it only
    in the first text of a batch when it generates, and `loglikelihood_rolling` scores a second BOS
    behind the first, unless `add_bos_token=False`.
  - A context that is too long to generate from keeps its BOS and loses what follows: models that
    were trained with it continue badly without.
  - Options that are not known are refused by name instead of being handed on or left out.

A model that sees answers texts as the language model that it has within, and requests with pictures
as `hf-multimodal` has them: one `<image>` in the context for each picture, laid out and encoded as
in `lmops score` (`seeing.SeeingEncoder`). A context with pictures that is too long is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmops_jax import pretrained as pretrained_lib
from lmops_jax.data import images as images_lib
from lmops_jax.data.multimodal import Picture, drawn
from lmops_jax.decoding import GenerationOptions, Generator, image_prompts
from lmops_jax.decoding.scoring import OptionScorer, Request, rolling_requests, total
from lmops_jax.decoding.text import check_stop, find_stop
from lmops_jax.evaluation.in_context import Encoder
from lmops_jax.evaluation.seeing import SeeingEncoder
from lmops_jax.host import progress

try:
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise ImportError(
    "lm-evaluation-harness is not installed; install it with pip install 'lmops_jax[lm-eval]'."
  ) from error

_MAX_NEW_TOKENS = 256
# How tasks name the number of new tokens; of several the first counts, as in the harness.
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_SEARCH = {
  "no_repeat_ngram_size": "no_repeat_ngram", **{name: name for name in (
    "repetition_penalty", "min_new_tokens", "num_beams", "num_beam_groups", "diversity_penalty",
    "length_penalty", "early_stopping", "seed")},
}


@register_model("lmops")
class LmopsLM(LM):
  """A model that `pretrained.load` opens, as the harness wants one.

  Attributes:
    MULTIMODAL: whether requests may have pictures; the harness asks.
  """

  def __init__(
    self, pretrained: str, *, dtype: str = "float32", param_dtype: str = "float32",
    batch_tokens: int = 4096, max_new_tokens: int = _MAX_NEW_TOKENS, max_length: int | None = None,
    partitioner=None, batch_size=None, max_batch_size=None, device=None, **unknown: Any,
  ):
    """
    Args:
      pretrained: see `pretrained.load`.
      dtype, param_dtype: execution choices.
      batch_tokens: most token positions of a batch.
      max_new_tokens: most new tokens if a task does not say.
      max_length: most positions to use; None is all that the model has.
      partitioner: a `mesh.meshes.Partitioner`; None is one device.
      batch_size, max_batch_size, device: the harness gives these to every model; `batch_tokens`,
        `partitioner` and JAX decide here.

    Raises:
      ValueError: for other arguments, which would change nothing, `max_length` out of range, or a
        model that does not continue texts.
    """
    super().__init__()
    if unknown:
      raise ValueError(
        f"the model lmops has no argument {', '.join(sorted(unknown))}; leave it out of model_args."
      )
    source = pretrained_lib.load(pretrained, dtype=dtype, param_dtype=param_dtype)
    if source.decoder is None:
      raise ValueError(
        f"{pretrained} is a model of the family {source.family} that does not continue a text; the "
        "harness needs a decoder."
      )
    positions = source.decoder.config.max_length
    self._max_length = positions if max_length is None else int(max_length)
    if not 1 <= self._max_length <= positions:
      raise ValueError(
        f"max_length={max_length} is not between 1 and the {positions} positions of {pretrained}."
      )
    self._tokenizer = source.tokenizer()
    self._model, self._max_new_tokens = source.decoder, int(max_new_tokens)
    settings, params = source.image_settings(), source.params(partitioner)
    self._scorer = OptionScorer(
      self._model, source.of_decoder(params), partitioner, batch_tokens=int(batch_tokens)
    )
    self._generator = Generator(
      self._model, self._scorer.params, self._tokenizer, partitioner
    )
    self._encoder = Encoder(self._tokenizer)
    self.MULTIMODAL = settings is not None
    if self.MULTIMODAL:
      ids = image_prompts.image_tokens(self._tokenizer, source.config.vectors_per_image)
      pictures = image_prompts.PictureEncoder(source.model, params, settings, partitioner)
      self._seeing = SeeingEncoder(self._tokenizer, ids, pictures, self._max_length)
    self._cut = 0

  @property
  def max_length(self) -> int:
    """Positions that are used."""
    return self._max_length

  @property
  def eot_token_id(self) -> int | None:
    """The token that ends a text."""
    return self._tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """The token that stands for an empty context: BOS, or the end token of a model without BOS."""
    tokenizer = self._tokenizer
    for found in (tokenizer.bos_id, tokenizer.eos_id):
      if found is not None:
        return found
    raise ValueError(
      f"the tokenizer of {tokenizer.path} has neither BOS nor end token to begin with, and a "
      "request has no context; give it one."
    )

  @property
  def tokenizer_name(self) -> str:
    """What the harness's cache calls the chat template."""
    return str(self._tokenizer.path).replace("/", "__")

  def chat_template(self, chat_template: bool | str = False) -> str:
    """The template's source, which the harness logs.

    Raises:
      ValueError: if another one than the model's is asked for.
    """
    if isinstance(chat_template, str) and chat_template != "default":
      raise ValueError(
        f"the chat template {chat_template!r} is asked for, and lmops takes the model's default "
        "one; set apply_chat_template to True."
      )
    return self._tokenizer.chat_template or ""

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """A conversation as text; without generation prompt the model goes on with the last message."""
    return self._tokenizer.apply_chat_template(
      chat_history, add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """For each (context, continuation) its log-likelihood and whether it is the greedy answer."""
    pairs = [
      self._seen(i, request, 1) if len(request.args) > 2
      else self._fit(self._split(i, *request.args)) for i, request in enumerate(requests)]
    found = self._score(pairs, "loglikelihood", disable_tqdm)
    return [(float(total([scores])[0]), bool(best.all())) for ((scores, best),) in found]

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """For each text the log-likelihood of all its tokens, in windows of the model's length."""
    windows, counts = [], []
    for request in requests:
      ids = self._tokenizer.encode(request.args[0], False)
      if ids[:1] == [self.prefix_token_id]:  # given, not predicted
        ids = ids[1:]
      parts = rolling_requests(ids, self.prefix_token_id, self.max_length)
      windows += parts
      counts.append(len(parts))
    sums = iter(
      [float(total([scores])[0])
       for ((scores, _),) in self._score(windows, "rolling", disable_tqdm)] if windows else []
    )
    return [sum((next(sums) for _ in range(count)), 0.0) for count in counts]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """For each (context, options) the generated text up to one of `until`."""
    answers: list[str] = [""] * len(requests)
    groups: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(self._options(request.args[1]), []).append(i)
    with progress.Progress(
      len(requests), "requests", "generate_until", quiet=disable_tqdm
    ) as bar:
      for (options, stop), indices in groups.items():
        prompts = [
          self._seen(i, requests[i], options.max_new_tokens).context
          if len(requests[i].args) > 2 else self._prompt(requests[i].args[0], options)
          for i in indices]
        for i, answer in zip(indices, self._generate(prompts, options, stop), strict=True):
          answers[i] = answer
        bar.update(len(indices))
    self._report_cut()
    return answers

  def _generate(self, prompts, options: GenerationOptions, stop: Sequence[str]) -> list[str]:
    """Generates texts until one of `stop` is there, and cuts them at each of `stop` in order."""
    so_far: list[list[int]] = [[] for _ in prompts]

    def stopped(i, ids):
      so_far[i] += ids
      return find_stop(self._tokenizer.decode(so_far[i]), stop) is not None

    texts = []
    for generated in self._generator.generate_ids(prompts, options, stopped):
      text = self._tokenizer.decode(generated.ids)
      for end in stop:
        text = text.split(end)[0]
      texts.append(text)
    return texts

  def _options(self, kwargs: Mapping[str, Any]) -> tuple[GenerationOptions, tuple[str, ...]]:
    """A task's `generation_kwargs` as our options and the texts that end an answer."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    unknown = given.keys() - {"until", "do_sample", *_NEW_TOKENS, *_SAMPLING, *_SEARCH}
    if unknown:
      raise ValueError(
        f"generation_kwargs hold {', '.join(sorted(unknown))}, which lmops does not know; it takes "
        f"until, do_sample, {', '.join((*_NEW_TOKENS, *_SAMPLING, *_SEARCH))}."
      )
    fields = {ours: given[theirs] for theirs, ours in _SEARCH.items() if theirs in given}
    if given.get("do_sample", bool(given.get("temperature"))):
      fields |= {"temperature": 1.0, **{name: given[name] for name in _SAMPLING if name in given}}
      if not fields["temperature"]:
        raise ValueError(
          "generation_kwargs hold do_sample=True and temperature=0; set a temperature above 0, or "
          "do_sample to False for the most probable tokens."
        )
    wanted = next((given[name] for name in _NEW_TOKENS if name in given), self._max_new_tokens)
    stop, ends = self._stop(given.get("until", ()))
    options = GenerationOptions(max_new_tokens=int(wanted), eos_ids=ends, **fields)
    if self._room(options) < max(1, len(self._encoder.start)):
      raise ValueError(
        f"max_gen_toks={wanted} leaves no room for a context in the {self.max_length} positions; "
        "set a smaller one in the task's generation_kwargs."
      )
    return options, stop

  def _stop(self, until: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts that end an answer, and tokens that do: special ones, which no text shows."""
    until, tokenizer = [until] if isinstance(until, str) else until, self._tokenizer
    if not isinstance(until, (list, tuple)):
      raise ValueError(f"until={until!r} in generation_kwargs is no text and no list of texts.")
    texts = list(check_stop([text for text in until if text]))
    first = [id for text in texts for id in tokenizer.encode(text, False)[:1]]
    special = [id for id in first if tokenizer.decode([id], False) and not tokenizer.decode([id])]
    if "eos" in tokenizer.special:  # even if its characters are generated one by one
      texts.append(tokenizer.special["eos"])
    return tuple(texts), (*tokenizer.stop_ids, *special)

  def _room(self, options: GenerationOptions) -> int:
    return self.max_length - options.max_new_tokens

  def _prompt(self, text: str, options: GenerationOptions) -> list[int]:
    """The context's ids; if they are too many, those in front of the text and those of its end."""
    ids, room = self._encoder.encode(text) or [self.prefix_token_id], self._room(options)
    if len(ids) <= room:
      return ids
    self._cut += 1
    front = len(self._encoder.start)
    return ids[:front] + ids[len(ids) - (room - front) :]

  def _seen(self, number: int, request, num_new: int) -> Request:
    """The request of a context with pictures, and its continuation if it has one.

    Args:
      num_new: tokens behind the context that are to be generated, or 1.
    """
    context, asked, others = request.args
    if not self.MULTIMODAL or others.keys() != {"visual"}:
      raise ValueError(
        f"request {number} has {', '.join(others)} beside its text, and this model reads "
        f"{'texts and pictures' if self.MULTIMODAL else 'texts'} alone; take another task."
      )
    options = [asked] if isinstance(asked, str) else []
    pictures = _pictures(others["visual"], f"request {number}")
    found = self._seeing.split(context, options, pictures)
    num_read = len(found.context) + max([num_new, *map(len, found.options)]) - 1
    if num_read > self.max_length:
      raise ValueError(
        f"request {number} has {len(found.context)} tokens with its {len(pictures)} pictures, and "
        f"with what follows they exceed the {self.max_length} positions; pictures are not cut, so "
        "take a task with shorter contexts."
      )
    return found

  def _split(self, number: int, context: str, continuation: str) -> Request:
    """Tokens of a context and its continuation, see the module."""
    bare = context.rstrip()
    whole = context + continuation
    if len(whole) == len(bare):
      raise ValueError(f"request {number} has an empty continuation; give it some text.")
    if not bare:
      ids = self._tokenizer.encode(whole, False)
      if ids[:1] != [self.prefix_token_id]:
        ids = [self.prefix_token_id, *ids]
      given, rest = ids[:1], ids[1:]
    else:
      given = self._encoder.encode(bare)
      rest = self._encoder.encode(whole)[len(given) :]
    rest = rest or self._tokenizer.encode(whole[len(bare) :], False)
    if len(rest) > self.max_length:
      raise ValueError(
        f"request {number} has a continuation of {len(rest)} tokens, beyond the {self.max_length} "
        "positions; give a shorter one."
      )
    return Request(given, [rest])

  def _fit(self, request: Request) -> Request:
    """The request without what the model has no positions for; the last token needs none."""
    room = self.max_length + 1 - len(request.options[0])
    if len(request.context) > room:
      self._cut += 1
    return Request(request.context[-room:], request.options)

  def _score(self, pairs: Sequence[Request], name: str, quiet: bool):
    with progress.Progress(len(pairs), "requests", name, quiet=quiet) as bar:
      found = self._scorer.score_and_rank(pairs, bar.update)
    self._report_cut()
    return found

  def _report_cut(self) -> None:
    if self._cut:
      progress.log(
        f"{self._cut} contexts exceed the model's {self.max_length} positions and lost their "
        "beginning."
      )
      self._cut = 0


def _pictures(visual: Any, where: str) -> list[Picture]:
  """The harness's pictures, one or a list of Pillow's, as files without loss."""
  listed = visual if isinstance(visual, (list, tuple)) else [visual]
  return [
    drawn(np.asarray(images_lib.to_rgb(image, where)), f"picture {i} of {where}")
    for i, image in enumerate(listed)]
