"""Referring expressions of tfds: datasets of the features of `ref_coco`, as tfds writes them."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from lmops_jax.data import boxes
from lmops_jax.data.images import decode
from lmops_jax.data.tasks import picture_task

EXPRESSIONS = [  # of each picture: a box (x1, y1, x2, y2) and its expressions with their ids
  [((0.25, 0.0, 0.5, 0.75), {100: "The  left dog!", 101: "dog"})],
  [((0.0, 0.0, 1.0, 1.0), {102: "grass"}), ((0.5, 0.25, 1.0, 1.0), {103: "a cat"})]]


def write_ref_coco(folder, config="refcoco_unc", kind="array_record", splits=("validation",)):
  """A dataset that `tfds.builder("ref_coco/CONFIG", data_dir=folder)` finds."""
  import tensorflow_datasets as tfds

  features = tfds.features
  annotation = {
    "id": np.int64, "area": np.int64, "bbox": features.BBoxFeature(), "label": np.int64}
  of_rows = features.FeaturesDict({
    "image": features.Image(encoding_format="jpeg"),
    "image/id": np.int64,
    "objects": features.Sequence(annotation | {
      "gt_box_index": np.int64, "mask": features.Image(encoding_format="png"),
      "refexp": features.Sequence({"refexp_id": np.int64, "raw": features.Text()})}),
    "coco_annotations": features.Sequence(annotation)})

  def row(number, of_picture):
    plain = [
      {"id": i, "area": 9, "bbox": features.BBox(y1, x1, y2, x2), "label": 1}
      for i, ((x1, y1, x2, y2), _) in enumerate(of_picture)]
    objects = [
      annotation | {"gt_box_index": i, "mask": np.ones((20, 40, 3), np.uint8), "refexp": [
        {"refexp_id": key, "raw": text} for key, text in of_picture[i][1].items()]}
      for i, annotation in enumerate(plain)]
    return {"image": np.full((20, 40, 3), 50 + 100 * number, np.uint8), "image/id": number,
            "objects": objects, "coco_annotations": plain}

  rows = [(i, row(i, of_picture)) for i, of_picture in enumerate(EXPRESSIONS)]
  tfds.dataset_builders.store_as_tfds_dataset(
    name="ref_coco", config=config, version="1.1.0", features=of_rows, data_dir=folder,
    split_datasets=dict.fromkeys(splits, rows), file_format=kind, disable_shuffling=True)
  return str(folder)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  write_ref_coco(folder, "refcocog_umd", splits=("validation", "train"))
  return write_ref_coco(folder)


def _check(task):
  assert [row.prompt for row in task.rows] == [
    f"<image><grounding><phrase> {text}</phrase>"
    for text in ("The left dog!", "dog", "grass", "a cat")]
  assert [row.boxes for row in task.rows] == [
    ((0.25, 0.0, 0.5, 0.75),), ((0.25, 0.0, 0.5, 0.75),), ((0, 0, 1, 1),), ((0.5, 0.25, 1, 1),)]
  assert task.rows[3].answers == (boxes.words(boxes.encode(task.rows[3].boxes)),)
  values = []
  for row in task.rows:
    (picture,) = row.images
    image = decode(picture.read(), picture.where)
    assert image.size == (40, 20)
    values.append(round(float(np.asarray(image).mean())))
  assert values == [50, 50, 150, 150] and task.metric == "referring"
  # Rows of a picture share it, so that it is encoded once.
  assert len({row.images for row in task.rows}) == 2


def test_expressions_of_a_dataset_with_random_access(stored):
  task = picture_task("refcoco", data_dir=stored)
  _check(task)
  assert task.rows[0].images[0].where == "ref_coco/refcoco_unc[validation]:0"
  assert len(picture_task("refcoco", data_dir=stored, limit=3).rows) == 3
  with pytest.raises(ValueError, match="has no split 'testA' .it has validation"):
    picture_task("refcoco", data_dir=stored, split="testA")


def test_expressions_of_tfrecord(tmp_path):
  task = picture_task(
    "refcoco-plus", data_dir=write_ref_coco(tmp_path, "refcocoplus_unc", "tfrecord"))
  _check(task)


def test_descriptions_draw_from_the_train_split(stored):
  task = picture_task("refcocog-expressions", data_dir=stored)
  assert [row.answers for row in task.rows] == [
    ("The left dog!", "dog"), ("grass",), ("a cat",)]
  assert [row.answers for row in task.train] == [row.answers for row in task.rows]
  assert {row.images[0].where[:31] for row in task.train} == {"ref_coco/refcocog_umd[train]:0",
                                                               "ref_coco/refcocog_umd[train]:1"}
  ids = picture_task("refcocog", data_dir=stored)
  assert len({row.id for row in ids.rows}) == 4


def test_expressions_have_the_ids_of_the_original_form(stored, tmp_path):
  """An expression is the same row, wherever it is read from."""
  import pickle

  folder = tmp_path / "refcoco"
  folder.mkdir()
  picture = io.BytesIO()
  Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(picture, "PNG")
  for i in range(2):
    (tmp_path / f"{i}.jpg").write_bytes(picture.getvalue())
  annotations, references = [], []
  for i, of_picture in enumerate(EXPRESSIONS):
    for (x1, y1, x2, y2), texts in of_picture:
      number = len(annotations)
      annotations.append({"id": number, "image_id": i, "bbox": [
        40 * x1, 20 * y1, 40 * (x2 - x1), 20 * (y2 - y1)]})
      references.append({"ann_id": number, "split": "val", "sentences": [
        {"sent": text, "sent_id": key} for key, text in texts.items()]})
  (folder / "instances.json").write_text(json.dumps({"annotations": annotations, "images": [
    {"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 20} for i in range(2)]}))
  (folder / "refs(unc).p").write_bytes(pickle.dumps(references))
  local, stored_rows = picture_task("refcoco", tmp_path), picture_task("refcoco", data_dir=stored)
  assert [row._replace(images=()) for row in local.rows] == [
    row._replace(images=()) for row in stored_rows.rows]


@pytest.mark.parametrize("name, how, message", [
  ("coco", {}, "the task coco reads its data set's own folder .*; give it with data"),
  ("refcoco", {"pictures": "."}, "pictures='.' belongs to annotations in a folder, and tfds holds"),
  ("refcocog", {"data_dir": os.devnull}, "the tfds dataset 'ref_coco/refcocog_umd' of task refcoco"
   "g is not prepared in .*; run python -m .* build ref_coco/refcocog_umd where"),
])
def test_what_tfds_has_not_is_told(name, how, message):
  with pytest.raises(ValueError, match=message):
    picture_task(name, **how)
