"""The standard harness (lm-evaluation-harness) on our models; needs the extra `lm-eval`.

    import lm_eval
    from lmops_jax.evaluation.lm_eval_adapter import LmopsLM
    lm_eval.simple_evaluate(LmopsLM("DIR"), tasks=["lambada_openai"])

or, where this module is imported, by the harness's own name "lmops" with `pretrained=DIR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmops_jax import pretrained as pretrained_lib
from lmops_jax import progress
from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.scoring import OptionScorer, Request, rolling_requests, total
from lmops_jax.evaluation.in_context import Encoder

try:
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise ImportError(
    "lm-evaluation-harness is not installed; install it with pip install 'lmops_jax[lm-eval]'."
  ) from error

_MAX_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@register_model("lmops")
class LmopsLM(LM):
  """A model that `pretrained.load` opens, as the harness wants one.

  Contexts too long for the model lose their beginning, as in the harness's own models; how many is
  logged.
  """

  def __init__(
    self, pretrained: str, *, dtype: str = "float32", param_dtype: str = "float32",
    batch_tokens: int = 4096, max_new_tokens: int = _MAX_NEW_TOKENS, partitioner=None, **_: Any,
  ):
    """
    Args:
      pretrained: see `pretrained.load`.
      dtype, param_dtype: execution choices.
      batch_tokens: most token positions of a batch.
      max_new_tokens: where a task does not say.
      partitioner: a `training.mesh.Partitioner`; None is one device.
    """
    super().__init__()
    source = pretrained_lib.load(pretrained, dtype=dtype, param_dtype=param_dtype)
    self._tokenizer = source.tokenizer()
    self._model, self._max_new_tokens = source.model, int(max_new_tokens)
    self._scorer = OptionScorer(
      source.model, source.params(partitioner), partitioner, batch_tokens=int(batch_tokens)
    )
    self._generator = Generator(
      source.model, self._scorer.params, self._tokenizer, partitioner
    )
    self._encoder = Encoder(self._tokenizer)
    self._cut = 0

  @property
  def max_length(self) -> int:
    """Positions of the model."""
    return self._model.config.max_length

  @property
  def tokenizer_name(self) -> str:
    """What the harness's cache calls the chat template."""
    return str(self._tokenizer.path).replace("/", "__")

  def chat_template(self, chat_template: bool | str = False) -> str:
    """The template's source, which the harness logs."""
    return self._tokenizer.chat_template or ""

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """A conversation as text."""
    return self._tokenizer.apply_chat_template(
      chat_history, add_generation_prompt=add_generation_prompt
    )

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """For each (context, continuation) its log-likelihood and whether it is the greedy answer."""
    pairs = [self._fit(self._encoder.split(*_pair(request.args))) for request in requests]
    found = self._score(pairs, "loglikelihood", disable_tqdm)
    return [(float(total([scores])[0]), bool(best.all())) for ((scores, best),) in found]

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """For each text the log-likelihood of all its tokens, in windows of the model's length."""
    windows, counts = [], []
    for request in requests:
      ids = self._tokenizer.encode(request.args[0], False)
      parts = rolling_requests(ids, self._first(), self.max_length)
      windows += parts
      counts.append(len(parts))
    sums = iter(
      [float(total([scores])[0])
       for ((scores, _),) in self._score(windows, "rolling", disable_tqdm)] if windows else []
    )
    return [sum(next(sums) for _ in range(count)) for count in counts]

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
        texts = [self._shortened(requests[i].args[0], options) for i in indices]
        for i, answer in zip(indices, self._generator.generate(texts, options, stop=stop)):
          answers[i] = answer.text
        bar.update(len(indices))
    self._report_cut()
    return answers

  def _options(self, kwargs) -> tuple[GenerationOptions, tuple[str, ...]]:
    until = kwargs.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    sampled = kwargs.get("do_sample", bool(kwargs.get("temperature", 0)))
    fields = {name: kwargs[name] for name in _SAMPLING if name in kwargs} if sampled else {}
    if sampled:
      fields.setdefault("temperature", 1.0)
    return GenerationOptions(
      max_new_tokens=int(kwargs.get("max_gen_toks", self._max_new_tokens)), **fields
    ), tuple(text for text in until if text)

  def _shortened(self, text: str, options: GenerationOptions) -> str:
    room = self.max_length - options.max_new_tokens
    ids = self._encoder.encode(text)
    if len(ids) <= room:
      return text
    self._cut += 1
    return self._tokenizer.decode(ids[-(room - len(self._encoder.start)) :])

  def _first(self) -> int:
    tokenizer = self._tokenizer
    return next(i for i in (tokenizer.bos_id, tokenizer.eos_id, 0) if i is not None)

  def _fit(self, request: Request) -> Request:
    context = list(request.context) or [self._first()]
    room = self.max_length - len(request.options[0])
    if len(context) > room:
      self._cut += 1
      context = context[-max(room, 1) :]
    return Request(context, request.options)

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


def _pair(args) -> tuple[str, list[str]]:
  """Context and continuation; blanks between them belong to the continuation."""
  context, continuation = args
  return context, [continuation]
