"""Referring expressions of RefCOCO, RefCOCO+ and RefCOCOg, in any of three forms.

MDETR's (arXiv:2104.12763), which Kosmos-2 was evaluated with: a file `*refcoco_val.json` for each
split, where each expression is an entry of `images` with its caption. And the original one: folders
`refcoco` and so on with `refs(unc).p` or `refs(umd).p`, a pickle of plain values, and
`instances.json`. Boxes are (x, y, width, height) in pixels. Pictures are those of COCO 2014, whose
names tell their folder. Or the dataset `ref_coco` of tfds, which holds its pictures, and the
expressions as people typed them (of `refs` the field `sent` is read, in lower case and without
punctuation).
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
from annotated_types import Len

from lmops_jax.data.boxes import Box, from_corner_and_size
from lmops_jax.data.boxes import checked as checked_boxes
from lmops_jax.data.multimodal import Picture
from lmops_jax.data.tasks.pictures.source import NotThere, Source, fields_of
from lmops_jax.data.tasks.pictures.truths import as_words, fractions
from lmops_jax.data.tasks.task import Example
from lmops_jax.data.tfds_images import StoredPicture, undecoded
from lmops_jax.host.foreign_files import checked, printable, read_bytes, read_json

_PART = re.compile(r"COCO_((?:train|val|test)20\d\d)_")
_HINT = (
  "boxes are (x, y, width, height) in pixels; if these are (x1, y1, x2, y2), subtract the corner")


class _Picture(pydantic.BaseModel):
  id: int
  file_name: str
  width: int
  height: int
  caption: str


class _Annotation(pydantic.BaseModel):
  image_id: int
  bbox: Annotated[list[float], Len(4, 4)]


class _Expressions(pydantic.BaseModel):
  images: list[_Picture]
  annotations: list[_Annotation]


class _Sentence(pydantic.BaseModel):
  sent: str
  sent_id: int


class _Reference(pydantic.BaseModel):
  ann_id: int
  split: str
  sentences: list[_Sentence]


class _Image(pydantic.BaseModel):
  id: int
  file_name: str
  width: int
  height: int


class _Instance(_Annotation):
  id: int


class _Instances(pydantic.BaseModel):
  images: list[_Image]
  annotations: list[_Instance]


class Expression(NamedTuple):
  """An expression and what it refers to.

  Attributes:
    id: of the entry, or of the sentence.
    picture: its path, or itself.
    words: the expression.
    boxes: fractions of the picture.
  """

  id: int
  picture: str | Picture | StoredPicture
  words: str
  boxes: tuple[Box, ...]


def comprehension(source: Source, data: str) -> Iterator[Example | None]:
  """A row for each expression, whose box is asked for; None for one without box.

  Args:
    source: the folder.
    data: "refcoco", "refcoco+" or "refcocog".
  """
  for found in _expressions(source, data):
    if not found.boxes or "<" in found.words:
      yield None
      continue
    yield source.example(
      str(found.id), fields_of(source.prompt, phrase=found.words), [found.picture],
      answers=[as_words(found.boxes, source.grid())], boxes=found.boxes)


def description(source: Source, data: str) -> Iterator[Example | None]:
  """A row for each box, whose expressions are the right answers; None for one without box."""
  of_box: dict[tuple, list[Expression]] = {}
  for found in _expressions(source, data):
    of_box.setdefault((found.picture, found.boxes), []).append(found)
  for (picture, boxes), members in of_box.items():
    if not boxes:
      yield from [None] * len(members)
      continue
    prompt = fields_of(source.prompt, boxes=as_words(boxes, source.grid()))
    yield source.example(
      str(members[0].id), prompt, [picture], answers=[member.words for member in members])


def _expressions(source: Source, data: str) -> Iterator[Expression]:
  if source.dataset is not None:
    return _of_tfds(source)
  path = source.file(
    f"*{data}_{source.split}.json", f"{data}/refs(umd).p", f"{data}/refs(unc).p")
  return (_original if path.suffix == ".p" else _of_mdetr)(source, path)


def _of_mdetr(source: Source, path: Path) -> Iterator[Expression]:
  found = checked(_Expressions, read_json(path), path)
  boxes: dict[int, list] = {image.id: [] for image in found.images}
  if len(boxes) < len(found.images):
    raise ValueError(
      f"{printable(path)} has {len(found.images)} images and {len(boxes)} different ids of them; "
      "give each expression an entry of its own."
    )
  for annotation in found.annotations:
    if annotation.image_id not in boxes:
      raise ValueError(
        f"{printable(path)} has a box of the image {annotation.image_id}, which is not among its "
        "images; give the file of one split."
      )
    boxes[annotation.image_id].append(annotation.bbox)
  for image in found.images:
    where = f"{printable(path)}: image {image.id}"
    yield _expression(source, image, image.id, image.caption, boxes[image.id], where)


def _of_tfds(source: Source) -> Iterator[Expression]:
  dataset = source.dataset
  splits = dataset.builder.info.splits
  if dataset.split not in splits:
    raise NotThere(
      f"the tfds dataset {dataset.name} has no split {source.split!r} (it has "
      f"{', '.join(sorted(splits))}).")
  examples = undecoded(dataset)
  is_random = isinstance(examples, Sequence)
  for row, example in enumerate(examples):
    where = f"{dataset.name}[{dataset.split}]:{row}"
    picture = (
      StoredPicture(where, dataset, row) if is_random
      else Picture(where, data=bytes(example["image"])))
    objects = example["objects"]
    expressions = objects["refexp"]
    for (top, left, bottom, right), numbers, texts in zip(
      objects["bbox"], expressions["refexp_id"], expressions["raw"], strict=True
    ):
      box, = checked_boxes(np.array([(left, top, right, bottom)], np.float64), where).tolist()
      for number, text in zip(np.asarray(numbers), np.asarray(texts), strict=True):
        yield Expression(int(number), picture, " ".join(text.decode().split()), (tuple(box),))


def _original(source: Source, path: Path) -> Iterator[Expression]:
  references = checked(list[_Reference], _plain_pickle(path), path)
  there = {reference.split for reference in references}
  if source.split not in there:
    raise NotThere(
      f"{printable(path)} has no split {source.split!r} (it has {', '.join(sorted(there))}).")
  path = path.with_name("instances.json")
  instances = checked(_Instances, read_json(path), path)
  images = {image.id: image for image in instances.images}
  annotations = {annotation.id: annotation for annotation in instances.annotations}
  for reference in references:
    if reference.split != source.split:
      continue
    where = f"{printable(path)}: annotation {reference.ann_id}"
    annotation = annotations.get(reference.ann_id)
    if annotation is None or annotation.image_id not in images:
      raise ValueError(
        f"{where} or its image is not there, and an expression refers to it; give the instances of "
        "the same data set."
      )
    for sentence in reference.sentences:
      yield _expression(
        source, images[annotation.image_id], sentence.sent_id, sentence.sent, [annotation.bbox],
        where)


def _expression(
  source: Source, image: _Image | _Picture, number: int, words: str, boxes: list, where: str
) -> Expression:
  corners = from_corner_and_size(boxes)
  return Expression(
    number, _place(source.pictures, image.file_name), " ".join(words.split()),
    fractions(corners, image.width, image.height, where, _HINT))


class _PlainUnpickler(pickle.Unpickler):
  """Makes numbers, texts, lists and mappings, and runs nothing."""

  def find_class(self, module, name):
    raise pickle.UnpicklingError(f"it holds {module}.{name}, and expressions are plain values")


def _plain_pickle(path: Path) -> Any:
  file = io.BytesIO(read_bytes(path))
  try:
    return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
  except Exception as error:  # a broken pickle raises almost anything
    raise ValueError(
      f"{printable(path)} cannot be read as a pickle of plain values ({error}); fetch the file "
      "again."
    ) from error


def _place(pictures: Path, name: str) -> str:
  """Where a picture of COCO is: in its part's folder, if there is one."""
  part = _PART.match(name)
  return f"{part[1]}/{name}" if part and (pictures / part[1]).is_dir() else name
