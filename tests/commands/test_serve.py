"""`lmops serve`: the protocol over a tiny model, as raw clients and the official one see it."""

import argparse
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from lmops_jax.commands import models
from lmops_jax.commands.serve import command, server
from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.serving import Batcher
from tests import model_folders

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return model_folders.write(tmp_path_factory.mktemp("models") / "tiny")


def parsed(folder, *more):
  parser = argparse.ArgumentParser()
  command.add_parsers(parser.add_subparsers(dest="command"), {})
  return parser.parse_args(["serve", "--model", str(folder), *more])


@pytest.fixture(scope="module")
def source(folder):
  return models.load(parsed(folder))[0]


@pytest.fixture(scope="module")
def generator(source):
  return Generator(source.model, source.params(), source.tokenizer())


@pytest.fixture(scope="module")
def at(source):
  """A server of four slots in a thread, at a port that is free."""
  tokenizer = source.tokenizer()
  batcher = Batcher(
    source.model, source.params(), tokenizer, num_slots=4, max_waiting=40, max_length=128)
  with server.ModelServer("127.0.0.1", 0) as found:
    thread = threading.Thread(target=found.serve, args=("tiny", tokenizer, batcher))
    thread.start()
    try:
      assert get(found, "/health")[0] == 200  # from here on it is complete
      yield found
    finally:
      found.shutdown()
      thread.join()


def get(at, path, **headers):
  connection = http.client.HTTPConnection(*at.server_address)
  connection.request("GET", path, headers=headers)
  with contextlib.closing(connection):
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def opened(at, request, path=CHAT, **headers):
  """The connection and the response to a request, whose bytes are sent as they are."""
  connection = http.client.HTTPConnection(*at.server_address)
  body = request if isinstance(request, bytes) else json.dumps(request).encode()
  headers = {"Content-Type": "application/json"} | {
    name.replace("_", "-"): value for name, value in headers.items()}
  connection.request("POST", path, body, headers)
  return connection, connection.getresponse()


def post(at, request, path=CHAT, **headers):
  connection, response = opened(at, request, path, **headers)
  with contextlib.closing(connection):
    return response.status, json.loads(response.read())


def events(at, request, path=CHAT):
  """The values of a stream, which ends as the protocol says."""
  connection, response = opened(at, request | {"stream": True}, path)
  with contextlib.closing(connection):
    assert response.headers["Content-Type"].startswith("text/event-stream")
    parts = response.read().decode().split("\n\n")
  assert parts[-2:] == ["data: [DONE]", ""] or "error" in json.loads(parts[-2][6:])
  assert all(part.startswith("data: ") for part in parts[:-1])
  return [json.loads(part[6:]) for part in parts[:-1] if part != "data: [DONE]"]


def chat(text="Hi", **more):
  return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 12} | more


def plain(prompt="ab", **more):
  return {"model": "tiny", "prompt": prompt, "max_tokens": 12} | more


def wanted(generator, text, num_new=12, row_id=0, stop=(), chat=True, **options):
  """What `Generator` makes of it."""
  text = f"[user] {text}\n[assistant] " if chat else text
  found, = generator.generate(
    [text], GenerationOptions(max_new_tokens=num_new, **options), stop, row_ids=[row_id],
    add_special=not chat, capacity=16)
  return found


def test_the_model_and_the_health_are_told(at):
  status, models = get(at, "/v1/models")
  assert status == 200 and [m["id"] for m in models["data"]] == ["tiny"]
  assert get(at, "/v1/models/tiny") == (200, models["data"][0])
  assert models["data"][0]["max_model_len"] == 128
  status, health = get(at, "/health")
  assert status == 200 and health == {"status": "ok", "running": 0, "waiting": 0, "slots": 4}
  for path in ("/", "/v1/models/other", "/v1/models/../../etc/passwd", "/etc/passwd", CHAT):
    status, answer = get(at, path)
    assert status == 404 and answer["error"]["code"] == "not_found"


