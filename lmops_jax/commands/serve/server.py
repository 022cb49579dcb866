"""The web server of `lmops serve`.

    GET  /health                the numbers of answers that run and wait
    GET  /v1/models[/NAME]      the one model
    POST /v1/chat/completions   JSON in; JSON out, or server-sent events with "stream": true
    POST /v1/completions        the same behind plain prompts

It is meant for one machine and few people, see `local_server`. Nothing in a request names a file or
an address, and nothing of it is run. A thread for each connection reads and writes; the model
belongs to the thread of `Batcher.run`, and the two exchange jobs and pieces. A connection that ends
takes its answers out of their slots.
"""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
import time
import traceback
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from lmops_jax.commands.local_server import LocalHandler, LocalServer, Refused
from lmops_jax.commands.serve.protocol import Asked, ProtocolError, error_body, understood
from lmops_jax.decoding.serving import Batcher, Full, Piece
from lmops_jax.host.foreign_files import parse_json

MAX_REQUEST_BYTES = 4 << 20
_PEOPLE = 8  # connections that may ask beside those whose answers run or wait
_LOOK_SECONDS = 0.5  # between two looks whether who waits is still there
_PATHS = {"/v1/chat/completions": True, "/v1/completions": False}


class ModelServer(LocalServer):
  """Listens from the moment it is made, and answers once `serve` is called.

  Attributes:
    model: the name that requests give.
    tokenizer: its tokenizer.
    batcher: where the answers are made.
    places: of requests that are read and answered.
  """

  model: str
  batcher: Batcher
  places: threading.BoundedSemaphore
  request_queue_size = 128

  def __init__(self, host: str, port: int):
    """As `LocalServer`."""
    super().__init__(host, port, _Handler)

  def serve(self, model: str, tokenizer, batcher: Batcher) -> None:
    """Answers until `shutdown` is called from another thread; ends the batcher with itself."""
    self.model, self.tokenizer, self.batcher = model, tokenizer, batcher
    self.created = int(time.time())
    self.places = threading.BoundedSemaphore(batcher.num_slots + batcher.max_waiting + _PEOPLE)
    owner = threading.Thread(target=batcher.run, name="model")
    owner.start()
    try:
      self.serve_forever()
    finally:  # a process that ends amid jax's work aborts
      batcher.close()
      owner.join()

  def card(self) -> dict[str, Any]:
    """What /v1/models says about the model."""
    return {"id": self.model, "object": "model", "created": self.created, "owned_by": "lmops",
            "max_model_len": self.batcher.max_length}


