"""Chat templates: Jinja programs in a checkpoint that write a conversation as one text.

They are other people's code, so they run in Jinja's immutable sandbox, with the few names that
Hugging Face's own renderer offers: `raise_exception`, `strftime_now`, a `tojson` that leaves HTML
characters alone, `break` and `continue`, and the tag `generation` around an assistant's words.
What they do and write is limited, see `template_limits`. Left out: tool functions as Python objects
(give schemas), masks of the assistant's tokens, and filters for pages of HTML.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_REASON = 500  # characters of what a template itself says
_OPEN_END = "\ue123 "  # a character for private use, and a blank, which trimming takes away


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  where: str,
  add_generation_prompt: bool = True,
  **variables: Any,
) -> str:
  """The text of a conversation.

  Args:
    template: Jinja source.
    messages: each with `role` ("system", "user", "assistant", ...) and `content`.
    where: the file that holds the template, for errors.
    add_generation_prompt: end with the beginning of an assistant's turn.
    variables: what else the template may ask for, such as `bos_token` or `tools`.

  Raises:
    ValueError: if there are no messages, one has no role, or the template does not compile,
      objects, or does more than a published one would.
  """
  import jinja2

  from lmops_jax.text import template_limits

  messages = [_checked(i, message) for i, message in enumerate(messages)]
  if not messages:
    raise ValueError("a chat needs at least one message; give one with a role and a content.")
  try:
    return template_limits.run(_compile(template), {
      "tools": None, "documents": None, **variables, "messages": messages,
      "add_generation_prompt": add_generation_prompt,
    })
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f"the chat template of {where} is no Jinja template: {str(error).rstrip('.')}."
    ) from error
  except template_limits.LimitError as error:
    raise ValueError(
      f"the chat template of {where} {error}, which no conversation needs; give the model the "
      "template that it was published with."
    ) from error
  except Exception as error:  # the template is a program: anything may go wrong in it
    reason = str(error)[:_MAX_REASON].rstrip(".") or type(error).__name__
    raise ValueError(
      f"the chat template of {where} refuses this conversation: {reason}."
    ) from error


def render_open(
  template: str, messages: Sequence[Mapping[str, Any]], *, where: str, **variables: Any
) -> str:
  """As `render`, up to the end of the last message's content, which the model is to go on with.

  Blanks at the end of that content stay if the template leaves them.

  Raises:
    ValueError: as `render`; or if the template leaves out the content of the last message.
  """
  messages = [_checked(i, message) for i, message in enumerate(messages)]
  if not messages or not isinstance(messages[-1].get("content"), str):
    raise ValueError("the last message of the chat has no text to go on with; give it a content.")
  messages[-1]["content"] += _OPEN_END
  text = render(template, messages, where=where, add_generation_prompt=False, **variables)
  text, mark, behind = text.rpartition(_OPEN_END[0])
  if not mark:
    raise ValueError(
      f"the chat template of {where} leaves out the content of the last message, so there is "
      "nothing to go on with; let the model begin a turn of its own."
    )
  return text if behind.startswith(_OPEN_END[1:]) else text.rstrip()


def _checked(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
  if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
    raise ValueError(
      f"message {i} of the chat is {message!r}; it must be a mapping with a role and a content."
    )
  return dict(message)


@functools.lru_cache(maxsize=32)
def _compile(template: str):
  import jinja2
  import jinja2.ext
  import jinja2.nodes

  from lmops_jax.text import template_limits

  class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` stands for what is between."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return jinja2.nodes.Scope(body, lineno=line)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment = template_limits.MeteredEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.add_filter("tojson", _to_json)
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = _now
  return template_limits.compiled(environment, template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def choose(value: str | Mapping[str, str] | None, where: str) -> str | None:
  """The template among what a file holds: a text, or a mapping of named ones.

  Raises:
    ValueError: if there are several and none is named "default".
  """
  if not value or isinstance(value, str):
    return value or None
  if "default" in value:
    return value["default"]
  if len(value) == 1:
    return next(iter(value.values()))
  raise ValueError(
    f"{where} holds the chat templates {', '.join(value)} and no default; name one of them default."
  )
