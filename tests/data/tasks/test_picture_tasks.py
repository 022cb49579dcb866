"""Tasks with pictures from tiny folders: prompts word for word, paths, splits, what is refused."""

import json

import pytest

from lmops_jax.data import tasks
from lmops_jax.data.synthetic_pictures import Matrices
from lmops_jax.data.tasks import PictureTaskChoice, picture_rows_task, picture_task
from lmops_jax.evaluation import in_context


def _write(path, content=""):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = content if isinstance(content, str) else json.dumps(content)
  path.write_text(text, encoding="utf-8")


def _lines(path, *rows):
  _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _karpathy(folder, name, *images):
  """Pictures (file, split, captions), in a sub-folder if the file has one."""
  found = []
  for file, split, captions in images:
    place, _, filename = file.rpartition("/")
    row = {"filename": filename, "split": split, "sentences": [{"raw": c} for c in captions]}
    found.append(row | ({"filepath": place} if place else {}))
    _write(folder / file)
  _write(folder / f"dataset_{name}.json", {"images": found, "dataset": name})
  return folder


def test_coco_captions_by_karpathys_splits(tmp_path):
  folder = _karpathy(
    tmp_path, "coco", ("val2014/a.jpg", "test", ["A dog. ", "Dog runs"]),
    ("train2014/b.jpg", "train", ["A cat"]), ("val2014/c.jpg", "restval", ["A cow"]),
    ("val2014/d.jpg", "val", ["An owl"]), ("val2014/e.jpg", "test", [" "]))
  task = picture_task("coco", folder)
  (row,) = task.rows
  assert row.prompt == "<image> An image of" and row.images == (str(folder / "val2014/a.jpg"),)
  assert row.answers == ("A dog.", "Dog runs") and task.metric == "cider" and task.skipped == 1
  assert row.demonstration == "<image> An image of Dog runs"
  assert [r.answers for r in task.train] == [("A cat",), ("A cow",)]
  assert picture_task("coco", folder, split="val").rows[0].answers == ("An owl",)
  assert picture_task("coco", folder, split="train").train == ()
  with pytest.raises(ValueError, match="no pictures of the split 'dev' .it has restval, test, "):
    picture_task("coco", folder, split="dev")


def test_flickr_pictures_may_lie_elsewhere(tmp_path):
  folder = _karpathy(tmp_path / "json", "flickr30k", ("1.jpg", "test", ["A man"]))
  (folder / "1.jpg").unlink()
  with pytest.raises(ValueError, match="names the picture .*1.jpg, which is not there; give"):
    picture_task("flickr30k", folder)
  _write(tmp_path / "pictures" / "1.jpg")
  task = picture_task("flickr30k", folder, pictures=tmp_path / "pictures")
  assert task.rows[0].images == (str(tmp_path / "pictures" / "1.jpg"),) and task.train == ()


def _vqa(folder, split="val2014"):
  question = {"question_id": 12001, "image_id": 12, "question": "Is {it} red?"}
  answers = [{"answer": a, "answer_id": i} for i, a in enumerate(["no"] * 7 + ["yes"] * 3)]
  _write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": [question]})
  _write(folder / f"v2_mscoco_{split}_annotations.json",
         {"annotations": [{"question_id": 12001, "answers": answers}]})
  _write(folder / split / f"COCO_{split}_000000000012.jpg")
  return folder


def test_vqav2(tmp_path):
  task = picture_task("vqav2", _vqa(tmp_path))
  (row,) = task.rows
  assert row.prompt == "<image> Question: Is {it} red? Answer:" and task.metric == "vqa"
  assert row.images == (str(tmp_path / "val2014/COCO_val2014_000000000012.jpg"),)
  assert sorted(row.answers) == ["no"] * 7 + ["yes"] * 3
  assert row.demonstration.endswith("Answer: no")  # what most people say
  assert task.train == ()
  assert len(picture_task("vqav2", _vqa(tmp_path, "train2014")).train) == 1


