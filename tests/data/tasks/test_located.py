"""Tasks about boxes and SEED-Bench from tiny folders of the real formats."""

import json
import pathlib
import pickle
import re

import pytest

from lmops_jax.data import boxes, tasks
from lmops_jax.data.tasks import picture_task
from lmops_jax.data.tasks.task import Example, Task

SENTENCES = """[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at \
[/EN#1/people/other their hands] in [/EN#4/scene the yard] .
[/EN#0/notvisual It] is [/EN#1/people men] .
"""
XML = """<annotation><filename>36.jpg</filename>
<size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>1</name><name>2</name><bndbox>
<xmin>20</xmin><ymin>10</ymin><xmax>120</xmax><ymax>60</ymax></bndbox></object>
<object><name>1</name><bndbox>
<xmin>100</xmin><ymin>50</ymin><xmax>200</xmax><ymax>100</ymax></bndbox></object>
<object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>
"""


def _write(path, content=""):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))


def _entities(folder, xml=XML, sentences=SENTENCES, listed="36\n"):
  _write(folder / "test.txt", listed)
  _write(folder / "Annotations/36.xml", xml)
  _write(folder / "Sentences/36.txt", sentences)
  _write(folder / "flickr30k-images/36.jpg")
  return folder


def test_phrases_of_entities(tmp_path):
  task = picture_task("flickr30k-entities", _entities(tmp_path))
  assert [row.prompt.removeprefix("<image><grounding>") for row in task.rows] == [
    "<phrase> Two young guys</phrase>",
    " Two young guys with<phrase> shaggy hair</phrase>",
    " Two young guys with shaggy hair look at<phrase> their hands</phrase>",
    " It is<phrase> men</phrase>"]
  assert [row.categories for row in task.rows] == [
    ("people",), ("bodyparts",), ("people", "other"), ("people",)]
  both = ((0.1, 0.1, 0.6, 0.6), (0.5, 0.5, 1, 1))
  assert [row.boxes for row in task.rows] == [both, both[:1], both, both]
  first = task.rows[0]
  assert first.images == (str(tmp_path / "flickr30k-images/36.jpg"),)
  assert first.answers == (boxes.words(boxes.encode(both)),)
  assert first.demonstration.startswith(f"{first.prompt} <object><patch_index_")
  assert (task.metric, task.skipped) == ("phrase_grounding", 2)  # a scene, what is not visible
  assert len({row.id for row in task.rows}) == 4
  tasks.write_task(tmp_path, task)
  assert tasks.read_task(tmp_path) == task
  _write(tmp_path / "pictures/36.jpg")
  moved = picture_task("flickr30k-entities", tmp_path, pictures=tmp_path / "pictures")
  assert moved.rows[0].images == (str(tmp_path / "pictures/36.jpg"),)


