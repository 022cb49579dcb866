"""`lmops score` on tasks about boxes, on answers with boxes in them, and on SEED-Bench."""

import functools
import json
import re

import numpy as np
import pytest

from lmops_jax import cli
from lmops_jax.data import tasks
from lmops_jax.data.boxes import decode, grounding_words, words
from lmops_jax.data.images import as_png
from lmops_jax.decoding import Generator, image_prompts
from lmops_jax.decoding.scoring import OptionScorer, mean
from lmops_jax.decoding.text import Generation
from lmops_jax.evaluation.seeing import SeeingEncoder
from lmops_jax.pretrained import model as model_lib
from lmops_jax.text.tokenizer import load_tokenizer
from tests import model_folders, wordnet_files
from tests.data.tasks.test_ref_coco import write_ref_coco

SIDE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(model_folders.write_docked(
    tmp_path_factory.mktemp("docked"), max_length=192, words=grounding_words(SIDE)))


@pytest.fixture
def lmops(capsys):
  def run(*arguments, fails=False):
    code = cli.main(["score", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code != 0) == fails, err
    return out, err

  return run


@pytest.fixture
def says(monkeypatch, folder):
  """Makes the generator answer the given texts in turn; gives the prompts that it was asked."""
  tokenizer = load_tokenizer(folder)
  asked, answers = [], []

  def generate(self, texts, options, stop=(), *, constraint=None):
    asked.extend(tokenizer.decode(
      [i for i, slot in zip(text.ids, text.slots) if not slot], False) for text in texts)
    ids = [[*tokenizer.encode(answers.pop(0), False), tokenizer.eos_id] for _ in texts]
    return [Generation("untagged", of_one, [], "eos") for of_one in ids]

  monkeypatch.setattr(Generator, "generate", generate)
  return asked, answers


def _picture(path, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(as_png(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)))


def _expressions(folder, *rows, data="refcoco", split="val"):
  """Expressions (caption, box in pixels) about pictures of 40 x 20 pixels."""
  images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 20, "caption": caption}
            for i, (caption, _) in enumerate(rows)]
  found = [{"image_id": i, "bbox": box} for i, (_, box) in enumerate(rows)]
  (folder / f"finetune_{data}_{split}.json").write_text(
    json.dumps({"images": images, "annotations": found}))
  for i in range(len(rows)):
    _picture(folder / f"{i}.png", i)


def _pair(a, b):
  return words(np.array([(a, b)]), SIDE)


def _lines(path, *rows):
  path.write_text("\n".join(map(json.dumps, rows)))


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_box_of_an_expression_is_measured(lmops, folder, says, tmp_path):
  asked, answers = says
  exact, left, right = [5, 2.5, 10, 15], [0, 0, 20, 20], [20, 0, 20, 20]
  _expressions(tmp_path, ("a cat", exact), ("the dog", right), ("it", left), ("x", left))
  answers += [_pair(0, 13), f"{_pair(0, 13)} or<phrase> the dog</phrase>{_pair(2, 15)}",
              f" a<phrase> cow</phrase>{_pair(0, 13)}<object> ", _pair(0, 13)]
  output = tmp_path / "o.jsonl"
  out, err = lmops("--model", folder, "--task", "refcoco", "--data", tmp_path, "--output", output)
  assert asked == ["<s><image></image><grounding><phrase> a cat</phrase>",
                   "<s><image></image><grounding><phrase> the dog</phrase>",
                   "<s><image></image><grounding><phrase> it</phrase>",
                   "<s><image></image><grounding><phrase> x</phrase>"]
  first, *lines = out.splitlines()
  assert first == "P@1 0.2500 (standard error 0.2500), 4 rows, 0 shots, greedy"
  box = decode([(0, 13), (2, 15)], SIDE)
  np.testing.assert_allclose(box, [(0.125, 0.125, 0.375, 0.875), (0.625, 0.125, 0.875, 0.875)])
  iou = 0.25 * 0.75 / 0.5  # a coarse grid: from centre to centre too little of the half
  assert [line.split()[0] for line in lines] == ["P@1", "mean", "upper", "grid", "IoU"]
  assert lines[0].startswith("  P@1          0.2500 (0.0456 to 0.6994), 4 rows")  # Wilson's
  assert lines[-1].startswith(f"  IoU          {(1 + iou) / 4:.4f} (")
  rows = _read(output)
  assert [len(row["boxes"]) for row in rows] == [1, 2, 0, 1]
  np.testing.assert_allclose(rows[1]["boxes"], box)
  assert rows[0]["answer"] == _pair(0, 13) and rows[0]["score"] == 1
  assert [row["scores"]["IoU"] for row in rows] == pytest.approx([1, 0, 0, iou])
  assert [row["num_malformed"] for row in rows] == [0, 0, 1, 0]
  assert err.endswith("1 groups of boxes in the answers are malformed and count for nothing.\n")


