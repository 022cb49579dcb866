"""`lmops score` on tasks with pictures: open answers, names alone, ROC curves, shown prompts."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lmops_jax import cli
from lmops_jax.data.images import as_png
from lmops_jax.decoding import Generator, image_prompts
from lmops_jax.decoding.scoring import OptionScorer, total
from lmops_jax.decoding.text import Generation
from lmops_jax.evaluation.seeing import SeeingEncoder
from lmops_jax.pretrained import model as model_lib
from tests import model_folders

NAMES = ("cat", "cats", "do", "dog")  # some begin others


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(model_folders.write_docked(tmp_path_factory.mktemp("docked")))


def _picture(path, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(as_png(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)))


@pytest.fixture
def imagenet(tmp_path):
  """A picture of each of four classes."""
  lines = [f"n{i} {name}, other" for i, name in enumerate(NAMES)]
  (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines))
  for i in range(len(NAMES)):
    _picture(tmp_path / "val" / f"n{i}" / "a.png", i)
  return tmp_path


@pytest.fixture
def lmops(capsys):
  """Runs `lmops score`; gives what it writes to standard output and error."""
  def run(*arguments, fails=False):
    code = cli.main(["score", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code != 0) == fails, err
    return (out, err)

  return run


@pytest.fixture
def unread(monkeypatch):
  """Fails where the weights of a model are read."""
  def params(*_):
    raise AssertionError("the model is read")

  monkeypatch.setattr(model_lib.PretrainedModel, "params", params)


def _lines(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_alone_are_those_that_scoring_prefers(lmops, folder, imagenet):
  """As many beams as names are brute force over all of them, each with its end."""
  output = imagenet / "answers.jsonl"
  out, _ = lmops(
    "--model", folder, "--task", "imagenet", "--data", imagenet, "--only-names", "--beams",
    len(NAMES), "--length-penalty", 0, "--output", output)
  source = model_lib.load(folder)
  params, tokenizer, settings = source.params(), source.tokenizer(), source.image_settings()
  ids = image_prompts.image_tokens(tokenizer, source.config.vectors_per_image)
  encoder = SeeingEncoder(
    tokenizer, ids, image_prompts.PictureEncoder(source.model, params, settings), 64)
  scorer = OptionScorer(source.decoder, source.of_decoder(params))
  requests = [
    encoder.split("<image> The photo of the", [f" {name}</s>" for name in NAMES],
                  [str(imagenet / "val" / f"n{i}" / "a.png")]) for i in range(len(NAMES))]
  assert all(option[-1] == tokenizer.eos_id for r in requests for option in r.options)
  want = np.array([total(scores) for scores in scorer.score(requests)])
  assert np.diff(np.sort(want))[:, -1].min() > 1e-3  # else the test could not tell
  best = want.argmax(axis=1)
  got = _read(output)
  assert [row["answer"] for row in got] == [NAMES[i] for i in best]
  right = float(np.mean(best == np.arange(len(NAMES))))
  assert [row["answers"] for row in got] == [[name] for name in NAMES]
  assert out.startswith(f"exact_match {right:.4f} (standard error ")
  assert out.endswith("4 rows, 0 shots, 4 beams, of 4 names alone\n")


@pytest.fixture
def told(monkeypatch):
  """What is asked of the generator, which answers "cats" to everything."""
  asked = []

  def generate(self, texts, options, stop=(), *, constraint=None):
    asked.append((texts, options, stop, constraint))
    return [Generation(" cats ", [], [], "eos") for _ in texts]

  monkeypatch.setattr(Generator, "generate", generate)
  return asked


def test_names_are_open_answers_of_two_beams(lmops, folder, imagenet, told):
  base = ("--model", folder, "--task", "imagenet", "--data", imagenet)
  out, _ = lmops(*base)
  assert out.startswith("exact_match 0.2500 (standard error 0.2500), 4 rows, 0 shots, 2 beams\n")
  (prompts, options, stop, tree), = told
  assert (options.num_beams, options.max_new_tokens, stop, tree) == (2, 32, (), None)
  tokenizer = model_lib.load(folder).tokenizer()
  image = tokenizer.token_id("<image>")
  words = tokenizer.encode("The photo of the", False)
  block = [0] * 4  # slots
  for prompt in prompts:
    assert prompt.index[prompt.slots].tolist() == [0, 1, 2, 3]
    ids = [0 if slot else i for i, slot in zip(prompt.ids, prompt.slots)]
    assert ids == [0, image, *block, tokenizer.token_id("</image>"), *words]
  told.clear()
  lmops(*base, "--beams", 1, "--max-new-tokens", 3, "--stop", ".", "--limit", 2)
  (prompts, options, stop, _), = told
  assert (options.num_beams, options.max_new_tokens, stop, len(prompts)) == (1, 3, (".",), 2)


def test_answers_of_ones_own_rows_have_the_metric_that_is_asked_for(
  lmops, folder, tmp_path, told
):
  _picture(tmp_path / "a.png", 0)
  rows = _lines(
    tmp_path / "rows.jsonl", {"images": "a.png", "prompt": "It is", "answers": ["two cats"]},
    {"images": "a.png", "prompt": "Now", "answers": ["cats"]})
  base = ("--model", folder, "--task", rows, "--max-new-tokens", 4)
  assert lmops(*base)[0].startswith("exact_match 0.5000 (standard error 0.5000), 2 rows")
  out, _ = lmops(*base, "--metric", "f1", "--output", tmp_path / "o.jsonl")
  assert out.startswith("f1 0.8333") and out.endswith("0 shots, greedy\n")
  assert [row["score"] for row in _read(tmp_path / "o.jsonl")] == [pytest.approx(2 / 3), 1]


def test_demonstrations_without_room_are_left_out_and_told_of(lmops, folder, tmp_path, told):
  _picture(tmp_path / "a.png", 0)
  rows = _lines(tmp_path / "rows.jsonl", *(
    {"images": "a.png", "prompt": f"q{i}", "answer": "cats"} for i in range(7)))
  base = ("--model", folder, "--task", rows, "--max-new-tokens", 4)
  _, err = lmops(*base, "--shots", 5)
  # <s>, blocks of 6, "qN", " cats" and two line ends: four demonstrations have room in 61 tokens.
  assert err.count("\n") == 1 and err.startswith(
    "2 demonstrations in front of 2 rows, the first ones of each, had no room in the model's 64 p")
  (prompts, *_), = told
  assert [int(prompt.slots.sum()) for prompt in prompts] == [20, 20]
  kept = lmops(*base, "--shots", 5, "--show-prompts", 1)[0]
  shown = json.loads(kept)["prompt"].split("\n\n")[1:]  # without the first
  tokenizer = model_lib.load(folder).tokenizer()
  said = [i for i, slot in zip(prompts[0].ids, prompts[0].slots) if not slot]
  assert "".join(x.replace("<image> ", "") for x in shown) == tokenizer.decode(said)
  with_none = lmops(*base, "--shots", 3)[1]
  assert "had no room" not in with_none
  error = lmops(*base[:-1], 57, fails=True)[1]
  assert "has 9 tokens without any demonstration, and with 57 new ones they exceed the" in error


def test_memes_are_measured_by_their_roc_curve(lmops, folder, tmp_path):
  labels = (1, 0, 0, 1, 0)
  rows = [{"id": i, "img": f"{i}.png", "label": label} for i, label in enumerate(labels)]
  for i in range(5):
    _picture(tmp_path / f"{i}.png", i)
  long = model_folders.write_docked(tmp_path / "long", max_length=128)
  _lines(tmp_path / "dev.jsonl", *rows)
  base = ("--model", long, "--task", "hateful-memes", "--data", tmp_path)
  out, _ = lmops(*base, "--output", tmp_path / "o.jsonl")
  scores = [row["scores"] for row in _read(tmp_path / "o.jsonl")]
  odds = [row["yes"] - row["no"] for row in scores]  # p(yes) / (p(yes) + p(no)) grows with them
  right = np.mean([(x > 0) == label for x, label in zip(odds, labels)])
  assert out.startswith(f"roc_auc {roc_auc_score(labels, odds):.4f} (standard error 0.")
  assert f"), accuracy {right:.4f} (standard error " in out and "5 rows, 0 shots, by sum" in out
  error = lmops(*base, "--limit", 1, fails=True)[1]
  assert "the 1 rows of the task hateful-memes all have the label 1, and a ROC curve needs" in error


def _shown(lmops, *arguments):
  return [json.loads(line) for line in lmops("--model", "none", *arguments)[0].splitlines()]


def test_prompts_are_shown_as_a_task_has_them(lmops, tmp_path):
  for i in range(9):
    _picture(tmp_path / f"{i}.png", i)
    _picture(tmp_path / "val" / f"VizWiz_{i}.jpg", i)
  images = [str(tmp_path / f"{i}.png") for i in range(9)]
  _lines(tmp_path / "test.jsonl", {
    "context": ["0.png", "1.png", "2.png"], "candidates": ["3.png", "4.png"], "answer": 1})
  row, = _shown(lmops, "--task", "raven", "--data", tmp_path, "--show-prompts", 3)
  assert row["prompt"] == (
    "Here are three images: <image> <image> <image> The following image is: <image> Is it correct?")
  assert row["images"] == images[:3] and row["option_images"] == images[3:5]
  assert row["options"] == [" Yes", " Yes"] and row["label"] == 1

  questions = [
    {"image": f"VizWiz_{i}.jpg", "question": f"What {i}?", "answers": [{"answer": f"a{i}"}] * 2}
    for i in range(4)]
  (tmp_path / "val.json").write_text(json.dumps(questions))
  base = ("--task", "vizwiz", "--data", tmp_path, "--show-prompts", 1)
  row, = _shown(lmops, *base, "--shots", 2)
  first, second, last = row["prompt"].split("\n\n")
  number = {part: int(part.split("What ")[1][0]) for part in (first, second, last)}
  for part in (first, second):
    i = number[part]
    assert part == f"<image> Question: What {i}? Answer: a{i}"
  assert last == f"<image> Question: What {number[last]}? Answer:"
  assert [path[-5] for path in row["images"]] == [str(i) for i in number.values()]
  assert row["answers"] == [f"a{number[last]}"] * 2
  zero, = _shown(lmops, *base)
  assert zero["prompt"] == "<image> Question: What 0? Answer:" and len(zero["images"]) == 1

  captions = [{"filename": f"{i}.png", "split": "test" if i else "train",
               "sentences": [{"raw": f"A dog {i}."}]} for i in range(2)]
  (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": captions}))
  row, = _shown(
    lmops, "--task", "coco", "--data", tmp_path, "--shots", 1, "--show-prompts", 1)
  assert row["prompt"] == "<image> An image of A dog 0.\n\n<image> An image of"


@pytest.mark.parametrize("arguments, message", [
  (("--normalise", "token"), "has no options to score, so that --normalise changes nothing; leave"),
  (("--balanced",), "so that --balanced changes nothing"),
  (("--only-names", "--stop", "x"), "--only-names makes whole names, so that --stop changes noth"),
  (("--metric", "f1"), "--metric is for a --task that is a file of rows with images"),
  (("--beams", 0), "num_beams=0 must be"), (("--stop", ""), "the stop string '' must be"),
  (("--show-prompts", 0), "--show-prompts 0 must be at least 1"),
  (("--shots", 9), "9 demonstrations are asked for and there are 4 rows"),
])
def test_what_open_answers_do_not_read_is_refused(
  lmops, folder, imagenet, unread, arguments, message
):
  error = lmops(
    "--model", folder, "--task", "imagenet", "--data", imagenet, *arguments, fails=True)[1]
  assert error.startswith("lmops: error: ") and error.count("\n") == 1 and message in error, error


@pytest.mark.parametrize("arguments, message", [
  (("--beams", 2), "the task rows has options, which are scored, so that --beams changes nothing"),
  (("--only-names",), "so that --only-names changes nothing"),
  (("--metric", "bleu"), "metric='bleu' is not one of accuracy, roc_auc"),
  (("--metric", "f1"), "does not fit metric='f1': it has 2 options"),
])
def test_what_options_do_not_read_is_refused(lmops, folder, tmp_path, unread, arguments, message):
  _picture(tmp_path / "a.png", 0)
  rows = _lines(tmp_path / "rows.jsonl", {
    "images": "a.png", "prompt": "It is", "options": ["a", "b"], "label": 0})
  error = lmops("--model", folder, "--task", rows, *arguments, fails=True)[1]
  assert error.startswith("lmops: error: ") and error.count("\n") == 1 and message in error, error


def test_free_texts_have_no_names(lmops, folder, tmp_path, unread):
  _picture(tmp_path / "a.png", 0)
  rows = _lines(tmp_path / "rows.jsonl", {"images": "a.png", "prompt": "It is", "answer": "a"})
  error = lmops("--model", folder, "--task", rows, "--only-names", fails=True)[1]
  assert "answers to the task rows are free texts, not names of classes to keep to" in error
