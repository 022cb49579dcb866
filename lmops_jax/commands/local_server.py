"""What the web servers of this package share: one machine, few people, requests of bounded size.

Pages of other origins are kept out: their requests carry another Origin, and a name of theirs that
is made to point here (DNS rebinding) is no name of this machine.
"""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import json
import socket
import socketserver
import sys
import urllib.parse
from collections.abc import Mapping
from typing import Any

_SECONDS = 30  # without a byte, after which a connection is closed
_MAX_UNREAD = 1 << 28  # bytes of a refused request that are taken, so that the sentence arrives
_BLOCK = 1 << 16


def is_local(host: str) -> bool:
  """Whether only this machine reaches a server that listens at that name or address."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def warn_if_open(host: str) -> None:
  """Tells on standard error who else can use a server that listens there."""
  if not is_local(host):
    print(f"lmops: warning: everybody who reaches {host} can use this model; there is no password.",
          file=sys.stderr)


class LocalServer(socketserver.ThreadingTCPServer):
  """Listens from the moment it is made, with a thread for each connection.

  Attributes:
    address: for a client on this machine.
    names: by which requests may ask for it, beside addresses.
  """

  allow_reuse_address = True
  daemon_threads = False  # one that writes or computes while the interpreter ends aborts it

  def __init__(self, host: str, port: int, handler: type[LocalHandler]):
    """
    Args:
      host: name or address of this machine to listen at.
      port: 0 takes a free one.
      handler: of a connection.

    Raises:
      ValueError: there is no such address, or it is taken.
    """
    self._open: set[socket.socket] = set()
    self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
      super().__init__((host, port), handler)
    except (OSError, OverflowError) as error:
      raise ValueError(
        f"--host {host} --port {port} cannot be listened at ({getattr(error, 'strerror', error)}); "
        "take another port, 0 for a free one, or an address of this machine."
      ) from error
    shown = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)
    self.address = f"http://{shown}:{self.server_address[1]}"
    self.names = {"localhost", host.lower(), socket.gethostname().lower()}

  def process_request(self, request, client_address) -> None:
    """Hands a connection to a thread of its own."""
    self._open.add(request)
    super().process_request(request, client_address)

  def shutdown_request(self, request) -> None:
    """Ends a connection."""
    self._open.discard(request)
    super().shutdown_request(request)

  def server_close(self) -> None:
    """Ends: nothing more is read, and what is under way is answered before this returns."""
    for connection in list(self._open):
      with contextlib.suppress(OSError):  # its other side went away
        connection.shutdown(socket.SHUT_RD)
    super().server_close()  # waits for the threads

  def handle_error(self, request, client_address) -> None:
    """Tells what went wrong in a connection, unless the other side went away."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


class Refused(Exception):
  """What is answered instead: a status, and a sentence."""

  def __init__(self, status: int, sentence: str):
    super().__init__(sentence)
    self.status = status


class LocalHandler(http.server.BaseHTTPRequestHandler):
  """Checks and answers of one request; the connection ends behind it.

  Attributes:
    headers_of_all: that every answer has.
  """

  server: LocalServer
  timeout = _SECONDS
  server_version, sys_version = "lmops", ""
  headers_of_all: Mapping[str, str] = {}

  def check_host(self) -> None:
    """Raises Refused if the request asks for a name that this machine does not have."""
    try:
      name = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
      known = name in self.server.names or bool(ipaddress.ip_address(name.partition("%")[0]))
    except ValueError:
      known = False
    if not known:
      raise Refused(
        403, "the server was asked for by a name that this machine does not have; open it by the "
        "address that its terminal shows, or start it with that name as --host.")

  def check_origin(self) -> None:
    """Raises Refused if another site's page asks."""
    self.check_host()
    origin = self.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != self.headers.get("Host"):
      raise Refused(403, "the request comes from another site, which may not use this server.")

  def check_json(self) -> None:
    """Raises Refused if the request is not sent as JSON."""
    if self.headers.get_content_type() != "application/json":
      raise Refused(415, "the request is not JSON; send it as application/json.")

  def length(self) -> int:
    """How many bytes the request says that it has; raises Refused if it does not say."""
    length = self.headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 20):
      raise Refused(411, "the request does not say how long it is; send a Content-Length.")
    return int(length)

  def body(self, length: int) -> bytes:
    """The request's bytes; raises Refused if there are fewer."""
    body = self.rfile.read(length)
    if len(body) < length:
      raise Refused(400, "the request is cut off; send it again.")
    return body

  def drop(self, num_bytes: int) -> None:
    """Takes what was refused unread: a browser shows no answer to what it could not send."""
    left = num_bytes if num_bytes <= _MAX_UNREAD else 0
    while left > 0 and (block := self.rfile.read(min(left, _BLOCK))):
      left -= len(block)

  def begin(self, status: int, content_type: str, **more: str) -> None:
    """Sends the status and the headers."""
    self.send_response(status)
    for name, value in ({**self.headers_of_all, "Content-Type": content_type} | more).items():
      self.send_header(name, value)
    self.end_headers()

  def send(self, status: int, content_type: str, content: bytes, **more: str) -> None:
    """Sends a whole answer."""
    self.begin(status, content_type, **{"Content-Length": str(len(content))} | more)
    self.wfile.write(content)

  def send_json(self, status: int, value: Mapping[str, Any], **more: str) -> None:
    """Sends a whole answer in JSON."""
    self.send(status, "application/json", json.dumps(value).encode(), **more)

  def tell(self, what: str) -> None:
    """A line on standard error about who asks."""
    print(f"lmops: {self.client_address[0]} {what}", file=sys.stderr, flush=True)

  def log_message(self, format: str, *args: Any) -> None:
    """Keeps quiet: answers have lines of their own, which hold nothing that a client sent."""