@pytest.mark.parametrize("change,message", [
  ({"xml": XML.replace("<xmax>120", "<xmax>10")},
   r"36.xml has the box \(20, 10, 10, 60\), whose right or bottom edge is not behind the left"),
  ({"xml": XML.replace("<xmax>200", "<xmax>203")},
   r"has the box \(100, 50, 203, 100\), which leaves its picture of 200 x 100 pixels; give"),
  ({"xml": XML.replace("<ymax>60</ymax>", "")}, "has None as ymax of <bndbox>; expected a number"),
  ({"xml": XML.replace("<width>200", "<width>0")}, "has a picture of 0.0 x 100.0 pixels; give its"),
  ({"xml": XML.replace("<size>", "")}, "36.xml is no XML .mismatched tag.*; fetch the file again"),
  ({"xml": XML.replace("<name>1</name>", "<name>7</name>").replace("<name>2</name>", "")},
   "36.txt has phrases 1, 2, 4, and the annotations of 36 boxes of 7 only; give both files of one"),
  ({"sentences": "[/EN#1/people A man] and [/EN#2 a dog] .\n"}, "36.txt:1 has a phrase that is"),
  ({"listed": "36\n36\n"}, "test.txt has the picture 36 several times; list it once"),
  ({"listed": "36\n37\n"}, "37.xml is not there, and test.txt of the task flickr30k-entities l"),
])
def test_bad_entities(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    picture_task("flickr30k-entities", _entities(tmp_path, **change))


def test_edges_are_cut_by_a_pixel_at_most(tmp_path):
  xml = XML.replace("<xmax>200", "<xmax>201")
  task = picture_task("flickr30k-entities", _entities(tmp_path, xml))
  assert task.rows[0].boxes[1] == (0.5, 0.5, 1, 1)


def _mdetr(folder, *rows, data="refcoco", split="val"):
  """Expressions (id, caption, box) about one picture of 200 x 100 pixels."""
  images = [{"id": i, "file_name": "COCO_train2014_000000000009.jpg", "width": 200, "height": 100,
             "caption": caption, "dataset_name": data} for i, caption, _ in rows]
  found = [{"id": i, "image_id": i, "bbox": box, "area": 1.5, "iscrowd": 0}
           for i, _, box in rows if box]
  _write(folder / f"finetune_{data}_{split}.json",
         {"info": {}, "images": images, "annotations": found, "categories": []})
  _write(folder / "train2014/COCO_train2014_000000000009.jpg")
  return folder


def test_referring_expressions(tmp_path):
  _mdetr(tmp_path, (1, "the  left man", [20.0, 10, 100, 50]), (2, "nobody", None))
  _mdetr(tmp_path, (1, "plus", [0, 0, 200, 100]), data="refcoco+")
  _mdetr(tmp_path, (1, "B", [0, 0, 200, 100]), split="testB")
  task = picture_task("refcoco", tmp_path)
  (row,) = task.rows
  assert row.prompt == "<image><grounding><phrase> the left man</phrase>"
  assert row.boxes == ((0.1, 0.1, 0.6, 0.6),) and row.images == (
    str(tmp_path / "train2014/COCO_train2014_000000000009.jpg"),)
  assert (task.metric, task.skipped) == ("referring", 1)
  assert picture_task("refcoco-plus", tmp_path).rows[0].prompt.endswith(" plus</phrase>")
  assert picture_task("refcoco", tmp_path, split="testB").rows[0].prompt.endswith(" B</phrase>")
  with pytest.raises(ValueError, match=re.escape("has no file *refcocog_val.json or refcocog/")):
    picture_task("refcocog", tmp_path)


def test_all_expressions_of_a_box_describe_it(tmp_path):
  whole, left = [0, 0, 200, 100], [0, 0, 100, 100]
  _mdetr(tmp_path, (1, "a field", whole), (2, "a cow", left), (3, "grass", whole), (4, "x", None),
         data="refcocog")
  task = picture_task("refcocog-expressions", tmp_path)
  assert [row.answers for row in task.rows] == [("a field", "grass"), ("a cow",)]
  assert task.rows[0].prompt == (
    "<image><grounding><phrase> It</phrase><object><patch_index_0000><patch_index_1023></object> is"
  )
  assert task.rows[0].demonstration.endswith("</object> is grass")
  assert (task.metric, task.skipped) == ("meteor", 1)


@pytest.mark.parametrize("rows,message", [
  ([(1, "a", [120, 10, 160, 60])], r"image 1 has the box \(120, 10, 280, 70\), which leaves its pic"
   r"ture of 200 x 100 pixels; boxes are \(x, y, width, height\) in pixels; if these are \(x1"),
  ([(1, "a", [20, 10, 0, 60])], r"image 1 has the box \(20, 10, 20, 70\), whose right or bottom"),
  ([(1, "a", [20, 10, 5])], r"annotations\[0\].bbox=\[20, 10, 5\] should be a list of 4 whose"),
  ([(1, "a", [0, 0, 9, 9]), (1, "b", [0, 0, 9, 9])], "has 2 images and 1 different ids of them"),
])
def test_bad_expressions(tmp_path, rows, message):
  with pytest.raises(ValueError, match=message):
    picture_task("refcoco", _mdetr(tmp_path, *rows))


def test_a_box_of_another_file_is_refused(tmp_path):
  _mdetr(tmp_path, (1, "a", [0, 0, 9, 9]))
  path = tmp_path / "finetune_refcoco_val.json"
  path.write_text(path.read_text().replace('"image_id": 1', '"image_id": 5'))
  with pytest.raises(ValueError, match="has a box of the image 5, which is not among its images"):
    picture_task("refcoco", tmp_path)


def _original(folder, *, references=None, instances=None):
  sentences = [{"sent": "left man", "sent_id": 7, "raw": "Left man", "tokens": ["left", "man"]},
               {"sent": "him", "sent_id": 8, "raw": "him", "tokens": ["him"]}]
  if references is None:
    references = [
      {"ref_id": i, "ann_id": ann, "image_id": 9, "split": split, "category_id": 1,
       "file_name": "COCO_train2014_000000000009_4.jpg", "sentences": sentences}
      for i, (ann, split) in enumerate([(4, "val"), (5, "testA")])]
  if instances is None:
    instances = {
      "images": [{"id": 9, "file_name": "a.jpg", "width": 200, "height": 100}],
      "annotations": [{"id": 4, "image_id": 9, "bbox": [20, 10, 100, 50]},
                      {"id": 5, "image_id": 9, "bbox": [0, 0, 200, 100]}]}
  _write(folder / "refcoco/instances.json", instances)
  (folder / "refcoco/refs(unc).p").write_bytes(pickle.dumps(references, 2))
  _write(folder / "a.jpg")
  return folder


def test_the_original_form_has_several_expressions_of_an_annotation(tmp_path):
  task = picture_task("refcoco", _original(tmp_path))
  assert [row.prompt.removeprefix("<image><grounding><phrase> ") for row in task.rows] == [
    "left man</phrase>", "him</phrase>"]
  assert {row.boxes for row in task.rows} == {((0.1, 0.1, 0.6, 0.6),)}
  assert task.rows[0].images == (str(tmp_path / "a.jpg"),)
  (whole, _) = picture_task("refcoco", tmp_path, split="testA").rows
  assert whole.boxes == ((0, 0, 1, 1),)
  with pytest.raises(ValueError, match=r"refs\(unc\).p has no split 'testB' \(it has testA, val\)"):
    picture_task("refcoco", tmp_path, split="testB")


@pytest.mark.parametrize("change,message", [
  ({"instances": {"images": [], "annotations": []}}, "annotation 4 or its image is not there, an"),
  ({"references": [pathlib.Path("x")]}, "cannot be read as a pickle of plain values .it holds pa"),
  ({"references": [{"ann_id": 4}]}, r"refs\(unc\).p has no field '\[0\].split', which should be"),
])
def test_bad_originals(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    picture_task("refcoco", _original(tmp_path, **change))


def _seed(folder, *changes, types=None):
  base = {"answer": "C", "choice_a": "One", "choice_b": "Two", "choice_c": "Three ",
          "choice_d": "Four", "data_id": "14_25", "data_type": "image",
          "question": "How many\ntowels?", "question_id": "101", "question_type_id": 5}
  types = {"Instances Counting": 5} if types is None else types
  _write(folder / "SEED-Bench.json",
         {"questions": [base | change for change in changes], "question_type": types})
  _write(folder / "SEED-Bench-image/14_25")
  return folder


def test_questions_of_seed_bench(tmp_path):
  task = picture_task("seed-bench", _seed(
    tmp_path, {}, {"data_type": "video", "segment": [0, 1]}, {"choice_b": "One"}))
  (row,) = task.rows
  assert row.prompt == "<image> Question: How many towels? Answer:" and row.label == 2
  assert row.options == (" One", " Two", " Three", " Four")
  assert row.categories == ("Instances Counting",) and task.skipped == 1  # the same choice twice
  assert row.images == (str(tmp_path / "SEED-Bench-image/14_25"),)
  unnamed = picture_task("seed-bench", _seed(tmp_path, {}, types={}))
  assert unnamed.rows[0].categories == ("5",)


@pytest.mark.parametrize("change,message", [
  ({"answer": "E"}, r'questions\[0\].answer="E" should be one of "A", "B", "C", "D"'),
  ({"question_type_id": 9}, "question 101 has the type 9, which question_type does not name .it"),
])
def test_bad_questions(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    picture_task("seed-bench", _seed(tmp_path, change))


def test_captions_and_questions_may_be_asked_for_in_grounded_form(tmp_path):
  _write(tmp_path / "1.jpg")
  _write(tmp_path / "dataset_flickr30k.json", {"images": [
    {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "A man"}]}]})
  task = picture_task("flickr30k", tmp_path, template=1)
  assert task.rows[0].prompt == "<image><grounding> An image of"


def test_a_task_about_boxes_has_them():
  row = Example(3, "<phrase> a</phrase>", (), -1, ("x",))
  with pytest.raises(ValueError, match="row 3 .* does not fit metric='referring': it has no box"):
    Task("t", (row,), metric="referring")
