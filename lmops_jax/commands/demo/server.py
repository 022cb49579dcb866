"""A small web server for one demo: its pages, facts about it, and one answer at a time.

    GET /         and further pages, all of them read into memory beforehand
    GET /facts    JSON for the page
    POST /answer  JSON in, JSON out; what is refused is {"error": one sentence}

Who accepts application/x-ndjson gets lines instead: {"text": ...} as often as something is written,
then {"answer": ...}, or {"error": ...} if it breaks off; the connection ends behind the last.

It is meant for one machine and few people. Nothing in a request names a file. Requests have a
bounded size and number. Pages of other origins are kept out, see `local_server`.
"""

from __future__ import annotations

import importlib.resources
import json
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from lmops_jax.commands.local_server import LocalHandler, LocalServer, Refused
from lmops_jax.host.foreign_files import parse_json

MAX_WAITING = 8  # requests that are read, answered or wait for their turn
_LINES = "application/x-ndjson"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
  "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
                             "img-src blob: data:; connect-src 'self'; base-uri 'none'; "
                             "form-action 'none'; frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Cache-Control": "no-store",
}


class Page(NamedTuple):
  """What the server hands out at a path: bytes, and their type for the browser."""

  content_type: str
  content: bytes


def read_pages(first: str, *others: str) -> dict[str, Page]:
  """Packaged files by path: the first at "/", the others at "/" and their name."""
  folder = importlib.resources.files("lmops_jax.commands.demo") / "pages"
  return {
    path: Page(f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8", (folder / name).read_bytes())
    for path, name in {"/": first, **{f"/{name}": name for name in others}}.items()}


class Demo(Protocol):
  """What a server shows.

  Attributes:
    pages: by path; "/" is the first.
    max_request_bytes: of the JSON text that `answer` is asked with.
  """

  pages: Mapping[str, Page]
  max_request_bytes: int

  def facts(self) -> Mapping[str, Any]:
    """What the page has to know, for JSON."""

  def answer(
    self, request: Any, write: Callable[[str], bool] | None = None
  ) -> Mapping[str, Any]:
    """The answer to a JSON value, for JSON; called for one request at a time.

    Args:
      request: what was asked.
      write: shows a piece of the answer as soon as there is one; True if nobody listens any more.

    Raises:
      ValueError: one sentence for the person who asked.
    """


class DemoServer(LocalServer):
  """Listens from the moment it is made, and answers once `serve` is called.

  Attributes:
    demo: what is served.
    turn: held while an answer is made.
    places: of requests that are read, answered or wait for their turn.
    closes: whether no further answer is begun.
  """

  demo: Demo
  closes = False

  def __init__(self, host: str, port: int):
    """As `LocalServer`."""
    self.turn = threading.Lock()
    self.places = threading.BoundedSemaphore(MAX_WAITING)
    super().__init__(host, port, _Handler)

  def serve(self, demo: Demo) -> None:
    """Answers until `shutdown` is called from another thread."""
    self.demo = demo
    self.serve_forever()

  def server_close(self) -> None:
    """Ends, once the answer that is under way is made and sent; no further one is begun."""
    self.closes = True
    super().server_close()


class _Handler(LocalHandler):
  server: DemoServer
  headers_of_all = _HEADERS
  _has_lines = False  # whether the first line of the answer is sent

  def do_GET(self) -> None:
    """A page, or the facts."""
    path = self.path.partition("?")[0]
    try:
      self.check_host()
      if path == "/facts":
        self.send_json(200, self.server.demo.facts())
        return
      page = self.server.demo.pages.get(path)
      if page is None:
        raise Refused(404, "there is no such page; the demo is at /.")
      self.send(200, *page)
    except Refused as refused:
      self.send_json(refused.status, {"error": str(refused)})

  def do_POST(self) -> None:
    """An answer."""
    begun, num_unread = time.perf_counter(), 0
    try:
      num_unread = self.length()
      self._check_post(num_unread)
      if not self.server.places.acquire(blocking=False):
        raise Refused(503, f"{MAX_WAITING} requests wait already; try again in a while.")
      try:
        body = self.body(num_unread)
        num_unread = 0
        status, answer = 200, self._answer(body)
      finally:
        self.server.places.release()
    except Refused as refused:
      status, answer = refused.status, {"error": str(refused)}
    if self._has_lines or (status == 200 and self._wants_lines()):
      self._send_line({"answer": answer} if status == 200 else answer)
    else:
      self.send_json(status, answer)
    got = "an answer" if status == 200 else f"status {status}"
    self.tell(f"got {got} after {time.perf_counter() - begun:.1f} s")
    self.drop(num_unread)

  def _check_post(self, length: int) -> None:
    self.check_origin()
    if self.path != "/answer":
      raise Refused(404, "there is nothing to ask here; ask at /answer.")
    self.check_json()
    most = self.server.demo.max_request_bytes
    if length > most:
      raise Refused(
        413, f"the request has {length:,} bytes, more than the {most:,} of this demo; take a "
        "smaller picture.")

  def _answer(self, body: bytes) -> Mapping[str, Any]:
    try:
      request = parse_json(body, "the request")
      with self.server.turn:
        if self.server.closes:
          raise Refused(503, "the demo has ended.")
        self.tell("is being answered")
        write = [self._write] if self._wants_lines() else []
        return self.server.demo.answer(request, *write)
    except Refused:
      raise
    except ValueError as error:
      raise Refused(400, " ".join(str(error).split())) from error
    except Exception as error:  # memory, a device: the demo goes on
      traceback.print_exc()
      kind = type(error).__name__
      raise Refused(
        500, f"the answer failed ({kind}); the terminal that runs the demo shows why.") from error

  def _wants_lines(self) -> bool:
    return _LINES in self.headers.get("Accept", "")

  def _write(self, text: str) -> bool:
    try:
      self._send_line({"text": text})
    except OSError:  # the other side went away, or takes nothing more
      return True
    return False

  def _send_line(self, value: Mapping[str, Any]) -> None:
    if not self._has_lines:
      self._has_lines = True
      self.begin(200, _LINES)
    self.wfile.write(json.dumps(value).encode() + b"\n")
