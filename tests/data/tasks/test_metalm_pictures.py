"""MetaLM's tasks with pictures from tiny folders in the data sets' own forms."""

import json

import numpy as np
import pytest

from lmops_jax.data import tasks
from lmops_jax.data.tasks import PictureTaskChoice, picture_task
from lmops_jax.evaluation import explained, generated, vqa


def _write(path, content=""):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def _nlvr2(folder):
  """The lines of the released files, fields that are not read among them."""
  rows = {
    "test1": [
      {"identifier": "test1-0-1-0", "sentence": "Both images show {two} dogs.", "label": "True",
       "left_url": "https://a/l.jpg", "right_url": "https://a/r.jpg", "synset": "dog"},
      {"identifier": "test1-0-1-1", "sentence": "No dog.", "label": "False"}],
    "train": [
      {"identifier": "train-10171-0-0", "sentence": "A cat.", "label": "True", "directory": 47}]}
  for split, of_split in rows.items():
    _write(folder / f"{split}.json", "".join(json.dumps(row) + "\n" for row in of_split))
  for i in (0, 1):
    _write(folder / f"test1/test1-0-1-img{i}.png")
    _write(folder / f"images/train/47/train-10171-0-img{i}.png")
  return folder


def test_nlvr2_shows_each_picture_with_the_sentence(tmp_path):
  task = picture_task("nlvr2", _nlvr2(tmp_path))
  first, second = task.rows
  sentence = "Both images show {two} dogs."
  assert first.prompt == f"<image> {sentence} <image> {sentence} it is"
  assert first.demonstration == f"{first.prompt} true" and second.demonstration.endswith("is false")
  assert first.images == second.images == tuple(
    str(tmp_path / f"test1/test1-0-1-img{i}.png") for i in (0, 1))
  assert task.metric == "accuracy" and task.words == ("false", "true")
  (drawn,) = task.train
  assert drawn.images[1] == str(tmp_path / "images/train/47/train-10171-0-img1.png")
  assert first.id != second.id


@pytest.mark.parametrize("change,sentence", [
  ({"label": "Maybe"}, "test1.json:1 has the label 'Maybe'; expected \"True\" or \"False\"."),
  ({"label": None}, "has the label None"),
  ({"sentence": 5}, "test1.json:1 has 5 in its field sentence; expected a text."),
])
def test_a_pair_without_a_label_or_sentence_is_named(tmp_path, change, sentence):
  row = {"identifier": "test1-0-1-0", "sentence": "A dog.", "label": "True", **change}
  _write(tmp_path / "test1.json", json.dumps(row) + "\n")
  with pytest.raises(ValueError) as error:
    picture_task("nlvr2", tmp_path)
  assert sentence in str(error.value)


_EXPLAINED = """,pairID,Flickr30kID,hypothesis,gold_label,explanation
0,7.jpg#2r1c,7.jpg,"An old man, in a car.",contradiction,One cannot walk and drive.
1,8.jpg#0r1e,8.jpg,A man is outside,entailment,"The ""man"" is in a
street.."
2,8.jpg#0r1n,8.jpg,A man is sad,neutral,
"""


def _esnli(folder):
  _write(folder / "esnlive_test.csv", _EXPLAINED)
  for name in ("7.jpg", "8.jpg"):
    _write(folder / "flickr" / name)
  return picture_task("e-snli-ve", folder, pictures=folder / "flickr")


def test_esnli_ve_answers_with_label_and_explanation(tmp_path):
  task = _esnli(tmp_path)
  first, second = task.rows
  assert task.skipped == 1  # nothing explains its label
  assert first.demonstration == (
    "<image> An old man, in a car. it is contradiction because One cannot walk and drive.")
  assert second.answers == ('entailment because The "man" is in a\nstreet.',)
  assert second.images == (str(tmp_path / "flickr/8.jpg"),) and task.metric == "explained"
  _write(tmp_path / "esnlive_test.csv", _EXPLAINED.replace("contradiction", "contradict"))
  with pytest.raises(ValueError, match="row 1, has gold_label='contradict'; expected one of "):
    picture_task("e-snli-ve", tmp_path, pictures=tmp_path / "flickr")


def test_labels_and_explanations_are_measured_apart(tmp_path):
  golds = [row.answers for row in _esnli(tmp_path).rows]
  right = [gold[0] for gold in golds]
  for name in ("explained", "explanation_rouge_l"):
    assert generated.score(name, right, golds).corpus == pytest.approx(1)
  other = ["Contradiction because it rains.", "neutral because The man is in a street."]
  np.testing.assert_array_equal(generated.score("explained", other, golds).rows, [1, 0])
  scores = explained.explanation_scores(other, golds)
  assert scores["METEOR"].rows[0] == 0 < scores["METEOR"].rows[1]  # though its label is wrong
  np.testing.assert_allclose(scores["BLEU-4"].rows, [0, 1], atol=1e-9)
  by_name = generated.score("explanation_cider", other, golds)
  np.testing.assert_array_equal(by_name.rows, scores["CIDEr"].rows)
  alone = generated.score("explained", ["contradiction", "entailment."], golds)
  np.testing.assert_array_equal(alone.rows, [1, 1])
  none = explained.explanation_scores(["contradiction", "entailment."], golds)
  assert none["ROUGE-L"].corpus == none["CIDEr"].corpus == none["METEOR"].corpus == 0


