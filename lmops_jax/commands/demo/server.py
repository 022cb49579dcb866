"""A small web server for one demo: its pages, facts about it, and one answer at a time.

    GET /         and further pages, all of them read into memory beforehand
    GET /facts    JSON for the page
    POST /answer  JSON in, JSON out; what is refused is {"error": one sentence}

Who accepts application/x-ndjson gets lines instead: {"text": ...} as often as something is written,
then {"answer": ...}, or {"error": ...} if it breaks off; the connection ends behind the last.

It is meant for one machine and few people. Nothing in a request names a file. Requests have a
bounded size and number. Pages of other origins are kept out: their requests carry another Origin,
and a name of theirs that is made to point here (DNS rebinding) is no name of this machine.
"""

from __future__ import annotations

import http.server
import importlib.resources
import ipaddress
import json
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from lmops_jax.host.foreign_files import parse_json

MAX_WAITING = 8  # requests that are read, answered or wait for their turn
_SECONDS = 30  # without a byte, after which a connection is closed
_MAX_UNREAD = 1 << 28  # bytes of a refused request that are taken, so that the sentence arrives
_BLOCK = 1 << 16
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


class DemoServer(socketserver.ThreadingTCPServer):
  """Listens from the moment it is made, and answers once `serve` is called.

  Attributes:
    address: for a browser on this machine.
    demo: what is served.
  """

  allow_reuse_address = True
  daemon_threads = True
  demo: Demo

  def __init__(self, host: str, port: int):
    """
    Args:
      host: name or address of this machine to listen at.
      port: 0 takes a free one.

    Raises:
      ValueError: there is no such address, or it is taken.
    """
    self.turn = threading.Lock()
    self.places = threading.BoundedSemaphore(MAX_WAITING)
    self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
      super().__init__((host, port), _Handler)
    except (OSError, OverflowError) as error:
      raise ValueError(
        f"--host {host} --port {port} cannot be listened at ({getattr(error, 'strerror', error)}); "
        "take another port, 0 for a free one, or an address of this machine."
      ) from error
    shown = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)
    self.address = f"http://{shown}:{self.server_address[1]}"
    self.names = {"localhost", host.lower(), socket.gethostname().lower()}

  def serve(self, demo: Demo) -> None:
    """Answers until `shutdown` is called from another thread."""
    self.demo = demo
    self.serve_forever()

  def server_close(self) -> None:
    """Ends, once the answer that is under way is made: a process that ends amid jax's work aborts.

    No further answer is begun.
    """
    super().server_close()
    self.turn.acquire()

  def handle_error(self, request, client_address) -> None:
    """Tells what went wrong in a connection, unless the other side went away."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


class _Refused(Exception):
  """What is answered instead: a status, and a sentence."""

  def __init__(self, status: int, sentence: str):
    super().__init__(sentence)
    self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
  server: DemoServer
  timeout = _SECONDS
  server_version, sys_version = "lmops", ""
  _has_lines = False  # whether the first line of the answer is sent

  def do_GET(self) -> None:
    """A page, or the facts."""
    path = self.path.partition("?")[0]
    try:
      self._check_host()
      if path == "/facts":
        self._send_json(200, self.server.demo.facts())
        return
      page = self.server.demo.pages.get(path)
      if page is None:
        raise _Refused(404, "there is no such page; the demo is at /.")
      self._send(200, *page)
    except _Refused as refused:
      self._send_json(refused.status, {"error": str(refused)})

  def do_POST(self) -> None:
    """An answer."""
    begun, num_unread = time.perf_counter(), 0
    try:
      num_unread = self._length()
      self._check_post(num_unread)
      if not self.server.places.acquire(blocking=False):
        raise _Refused(503, f"{MAX_WAITING} requests wait already; try again in a while.")
      try:
        body = self.rfile.read(num_unread)
        if len(body) < num_unread:
          raise _Refused(400, "the request is cut off; send it again.")
        num_unread = 0
        status, answer = 200, self._answer(body)
      finally:
        self.server.places.release()
    except _Refused as refused:
      status, answer = refused.status, {"error": str(refused)}
    if self._has_lines or (status == 200 and self._wants_lines()):
      self._send_line({"answer": answer} if status == 200 else answer)
    else:
      self._send_json(status, answer)
    got = "an answer" if status == 200 else f"status {status}"
    self._tell(f"got {got} after {time.perf_counter() - begun:.1f} s")
    self._drop(num_unread)

  def _tell(self, what: str) -> None:
    print(f"lmops: {self.client_address[0]} {what}", file=sys.stderr, flush=True)

  def _length(self) -> int:
    length = self.headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 20):
      raise _Refused(411, "the request does not say how long it is; send a Content-Length.")
    return int(length)

  def _check_host(self) -> None:
    try:
      name = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
      known = name in self.server.names or bool(ipaddress.ip_address(name.partition("%")[0]))
    except ValueError:
      known = False
    if not known:
      raise _Refused(
        403, "the demo was asked for by a name that this machine does not have; open it by the "
        "address that its terminal shows, or start it with that name as --host.")

  def _check_post(self, length: int) -> None:
    self._check_host()
    origin = self.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != self.headers.get("Host"):
      raise _Refused(403, "the request comes from another site; use the demo's own page.")
    if self.path != "/answer":
      raise _Refused(404, "there is nothing to ask here; ask at /answer.")
    if self.headers.get_content_type() != "application/json":
      raise _Refused(415, "the request is not JSON; send it as application/json.")
    most = self.server.demo.max_request_bytes
    if length > most:
      raise _Refused(
        413, f"the request has {length:,} bytes, more than the {most:,} of this demo; take a "
        "smaller picture.")

  def _answer(self, body: bytes) -> Mapping[str, Any]:
    try:
      request = parse_json(body, "the request")
      with self.server.turn:
        self._tell("is being answered")
        write = [self._write] if self._wants_lines() else []
        return self.server.demo.answer(request, *write)
    except ValueError as error:
      raise _Refused(400, " ".join(str(error).split())) from error
    except Exception as error:  # memory, a device: the demo goes on
      traceback.print_exc()
      kind = type(error).__name__
      raise _Refused(
        500, f"the answer failed ({kind}); the terminal that runs the demo shows why.") from error

  def _drop(self, num_bytes: int) -> None:
    """Takes what was refused unread: a browser shows no answer to what it could not send."""
    left = num_bytes if num_bytes <= _MAX_UNREAD else 0
    while left > 0 and (block := self.rfile.read(min(left, _BLOCK))):
      left -= len(block)

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
      self._begin(200, _LINES)
    self.wfile.write(json.dumps(value).encode() + b"\n")

  def _begin(self, status: int, content_type: str, **more: str) -> None:
    self.send_response(status)
    for name, value in (_HEADERS | {"Content-Type": content_type} | more).items():
      self.send_header(name, value)
    self.end_headers()

  def _send_json(self, status: int, value: Mapping[str, Any]) -> None:
    self._send(status, "application/json", json.dumps(value).encode())

  def _send(self, status: int, content_type: str, content: bytes) -> None:
    self._begin(status, content_type, **{"Content-Length": str(len(content))})
    self.wfile.write(content)

  def log_message(self, format: str, *args: Any) -> None:
    """Keeps quiet: answers have lines of their own, which hold nothing that a client sent."""
