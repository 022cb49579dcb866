"""The HTTP backend against a local server: retries, errors, streaming, and a key that never leaks.
"""

import http.server
import json
import threading
import traceback

import pytest

from lmops_jax.systems.socratic import BackendError, Cast, Limits, export, runs
from lmops_jax.systems.socratic import http_backend as http_lib
from lmops_jax.systems.socratic.backends import Place, Sampling, WindowExceeded

pytest.importorskip("httpx2")
KEY = "sk-very-secret-0123456789"
MESSAGES = (("system", "You are."), ("user", "Say é."))


def _event(content=None, finish=None, **more):
  choices = [{"delta": {"content": content} if content else {}, "finish_reason": finish}]
  return "data: " + json.dumps({"choices": choices, "model": "served", **more}) + "\n\n"


GOOD = _event("Hel") + _event("lo é") + _event(finish="stop") + (
  'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
  "data: [DONE]\n\n")


class Stub:
  """A server that gives prepared answers: (status, headers, body) or a text of events."""

  def __init__(self):
    self.answers, self.requests = [], []
    stub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        stub.requests.append((self.path, dict(self.headers), json.loads(body)))
        answer = stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0]
        if answer == "hang":
          stub.released.wait(20)
          return
        status, headers, text = answer if isinstance(answer, tuple) else (
          200, {"Content-Type": "text/event-stream; charset=utf-8"}, answer)
        self.send_response(status)
        for name, value in headers.items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

      def log_message(self, *unused):
        pass

    self.released = threading.Event()
    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
    self.thread.start()
    self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

  def close(self):
    self.released.set()
    self.server.shutdown()
    self.server.server_close()


@pytest.fixture
def stub(monkeypatch):
  monkeypatch.setenv("STUB_KEY", KEY)
  made = Stub()
  yield made
  made.close()


def backend(stub, waits=None, **options):
  waits = [] if waits is None else waits
  return http_lib.Http(stub.address, "m", key_env="STUB_KEY", sleep=waits.append, **options)


def complete(made, stream=None):
  return made.complete(MESSAGES, Sampling(50, 0.5, 0.9, 4), Place("0", "DED", 1), stream)


def test_a_streamed_reply(stub):
  stub.answers = [GOOD]
  pieces = []
  reply = complete(backend(stub), pieces.append)
  assert pieces == ["Hel", "lo é"] and reply.text == "Hello é" and reply.finish == "stop"
  assert (reply.usage.prompt, reply.usage.reply, reply.usage.estimated) == (7, 3, False)
  assert reply.model == "served"
  (path, headers, body), = stub.requests
  assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
  assert body == {
    "model": "m", "temperature": 0.5, "top_p": 0.9, "max_tokens": 50, "seed": 4, "stream": True,
    "stream_options": {"include_usage": True},
    "messages": [{"role": "system", "content": "You are."}, {"role": "user", "content": "Say é."}]}


def test_a_server_that_does_not_stream(stub):
  stub.answers = [(200, {"Content-Type": "application/json"}, json.dumps(
    {"choices": [{"message": {"content": "hi"}, "finish_reason": "length"}]}))]
  reply = complete(backend(stub))
  assert (reply.text, reply.finish, reply.usage.estimated) == ("hi", "length", True)


def test_failures_are_tried_again_and_waits_grow_but_for_what_the_server_says(stub):
  waits = []
  stub.answers = [
    (429, {"Retry-After": "7"}, "slow down"), (500, {}, ""), (503, {"Retry-After": "900"}, ""),
    _event("broken off"), 'data: {"choices": [{"del\n\n', GOOD]
  assert complete(backend(stub, waits)).text == "Hello é"
  assert waits[0] == 7 and waits[2] == 60 and len(waits) == 5
  assert 1 <= waits[1] <= 3 and 4 <= waits[3] <= 12 and 8 <= waits[4] <= 24


