"""SEED-Bench's questions about pictures, with four choices each (arXiv:2307.16125)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pydantic

from lmops_jax.data.tasks.pictures.source import Source, fields_of
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import checked, printable, read_json

PICTURES = "SEED-Bench-image"  # folder of the pictures beside the questions
_LETTERS = "ABCD"


class _Question(pydantic.BaseModel):
  answer: Literal["A", "B", "C", "D"]
  choice_a: str
  choice_b: str
  choice_c: str
  choice_d: str
  data_id: str
  data_type: str
  question: str
  question_id: str
  question_type_id: int


class _Questions(pydantic.BaseModel):
  questions: list[_Question]
  question_type: dict[str, int] = {}


def seed_bench(source: Source) -> Iterator[Example | None]:
  """The questions about single pictures by their type; those about videos are passed over."""
  path = source.file("SEED-Bench.json")
  found = checked(_Questions, read_json(path), path)
  types = {number: name for name, number in found.question_type.items()}
  place = f"{PICTURES}/" if source.pictures == source.folder else ""
  for question in found.questions:
    if question.data_type != "image":
      continue
    number = question.question_type_id
    if types and number not in types:
      raise ValueError(
        f"{printable(path)}: question {question.question_id} has the type {number}, which "
        f"question_type does not name (it has {', '.join(map(str, sorted(types)))})."
      )
    choices = (question.choice_a, question.choice_b, question.choice_c, question.choice_d)
    yield source.example(
      question.question_id, fields_of(source.prompt, question=_on_one_line(question.question)),
      [f"{place}{question.data_id}"], options=[f" {_on_one_line(choice)}" for choice in choices],
      label=_LETTERS.index(question.answer), categories=[types.get(number, str(number))])


def _on_one_line(text: str) -> str:
  return text.replace("\n", " ").strip()