def test_a_models_own_answers_are_measured(lmops, folder, tmp_path, monkeypatch):
  """Of random weights, without anything in the place of generation."""
  said = []

  def generate(self, texts, options, *arguments, **more):
    assert (options.num_beams, options.no_repeat_ngram) == (1, 3)  # as the authors' scripts
    said.extend(made := whole(self, texts, options, *arguments, **more))
    return made

  whole = Generator.generate
  monkeypatch.setattr(Generator, "generate", generate)
  _expressions(tmp_path, ("a", [0, 0, 40, 20]), ("b", [0, 0, 20, 20]))
  output = tmp_path / "o.jsonl"
  out, _ = lmops("--model", folder, "--task", "refcoco", "--data", tmp_path, "--max-new-tokens", 5,
                 "--output", output)
  tokenizer, rows = load_tokenizer(folder), _read(output)
  for row, answer in zip(rows, said, strict=True):
    ids = [i for i in answer.ids if i not in (tokenizer.eos_id, tokenizer.token_id("<pad>"))]
    assert 0 < len(answer.ids) <= 5
    assert row["answer"] == tokenizer.decode(ids, False).strip()
  right = np.mean([row["score"] for row in rows])
  assert out.startswith(f"P@1 {right:.4f} (standard error ") and len(out.splitlines()) == 6


