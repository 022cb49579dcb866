"""Demos behind a server: asking them, and what all of their pages must have."""

import contextlib
import http.client
import json
import re
import shutil
import threading

import pytest

from lmops_jax.commands.demo import server

LINES = {"Accept": "application/x-ndjson"}


@contextlib.contextmanager
def serving(demo):
  """A server in a thread, at a port that is free."""
  with server.DemoServer("127.0.0.1", 0) as found:
    thread = threading.Thread(target=found.serve, args=(demo,))
    thread.start()
    try:
      yield found
    finally:
      found.shutdown()
      thread.join()


def get(at, path, **headers):
  """Status, headers and content."""
  connection = http.client.HTTPConnection(*at.server_address)
  connection.request("GET", path, headers=headers)
  response = connection.getresponse()
  with contextlib.closing(connection):
    return response.status, response.headers, response.read()


def ask(at, request, path="/answer", **headers):
  """Status and answer; a request of bytes is sent as it is."""
  connection = http.client.HTTPConnection(*at.server_address)
  headers = {"Content-Type": "application/json"} | {
    name.replace("_", "-"): value for name, value in headers.items()}
  body = request if isinstance(request, bytes) else json.dumps(request).encode()
  connection.request("POST", path, body, headers)
  response = connection.getresponse()
  with contextlib.closing(connection):
    return response.status, json.loads(response.read())


def lines(at, request):
  """Status, and a JSON value for each line."""
  connection = http.client.HTTPConnection(*at.server_address)
  headers = {"Content-Type": "application/json"} | LINES
  connection.request("POST", "/answer", json.dumps(request), headers)
  response = connection.getresponse()
  with contextlib.closing(connection):
    return response.status, [json.loads(line) for line in response.read().splitlines()]


def check_page(at, name):
  """Checks that a page asks no other machine and has all that its script needs.

  Returns:
    The names that its script imports, and those that the shared one exports.
  """
  page = get(at, "/")[2].decode()
  parts = re.findall(r'(?:src|href)="(/[^"]+)"', page)
  assert parts == ["/demo.css", f"/{name}.js"]
  script = get(at, f"/{name}.js")[2].decode()
  names, path = re.search(r'import {(.*)} from "(.*)";', script).groups()
  shared = get(at, path)[2].decode()
  kinds = [get(at, path)[1]["Content-Type"] for path in ("/", *parts, path)]
  assert [kind.partition(";")[0] for kind in kinds] == [
    "text/html", "text/css", "text/javascript", "text/javascript"]
  for text in (page, script, shared, get(at, "/demo.css")[2].decode()):
    assert not re.search(r"https?:|url\(|@import|[\"'`]//", text)
  ids = re.findall(r'\bid="([\w-]+)"', page)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'byId\("([\w-]+)"\)', script + shared)) <= set(ids)
  fields = set(re.findall(r'<input type="(?:number|radio|checkbox)" name="(\w+)"', page))
  assert fields == json.loads(get(at, "/facts")[2])["defaults"].keys()
  return set(names.split(", ")), set(re.findall(r"export (?:async )?function (\w+)", shared))


@contextlib.contextmanager
def browser():
  """A headless Chromium; skips where there is none."""
  playwright = pytest.importorskip("playwright.sync_api")
  names = ("chromium", "chromium-browser", "google-chrome")
  path = next(filter(None, map(shutil.which, names)), None)
  if path is None:
    pytest.skip(f"needs one of {', '.join(names)}")
  with playwright.sync_playwright() as found:
    opened = found.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
    yield opened
    opened.close()
