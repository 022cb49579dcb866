"""Requests and answers in the protocol of OpenAI: chat completions and completions.

What would change a text and is not done here is refused by name, unless it has the value that
changes nothing. Labels of a request are passed over.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import annotated_types as at
import pydantic

from lmops_jax.commands.local_server import Refused
from lmops_jax.data.supervised import encode_behind, front_ids
from lmops_jax.decoding import GenerationOptions
from lmops_jax.decoding.serving import Job
from lmops_jax.host.foreign_files import Unfit, checked

MAX_ANSWERS = 16  # of a prompt
_MAX_PROMPTS = 64
_DEFAULT_TOKENS = 16  # of a completion, as the protocol has it; a chat goes on to its end
_LABELS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier",
                     "prompt_cache_key"})
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],),
  "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "top_logprobs": (0,),
  "response_format": ({"type": "text"},), "modalities": (["text"],), "echo": (False,),
  "best_of": (1,), "suffix": ("",), "functions": ([],),
}
_TYPES = {404: "not_found_error", 403: "permission_error", 429: "rate_limit_error"}


class ProtocolError(Refused):
  """A refusal in the protocol's form.

  Attributes:
    param: the field that is wrong, or None.
    code: a word for programs, or None.
  """

  def __init__(self, status: int, sentence: str, param: str | None = None, code: str | None = None):
    super().__init__(status, sentence)
    self.param, self.code = param, code


def error_body(refused: Refused) -> dict[str, Any]:
  """What is sent for a refusal."""
  kind = "server_error" if refused.status >= 500 else "invalid_request_error"
  found = {"param": None, "code": None}
  if isinstance(refused, ProtocolError):
    found = {"param": refused.param, "code": refused.code}
  return {"error": {
    "message": " ".join(str(refused).split()), "type": _TYPES.get(refused.status, kind), **found}}


class StreamOptions(pydantic.BaseModel, extra="forbid"):
  """`include_usage` adds a last chunk with the numbers of tokens."""

  include_usage: bool = False


class _Sampling(pydantic.BaseModel, extra="forbid"):
  """What both kinds of request have; see the protocol."""

  model: Annotated[str, at.MaxLen(1000)]
  temperature: Annotated[float, at.Ge(0), at.Le(2)] = 1.0
  top_p: Annotated[float, at.Gt(0), at.Le(1)] = 1.0
  max_tokens: Annotated[int, at.Ge(1), at.Le(2**31)] | None = None
  n: Annotated[int, at.Ge(1), at.Le(MAX_ANSWERS)] = 1
  stop: Annotated[str, at.Len(1, 1000)] | Annotated[
    list[Annotated[str, at.Len(1, 1000)]], at.MaxLen(4)] = []
  seed: Annotated[int, at.Ge(0), at.Le(2**32 - 1)] | None = None
  stream: bool = False
  stream_options: StreamOptions = StreamOptions()

  def options(self, max_new_tokens: int) -> GenerationOptions:
    """How tokens are chosen; without a seed by one of chance."""
    if self.temperature == 0:  # whose only token is in every top_p
      return GenerationOptions(max_new_tokens=max_new_tokens)
    seed = secrets.randbits(32) if self.seed is None else self.seed
    return GenerationOptions(
      max_new_tokens=max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed)


class TextPart(pydantic.BaseModel, extra="forbid"):
  """A part of a message; texts only."""

  type: Literal["text"]
  text: str


class Message(pydantic.BaseModel, extra="forbid"):
  """A turn of a chat; "developer" is the protocol's newer word for "system"."""

  role: Literal["system", "developer", "user", "assistant"]
  content: str | list[TextPart]
  name: str | None = None

  def turn(self) -> dict[str, str]:
    """As chat templates read it."""
    content = self.content
    if not isinstance(content, str):
      content = "".join(part.text for part in content)
    return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Sampling):
  """Of /v1/chat/completions."""

  messages: Annotated[list[Message], at.Len(1, 10_000)]
  max_completion_tokens: Annotated[int, at.Ge(1), at.Le(2**31)] | None = None
  logprobs: bool = False


_Ids = Annotated[list[int], at.Len(1)]


