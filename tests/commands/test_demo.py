"""`lmops demo`: the server with a toy behind it, and the demo of Kosmos on a tiny model."""

import argparse
import base64
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from lmops_jax import cli
from lmops_jax.commands import local_server
from lmops_jax.commands.demo import command, server
from lmops_jax.commands.demo import kosmos as kosmos_demo
from lmops_jax.commands.demo.kosmos import KosmosDemo, pieces
from lmops_jax.data.boxes import Entity, Grounded, extract, grounding_words
from tests import model_folders
from tests.commands import demos
from tests.commands.demos import LINES, ask, get, lines, serving

SIDE = 4


def raw(at, text):
  """What the server says to bytes after which no more come."""
  with socket.create_connection(at.server_address) as connection:
    connection.sendall(text.replace("\n", "\r\n").encode())
    connection.shutdown(socket.SHUT_WR)
    return connection.makefile("rb").read().decode()


# ---------------------------------------------------------------------------------- the server


class Toy:
  """Answers with what it was asked, unless that is the name of an error; writes nothing before."""

  max_request_bytes = 10_000
  pages = {"/": server.Page("text/plain", b"the page")}

  def facts(self):
    return {"name": "toy"}

  def answer(self, request, write=None):
    if request == "refuse":
      raise ValueError("one\nsentence.")
    if request == "break":
      raise RuntimeError("secret")
    return {"asked": request}


@pytest.fixture(scope="module")
def toy():
  with serving(Toy()) as found:
    yield found


def test_pages_and_facts_come_with_headers_that_keep_others_out(toy):
  status, headers, content = get(toy, "/?x=1")
  assert (status, content, headers["Content-Type"]) == (200, b"the page", "text/plain")
  assert "default-src 'none'" in headers["Content-Security-Policy"]
  assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
  assert headers["X-Content-Type-Options"] == "nosniff"
  assert json.loads(get(toy, "/facts")[2]) == {"name": "toy"}
  for path in ("/kosmos.py", "/../server.py", "/%2e%2e/server.py", "//etc/passwd", "/pages/"):
    assert get(toy, path)[0] == 404


def test_answers_come_one_at_a_time_and_errors_end_nothing(toy, capfd):
  held = []
  demo, toy.demo = toy.demo, Toy()
  toy.demo.answer = lambda request: held.append(toy.turn.locked()) or demo.answer(request)
  assert ask(toy, {"a": "ä"}) == (200, {"asked": {"a": "ä"}})
  assert held == [True] and not toy.turn.locked()
  toy.demo = demo
  assert ask(toy, "refuse") == (400, {"error": "one sentence."})
  status, answer = ask(toy, "break")
  assert status == 500 and "RuntimeError" in answer["error"] and "secret" not in answer["error"]
  assert "secret" in capfd.readouterr().err  # the terminal's is told
  for _ in range(server.MAX_WAITING + 1):  # those before gave their places back
    assert ask(toy, 1) == (200, {"asked": 1})
  with contextlib.ExitStack() as places:
    for _ in range(server.MAX_WAITING):
      places.enter_context(toy.places)
    status, answer = ask(toy, 1)
    assert status == 503 and "8 requests wait already" in answer["error"]
  assert ask(toy, 1)[0] == 200


def test_lines_come_while_the_answer_is_made(toy, monkeypatch):
  """The answer goes on only when its first piece has arrived."""
  arrived, left = threading.Event(), []

  def answer(request, write):
    left.append(write("first\n"))
    assert arrived.wait(60)
    left.append(write(" second"))
    if request == "break":
      raise RuntimeError("secret")
    return {"asked": request}

  monkeypatch.setattr(toy, "demo", Toy())
  toy.demo.answer = answer
  for request, last in ((3, {"answer": {"asked": 3}}), ("break", None)):
    arrived.clear()
    connection = http.client.HTTPConnection(*toy.server_address)
    connection.request(
      "POST", "/answer", json.dumps(request), {"Content-Type": "application/json"} | LINES)
    response = connection.getresponse()
    assert response.status == 200 and response.headers["Content-Type"] == LINES["Accept"]
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert json.loads(response.readline()) == {"text": "first\n"}
    arrived.set()
    assert json.loads(response.readline()) == {"text": " second"}
    found = json.loads(response.readline())
    assert found == last if last else "RuntimeError" in found["error"]
    assert response.read() == b"" and left == [False, False]
    left.clear()
    connection.close()


