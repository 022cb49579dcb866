"""Models behind an OpenAI-compatible endpoint: POST {base}/chat/completions, streamed.

The key comes from an environment variable and goes into one header; it is taken out of everything
that is raised, logged or returned. HTTPS is required, but for loopback hosts. The client library is
httpx2, of the extra `socratic`.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import json
import os
import random
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from lmops_jax.host.words import shortened
from lmops_jax.systems.socratic.backends import (
  BackendError,
  Reply,
  Sampling,
  Usage,
  WindowExceeded,
  estimated_tokens,
)
from lmops_jax.systems.socratic.context import Messages

TRIES, LONGEST_WAIT = 6, 60.0  # seconds
_CONNECT, _READ = 10.0, 120.0  # seconds
_RETRIED = (408, 409, 429)
_TOO_LONG = ("context_length", "context length", "maximum context", "context window",
             "exceeds the available context")
_MAX_REPLY_BYTES = 1 << 24
_MIN_SECRET = 8  # characters; local servers take "none" or "x" for a key, which texts may hold


class _Transient(Exception):
  """What may go well at another try; `wait` seconds if the server said so."""

  def __init__(self, reason: str, wait: float | None = None):
    super().__init__(reason)
    self.wait = wait


def client_library():
  """The module httpx2.

  Raises:
    ValueError: if it is not installed; names the extra.
  """
  try:
    import httpx2
  except ImportError:
    raise ValueError("an endpoint needs the package httpx2, which is not installed; install "
                     "lmops_jax[socratic].") from None
  return httpx2


def checked_endpoint(endpoint: str) -> str:
  """The base address without a slash at its end.

  Raises:
    ValueError: for no http(s) address, one with a password or query in it, or plain HTTP to
      another machine.
  """
  base = endpoint.rstrip("/")
  try:
    parts = urllib.parse.urlsplit(base)
    host = parts.hostname or ""
  except ValueError:
    parts, host = None, ""
  if parts is None or parts.scheme not in ("http", "https") or not host:
    raise ValueError("--endpoint is no address such as https://host/v1; give the base address of "
                     "an OpenAI-compatible server.")
  if parts.username or parts.password or parts.query or parts.fragment:
    raise ValueError("--endpoint holds a user, a password or a query; give the plain address, and "
                     "the key in an environment variable.")
  if parts.scheme == "http" and not is_loopback(host):
    raise ValueError(f"--endpoint uses http to the host {host}; use https, which plain http "
                     "replaces on loopback hosts only.")
  return base


def is_loopback(host: str) -> bool:
  """Whether a host is this machine by its name or address alone."""
  if host == "localhost":
    return True
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return False


class Http:
  """A model behind an endpoint."""

  can_score = False

  def __init__(self, endpoint: str, model: str, *, key_env: str | None = None,
               window: int = 8192, requests_per_minute: float | None = None,
               read_seconds: float = _READ, sleep: Callable[[float], None] = time.sleep,
               clock: Callable[[], float] = time.monotonic):
    """
    Args:
      endpoint: base address, such as http://localhost:8080/v1.
      model: its name there.
      key_env: name of the environment variable that holds the key; None sends none.
      window: tokens of prompt and reply together.
      requests_per_minute: most requests that are sent; None is no limit.
      read_seconds: how long to wait for the next piece of a reply.
      sleep, clock: for tests.

    Raises:
      ValueError: for an address that is not taken, a missing key or a missing client library.
    """
    self.model, self.window = model, window
    self._base = checked_endpoint(endpoint)
    self._key_env = key_env
    self._key()
    self._gap = 60 / requests_per_minute if requests_per_minute else 0.0
    self._sleep, self._clock, self._last = sleep, clock, None
    self._httpx = client_library()
    is_local = is_loopback(urllib.parse.urlsplit(self._base).hostname or "")
    self._client = self._httpx.Client(
      timeout=self._httpx.Timeout(read_seconds, connect=_CONNECT), follow_redirects=False,
      trust_env=not is_local)  # no proxy lies before this machine

  def _key(self) -> str | None:
    """The key, read anew each time so that no object keeps it."""
    if self._key_env is None:
      return None
    key = os.environ.get(self._key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
      raise ValueError(f"the environment variable {self._key_env} holds no key; set it and run the "
                       "command again.")
    return key

  def close(self) -> None:
    """Closes the connections."""
    self._client.close()

  def count_tokens(self, messages: Messages) -> int:
    """An estimate: the server counts after the call."""
    return sum(estimated_tokens(content) + 4 for _, content in messages)

  def score(self, messages: Messages, choices: Sequence[str]) -> list[float]:
    """Not offered: chat endpoints give no likelihood of a given reply."""
    raise NotImplementedError("an endpoint scores nothing.")

  def complete(self, messages, sampling: Sampling, place, stream=None) -> Reply:
    """A reply; up to 6 tries.

    Raises:
      WindowExceeded: if the server finds the request too long.
      BackendError: if it refuses, or no try went well.
    """
    body = {
      "model": self.model, "messages": [{"role": r, "content": c} for r, c in messages],
      "temperature": sampling.temperature, "top_p": sampling.top_p,
      "max_tokens": sampling.max_new_tokens, "seed": sampling.seed, "stream": True,
      "stream_options": {"include_usage": True},
    }
    jitter = random.Random(sampling.seed)
    for number in range(1, TRIES + 1):
      self._pace()
      try:
        return self._once(body, messages, stream)
      except _Transient as error:
        reason = self._redacted(str(error))
        wait = error.wait if error.wait is not None else 2.0 ** (number - 1) * (
          0.5 + jitter.random())
      if number < TRIES:
        self._sleep(min(wait, LONGEST_WAIT))
    raise BackendError(f"{self._base} gave no reply in {TRIES} tries (the last: {reason}); the run "
                       "can be resumed.")

  def _pace(self) -> None:
    now = self._clock()
    if self._gap and self._last is not None and now - self._last < self._gap:
      self._sleep(self._gap - (now - self._last))
    self._last = self._clock()

  def _redacted(self, text: str) -> str:
    key = self._key()
    is_secret = key is not None and len(key) >= _MIN_SECRET
    return text.replace(key, "[key]") if is_secret else text

  def _once(self, body: dict[str, Any], messages: Messages, stream) -> Reply:
    key = self._key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
      with self._client.stream("POST", f"{self._base}/chat/completions", json=body,
                               headers=headers) as response:
        if response.status_code != 200:
          self._refused(response)
        if "text/event-stream" in response.headers.get("content-type", ""):
          return self._streamed(response, messages, stream)
        return self._whole(_read(response), messages, stream)
    except self._httpx.TransportError as error:
      raise _Transient(type(error).__name__) from None  # its message may quote the request

  def _refused(self, response) -> None:
    code = response.status_code
    text = self._redacted(shortened(" ".join(
      _read(response).decode("utf-8", "replace").split()), 300))
    if code in _RETRIED or code >= 500:
      raise _Transient(f"status {code}", _retry_after(response.headers.get("retry-after")))
    if code in (400, 413, 422) and any(mark in text.lower() for mark in _TOO_LONG):
      raise WindowExceeded(f"{self._base} finds the request too long: {text}")
    if code in (401, 403):
      where = (f"check the key in the environment variable {self._key_env}" if self._key_env
               else "name the environment variable that holds your key with --key-env")
      raise BackendError(f"{self._base} refuses access (status {code}); {where}. The run can be "
                         "resumed.")
    raise BackendError(f"{self._base} refuses the request (status {code}): {text}")

  def _streamed(self, response, messages: Messages, stream) -> Reply:
    pieces, finish, usage, model, size = [], None, None, self.model, 0
    for line in response.iter_lines():
      if not line.startswith("data:"):
        continue
      data = line[5:].strip()
      if data == "[DONE]":
        break
      event = _parsed(data)
      usage = event.get("usage") or usage
      model = event.get("model") or model
      for choice in event.get("choices") or ():
        piece = (choice.get("delta") or {}).get("content") or ""
        finish = choice.get("finish_reason") or finish
        size += len(piece)
        if size > _MAX_REPLY_BYTES:
          raise BackendError(f"{self._base} sent more than {_MAX_REPLY_BYTES:,} characters.")
        pieces.append(piece)
        if stream is not None and piece:
          stream(self._redacted(piece))
    if finish is None:
      raise _Transient("the reply broke off")
    return self._made("".join(pieces), finish, usage, model, messages)

  def _whole(self, data: bytes, messages: Messages, stream) -> Reply:
    """A reply of a server that does not stream."""
    event = _parsed(data)
    choice = (event.get("choices") or [{}])[0]
    text = (choice.get("message") or {}).get("content") or ""
    if stream is not None:
      stream(self._redacted(text))
    return self._made(text, choice.get("finish_reason") or "stop", event.get("usage"),
                      event.get("model") or self.model, messages)

  def _made(self, text: str, finish: str, usage, model: str, messages: Messages) -> Reply:
    text = self._redacted(text)
    try:
      counted = Usage(max(0, int(usage["prompt_tokens"])), max(0, int(usage["completion_tokens"])))
    except (TypeError, KeyError, ValueError):
      counted = Usage(self.count_tokens(messages), estimated_tokens(text), estimated=True)
    return Reply(text, finish, counted, self._redacted(str(model)))


def _read(response) -> bytes:
  data = b""
  for piece in response.iter_bytes():
    data += piece
    if len(data) > _MAX_REPLY_BYTES:
      raise _Transient("the reply is endless")
  return data


def _parsed(data: str | bytes) -> dict[str, Any]:
  try:
    event = json.loads(data)
  except (ValueError, RecursionError):
    raise _Transient("the reply is no whole JSON") from None
  if not isinstance(event, dict):
    raise _Transient("the reply is no JSON object")
  if event.get("error"):
    raise _Transient("the server reported an error within the reply")
  return event


def _retry_after(value: str | None) -> float | None:
  """Seconds of a Retry-After header, which is a number or a date."""
  if value is None:
    return None
  with contextlib.suppress(ValueError):
    return max(0.0, float(value))
  with contextlib.suppress(ValueError, TypeError):
    return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
  return None