class CompletionRequest(_Sampling):
  """Of /v1/completions; `logprobs` 0 gives those of the tokens that were chosen."""

  prompt: str | Annotated[list[str], at.Len(1, _MAX_PROMPTS)] | _Ids | Annotated[
    list[_Ids], at.Len(1, _MAX_PROMPTS)]
  logprobs: Literal[0] | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request that was understood.

  Attributes:
    form: of the answer.
    jobs: one for each choice, whose `row_id` is its index; they share their pieces.
    num_prompt_tokens: of all prompts, each once.
    stream, include_usage: as asked.
  """

  form: Form
  jobs: tuple[Job, ...]
  num_prompt_tokens: int
  stream: bool
  include_usage: bool

  def usage(self, num_new: int) -> dict[str, int]:
    """The numbers of tokens, `num_new` of all choices."""
    return {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": num_new,
            "total_tokens": self.num_prompt_tokens + num_new}


def understood(
  request: Any, is_chat: bool, model: str, tokenizer, max_length: int,
) -> Asked:
  """What a request asks for.

  Args:
    request: its JSON value.
    is_chat: which of the two kinds.
    model: the name of the model that is served.
    tokenizer: its tokenizer.
    max_length: most tokens of prompt and answer.

  Raises:
    ProtocolError: naming the field that is wrong.
  """
  if not isinstance(request, dict):
    raise ProtocolError(400, "the request should be an object with fields.")
  schema = ChatRequest if is_chat else CompletionRequest
  asked = _checked(schema, _without_neutral(request, schema))
  if asked.model != model:
    raise ProtocolError(
      404, f"there is no model of that name here; this server has {model!r}.", "model",
      "model_not_found")
  if isinstance(asked, ChatRequest):
    limit, wants_logprobs, field = asked.max_completion_tokens, asked.logprobs, "messages"
    prompts = [_chat_ids(asked.messages, tokenizer)]
    default = max_length
  else:
    limit, wants_logprobs, field = None, asked.logprobs is not None, "prompt"
    prompts = _prompt_ids(asked.prompt, tokenizer)
    default = _DEFAULT_TOKENS
  limit = limit or asked.max_tokens
  stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
  jobs: list[Job] = []
  for ids in prompts:
    room = max_length - len(ids)
    if room < (limit or 1):
      more = f" and {limit} more are asked for" if limit else ""
      raise ProtocolError(
        400, f"the prompt has {len(ids)} tokens{more}, and this server's limit is {max_length} "
        "tokens for both; shorten the prompt or ask for fewer.", field, "context_length_exceeded")
    try:
      options = asked.options(limit or min(default, room))
    except ValueError as error:
      raise ProtocolError(400, str(error), "temperature") from error
    for _ in range(asked.n):
      more = {"pieces": jobs[0].pieces} if jobs else {}
      jobs.append(Job(ids, options, stop, len(jobs), **more))
  form = Form(is_chat, model, wants_logprobs, lambda i: tokenizer.decode([i], False))
  return Asked(
    form, tuple(jobs), sum(map(len, prompts)), asked.stream, asked.stream_options.include_usage)


def _without_neutral(request: Mapping[str, Any], schema: type[_Sampling]) -> dict[str, Any]:
  """The fields that mean something; null is as good as absent, in messages too."""
  found = {}
  for name, value in request.items():
    if value is None or (name in _LABELS and name not in schema.model_fields):
      continue
    if name in schema.model_fields:
      found[name] = value
    elif name not in _NEUTRAL:
      raise ProtocolError(
        400, f"the request has the unknown field {name[:100]!r}; leave it out.", name[:100],
        "unknown_parameter")
    elif value not in _NEUTRAL[name]:
      raise ProtocolError(
        400, f"this server does nothing for {name}; leave it out.", name, "unsupported_parameter")
  messages = found.get("messages")
  if isinstance(messages, list):
    found["messages"] = [
      {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
      for message in messages]
  return found


def _checked(schema, value):
  try:
    return checked(schema, value, "the request")
  except Unfit as error:
    raise ProtocolError(400, str(error), error.field or None) from error
  except ValueError as error:
    raise ProtocolError(400, str(error)) from error


def _chat_ids(messages: Sequence[Message], tokenizer) -> list[int]:
  try:
    text = tokenizer.apply_chat_template([message.turn() for message in messages])
  except ValueError as error:  # no template, or one that refuses this conversation
    raise ProtocolError(400, str(error), "messages") from error
  return _encoded(text, [], tokenizer, "messages")


def _prompt_ids(prompt, tokenizer) -> list[list[int]]:
  if isinstance(prompt, str):
    prompt = [prompt]
  if isinstance(prompt[0], int):
    return [prompt]
  if isinstance(prompt[0], list):
    return prompt
  front = front_ids(tokenizer)
  return [_encoded(text, front, tokenizer, "prompt") for text in prompt]


def _encoded(text, front, tokenizer, field) -> list[int]:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ProtocolError(
      400, "the text holds half a character (a lone surrogate); send whole ones.", field
    ) from error
  return encode_behind(front, tokenizer, text)


class Form:
  """The shape of an answer to one request.

  Attributes:
    is_chat: which of the two kinds.
  """

  def __init__(self, is_chat: bool, model: str, wants_logprobs: bool, spell: Callable[[int], str]):
    """
    Args:
      is_chat, model, wants_logprobs: as asked.
      spell: the text of one id.
    """
    self.is_chat, self._wants_logprobs, self._spell = is_chat, wants_logprobs, spell
    self._head = {
      "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
      "created": int(time.time()), "model": model}

  def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
    """The answer at once."""
    kind = "chat.completion" if self.is_chat else "text_completion"
    return {**self._head, "object": kind, "choices": list(choices), "usage": usage}

  def chunk(self, *choices: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A part of a stream."""
    kind = "chat.completion.chunk" if self.is_chat else "text_completion"
    return {**self._head, "object": kind, "choices": list(choices), **more}

  def choice(
    self, index: int, text: str, ids: Sequence[int], logprobs: Sequence[float],
    finish_reason: str | None, part: str = "message",
  ) -> dict[str, Any]:
    """One choice, or with part="delta" what a step adds to it."""
    content: dict[str, Any] = {"text": text}
    if self.is_chat:
      whole = {"role": "assistant", "content": text}
      content = {part: whole if part == "message" else {"content": text} if text else {}}
    reason = "stop" if finish_reason == "eos" else finish_reason
    return {
      "index": index, **content, "logprobs": self._logprobs(ids, logprobs), "finish_reason": reason}

  def opening(self, index: int) -> dict[str, Any]:
    """The first delta of a choice of a chat, which tells the role."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
            "finish_reason": None}

  def is_worth_sending(self, text: str, ids: Sequence[int], finish_reason: str | None) -> bool:
    """Whether a step has something to show."""
    return bool(text or finish_reason or (self._wants_logprobs and ids))

  def _logprobs(self, ids, logprobs) -> dict[str, Any] | None:
    if not self._wants_logprobs:
      return None
    tokens = [self._spell(i) for i in ids]
    if not self.is_chat:
      return {"tokens": tokens, "token_logprobs": list(logprobs), "top_logprobs": None,
              "text_offset": None}
    return {"content": [
      {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []}
      for token, logprob in zip(tokens, logprobs, strict=True)]}