def test_what_is_refused_before_a_line_has_its_status(toy):
  assert lines(toy, "refuse") == (400, [{"error": "one sentence."}])
  assert lines(toy, [1])[0] == 200


def test_a_text_that_nobody_reads_ends(toy, monkeypatch):
  ended, over = [], threading.Event()

  def answer(request, write):
    ended.append(next(i for i in range(100_000) if write("a" * 1000)))
    over.set()
    return {}

  monkeypatch.setattr(toy, "demo", Toy())
  toy.demo.answer = answer
  connection = http.client.HTTPConnection(*toy.server_address)
  connection.request("POST", "/answer", "1", {"Content-Type": "application/json"} | LINES)
  connection.getresponse().readline()
  connection.sock = connection.close()
  assert over.wait(60) and ended[0] < 100_000
  monkeypatch.undo()
  assert ask(toy, 1) == (200, {"asked": 1})


def test_a_request_waits_for_the_one_before(toy):
  toy.turn.acquire()
  found = []
  thread = threading.Thread(target=lambda: found.append(ask(toy, 2)))
  thread.start()
  assert get(toy, "/facts")[0] == 200  # pages do not wait
  assert not found
  toy.turn.release()
  thread.join()
  assert found == [(200, {"asked": 2})]


def test_closing_waits_for_the_answer_under_way_and_begins_no_other():
  """A thread that prints or computes while the interpreter ends would abort it."""
  begun, go_on, found = threading.Event(), threading.Event(), {}

  def answer(request):
    begun.set()
    assert go_on.wait(60)
    return {"asked": request}

  demo, before = Toy(), set(threading.enumerate())
  demo.answer = answer
  with serving(demo) as at, socket.create_connection(at.server_address) as idle:
    clients = [threading.Thread(target=lambda n=n: found.update({n: ask(at, n)})) for n in (1, 2)]
    clients[0].start()
    assert begun.wait(60)
    clients[1].start()
    while at.places._value > server.MAX_WAITING - 2:  # the second waits for its turn
      time.sleep(0.01)
    at.shutdown()
    closing = threading.Thread(target=at.server_close)
    closing.start()
    assert idle.recv(1) == b""  # who says nothing is not waited for
    assert closing.is_alive()
    go_on.set()
    for thread in (closing, *clients):
      thread.join()
  assert found == {1: (200, {"asked": 1}), 2: (503, {"error": "the demo has ended."})}
  assert set(threading.enumerate()) <= before  # some of an earlier test's may end meanwhile


@pytest.mark.parametrize("headers, status", [
  ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
  ({"Origin": "http://127.0.0.1:1"}, 403), ({"Host": "evil.example"}, 403), ({"Host": "["}, 403),
  ({"Host": ""}, 403), ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
  ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),  # a forwarded port
  ({"Host": "[::1]:8000", "Origin": "http://[::1]:8000"}, 200),
  ({"Host": "192.0.2.1:80"}, 200),
  ({"Content_Type": "text/plain"}, 415),  # what another site's form can send without asking
  ({"Content_Type": "application/json; charset=utf-8"}, 200),
])
def test_requests_of_other_sites_are_refused(toy, headers, status):
  found, answer = ask(toy, 1, **headers)
  assert found == status and ("error" in answer) == (status != 200)
  if "Host" in headers:
    assert get(toy, "/facts", Host=headers["Host"])[0] == status


