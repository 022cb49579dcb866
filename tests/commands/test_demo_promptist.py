"""The demo of Promptist on a tiny policy and a tiny model that draws."""

import argparse
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from lmops_jax import cli
from lmops_jax.commands.demo import command
from lmops_jax.decoding.diffusion.imagine import Imagined, image_keys
from lmops_jax.text.clip import clip_texts
from lmops_jax.text.tokenizer import load_tokenizer
from tests.commands import demos
from tests.commands.demos import ask, get, lines, serving
from tests.decoding.diffusion import tiny_models
from tests.systems.promptist import tiny_gpt2

REQUEST = {"prompt": "a cat", "max_new_tokens": 6, "num_rewrites": 2, "steps": 2, "seed": 3}


def arguments(*words):
  parser = argparse.ArgumentParser()
  command.add_parsers(parser.add_subparsers(dest="command"), {})
  return parser.parse_args(["demo", *map(str, words)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Of the policy, and of the model that draws."""
  policy = tiny_gpt2.write(tmp_path_factory.mktemp("policy") / "gpt2", max_length=160)
  return policy, tiny_models.write(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def promptist(folders):
  policy, sd = folders
  loaded = command._load(
    arguments("promptist", "--model", policy, "--images", sd, "--size", "8x16"))
  with serving(loaded) as found:
    yield found


def pixels(picture):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"]))))


def test_the_page_asks_no_other_machine_and_has_all_it_needs(promptist):
  imported, exported = demos.check_page(promptist, "promptist")
  assert imported <= exported
  facts = json.loads(get(promptist, "/facts")[2])
  assert facts["draws"] == {"model": "model", "height": 8, "width": 16}
  assert facts["family"] == "gpt2" and facts["max_length"] == 160


def test_all_pictures_start_from_the_noise_of_the_users_prompt(promptist, folders):
  status, found = lines(promptist, REQUEST)
  assert status == 200 and found[-1].keys() == {"answer"}, found
  answer = found[-1]["answer"]
  all_of = [answer["prompt"], *answer["rewrites"]]
  texts = [one["text"] for one in all_of]
  distinct = list(dict.fromkeys(texts))
  assert texts[0] == "a cat" and len(texts) == 3 and len(distinct) >= 2
  # The prompts come first, and each picture is told of before it is there.
  told = [line["text"] for line in found[:-1]]
  num = len(distinct)
  assert told == ["".join(f"{text}\n" for text in distinct[1:]),
                  *(f"Picture {i + 1} of {num} is being drawn.\n" for i in range(num))]
  draws = promptist.demo._painter._imaginer(2, 7.5)
  read = clip_texts(load_tokenizer(folders[1] / "tokenizer"), ["", *texts], 24)
  key = image_keys(["a cat"], 1, 3)
  for tokens, cut, one in zip(read.tokens[1:], read.cut[1:], all_of):
    want = draws(tokens[None], key, read.tokens[0])
    np.testing.assert_array_equal(pixels(one["picture"]), want.images[0])
    assert one["picture"]["cut"] == cut
  assert not np.array_equal(pixels(all_of[0]["picture"]), pixels(all_of[1]["picture"]))
  assert draws.num_programs == 1
  # Without lines the same comes at once.
  status, plain = ask(promptist, REQUEST)
  assert status == 200 and plain | {"seconds": 0} == answer | {"seconds": 0}


class Draws:
  """Draws in place of the model: black, not finite, and remembers what it was asked for."""

  def __init__(self):
    self.tokens = []

  def __call__(self, tokens, keys, negative):
    self.tokens.append(tokens)
    return Imagined(np.zeros((1, 8, 16, 3), np.uint8), np.zeros(1, bool))


def test_what_is_cut_or_not_finite_is_told(promptist, monkeypatch):
  long = "A quick brown FOX and the lazy dog " * 3 + "Painted by N. Rosé"
  draws = Draws()
  monkeypatch.setattr(promptist.demo._painter, "_imaginer", lambda steps, guidance: draws)
  answer = promptist.demo.answer(REQUEST | {"prompt": long})
  cut = answer["prompt"]["picture"]["cut"]
  assert cut and long.endswith(cut) and answer["prompt"]["picture"]["png"] is None
  assert len(draws.tokens) == len({long, *(one["text"] for one in answer["rewrites"])})


def test_nothing_more_is_drawn_for_nobody(promptist, monkeypatch):
  draws, told = Draws(), []
  monkeypatch.setattr(promptist.demo._painter, "_imaginer", lambda steps, guidance: draws)
  answer = promptist.demo.answer(REQUEST, lambda text: told.append(text) or len(told) == 3)
  assert len(draws.tokens) == 1 and answer["prompt"]["picture"]
  assert [one["picture"] for one in answer["rewrites"]] == [None, None]


def test_without_a_model_that_draws_there_are_prompts_alone(promptist, folders, monkeypatch):
  monkeypatch.setattr(promptist.demo, "_painter", None)
  status, answer = ask(promptist, REQUEST)
  assert status == 200 and len(answer["rewrites"]) == 2
  assert answer["rewrites"][0]["score"] >= answer["rewrites"][1]["score"]
  assert all(one["picture"] is None for one in [answer["prompt"], *answer["rewrites"]])
  assert json.loads(get(promptist, "/facts")[2])["draws"] is None


@pytest.mark.parametrize("change, message", [
  ({"prompt": " "}, "the prompt is empty"),
  ({"prompt": "a\0"}, "the prompt holds a NUL"),
  ({"prompt": "\ud800"}, "the request: prompt="),
  ({"prompt": "a Rephrase: b"}, "the prompt holds the words 'Rephrase:'"),
  ({"prompt": "x" * 190}, "the prompt has 200 tokens, and the model's context is 160 tokens"),
  ({"prompt": "x" * 30_000}, "the request: prompt="),
  ({"num_rewrites": 5}, "the request: num_rewrites=5 should be"),
  ({"max_new_tokens": 0}, "the request: max_new_tokens=0 should be"),
  ({"steps": 101}, "the request: steps=101 should be"),
  ({"steps": 2.5}, "the request: steps=2.5 should be"),
  ({"guidance": 0.5}, "the request: guidance=0.5 should be"),
  ({"guidance": float("nan")}, "the request: guidance="),
  ({"seed": -1}, "the request: seed=-1 should be"),
  ({"path": "/etc/passwd"}, "the request: path="),
])
def test_what_is_wrong_is_told_in_a_sentence(promptist, monkeypatch, change, message):
  def draw(*_):
    raise AssertionError("a picture is drawn")

  monkeypatch.setattr(promptist.demo._painter, "draw", draw)
  status, answer = ask(promptist, REQUEST | change)
  assert status == 400 and message in answer["error"] and "\n" not in answer["error"], answer
  assert len(answer["error"]) < 400


@pytest.mark.parametrize("words, message", [
  (("promptist", "--images", "nowhere"), "nowhere"),
  (("promptist", "--images", "nowhere", "--size", "12"), "--size 12 has a side"),
  (("kosmos", "--images", "nowhere"), "--images is a model that draws for lmops demo promptist")])
def test_a_demo_that_cannot_be_shown_is_refused(folders, words, message):
  with pytest.raises(ValueError, match=message):
    command._load(arguments(*words, "--model", folders[0]))


@pytest.mark.slow
def test_the_answer_is_that_of_the_commands(promptist, folders, tmp_path, capsys):
  policy, sd = folders
  status, answer = ask(promptist, REQUEST)
  assert status == 200
  assert cli.main([
    "promptist", "rewrite", "--model", str(policy), "--prompt", "a cat", "--return", "2",
    "--max-new-tokens", "6", "--json"]) == 0
  want = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [(one["text"], one["score"]) for one in answer["rewrites"]] == [
    (one["text"], one["score"]) for one in want]
  assert cli.main([
    "imagine", "--model", str(sd), "--prompt", "a cat", "--images", "1", "--seed", "3", "--steps",
    "2", "--size", "8x16", "--to", str(tmp_path / "to")]) == 0
  file, = (tmp_path / "to").glob("*.png")
  np.testing.assert_array_equal(pixels(answer["prompt"]["picture"]), np.asarray(Image.open(file)))


@pytest.fixture(scope="module")
def browser():
  with demos.browser() as found:
    yield found


@pytest.mark.slow
def test_a_browser_shows_prompts_and_pictures(promptist, browser):
  page = browser.new_page(viewport={"width": 360, "height": 700})
  asked, broken, answers = [], [], []
  page.on("request", lambda request: asked.append(request.url))
  page.on("pageerror", lambda error: broken.append(error))
  page.on("response", lambda r: answers.append(r) if r.url.endswith("/answer") else None)
  page.goto(promptist.address)
  page.wait_for_selector("text=model draws pictures of 8 × 16 pixels")
  for name, value in (("steps", "2"), ("seed", "3"), ("max_new_tokens", "6")):
    page.fill(f"[name={name}]", value)
  page.evaluate("""() => {
    window.seen = [];
    const written = document.getElementById("written");
    new MutationObserver(() => window.seen.push(written.textContent)).observe(
      written, {childList: true});
  }""")

  page.fill("[name=guidance]", "99")  # which the browser itself refuses
  page.fill("#prompt", "a cat")
  page.click("#go")
  assert not answers and page.evaluate("!document.querySelector('[name=guidance]').validity.valid")
  page.fill("[name=guidance]", "7.5")
  page.fill("#prompt", " ")
  page.click("#go")
  page.wait_for_selector("#error:not([hidden])")
  assert page.text_content("#error").startswith("the prompt is empty")

  page.fill("#prompt", "a cat")
  page.keyboard.press("Control+Enter")
  page.wait_for_selector("#answer:not([hidden])", timeout=120_000)
  assert page.is_hidden("#error")
  status, want = ask(promptist, answers[-1].request.post_data_json)
  assert status == 200 and want["prompt"]["text"] == "a cat"
  shown = page.query_selector_all(".pair .prompt")
  assert [one.text_content() for one in shown] == ["a cat", want["rewrites"][0]["text"]]
  assert page.evaluate("[...document.querySelectorAll('.pair img')].map(i => i.naturalWidth)") == [
    16, 16]
  *seen, last = page.evaluate("window.seen")
  assert last == "" and any("Picture 2 of 2 is being drawn." in text for text in seen)
  assert page.evaluate("document.documentElement.scrollWidth") == 360

  page.set_viewport_size({"width": 1000, "height": 700})
  left, right = (image.bounding_box() for image in page.query_selector_all(".pair img"))
  assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
  assert not broken
  assert all(url.startswith((promptist.address, "data:", "blob:")) for url in asked)
