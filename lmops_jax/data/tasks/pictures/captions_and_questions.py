"""Captions and questions in the JSON files of COCO, Flickr30k, NoCaps, (OK-)VQA and VizWiz."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pydantic

from lmops_jax.data.tasks.pictures.source import NotThere, Source, fields_of
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import checked, printable, read_json

_FREQUENT = 9  # questions


class _Sentence(pydantic.BaseModel):
  raw: str


class _Captioned(pydantic.BaseModel):
  filename: str
  split: str
  sentences: list[_Sentence]
  filepath: str = ""
  cocoid: int | None = None


class _Karpathy(pydantic.BaseModel):
  images: list[_Captioned]


class _Question(pydantic.BaseModel):
  question_id: int
  image_id: int
  question: str


class _Questions(pydantic.BaseModel):
  questions: list[_Question]


class _Answer(pydantic.BaseModel):
  answer: str


class _Annotation(pydantic.BaseModel):
  question_id: int
  answers: list[_Answer]


class _Annotations(pydantic.BaseModel):
  annotations: list[_Annotation]


class _OpenImage(pydantic.BaseModel):
  id: int
  file_name: str
  domain: str | None = None


class _Caption(pydantic.BaseModel):
  image_id: int
  caption: str


class _NoCaps(pydantic.BaseModel):
  images: list[_OpenImage]
  annotations: list[_Caption]


class _VizWiz(pydantic.BaseModel):
  image: str
  question: str
  answers: list[_Answer]


def karpathy(source: Source) -> Iterator[Example | None]:
  """Pictures with their captions, by Karpathy's splits; "train" takes COCO's "restval" along."""
  for image in _of_split(source):
    answers = [sentence.raw.strip() for sentence in image.sentences]
    place = f"{image.filepath}/{image.filename}" if image.filepath else image.filename
    yield source.example(place, source.prompt, [place], answers=answers)


def _of_split(source: Source) -> list[_Captioned]:
  """The pictures of a split of Karpathy's file."""
  path = source.file("dataset_*.json", "dataset.json")
  splits = ("train", "restval") if source.split == "train" else (source.split,)
  found = checked(_Karpathy, read_json(path), path)
  there = {image.split for image in found.images}
  if not there & set(splits):
    raise NotThere(
      f"{printable(path)} has no pictures of the split {source.split!r} (it has "
      f"{', '.join(sorted(there)) or 'none'})."
    )
  return [image for image in found.images if image.split in splits]


def nocaps(source: Source) -> Iterator[Example | None]:
  """Pictures with ten captions each, by how near their things are to COCO's: the domain."""
  path = source.file(f"nocaps_{source.split}_*captions.json", f"nocaps_{source.split}.json")
  found = checked(_NoCaps, read_json(path), path)
  captions = collections.defaultdict(list)
  for annotation in found.annotations:
    captions[annotation.image_id].append(annotation.caption.strip())
  for image in found.images:
    yield source.example(
      image.file_name, source.prompt, [image.file_name], answers=captions.get(image.id, ()),
      categories=(image.domain,) if image.domain else ())


def vqav2(source: Source) -> Iterator[Example | None]:
  """Questions about pictures of COCO, each with ten answers; OK-VQA has the same form."""
  for asked in _asked(source):
    yield source.example(asked.key, asked.prompt, [asked.picture], answers=asked.answers)


def vqa_karpathy(source: Source) -> Iterator[Example | None]:
  """Questions of VQAv2 about the pictures of a split of Karpathy's, for COCO's captions.

  What tells in-domain questions from others: whether people's commonest answer is that of nine
  questions or more of VQAv2's two parts, as the 3,129 answers are that classifiers choose among.
  """
  parts = [list(_asked(source._replace(split=part))) for part in ("train2014", "val2014")]
  frequent = collections.Counter(asked.answers[-1] for part in parts for asked in part)
  ids = {image.cocoid for image in _of_split(source)}
  for asked in itertools.chain(*parts):
    if asked.image_id in ids:
      domain = "in-domain" if frequent[asked.answers[-1]] >= _FREQUENT else "out-domain"
      yield source.example(
        asked.key, asked.prompt, [asked.picture], answers=asked.answers, categories=(domain,))


class _Asked(NamedTuple):
  """A question with its picture, and answers of which the commonest is the last."""

  key: str
  prompt: str
  image_id: int
  picture: str
  answers: list[str]


def _asked(source: Source) -> Iterator[_Asked]:
  path = source.file(f"*OpenEnded_mscoco_{source.split}*_questions.json")
  questions = checked(_Questions, read_json(path), path).questions
  path = source.file(f"*mscoco_{source.split}*_annotations.json")
  annotations = checked(_Annotations, read_json(path), path).annotations
  answers = {a.question_id: [answer.answer for answer in a.answers] for a in annotations}
  part = path.name.partition("mscoco_")[2].removesuffix("_annotations.json")
  for question in questions:
    if question.question_id not in answers:
      raise ValueError(
        f"{printable(path)} has no answers to the question {question.question_id}; give the "
        "annotations of the same split as the questions."
      )
    picture = f"{part}/COCO_{part}_{question.image_id:012d}.jpg"
    prompt = fields_of(source.prompt, question=question.question)
    yield _Asked(
      str(question.question_id), prompt, question.image_id, picture,
      _commonest_last(answers[question.question_id]))


def vizwiz(source: Source) -> Iterator[Example | None]:
  """Questions that blind people asked about their pictures, each with ten answers."""
  path = source.file(f"{source.split}.json", f"Annotations/{source.split}.json")
  for row in checked(list[_VizWiz], read_json(path), path):
    prompt = fields_of(source.prompt, question=row.question)
    answers = _commonest_last([answer.answer for answer in row.answers])
    yield source.example(row.image, prompt, [f"{source.split}/{row.image}"], answers=answers)


def _commonest_last(answers: Sequence[str]) -> list[str]:
  """The answers by rising frequency: a demonstration shows the last, which most people gave."""
  counts = collections.Counter(answers)
  return sorted(answers, key=lambda answer: (counts[answer], answer))