def test_what_is_too_large_or_no_request_is_refused(toy):
  limit = Toy.max_request_bytes
  assert ask(toy, b'"' + b"a" * (limit - 2) + b'"')[0] == 200
  for size in (limit + 1, 5_000_000):  # sent in full, and the sentence still arrives
    status, answer = ask(toy, b'"' + b"a" * (size - 2) + b'"')
    assert status == 413 and f"{size:,} bytes, more than the 10,000" in answer["error"]
  head = "POST /answer HTTP/1.0\nHost: localhost\nContent-Type: application/json\n"
  for length in ("", "-1", "1e3", "²", "9" * 30):
    assert " 411 " in raw(toy, f"{head}Content-Length: {length}\n\n1")
  assert " 411 " in raw(toy, f"{head}Transfer-Encoding: chunked\n\n1\n1\n0\n\n")
  assert " 413 " in raw(toy, f"{head}Content-Length: {10**15}\n\n1")
  assert " 400 " in raw(toy, f"{head}Content-Length: 20\n\n1")
  for body in (b"{", b"\xff", b"", b"[" * 9000):
    status, answer = ask(toy, body)
    assert status == 400 and answer["error"].startswith("the request is"), answer
  assert ask(toy, 1, "/")[0] == ask(toy, 1, "/answers")[0] == 404
  assert ask(toy, 1)[0] == 200


def test_a_port_that_cannot_be_had_is_told(toy):
  for port in (toy.server_address[1], 99_999):
    with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port} cannot be listened at"):
      server.DemoServer("127.0.0.1", port)