def test_vqa_annotations_of_another_split_are_refused(tmp_path):
  _vqa(tmp_path)
  _write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": []})
  with pytest.raises(ValueError, match="has no answers to the question 12001; give the annotation"):
    picture_task("vqav2", tmp_path)
  _write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": "x"}]})
  with pytest.raises(ValueError, match=r"annotations\[0\].question_id=\"x\" should be a whole num"):
    picture_task("vqav2", tmp_path)


def test_vizwiz(tmp_path):
  answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 6 + [{"answer": "tea"}] * 4
  row = {"image": "VizWiz_val_0.jpg", "question": "What is it?", "answers": answers}
  _write(tmp_path / "Annotations" / "val.json", [row])
  _write(tmp_path / "val" / "VizWiz_val_0.jpg")
  (row,) = picture_task("vizwiz", tmp_path).rows
  assert row.demonstration == "<image> Question: What is it? Answer: unanswerable"
  assert row.images == (str(tmp_path / "val/VizWiz_val_0.jpg"),) and len(row.answers) == 10


def test_rendered_sst2(tmp_path):
  for name in ("test/negative/2.png", "test/positive/1.png", "test/positive/.hidden.png",
               "test/positive/notes.txt", "train/positive/3.PNG", "train/negative/3.png"):
    _write(tmp_path / name)
  task = picture_task("rendered-sst2", tmp_path)
  assert [(r.images[0].removeprefix(str(tmp_path)), r.label) for r in task.rows] == [
    ("/test/negative/2.png", 0), ("/test/positive/1.png", 1)]
  assert task.rows[1].demonstration == (
    "<image> Question: what is the sentiment of the opinion? Answer: positive")
  assert len(task.train) == 2 and task.words == ("negative", "positive")
  with pytest.raises(ValueError, match="has no folder dev for the task rendered-sst2 .it has test"):
    picture_task("rendered-sst2", tmp_path, split="dev")


def test_hateful_memes(tmp_path):
  _lines(tmp_path / "dev_seen.jsonl", {"id": 1, "img": "img/1.png", "label": 1, "text": "x"},
         {"id": 2, "img": "img/2.png", "label": 0, "text": "y"})
  _write(tmp_path / "img" / "1.png")
  task = picture_task("hateful-memes", tmp_path)
  assert task.metric == "roc_auc" and [row.label for row in task.rows] == [1, 0]
  assert task.rows[0].demonstration == (
    "<image> Question: does this picture contain real hate speech? Answer: yes")
  assert task.rows[0].options == (" no", " yes")
  _lines(tmp_path / "test.jsonl", {"id": 1, "img": "img/1.png", "text": "x"})
  with pytest.raises(ValueError, match="test.jsonl:1 has img='img/1.png' and label=None"):
    picture_task("hateful-memes", tmp_path, split="test")


PAGE = """<html><head><title>No</title><style>p {}</style><body><p>Price:
<b>5&nbsp;&euro;</b></p><script>var x = "no";</script> Q {question}</body></html>"""


def _web(folder, **splits):
  for site, answer in (("book/01", "5 €"), ("auto/08", "red")):
    page = f"{site[-2:]}00001"
    row = f"How much?,{site[:2]}{page}00000,3,0,{answer}"
    _write(folder / site / "dataset.csv", f"question,id,element_id,answer_start,answer\n{row}\n")
    _write(folder / site / "processed_data" / f"{page}.html", PAGE)
    _write(folder / site / "processed_data" / f"{page}.png")
  _write(folder / "dataset_split.json", splits or {"dev": ["bo01"], "test": []})
  return folder