class _Handler(LocalHandler):
  server: ModelServer
  headers_of_all = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
  _has_begun = False  # whether a stream's headers are sent

  def do_GET(self) -> None:
    """The model, or how the server is."""
    path = urllib.parse.unquote(self.path.partition("?")[0])
    server = self.server
    found = {
      "/health": {
        "status": "ok", "running": server.batcher.num_running,
        "waiting": server.batcher.num_waiting, "slots": server.batcher.num_slots},
      "/v1/models": {"object": "list", "data": [server.card()]},
      f"/v1/models/{server.model}": server.card(),
    }
    try:
      self.check_host()
      if path not in found:
        raise ProtocolError(
          404, "there is no such page; ask /v1/models, or POST to /v1/chat/completions or "
          "/v1/completions.", code="not_found")
      self.send_json(200, found[path])
    except Refused as refused:
      self.send_json(refused.status, error_body(refused))

  def do_POST(self) -> None:
    """An answer."""
    begun, num_unread = time.perf_counter(), 0
    try:
      num_unread = self.length()
      path = self.path.partition("?")[0]
      self._check_post(path, num_unread)
      places = self.server.places
      if not places.acquire(blocking=False):
        raise ProtocolError(429, "too many requests are open; try again in a while.",
                            code="rate_limit_exceeded")
      try:
        body, num_unread = self.body(num_unread), 0
        status = self._answer(body, _PATHS[path])
      finally:
        places.release()
    except Refused as refused:
      status = f"status {refused.status}"
      self._refuse(refused)
    except OSError:  # the other side went away, or takes nothing more
      status = "nothing, having gone away"
    self.tell(f"got {status} after {time.perf_counter() - begun:.1f} s")
    self.drop(num_unread)

  def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
    """What Python's own server refuses, such as another method, in the protocol's form."""
    self.send_json(400, error_body(Refused(400, "the request is no GET or POST of HTTP.")))

  def _check_post(self, path: str, length: int) -> None:
    self.check_origin()
    if path not in _PATHS:
      raise ProtocolError(
        404, f"there is nothing to ask here; POST to {' or '.join(_PATHS)}.", code="not_found")
    self.check_json()
    if length > MAX_REQUEST_BYTES:
      raise ProtocolError(
        413, f"the request has {length:,} bytes, more than the {MAX_REQUEST_BYTES:,} of this "
        "server; shorten it.", code="request_too_large")

  def _refuse(self, refused: Refused) -> None:
    if self._has_begun:
      self._event(error_body(refused))
      return
    more = {"Retry-After": "1"} if refused.status == 429 else {}
    self.send_json(refused.status, error_body(refused), **more)

  def _answer(self, body: bytes, is_chat: bool) -> str:
    """Answers a request; returns what the terminal is told."""
    try:
      request = parse_json(body, "the request")
    except ValueError as error:
      raise ProtocolError(400, str(error)) from error
    server, asked = self.server, None
    try:
      asked = understood(
        request, is_chat, server.model, server.tokenizer, server.batcher.max_length)
      server.batcher.submit(*asked.jobs)
      num_new = self._stream(asked) if asked.stream else self._whole(asked)
    except Full as error:
      raise ProtocolError(429, str(error), code="rate_limit_exceeded") from error
    except ValueError as error:
      raise ProtocolError(400, str(error).replace("prompt 0", "the prompt")) from error
    except (Refused, OSError):
      raise
    except Exception as error:
      traceback.print_exc()
      raise ProtocolError(
        500, f"the answer failed ({type(error).__name__}); the terminal that runs the server shows "
        "why.") from error
    finally:
      for job in asked.jobs if asked else ():
        job.cancelled.set()  # what is done does not mind
    return f"{num_new} tokens behind {asked.num_prompt_tokens}"

  def _pieces(self, asked: Asked) -> Iterator[Piece]:
    """What comes of all jobs, until each is done.

    Raises:
      ProtocolError: if one breaks off.
      ConnectionError: if nobody listens any more.
    """
    num_left = len(asked.jobs)
    while num_left:
      try:
        piece = asked.jobs[0].pieces.get(timeout=_LOOK_SECONDS)
      except queue.Empty:
        piece = None
      if self._has_gone():
        raise ConnectionResetError("the client went away")
      if piece is None:
        continue
      if piece.error is not None:
        raise ProtocolError(500, piece.error)
      num_left -= piece.is_last
      yield piece

  def _whole(self, asked: Asked) -> int:
    found: list[list[Piece]] = [[] for _ in asked.jobs]
    for piece in self._pieces(asked):
      found[piece.row_id].append(piece)
    choices = [
      asked.form.choice(
        index, "".join(piece.text for piece in pieces), [i for p in pieces for i in p.ids],
        [x for p in pieces for x in p.logprobs], pieces[-1].finish_reason)
      for index, pieces in enumerate(found)]
    num_new = sum(len(piece.ids) for pieces in found for piece in pieces)
    self.send_json(200, asked.form.whole(choices, asked.usage(num_new)))
    return num_new

  def _stream(self, asked: Asked) -> int:
    form, num_new = asked.form, 0
    more = {"usage": None} if asked.include_usage else {}
    self.begin(200, "text/event-stream; charset=utf-8")
    self._has_begun = True
    if form.is_chat:
      for index in range(len(asked.jobs)):
        self._event(form.chunk(form.opening(index), **more))
    for piece in self._pieces(asked):
      num_new += len(piece.ids)
      if form.is_worth_sending(piece.text, piece.ids, piece.finish_reason):
        self._event(form.chunk(form.choice(*piece[:5], part="delta"), **more))
    if asked.include_usage:
      self._event(form.chunk(usage=asked.usage(num_new)))
    self.wfile.write(b"data: [DONE]\n\n")
    return num_new

  def _event(self, value: Mapping[str, Any]) -> None:
    self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

  def _has_gone(self) -> bool:
    """Whether the other side has closed the connection."""
    look = select.poll()  # which, unlike select, takes any number of open files
    look.register(self.connection, select.POLLIN)
    return bool(look.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