@pytest.mark.parametrize("host, local", [
  ("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)])
def test_who_can_reach_an_address(host, local):
  assert local_server.is_local(host) == local


# ---------------------------------------------------------------------------------- Kosmos


def arguments(folder):
  parser = argparse.ArgumentParser()
  command.add_parsers(parser.add_subparsers(dest="command"), {})
  return parser.parse_args(["demo", "kosmos", "--model", str(folder)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return model_folders.write_docked(
    tmp_path_factory.mktemp("model"), max_length=96, words=grounding_words(SIDE))


@pytest.fixture(scope="module")
def kosmos(folder):
  with serving(KosmosDemo.load(arguments(folder))) as found:
    yield found


@pytest.fixture(scope="module")
def picture():
  """The contents of a picture of 40 x 20 pixels that is stored on its side."""
  exif, file = Image.Exif(), io.BytesIO()
  exif[0x0112] = 6  # turned by a quarter
  pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 3), np.uint8)
  Image.fromarray(pixels).save(file, "PNG", exif=exif)
  return file.getvalue()


def upload(data, name="a.png"):
  return {"name": name, "base64": base64.b64encode(data).decode()}


WHERE = {
  "prompt": "<grounding><phrase> the dog</phrase>", "search": "greedy", "grammar": True,
  "max_new_tokens": 16}


def test_the_page_asks_no_other_machine_and_has_all_it_needs(kosmos):
  imported, exported = demos.check_page(kosmos, "kosmos")
  assert imported == exported


def test_an_upload_is_answered_with_text_and_boxes(kosmos, picture):
  status, got = ask(kosmos, WHERE | {"picture": upload(picture)})
  assert status == 200, got
  assert got["prompt"] == WHERE["prompt"] and got["num_tokens"] <= 16 and got["seconds"] > 0
  assert (got["width"], got["height"]) == (40, 20)  # upright
  want = extract(got["prompt"] + got["written"], SIDE)
  assert [(e["name"], e["boxes"]) for e in got["entities"]] == [
    (entity.name, [*map(list, entity.boxes)]) for entity in want.entities]
  assert got["pieces"][0] == {"text": "the dog", "entity": 0}
  # The same picture is not encoded again; without grammar the model does not write a box at once.
  status, free = ask(kosmos, WHERE | {"picture": upload(picture, "b.png"), "grammar": False})
  assert status == 200 and kosmos.demo._encoder.num_encoded == 1
  assert free["written"] != got["written"]


def test_tags_are_held_back_until_they_are_known():
  written = []
  show = kosmos_demo._untagged(lambda text: written.append(text) or text == "end")
  told = [show(0, piece) for piece in ("a <phr", "ase> b", "</phrase><obj", "ect>", "c", "d <\n",
                                       "1 < 2", "end>", "end")]
  assert written == ["a ", " b", "c", "d <\n", "1 ", "end"] and told == [False] * 8 + [True]


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_the_continuation_comes_as_it_is_written(kosmos, picture, search):
  request = WHERE | {"picture": upload(picture), "search": search, "prompt": "<grounding> a",
                     "grammar": False, "num_beams": 2}
  status, plain = ask(kosmos, request)
  assert status == 200
  status, found = lines(kosmos, request)
  assert status == 200 and found[-1].keys() == {"answer"}
  assert found[-1]["answer"] | {"seconds": 0} == plain | {"seconds": 0}
  texts = [line["text"] for line in found[:-1]]
  assert len(texts) == 1 if search == "beams" else len(texts) > 1
  whole = "".join(piece["text"] for piece in plain["pieces"])
  assert whole.endswith("".join(texts).strip()) and "".join(texts).strip()
  assert "</phrase>" in plain["written"]  # which is left out
  assert lines(kosmos, request | {"prompt": "<image><image>"})[0] == 400


@pytest.mark.slow
@pytest.mark.parametrize("search, options", [
  ({}, ()), ({"search": "beams", "num_beams": 3}, ("--beams", "3")),
  ({"search": "sampling", "seed": 5}, ("--temperature", "0.7", "--top-p", "0.9", "--seed", "5"))])
def test_the_answer_is_that_of_lmops_generate(
  kosmos, folder, picture, tmp_path, capsys, search, options
):
  status, got = ask(kosmos, WHERE | {"picture": upload(picture)} | search)
  assert status == 200, got
  path = tmp_path / "a.png"
  path.write_bytes(picture)
  assert cli.main([
    "generate", "--model", str(folder), "--image", str(path), "--prompt", WHERE["prompt"],
    "--grammar", "--max-new-tokens", "16", "--no-repeat-ngram", "3", "--json", *options]) == 0
  want = json.loads(capsys.readouterr().out)
  assert "".join(piece["text"] for piece in got["pieces"]) == want["caption"]
  assert got["entities"] == [
    {"name": entity["name"], "boxes": entity["boxes"]} for entity in want["entities"]]
  assert got["entities"] and got["num_tokens"] == len(want["ids"])
  assert got["is_whole"] == (want["finish_reason"] != "length")


@pytest.mark.parametrize("change, message", [
  ({"picture": upload(b"", "x.png")}, "x.png is empty, not a picture"),
  ({"picture": upload(b"no picture", "<b>\x1b[1m" + "x" * 200)}, "is not a picture in a format"),
  ({"picture": "half"}, "is cut off or damaged"),
  ({"picture": {"name": "x", "base64": "é"}}, "x did not arrive as base64"),
  ({"picture": {"name": "x", "base64": "AAA"}}, "x did not arrive as base64"),
  ({"picture": {"name": "x"}}, "the request has no field 'picture.base64'"),
  ({"prompt": "<image><image>"}, "the prompt has 1 pictures and its text 2 places"),
  ({"prompt": "a" * 80}, "the prompt has 87 tokens and decoding.GenerationOptions.max_new_tokens="
   "16 more, and the model's context is 96 tokens; shorten the prompt"),
  ({"prompt": "a" * 30_000}, "the request: prompt="),
  ({"prompt": "\ud800"}, "the request: prompt="),
  ({"max_new_tokens": 90}, "ask for fewer new tokens"),
  ({"max_new_tokens": True}, "the request: max_new_tokens=true should be"),
  ({"search": "best"}, 'the request: search="best" should be'),
  ({"search": "beams", "num_beams": 99}, "the request: num_beams=99 should be"),
  ({"search": "sampling", "temperature": float("nan")}, "the request: temperature="),
  ({"path": "/etc/passwd"}, "the request: path="),
])
def test_what_is_wrong_is_told_in_a_sentence(kosmos, picture, monkeypatch, change, message):
  def generated(*_, **__):
    raise AssertionError("the model is run")

  monkeypatch.setattr(kosmos.demo._generator, "generate", generated)
  request = WHERE | {"picture": upload(picture)} | change
  if request["picture"] == "half":
    request["picture"] = upload(picture[: len(picture) // 2])
  status, answer = ask(kosmos, request)
  assert status == 400 and message in answer["error"] and "\n" not in answer["error"], answer
  assert len(answer["error"]) < 400
  assert get(kosmos, "/")[0] == 200


def test_a_picture_larger_than_the_demo_takes_is_refused(kosmos, picture, monkeypatch):
  largest = len(upload(b"0" * kosmos_demo.MAX_PICTURE_BYTES)["base64"])
  assert kosmos.demo.max_request_bytes > largest + 6 * 20_000 + 1000  # escaped prompt and numbers
  monkeypatch.setattr(kosmos_demo, "MAX_PICTURE_BYTES", len(picture) - 1)
  status, answer = ask(kosmos, WHERE | {"picture": upload(picture)})
  assert status == 400 and f"a.png has {len(picture):,} bytes, more than the" in answer["error"]


def test_a_model_of_texts_says_that_it_reads_no_pictures(picture, tmp_path):
  demo = KosmosDemo.load(arguments(model_folders.write(tmp_path)))
  facts = demo.facts()
  assert (facts["sees"], facts["grounds"]) == (False, False)
  request = {"prompt": "a", "picture": upload(picture)}
  with pytest.raises(ValueError, match="the prompt has the picture a.png, and .* reads texts only"):
    demo.answer(request)
  with pytest.raises(ValueError, match="the vocabulary has no word <phrase>"):
    demo.answer({"prompt": "a", "grammar": True})


@pytest.mark.parametrize("grounded", [
  extract("a 🐕<phrase> dog</phrase><object><patch_index_0001><patch_index_0009></object> and"
          "<object><patch_index_0001><patch_index_0009></object> .", SIDE),
  extract(" <object><patch_index_0001><patch_index_0009></object> word", SIDE),
  Grounded("no entity", ()), Grounded("", (Entity("x", -2, -2, ((0, 0, 1, 1),)),)),
])
def test_pieces_are_the_text_and_mark_each_entity_once(grounded):
  found = pieces(grounded)
  assert "".join(piece["text"] for piece in found) == grounded.text
  marked = [piece for piece in found if piece["entity"] is not None]
  assert [piece["entity"] for piece in marked] == [*range(len(grounded.entities))]
  for piece, entity in zip(marked, grounded.entities):
    assert piece["text"] == ("" if entity.start == entity.end else entity.name)


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(folder):
  lmops = [sys.executable, "-m", "lmops_jax.cli"]
  process = subprocess.Popen(
    [*lmops, "demo", "kosmos", "--model", str(folder), "--port", "0"],
    stderr=subprocess.PIPE, text=True)
  line = next(line for line in process.stderr if line.startswith("lmops: http"))
  port = int(re.search(r"http://127\.0\.0\.1:(\d+) shows", line)[1])
  connection = http.client.HTTPConnection("127.0.0.1", port)
  connection.request("GET", "/facts")
  assert json.loads(connection.getresponse().read())["family"] == "kosmos-2"
  connection = http.client.HTTPConnection("127.0.0.1", port)
  connection.request("POST", "/answer", json.dumps(WHERE), {"Content-Type": "application/json"})
  assert "is being answered" in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  said = process.stderr.read()
  assert "lmops: the demo ends, once" in said
  assert process.wait() == 0, said  # jax's work was not torn apart
  connection.close()


@pytest.fixture(scope="module")
def browser():
  with demos.browser() as found:
    yield found


@pytest.mark.slow
def test_a_browser_shows_phrases_and_boxes_in_the_same_colours(kosmos, picture, browser):
  page = browser.new_page(viewport={"width": 360, "height": 700})
  asked, broken, answers = [], [], []
  page.on("request", lambda request: asked.append(request.url))
  page.on("pageerror", lambda error: broken.append(error))
  page.on("response", lambda r: answers.append(r) if r.url.endswith("/answer") else None)
  page.goto(kosmos.address)
  page.click("text=Where is")
  page.check("[name=grammar]")
  page.check("text=Greedy")
  page.fill("[name=max_new_tokens]", "16")
  page.evaluate("""() => {
    window.seen = [];
    const written = document.getElementById("written");
    new MutationObserver(() => window.seen.push(written.textContent)).observe(
      written, {childList: true});
  }""")

  page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no"})
  page.keyboard.press("Enter")
  page.click("#go")
  page.wait_for_selector("#error:not([hidden])")
  assert page.text_content("#error").startswith("x.png is not a picture")

  page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": picture})
  page.focus("#prompt")
  page.keyboard.press("Control+Enter")
  page.wait_for_selector("#answer:not([hidden])", timeout=120_000)
  assert page.is_hidden("#error")
  for image in ("#preview", "#shown"):
    assert page.evaluate("i => document.querySelector(i).naturalWidth", image) == 40
  page.click("#remove")
  assert page.is_hidden("#preview") and page.is_visible("#shown") and page.is_visible("#hint")
  assert answers[-1].headers["content-type"] == LINES["Accept"]
  status, want = ask(kosmos, answers[-1].request.post_data_json)
  assert status == 200
  # What was written was shown meanwhile, and went away for the answer.
  *seen, last = page.evaluate("window.seen")
  assert seen and last == "" == page.text_content("#written")
  assert all(later.startswith(text) for text, later in zip(seen, seen[1:]))
  boxes = want["entities"][0]["boxes"]
  assert page.text_content("#caption") == "".join(piece["text"] for piece in want["pieces"])
  stage = page.query_selector("#stage").bounding_box()
  assert stage["width"] == pytest.approx(2 * stage["height"], abs=1)  # 40 x 20, upright
  drawn = page.query_selector_all(".box.c0")
  assert len(drawn) == len(boxes)
  for element, (left, top, right, bottom) in zip(drawn, boxes):
    found = element.bounding_box()
    got = [found["x"] - stage["x"], found["y"] - stage["y"], found["width"], found["height"]]
    wanted = np.array([left, top, right - left, bottom - top]) * np.array(
      [stage["width"], stage["height"]] * 2)
    np.testing.assert_allclose(got, wanted, atol=1)
  assert page.evaluate(
    "getComputedStyle(document.querySelector('.box.c0'), '::before').borderTopColor") == (
    page.evaluate("getComputedStyle(document.querySelector('.phrase.c0')).borderBottomColor"))

  def lit():
    return len(page.query_selector_all(".box.on"))

  page.mouse.move(0, 0)
  assert lit() == 0
  page.hover(".phrase.c0")
  assert lit() == len(boxes)
  page.mouse.move(0, 0)
  assert lit() == 0
  page.focus(".phrase.c0")
  page.keyboard.press("Enter")
  page.focus("#prompt")
  assert lit() == len(boxes) and page.get_attribute(".phrase.c0", "aria-pressed") == "true"
  page.keyboard.press("Escape")
  assert lit() == 0
  assert page.evaluate("document.documentElement.scrollWidth") == 360
  assert not broken
  assert all(url.startswith((kosmos.address, "data:", "blob:")) for url in asked)