def test_websrc(tmp_path):
  folder = _web(tmp_path)
  asked = ("Given the context below from web page, extract the answer from the given text like "
           "this: Qusestion: Who is the publisher of this book? Answer: Penguin Books Ltd. ")
  task = picture_task("websrc", folder)
  (row,) = task.rows
  assert row.prompt == f"<image> {asked}Context: Price: 5 € Q {{question}} Q: How much? A:"
  assert row.images == (str(folder / "book/01/processed_data/0100001.png"),)
  assert row.answers == ("5 €",) and task.metric == "f1"
  assert [r.answers for r in task.train] == [("red",)]  # sites that no other split lists
  text, seen = (picture_task("websrc", folder, template=i).rows[0] for i in (1, 2))
  assert text.images == () and text.prompt == row.prompt.removeprefix("<image> ")
  assert seen.images == row.images and seen.prompt == f"<image> {asked}Q: How much? A:"
  with pytest.raises(ValueError, match="has no split 'val' .it has dev, test"):
    picture_task("websrc", folder, split="val")
  _write(folder / "book/01/dataset.csv", "question,id\nWhat?,bo010000100000\n")
  with pytest.raises(ValueError, match="dataset.csv:2 has no answer; test splits without answers"):
    picture_task("websrc", folder)


def test_a_page_that_holds_a_place_for_a_picture_is_left_out(tmp_path):
  folder = _web(tmp_path)
  _write(folder / "book/01/processed_data/0100001.html", "<p>&lt;image&gt;</p>")
  with pytest.raises(ValueError, match=r"the task websrc has no rows \(1 were left out\)"):
    picture_task("websrc", folder)


def test_matrices_from_a_file(tmp_path):
  made = [Matrices(num_context=(num,)).matrix(0, 0) for num in (3, 4, 8)]
  rows = []
  for i, matrix in enumerate(made):
    names = [[f"{i}/{kind}{j}.png" for j in range(len(of))]
             for kind, of in (("context", matrix.context), ("candidate", matrix.candidates))]
    for name in (*names[0], *names[1]):
      _write(tmp_path / name)
    rows.append({"context": names[0], "candidates": names[1], "answer": matrix.label})
  _lines(tmp_path / "test.jsonl", *rows)
  task = picture_task("raven", tmp_path)
  assert [row.prompt for row in task.rows] == [matrix.prompt for matrix in made]
  for row, matrix, given in zip(task.rows, made, rows):
    assert row.label == matrix.label and row.options == (" Yes",) * 6
    assert row.images == tuple(str(tmp_path / name) for name in given["context"])
    assert row.option_images == tuple(str(tmp_path / name) for name in given["candidates"])
    assert row.prompt.count("<image>") == len(row.images) + 1


@pytest.mark.parametrize("change,message", [
  ({"answer": 6}, "test.jsonl:1 has the answer 6; expected the number of one of its 6 candidates"),
  ({"answer": True}, "has the answer True"),
  ({"candidates": []}, "has the answer 0; expected the number of one of its 0 candidates"),
  ({"candidates": ["a", ""]}, r"has \['a', ''\] in its field candidates; expected paths"),
  ({"context": ["a"] * 5}, "test.jsonl:1: a matrix has 5 pictures of context"),
  ({"context": "a", "candidates": [1]}, r"has \[1\] in its field candidates; expected paths"),
])
def test_bad_matrices(tmp_path, change, message):
  row = {"context": ["a"] * 3, "candidates": list("bcdefg"), "answer": 0}
  _lines(tmp_path / "test.jsonl", {**row, **change})
  with pytest.raises(ValueError, match=message):
    picture_task("raven", tmp_path)


def test_imagenet_names_are_the_first_of_the_mapping(tmp_path):
  _write(tmp_path / "LOC_synset_mapping.txt",
         "n01 tench, Tinca tinca\nn02 crane\nn03 goldfish, Carassius auratus\nn04 crane\n")
  for name in ("n01/b.JPEG", "n01/a.JPEG", "n04/c.JPEG"):
    _write(tmp_path / "val" / name)
  task = picture_task("imagenet", tmp_path)
  assert [(row.answers, row.images[0][-6:]) for row in task.rows] == [
    (("tench",), "a.JPEG"), (("tench",), "b.JPEG"), (("crane",), "c.JPEG")]
  assert task.rows[0].prompt == "<image> The photo of the"
  assert task.words == ("tench", "crane", "goldfish")  # what a prefix tree holds, each name once
  assert picture_task("imagenet", tmp_path, limit=2).words == task.words
  _write(tmp_path / "val" / "n05" / "d.JPEG")
  with pytest.raises(ValueError, match="n05 is a folder of a class that LOC_synset_mapping.txt do"):
    picture_task("imagenet", tmp_path)
  (tmp_path / "LOC_synset_mapping.txt").unlink()
  _write(tmp_path / "val" / "great_owl" / "e.png")
  assert picture_task("imagenet", tmp_path).words == ("great owl", "n01", "n04", "n05")
  _write(tmp_path / "LOC_synset_mapping.txt", "n01\n")
  with pytest.raises(ValueError, match="mapping.txt:1 names no class behind 'n01'"):
    picture_task("imagenet", tmp_path)