def test_a_chat_is_what_the_generator_writes(at, generator):
  want = wanted(generator, "Hi")
  status, answer = post(at, chat(temperature=0))
  assert status == 200 and answer["object"] == "chat.completion"
  choice, = answer["choices"]
  assert choice["message"] == {"role": "assistant", "content": want.text}
  assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
  prompt = len("[user] Hi\n[assistant] ")
  assert answer["usage"] == {
    "prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
  parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
  assert post(at, chat(parts, temperature=0))[1]["choices"] == answer["choices"]
  same = chat(temperature=0, top_p=0.5, user="me", logit_bias={}, presence_penalty=0, stop=None,
              max_tokens=None, max_completion_tokens=12, frequency_penalty=0.0, tools=[])
  assert post(at, same)[1]["choices"] == answer["choices"]


def test_a_stream_has_the_same_text_and_counts(at, generator):
  request = chat(temperature=0.8, top_p=0.9, seed=7, stream_options={"include_usage": True}, n=2)
  whole = post(at, request)[1]
  first, second, *rest, usage = events(at, request)
  for index, opening in enumerate((first, second)):
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert opening["choices"][0]["index"] == index
  assert {part["object"] for part in (first, *rest, usage)} == {"chat.completion.chunk"}
  assert len({part["id"] for part in (first, *rest, usage)}) == 1
  for index, choice in enumerate(whole["choices"]):
    own = [p["choices"][0] for p in rest if p["choices"][0]["index"] == index]
    text = "".join(part["delta"].get("content", "") for part in own)
    want = wanted(generator, "Hi", row_id=index, temperature=0.8, top_p=0.9, seed=7)
    assert text == choice["message"]["content"] == want.text
    assert [p["finish_reason"] for p in own] == [None] * (len(own) - 1) + ["length"]
  assert usage["choices"] == [] and usage["usage"] == whole["usage"]
  assert whole["usage"]["completion_tokens"] == 24
  assert all(part["usage"] is None for part in (first, *rest))


def test_completions_of_texts_and_ids(at, generator):
  tokenizer = generator._tokenizer
  want = [wanted(generator, text, 5, chat=False) for text in ("ab", "xyz")]
  request = plain(["ab", "xyz"], temperature=0, max_tokens=5, logprobs=0)
  status, answer = post(at, request, PLAIN)
  assert status == 200 and answer["object"] == "text_completion"
  assert [choice["text"] for choice in answer["choices"]] == [found.text for found in want]
  assert answer["usage"]["prompt_tokens"] == len("ab") + len("xyz") + 2  # a BOS each
  for choice, found in zip(answer["choices"], want):
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(found.logprobs, abs=1e-4)
    assert len(choice["logprobs"]["tokens"]) == 5
  ids = [tokenizer.encode(text) for text in ("ab", "xyz")]
  for prompt, texts in ((ids, want), (ids[1], want[1:])):
    answer = post(at, request | {"prompt": prompt}, PLAIN)[1]
    assert [choice["text"] for choice in answer["choices"]] == [found.text for found in texts]
  del request["max_tokens"]
  assert post(at, request, PLAIN)[1]["usage"]["completion_tokens"] == 32  # two times sixteen
  streamed = events(at, plain(temperature=0, max_tokens=5), PLAIN)
  assert "".join(part["choices"][0]["text"] for part in streamed) == want[0].text


def test_log_probabilities_of_a_chat(at, generator):
  want = wanted(generator, "Hi")
  content = post(at, chat(temperature=0, logprobs=True))[1]["choices"][0]["logprobs"]["content"]
  assert [token["logprob"] for token in content] == pytest.approx(want.logprobs, abs=1e-4)
  parts = events(at, chat(temperature=0, logprobs=True))
  streamed = [token for part in parts for token in (part["choices"][0]["logprobs"] or {}).get(
    "content", [])]
  assert streamed == content


def test_stop_texts_cut_the_answer(at, generator):
  text = wanted(generator, "Hi").text
  stop = text[3:5]
  want = wanted(generator, "Hi", stop=(stop,))
  assert want.finish_reason == "stop"
  for given in (stop, ["not there", stop]):
    answer = post(at, chat(temperature=0, stop=given))[1]
    assert answer["choices"][0]["message"]["content"] == want.text == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(want.ids)


def test_without_seed_answers_differ_and_with_one_they_do_not(at):
  def texts(**more):
    answer = post(at, chat(n=4, max_tokens=20, **more))[1]
    return [choice["message"]["content"] for choice in answer["choices"]]

  assert texts(seed=1) == texts(seed=1) != texts(seed=2)
  assert len({*texts(), *texts()}) > 4


BAD = [
  (b"{", None, "not valid JSON"), (b"\xff", None, "not UTF-8"), (b"[1]", None, "an object"),
  (b"[" * 9000, None, "nested too deeply"),
  ({"messages": []}, "model", "no field 'model'"),
  (chat() | {"messages": []}, "messages", "messages"),
  (chat() | {"messages": [{"role": "user"}]}, "messages[0].content", "no field"),
  (chat() | {"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "one of"),
  (chat([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), None, "content"),
  (chat(temperature=-1), "temperature", "at least 0"), (chat(temperature=3), "temperature", "2"),
  (chat(temperature="1"), "temperature", "a finite number"),
  (chat(temperature=1e-60), "temperature", "no number in float32"),
  (chat(top_p=0), "top_p", "above 0"), (chat(n=0), "n", "at least 1"), (chat(n=17), "n", "16"),
  (chat(max_tokens=0), "max_tokens", "at least 1"), (chat(max_tokens=1.5), "max_tokens", "whole"),
  (chat(stop=["a"] * 5), "stop", "stop"), (chat(stop=""), "stop", "stop"),
  (chat(seed=-1), "seed", "at least 0"), (chat(stream="yes"), "stream", "true or false"),
  (chat(stream_options={"x": 1}), "stream_options.x", "stream_options.x"),
  (chat(logprobs=True, top_logprobs=5), "top_logprobs", "does nothing for"),
  (chat(tools=[{"type": "function"}]), "tools", "does nothing for"),
  (chat(response_format={"type": "json_object"}), "response_format", "does nothing for"),
  (chat(nonsense=1), "nonsense", "unknown field 'nonsense'"),
  (chat("a" * 120), "messages", "limit is 128 tokens"),
  (chat("\ud800"), "messages", "half a character"),
]
BAD_PLAIN = [
  (plain([]), "prompt", "prompt"), (plain([[]]), "prompt", "prompt"), (plain(3), "prompt", "text"),
  (plain([3, 999]), None, "token id 999"), (plain([3, -1]), None, "token id -1"),
  (plain("a" * 120), "prompt", "121 tokens and 12 more"), (plain(logprobs=3), "logprobs", "0"),
  (plain(echo=True), "echo", "does nothing for"), (plain(messages=[]), "messages", "unknown"),
]


@pytest.mark.parametrize("path, request_, param, words", [
  *((CHAT, *row) for row in BAD), *((PLAIN, *row) for row in BAD_PLAIN)])
def test_bad_requests_are_refused_in_the_form_of_the_protocol(at, path, request_, param, words):
  status, answer = post(at, request_, path)
  assert status == 400 and set(answer) == {"error"}
  error = answer["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["type"] == "invalid_request_error"
  assert words in error["message"] and "\n" not in error["message"]
  assert param is None or error["param"].startswith(param)


def test_other_refusals_have_their_status(at):
  status, answer = post(at, chat(model="../../etc"))
  assert status == 404 and answer["error"]["code"] == "model_not_found"
  assert answer["error"]["param"] == "model"
  assert post(at, chat(), "/v1/embeddings")[0] == 404
  assert post(at, chat(), Content_Type="text/plain")[0] == 415
  for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
    status, answer = post(at, chat(), **headers)
    assert status == 403 and answer["error"]["type"] == "permission_error"
  assert get(at, "/v1/models", Host="evil.example")[0] == 403
  too_long = chat("a" * 120)["messages"]
  answer = post(at, chat(messages=too_long))[1]
  assert answer["error"]["code"] == "context_length_exceeded"


def test_what_is_no_request_is_refused_in_the_same_form(at):
  for text in (f"PUT {CHAT} HTTP/1.0", "GET / HTTP/9.9", "a b c d"):
    with socket.create_connection(at.server_address) as connection:
      connection.sendall(f"{text}\r\nHost: localhost\r\n\r\n".encode())
      head, _, body = connection.makefile("rb").read().decode().rpartition("\r\n\r\n")
    assert " 400 " in head or not text.startswith("PUT")  # HTTP of no version has no head
    assert "no GET or POST" in json.loads(body)["error"]["message"]


def test_requests_have_a_bounded_size(at):
  for size in (server.MAX_REQUEST_BYTES + 1, 9_000_000):  # sent in full, and the answer arrives
    status, answer = post(at, b" " * size)
    assert status == 413 and f"{size:,} bytes" in answer["error"]["message"]
  for length, status in ((10**15, 413), ("-1", 411), ("", 411), (20, 400)):
    with socket.create_connection(at.server_address) as connection:
      connection.sendall((
        f"POST {CHAT} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n1").encode())
      connection.shutdown(socket.SHUT_WR)
      assert f" {status} " in connection.makefile("rb").read().decode().splitlines()[0]


def test_beyond_the_queue_comes_429(at, monkeypatch):
  monkeypatch.setattr(at.batcher, "max_waiting", 1)
  connection, response = opened(at, chat(n=6))
  with contextlib.closing(connection):
    answer = json.loads(response.read())
  assert response.status == 429 and response.headers["Retry-After"] == "1"
  assert answer["error"]["type"] == "rate_limit_error"
  assert answer["error"]["code"] == "rate_limit_exceeded"
  assert post(at, chat(n=5))[0] == 200
  monkeypatch.setattr(at, "places", threading.BoundedSemaphore(1))
  with at.places:
    assert post(at, chat())[0] == 429
  assert post(at, chat())[0] == 200


def test_a_failing_model_is_told_and_the_next_request_succeeds(at, monkeypatch, capfd):
  def fail(*args):
    raise RuntimeError("secret")

  with monkeypatch.context() as patched:
    patched.setattr(at.batcher, "_step", fail)
    status, answer = post(at, chat())
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert "RuntimeError" in answer["error"]["message"]
    assert "secret" not in answer["error"]["message"]
    last = events(at, chat())[-1]
    assert last["error"]["type"] == "server_error"
  assert "secret" in capfd.readouterr().err
  assert post(at, chat())[0] == 200


def test_many_clients_at_once_on_four_slots(at, generator):
  texts = [f"say {i % 8}" for i in range(32)]
  want = {text: wanted(generator, text).text for text in set(texts)}
  found = [None] * len(texts)

  def ask(i):
    found[i] = post(at, chat(texts[i], temperature=0))

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for text, (status, answer) in zip(texts, found):
    assert status == 200 and answer["choices"][0]["message"]["content"] == want[text]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(at, monkeypatch, stream):
  """The model waits at its fourth token until the server has seen that the client is gone."""
  gone, fourth, steps, step = threading.Event(), threading.Event(), [], at.batcher._advance

  def slow():
    steps.append(at.batcher._running[0].job)
    if len(steps) > 3:
      fourth.set()
      assert gone.wait(60) and steps[0].cancelled.wait(60)
    step()

  monkeypatch.setattr(at.batcher, "_advance", slow)
  body = json.dumps(chat(max_tokens=100, stream=stream)).encode()
  with socket.create_connection(at.server_address) as connection:
    connection.sendall((
      f"POST {CHAT} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      f"Content-Length: {len(body)}\r\n\r\n").encode() + body)
    if stream:
      assert b" 200 " in connection.recv(20)
    assert fourth.wait(60)
  gone.set()
  while get(at, "/health")[1]["running"]:
    pass
  assert len(steps) == 4
  monkeypatch.undo()
  assert post(at, chat())[0] == 200


def test_the_official_client(at, generator):
  openai = pytest.importorskip("openai")
  with openai.OpenAI(base_url=f"{at.address}/v1", api_key="none", max_retries=0) as client:
    assert [model.id for model in client.models.list()] == ["tiny"]
    request = chat(temperature=0)
    want = wanted(generator, "Hi").text
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == want and answer.usage.completion_tokens == 12
    parts = list(client.chat.completions.create(
      **request, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == want
    assert parts[-1].usage == answer.usage
    answer = client.completions.create(**plain(temperature=0, logprobs=0))
    assert answer.choices[0].text == wanted(generator, "ab", chat=False).text
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
      client.chat.completions.create(**request | {"model": "other"})
    with pytest.raises(openai.BadRequestError) as caught:
      client.chat.completions.create(**request | {"temperature": 3})
    assert caught.value.param == "temperature"


def test_what_the_command_line_refuses(folder, at):
  port = str(at.server_address[1])
  with pytest.raises(ValueError, match=f"--port {port} cannot be listened at"):
    command.run(parsed(folder, "--port", port))
  for option, sentence in (("--slots", "num_slots=0"), ("--max-length", "max_length=0")):
    with pytest.raises(ValueError, match=sentence):
      command.run(parsed(folder, "--port", "0", option, "0"))
  with pytest.raises(ValueError, match="divides a batch into 2 parts"):
    command.run(parsed(folder, "--port", "0", "--mesh", "data=2,tensor=4"))


@pytest.mark.parametrize("options, host", [((), "127.0.0.1"), (("--host", "0.0.0.0"), "0.0.0.0")])
def test_it_listens_to_this_machine_alone_unless_told(folder, monkeypatch, capsys, options, host):
  listening = []
  monkeypatch.setattr(
    server.ModelServer, "serve", lambda self, *unused: listening.append(self.server_address[0]))
  command.run(parsed(folder, "--port", "0", *options))
  assert listening == [host]
  assert ("everybody who reaches 0.0.0.0 can use this model" in capsys.readouterr().err) == (
    host == "0.0.0.0")


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(folder):
  process = subprocess.Popen(
    [sys.executable, "-m", "lmops_jax.cli", "serve", "--model", str(folder), "--port", "0"],
    stderr=subprocess.PIPE, text=True)
  line = next(line for line in process.stderr if "serves" in line)
  host, port = re.search(r"http://([\d.]+):(\d+)/v1 serves tiny", line).groups()
  at = argparse.Namespace(server_address=(host, int(port)))
  assert post(at, chat(temperature=0))[0] == 200
  process.send_signal(signal.SIGINT)
  said = process.stderr.read()
  assert "the server has ended" in said
  assert process.wait() == 0, said