def test_ok_vqa_reads_what_people_said_and_normalises_as_vqa_does(tmp_path):
  question = {"question_id": 2971475, "image_id": 297147, "question": "What sport is this?"}
  answers = [
    {"answer_id": i, "raw_answer": "racing", "answer_confidence": "yes", "answer": answer}
    for i, answer in enumerate(["race"] * 8 + ["a motocross"] * 2, 1)]
  _write(tmp_path / "OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
  _write(tmp_path / "mscoco_val2014_annotations.json", {
    "annotations": [{**question, "answers": answers, "answer_type": "other"}]})
  picture = tmp_path / "val2014/COCO_val2014_000000297147.jpg"
  _write(picture)
  task = picture_task("ok-vqa", tmp_path)
  (row,) = task.rows
  assert row.prompt == "<image> question: What sport is this? answer:"
  assert row.images == (str(picture),) and task.metric == "vqa"
  assert generated.score("vqa", ["The Race."], [row.answers]).corpus == 1
  assert vqa.accuracy("motocross", row.answers) < 1
  (shot,) = picture_task("ok-vqa", tmp_path, template=1).rows
  assert shot.demonstration == "<image> Question: What sport is this? Answer: race"


def test_nocaps_tells_its_domains_apart(tmp_path):
  images = [
    {"id": i, "file_name": f"00{i}.jpg", "domain": domain, "open_images_id": "x", "width": 9}
    for i, domain in enumerate(("near-domain", "out-domain"))]
  captions = [{"id": k, "image_id": k % 2, "caption": f"Thing {k}. "} for k in range(6)]
  _write(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
  for image in images:
    _write(tmp_path / "pictures" / image["file_name"])
  task = picture_task("nocaps", tmp_path, pictures=tmp_path / "pictures")
  near, out = task.rows
  assert near.prompt == "<image> Summarize this image:" and task.metric == "cider"
  assert near.answers == ("Thing 0.", "Thing 2.", "Thing 4.") and out.categories == ("out-domain",)
  assert task.train == () and near.images == (str(tmp_path / "pictures/000.jpg"),)


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
@pytest.mark.parametrize("template,prompt", [(2, "Summarize this image:"), (3, "caption:")])
def test_captions_in_metalms_words(tmp_path, name, template, prompt):
  image = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "A dog"}]}
  _write(tmp_path / f"dataset_{name}.json", {"images": [image]})
  _write(tmp_path / "1.jpg")
  (row,) = picture_task(name, tmp_path, template=template).rows
  assert row.demonstration == f"<image> {prompt} A dog"


def test_a_choice_of_a_task_knows_its_files(tmp_path):
  choice = PictureTaskChoice("nlvr2", data=str(_nlvr2(tmp_path)))
  before = choice.fingerprint()
  assert len(choice.load().rows) == 2
  text = (tmp_path / "test1.json").read_text()
  _write(tmp_path / "test1.json", text.replace("True", "False"))
  assert choice.fingerprint() != before
  assert set(tasks.PICTURE_ENTRIES) >= {"nlvr2", "e-snli-ve", "ok-vqa", "nocaps"}


def test_vqa_by_karpathys_splits_tells_rare_answers_apart(tmp_path):
  splits = {1: "test", 2: "train", 3: "test", 4: "restval"}
  _write(tmp_path / "dataset_coco.json", {"images": [
    {"filename": f"{i}.jpg", "split": split, "cocoid": i, "sentences": [{"raw": "x"}]}
    for i, split in splits.items()]})
  # Nine questions are answered "yes", of which one is about a picture to test on.
  asked = {"train2014": [(10 + i, 2, "yes") for i in range(8)] + [(30, 1, "a yak")],
           "val2014": [(40, 3, "yes"), (41, 4, "no")]}
  for part, questions in asked.items():
    _write(tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": [
      {"question_id": key, "image_id": image, "question": f"{key}?"}
      for key, image, _ in questions]})
    _write(tmp_path / f"v2_mscoco_{part}_annotations.json", {"annotations": [
      {"question_id": key, "answers": [{"answer": "maybe"}] + [{"answer": answer}] * 9}
      for key, _, answer in questions]})
    for _, image, _ in questions:
      _write(tmp_path / f"{part}/COCO_{part}_{image:012d}.jpg")
  task = picture_task("vqa-karpathy", tmp_path)
  assert [(row.prompt.split()[2], row.answers[-1], row.categories) for row in task.rows] == [
    ("30?", "a yak", ("out-domain",)), ("40?", "yes", ("in-domain",))]
  assert task.rows[1].images[0].endswith("val2014/COCO_val2014_000000000003.jpg")
  assert len(task.train) == 9 and {row.categories for row in task.train[:8]} == {("in-domain",)}