def test_look_alikes_with_descriptions_and_without(tmp_path):
  for name in ("three_toed_woodpecker", "downy_woodpecker", "Gentoo_penguin", "royal penguin",
               "black_throated_sparrow", "fox_sparrow"):
    _write(tmp_path / name / "1.jpg")
  told, named = (picture_task("look-alikes", tmp_path, template=i).rows for i in (0, 1))
  assert len(told) == len(named) == 6
  assert told[1].answers == ("downy", "downy woodpecker")
  assert told[1].prompt == (
    "Description of three toed woodpecker: It has black and white stripes throughout the body and "
    "a yellow crown. Description of downy woodpecker: It has white spots on black wings and some "
    "red on the crown. <image> Question:what is the name of the woodpecker in the picture? Answer:")
  assert named[1].prompt == (
    "<image> Question:what is the name of the woodpecker in the picture, three toed or downy? "
    "Answer:")
  assert named[3].prompt.endswith("penguin in the picture, Gentoo or royal? Answer:")


def _own(tmp_path, *rows):
  _lines(tmp_path / "mine.jsonl", *rows)
  for name in ("a.png", "b.png"):
    _write(tmp_path / name)
  return tmp_path / "mine.jsonl"


def test_rows_of_ones_own(tmp_path):
  path = _own(
    tmp_path, {"images": ["a.png", "b.png"], "prompt": "<image> and <image> differ in",
               "answers": ["size", "color"]},
    {"images": "a.png", "prompt": "It is", "answer": "red"})
  task = picture_rows_task(path)
  first, second = task.rows
  assert first.images == tuple(str(tmp_path / f"{n}.png") for n in "ab")
  assert first.answers == ("size", "color") and task.metric == "exact_match"
  assert second.prompt == "<image> It is" and second.answers == ("red",) and task.name == "mine"
  assert picture_rows_task(path, metric="f1", limit=1).rows == (first,)
  choices = [{"images": ["a.png"], "prompt": "It is", "options": ["red", "blue"], "label": x}
             for x in (1, "red")]
  others = tmp_path / "train.jsonl"
  _lines(others, choices[0])
  task = picture_rows_task(_own(tmp_path, *choices), train=others)
  assert task.metric == "accuracy" and [row.label for row in task.rows] == [1, 0]
  assert [row.label for row in task.train] == [1]
  assert task.rows[0].options == (" red", " blue")


@pytest.mark.parametrize("row,message", [
  ({"images": ["a.png"], "prompt": "<image> <image>", "answer": "x"},
   "mine.jsonl:1 has 2 <image> in its prompt and 1 images; write one for each"),
  ({"images": ["a.png", "b.png"], "prompt": "Both?", "answer": "x"}, "has 0 <image> .* 2 images"),
  ({"images": [0], "prompt": "x", "answer": "x"}, r"has \[0\] in its field images; expected paths"),
  ({"images": ["a.png"], "prompt": " ", "answer": "x"}, "has the prompt ' '; expected a text"),
  ({"images": ["a.png"], "prompt": "x"}, "has None in its field answer; expected texts"),
  ({"images": ["a.png"], "prompt": "x", "options": ["r", "b"], "label": 2}, "has the label 2; exp"),
  ({"images": ["a.png"], "prompt": "x", "options": [], "label": 0}, r"has \[\] in its field opt"),
  ({"images": ["a.png"], "prompt": "x", "options": ["r", " "], "label": 0}, "no rows .1 were left"),
  ({"images": ["c.png"], "prompt": "x", "answer": "x"}, "names the picture .*c.png, which is not"),
])
def test_bad_rows_of_ones_own(tmp_path, row, message):
  with pytest.raises(ValueError, match=message):
    picture_rows_task(_own(tmp_path, row))