def test_the_grammar_is_that_of_generation(lmops, folder, tmp_path, capsys):
  """Of random weights, which without it do not write a single box."""
  _expressions(tmp_path, ("a", [0, 0, 40, 20]), ("a b c", [0, 0, 20, 20]))
  output = tmp_path / "o.jsonl"
  base = ("--model", folder, "--task", "refcoco", "--data", tmp_path, "--max-new-tokens", 6,
          "--output", output)
  lmops(*base)
  assert all(not row["boxes"] for row in _read(output))
  out, _ = lmops(*base, "--grammar")
  assert out.splitlines()[0].endswith("2 rows, 0 shots, greedy, by the grammar of boxes")
  rows = _read(output)
  for i, (row, phrase) in enumerate(zip(rows, ("a", "a b c"), strict=True)):
    assert cli.main([
      "generate", "--model", folder, "--image", str(tmp_path / f"{i}.png"), "--prompt",
      f"<grounding><phrase> {phrase}</phrase>", "--grammar", "--no-repeat-ngram", "3",
      "--max-new-tokens", "6", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert row["answer"] == load_tokenizer(folder).decode(alone["ids"], False)
    (first, last), = re.findall(
      r"^<object><patch_index_(\d{4})><patch_index_(\d{4})>", row["answer"])
    assert int(first) % SIDE <= int(last) % SIDE and int(first) // SIDE <= int(last) // SIDE


def test_phrases_are_measured_by_their_types(lmops, folder, says, tmp_path):
  _, answers = says
  (tmp_path / "val.txt").write_text("36\n")
  (tmp_path / "Sentences").mkdir()
  (tmp_path / "Sentences/36.txt").write_text("[/EN#1/people A man] in [/EN#2/clothing a hat] .\n")
  (tmp_path / "Annotations").mkdir()
  things = "".join(
    f"<object><name>{i}</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>{x}</xmax><ymax>20</ymax>"
    "</bndbox></object>" for i, x in ((1, 40), (2, 10)))
  (tmp_path / "Annotations/36.xml").write_text(
    f"<annotation><size><width>40</width><height>20</height></size>{things}</annotation>")
  _picture(tmp_path / "elsewhere/36.jpg")
  answers += [_pair(0, 15), _pair(0, 15)]
  out, _ = lmops("--model", folder, "--task", "flickr30k-entities", "--data", tmp_path, "--split",
                 "val", "--pictures", tmp_path / "elsewhere")
  lines = [line.split() for line in out.splitlines()]
  assert lines[0][:2] == ["R@1", "0.5000"]  # 9 / 16 of the whole, and too much of a quarter
  assert [line[:2] for line in lines[1:]] == [
    ["R@1", "0.5000"], ["R@5", "0.5000"], ["R@10", "0.5000"], ["R@all", "0.5000"],
    ["clothing", "0.0000"], ["people", "1.0000"]]


def test_rows_of_ones_own_are_located_behind_whole_examples(lmops, folder, says, tmp_path):
  asked, answers = says
  for i in range(4):
    _picture(tmp_path / f"{i}.png", i)  # 8 x 8
  rows = [
    {"images": "0.png", "phrase": "a cat", "target": [0, 0, 4, 8], "box_unit": "pixels"},
    {"images": ["1.png"], "prompt": "<grounding><phrase> it</phrase> and<phrase> a dog</phrase>",
     "boxes": [[0, 0, 0.5, 1], None], "target": [[0, 0, 0.25, 0.25], [0.5, 0, 1, 1]],
     "box_unit": "fractions"},
    {"images": ["2.png"], "prompt": "<phrase> a hat</phrase>", "target": [0, 0, 1, 1],
     "box_unit": "fractions"},
    {"images": "0.png", "phrase": "nothing", "target": [], "box_unit": "pixels"}]
  _lines(tmp_path / "rows.jsonl", *rows)
  _lines(tmp_path / "train.jsonl", {"images": "3.png", "phrase": "a mat", "target": [4, 0, 8, 8],
                                    "box_unit": "pixels"})
  base = ("--model", folder, "--task", tmp_path / "rows.jsonl", "--train", tmp_path / "train.jsonl",
          "--shots", 1)
  answers += [_pair(0, 13), _pair(2, 15), f"{_pair(5, 5)}{_pair(0, 15)}"]
  out, err = lmops(*base, "--output", tmp_path / "o.jsonl")
  shown = f"<image></image><grounding><phrase> a mat</phrase>{_pair(2, 15)}"
  assert asked == [
    f"<s>{shown}<image></image><grounding><phrase> a cat</phrase>",
    f"<s>{shown}<image></image><grounding><phrase> it</phrase>{_pair(0, 13)} and"
    "<phrase> a dog</phrase>",
    f"<s>{shown}<image></image><phrase> a hat</phrase>"]
  exact = 0.25 * 0.75 / 0.5  # two of four columns from centre to centre: too coarse a grid
  found = _read(tmp_path / "o.jsonl")
  assert [row["scores"]["IoU"] for row in found] == pytest.approx([exact, exact, 1 / 16])
  assert found[1]["answers"] == [words([(0, 0), (2, 15)], SIDE)]
  assert out.startswith("P@1 0.0000 (") and "1 rows of rows are left out" in err
  assert "warning: 1 prompts that ask for boxes have no <grounding>, without which" in err
  answers += [_pair(0, 13), f"{_pair(5, 5)}", f"{_pair(5, 5)[:-9]}</delimiter_of_multi_objects/>"
              f"{_pair(0, 15)[8:]}"]
  out, _ = lmops(*base, "--metric", "phrase_grounding")
  assert [line.split()[:2] for line in out.splitlines()] == [
    ["R@1", "0.0000"], ["R@1", "0.0000"], ["R@5", "0.3333"], ["R@10", "0.3333"],
    ["R@all", "0.3333"]]
  row, _ = lmops(*base, "--show-prompts", 1)  # on the model's grid as well
  assert json.loads(row)["answers"] == [_pair(0, 13)] and _pair(2, 15) in json.loads(row)["prompt"]


@pytest.mark.slow
def test_expressions_of_tfds_are_scored_by_name(lmops, folder, tmp_path, monkeypatch):
  write_ref_coco(tmp_path)
  monkeypatch.setattr(
    tasks, "picture_task", functools.partial(tasks.picture_task, data_dir=str(tmp_path)))
  output = tmp_path / "o.jsonl"
  out, _ = lmops("--model", folder, "--task", "refcoco", "--max-new-tokens", 5, "--output", output)
  assert "P@1 " in out and len(_read(output)) == 4
  shown, _ = lmops("--model", folder, "--task", "refcoco", "--show-prompts", 1)
  assert json.loads(shown.splitlines()[-1])["images"] == ["ref_coco/refcoco_unc[validation]:0"]


def test_captions_are_measured_without_their_boxes(lmops, folder, says, tmp_path):
  asked, answers = says
  captions = [{"filename": f"{i}.png", "split": "test", "sentences": [{"raw": caption}]}
              for i, caption in enumerate(["a cat on a red mat", "two dogs run"])]
  (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": captions}))
  for i in range(2):
    _picture(tmp_path / f"{i}.png", i)
  base = ("--model", folder, "--task", "flickr30k", "--data", tmp_path, "--output",
          tmp_path / "o.jsonl")
  answers += [f"<phrase> a cat</phrase>{_pair(0, 5)} on<phrase> a red mat</phrase>{_pair(4, 15)}",
              " two dogs run"]
  out, _ = lmops(*base, "--template-index", 1)
  assert asked[0] == "<s><image></image><grounding> An image of"
  assert [row["answer"] for row in _read(tmp_path / "o.jsonl")] == [
    "a cat on a red mat", "two dogs run"]
  # equal to their references, of which the second has no 4-grams
  assert out.startswith("cider 8.7500 (")


def test_expressions_are_measured_by_two_figures_behind_whole_examples(
  lmops, folder, says, tmp_path
):
  asked, answers = says
  left, right = [0, 0, 20, 20], [20, 0, 20, 20]
  _expressions(tmp_path, ("a cat", left), ("two dogs", right), data="refcocog")
  _expressions(tmp_path, ("a hat", left), data="refcocog", split="train")
  answers += [f" a<phrase> cat</phrase>{_pair(0, 5)}", " dogs"]
  base = ("--model", folder, "--task", "refcocog-expressions", "--data", tmp_path)
  out, _ = lmops(*base, "--shots", 1)
  shown, row = f"<phrase> It</phrase>{_pair(0, 13)} is", f"<phrase> It</phrase>{_pair(2, 15)} is"
  assert asked[1] == (
    f"<s><image></image><grounding>{shown} a hat<image></image><grounding>{row}")
  # both words in one piece, without their boxes; and one of two words
  meteor = (1 - 0.5 / 8) / 2 + 0.5 * 0.5 / (0.9 + 0.1 * 0.5) / 2
  first, second = out.splitlines()
  assert first.startswith(f"meteor {meteor:.4f} (standard error ") and "1 shots, greedy" in first
  assert second.startswith("  cider  ") and second.endswith("2 rows")


def test_synonyms_of_wordnet_are_told_of(lmops, folder, says, tmp_path):
  _expressions(tmp_path, ("an auto", [0, 0, 20, 20]), data="refcocog")
  base = ("--model", folder, "--task", "refcocog-expressions", "--data", tmp_path)
  says[1].extend([" an automobile", " an automobile"])
  out, _ = lmops(*base)
  assert out.splitlines()[0] == "meteor 0.2500, 1 rows, 0 shots, greedy"
  files = wordnet_files.write(tmp_path / "wordnet")
  out, _ = lmops(*base, "--wordnet", files)
  assert out.splitlines()[0] == (
    f"meteor {0.9 * (1 - 0.5 / 8):.4f}, 1 rows, 0 shots, greedy, with synonyms")
  (files / "verb.exc").unlink()
  _, err = lmops(*base, "--wordnet", files, fails=True)
  assert f"{files} has no verb.exc; give the folder of WordNet's database files" in err
  _expressions(tmp_path, ("an auto", [0, 0, 20, 20]))
  _, err = lmops("--model", folder, "--task", "refcoco", "--data", tmp_path, "--wordnet", files,
                 fails=True)
  assert "the task refcoco is measured by referring and not by meteor, so that --wordnet" in err


def test_questions_are_compared_by_their_mean_and_told_by_type(lmops, folder, tmp_path):
  choices = ["one", "several green ones", "no", "a hundred of them"]
  questions = [{
    "answer": "ABCD"[i], **{f"choice_{c}": choices[j] for j, c in enumerate("abcd")},
    "data_id": f"{i}", "data_type": "image", "question": f"How many {i}?", "question_id": f"{i}",
    "question_type_id": i % 2} for i in range(4)]
  (tmp_path / "SEED-Bench.json").write_text(
    json.dumps({"questions": questions, "question_type": {"Count": 0, "Scene": 1}}))
  for i in range(4):
    _picture(tmp_path / f"SEED-Bench-image/{i}", i)
  out, _ = lmops("--model", folder, "--task", "seed-bench", "--data", tmp_path)
  source = model_lib.load(folder)
  params, tokenizer, settings = source.params(), source.tokenizer(), source.image_settings()
  ids = image_prompts.image_tokens(tokenizer, source.config.vectors_per_image)
  encoder = SeeingEncoder(
    tokenizer, ids, image_prompts.PictureEncoder(source.model, params, settings), 192)
  found = OptionScorer(source.decoder, source.of_decoder(params)).score([encoder.split(
    f"<image> Question: How many {i}? Answer:", [f" {choice}" for choice in choices],
    [str(tmp_path / f"SEED-Bench-image/{i}")]) for i in range(4)])
  right = np.array([mean(of_row).argmax() == i for i, of_row in enumerate(found)])
  lines = out.splitlines()
  assert lines[0].startswith(f"accuracy {right.mean():.4f} (")
  assert lines[0].endswith("4 rows, 0 shots, by token")
  assert [line.split()[:2] for line in lines[1:]] == [
    ["Count", f"{right[::2].mean():.4f}"], ["Scene", f"{right[1::2].mean():.4f}"]]


@pytest.mark.parametrize("task,arguments,message", [
  ("refcocog-expressions", ("--split", "dev"), "has no file *refcocog_dev.json"),
  ("copa", ("--split", "val"), "--split and --pictures are for a --task that is a named one with"),
])
def test_what_does_not_fit_is_told_before_the_weights_are_read(
  lmops, folder, tmp_path, monkeypatch, task, arguments, message
):
  def params(*_):
    raise AssertionError("the model is read")

  monkeypatch.setattr(model_lib.PretrainedModel, "params", params)
  _expressions(tmp_path, ("a cat", [0, 0, 20, 20]), data="refcocog")
  _, err = lmops("--model", folder, "--task", task, "--data", tmp_path, *arguments, fails=True)
  assert err.startswith("lmops: error: ") and err.count("\n") == 1 and message in err, err


def test_the_grammar_is_for_answers_with_boxes(lmops, folder, tmp_path):
  _picture(tmp_path / "a.png")
  rows, plain = tmp_path / "rows.jsonl", model_folders.write_docked(tmp_path / "plain")
  rows.write_text(json.dumps(
    {"images": "a.png", "prompt": "It is", "options": ["a", "b"], "label": 0}))
  base = ("--task", rows, "--grammar")
  _, err = lmops("--model", folder, *base, fails=True)
  assert "the task rows has options, which are scored, so that --grammar changes nothing" in err
  rows.write_text(json.dumps({"images": "a.png", "prompt": "It is", "answer": "a"}))
  _, err = lmops("--model", plain, *base, fails=True)
  assert "the vocabulary has no word <phrase>, which texts with boxes need" in err


def test_a_model_without_words_for_boxes_is_refused(lmops, tmp_path):
  plain = model_folders.write_docked(tmp_path / "plain")
  _expressions(tmp_path, ("a cat", [0, 0, 20, 20]))
  _, err = lmops("--model", plain, "--task", "refcoco", "--data", tmp_path, fails=True)
  assert "the vocabulary has no word <phrase>, which texts with boxes need; take a model" in err