def test_tries_are_bounded(stub):
  stub.answers = [(500, {}, f"echo {KEY}")]
  with pytest.raises(BackendError, match="no reply in 6 tries .*status 500") as caught:
    complete(backend(stub))
  assert len(stub.requests) == 6
  assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_hangs_or_is_not_there(stub):
  stub.answers = ["hang", GOOD]
  assert complete(backend(stub, read_seconds=0.2)).text == "Hello é"
  stub.answers = [GOOD]
  gone = backend(stub)
  stub.close()
  with pytest.raises(BackendError, match="ConnectError"):
    complete(gone)


@pytest.mark.parametrize("status, body, kind, message", [
  (401, f"Incorrect key {KEY}", BackendError, "check the key in the environment variable STUB_KEY"),
  (403, "", BackendError, "status 403"), (404, "no such model", BackendError, "no such model"),
  (400, f"bad field {KEY}", BackendError, r"bad field \[key\]"),
  (400, '{"error": {"code": "context_length_exceeded"}}', WindowExceeded, "too long"),
])
def test_refusals_are_not_tried_again(stub, status, body, kind, message):
  stub.answers = [(status, {}, body)]
  with pytest.raises(kind, match=message) as caught:
    complete(backend(stub))
  assert len(stub.requests) == 1
  assert KEY not in "".join(traceback.format_exception(caught.value))


def test_redirects_are_not_followed(stub):
  stub.answers = [(307, {"Location": "http://127.0.0.1:9/"}, "")]
  with pytest.raises(BackendError, match="status 307"):
    complete(backend(stub))


def test_requests_per_minute(stub):
  stub.answers = [GOOD]
  waits, now = [], iter([0.0, 0.0, 1.0, 1.0])
  made = backend(stub, waits, requests_per_minute=30, clock=lambda: next(now))
  complete(made), complete(made)
  assert waits == [1.0]


def test_a_run_over_http_leaves_no_key_anywhere(stub, tmp_path):
  """Even if the server echoes it: the bytes of the log and of its exports are searched."""
  too_long = (400, {}, "maximum context length")
  said = "CONCLUSION: your key is " + KEY + "\nANSWER: 1"
  stub.answers = [too_long, GOOD.replace("Hel", "SOLVE "),
                  _event(said, "stop"), _event("VERDICT: OK", "stop")]
  model = backend(stub)
  plan = runs.Plan("P", Limits(), Cast(), {"kind": "http", "key_env": "STUB_KEY"})
  root = runs.run(tmp_path, plan, model).tree.root
  with runs.looked_at(tmp_path, model) as (outcome, journal):
    for name in ("page.html", "page.md", "page.json"):
      export.write(tmp_path / name, outcome, runs.texts_of(journal))
  assert root.state == "verified" and root.conclusion.text == "your key is [key]"
  assert root.attempts["ASSESS"] == 2  # built again after the server found it too long
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(files) > 3 and not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("endpoint, message", [
  ("http://example.com/v1", "uses http to the host example.com"),
  ("https://user:secret@example.com/v1", "holds a user, a password"),
  ("ftp://x", "no address"), ("https://x/v1?key=secret", "or a query"), ("", "no address"),
  ("http://127.0.0.1.example.com", "uses http to the host"),
])
def test_addresses_that_are_refused(endpoint, message):
  with pytest.raises(ValueError, match=message) as caught:
    http_lib.checked_endpoint(endpoint)
  assert "secret" not in str(caught.value)


def test_addresses_that_are_taken():
  for address in ("https://example.com/v1/", "http://localhost:80", "http://127.0.0.2",
                  "http://[::1]:8"):
    assert http_lib.checked_endpoint(address) == address.rstrip("/")


def test_a_missing_key_names_the_variable(monkeypatch):
  monkeypatch.delenv("STUB_KEY", raising=False)
  with pytest.raises(ValueError, match="variable STUB_KEY holds no key"):
    http_lib.Http("https://example.com", "m", key_env="STUB_KEY")


def test_a_missing_library_names_the_extra(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "httpx2", None)
  with pytest.raises(ValueError, match=r"install lmops_jax\[socratic\]"):
    http_lib.Http("https://example.com", "m")