@pytest.mark.parametrize("arguments,message", [
  ({"name": "coc"}, "no task with pictures 'coc'; the nearest valid name is 'coco'. It"),
  ({"template": 4}, "the task coco has no template 4; its indices are 0, 1, 2, 3"),
  ({"data": "nowhere"}, "data='nowhere' is no folder; give the one of the task coco"),
  ({"pictures": "nowhere"}, "pictures='nowhere' is no folder"),
  ({"limit": 0}, "limit=0 must be at least 1"),
  ({}, "has no file dataset_.*.json or dataset.json for the task coco .it has nothing"),
])
def test_what_there_is_not_is_told(tmp_path, arguments, message):
  with pytest.raises(ValueError, match=message):
    picture_task(**{"name": "coco", "data": tmp_path, **arguments})


def test_two_files_of_annotations_are_refused(tmp_path):
  _karpathy(tmp_path, "coco", ("a.jpg", "test", ["A dog"]))
  _karpathy(tmp_path, "flickr8k", ("a.jpg", "test", ["A dog"]))
  with pytest.raises(ValueError, match="has several files dataset_.*.json .dataset_coco.json, dat"):
    picture_task("coco", tmp_path)


def test_models_that_only_read_refuse_pictures(tmp_path):
  task = picture_rows_task(_own(tmp_path, {
    "images": ["a.png"], "prompt": "It is", "options": ["red", "blue"], "label": 1}))
  with pytest.raises(ValueError, match="the task mine has pictures, and the model reads text"):
    in_context.rows_and_front(task)


def test_a_choice_of_rows_keeps_their_pictures(tmp_path):
  rows = [{"images": ["a.png"], "prompt": f"{i} is", "answer": "x"} for i in range(9)]
  choice = PictureTaskChoice(str(_own(tmp_path, *rows)), num_rows=4)
  task = choice.load()
  assert (choice.name, len(task.rows), len(task.train)) == ("mine", 4, 5)
  tasks.write_task(tmp_path, task)
  assert tasks.read_task(tmp_path) == task
  assert isinstance(choice, tasks.TaskSource) and choice.stage("tasks[0]").name == "task/mine"


def test_a_choices_fingerprint_is_its_annotations(tmp_path):
  for name in ("test/negative/2.png", "test/positive/1.png"):
    _write(tmp_path / "sst2" / name)
  choice = PictureTaskChoice("rendered-sst2", data=str(tmp_path / "sst2"))
  before = choice.fingerprint()
  assert before == choice.fingerprint()
  _write(tmp_path / "sst2/test/positive/3.png")
  assert choice.fingerprint() != before
  coco = PictureTaskChoice("coco", data=str(_karpathy(tmp_path, "c", ("a.jpg", "test", ["x"]))))
  before = coco.fingerprint()
  _karpathy(tmp_path, "c", ("a.jpg", "test", ["y"]))
  assert coco.fingerprint() != before


@pytest.mark.parametrize("settings,message", [
  ({"task": "coco"}, "task='coco' needs tasks.choose_pictures.data"),
  ({"task": "x.jsonl"}, "task='x.jsonl' is not a file; give JSON lines"),
  ({"task": "x.jsonl", "data": "y"}, "choose_pictures.data is for named tasks, and 'x.jsonl' is"),
  ({"task": "cocoa", "data": "y"}, "no task with pictures 'cocoa'; the nearest"),
  ({"task": "coco", "data": "nowhere"}, "data='nowhere' is no folder"),
])
def test_bad_choices(settings, message):
  with pytest.raises(ValueError, match=message):
    PictureTaskChoice(**settings)
