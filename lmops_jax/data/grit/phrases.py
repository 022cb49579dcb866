"""What a caption names: noun chunks, and the referring expressions around them, by spaCy.

The first and fifth step of GrIT (arXiv:2306.14824, section 3.1). A noun chunk grows to all that
depends on its root: of "a dog in a field of flowers" the chunk "a dog" becomes the whole. A chunk
that is joined to others ("cats and dogs") stays as it is, since the others depend on its root too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from lmops_jax.config.setting_types import PositiveInt, Text, component
from lmops_jax.host.hashing import digest

if TYPE_CHECKING:
  from spacy.language import Language
  from spacy.tokens import Doc, Token

# The authors' list, from an answer to users of their code.
ABSTRACT_WORDS = (
  "time", "life", "love", "freedom", "happiness", "wisdom", "peace", "justice", "hope", "courage",
  "faith", "understanding", "advantage", "pursuit",
)


class Phrase(NamedTuple):
  """A noun chunk of a caption and the referring expression around it, in characters, ends excluded.

  Attributes:
    start, end: of the chunk, which the detector is asked for.
    expression_start, expression_end: of the expression.
  """

  start: int
  end: int
  expression_start: int
  expression_end: int


class Phrases(NamedTuple):
  """The phrases of a caption, in order, and how many chunks were left out as abstract."""

  found: tuple[Phrase, ...]
  num_abstract: int


@runtime_checkable
class PhraseFinder(Protocol):
  """A setting that finds what captions name."""

  def fingerprint(self) -> str:
    """Changes when the phrases may."""

  def phrases(self, captions: Sequence[str]) -> list[Phrases]:
    """The phrases of each caption."""


def phrases_of(doc: Doc, abstract_words: Sequence[str] = ABSTRACT_WORDS) -> Phrases:
  """The phrases of a parsed caption.

  Args:
    doc: with heads and dependencies, of a language whose noun chunks spaCy knows.
    abstract_words: a chunk whose root is one of them, as it stands or as its lemma, is left out.
  """
  found, num_abstract = [], 0
  for chunk in doc.noun_chunks:
    if {chunk.root.lower_, chunk.root.lemma_.lower()} & set(abstract_words):
      num_abstract += 1
      continue
    first, last = chunk[0], chunk[-1]
    whole = (first, last) if chunk.root.conjuncts else (
      min(first, chunk.root.left_edge, key=_place), max(last, chunk.root.right_edge, key=_place))
    found.append(Phrase(*_characters(first, last), *_characters(*whole)))
  return Phrases(tuple(found), num_abstract)


def _place(token: Token) -> int:
  return token.i


def _characters(first: Token, last: Token) -> tuple[int, int]:
  return first.idx, last.idx + len(last)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class SpacyPhrases:
  """Phrases from a spaCy model (extra `grit`); the authors took `en_core_web_trf`.

  Attributes:
    model: the folder of a model with a dependency parser, as spaCy writes it (`nlp.to_disk`).
    abstract_words: chunks with one of these roots are left out.
    batch_size: captions that the model reads together; no result is meant to depend on it.

  Raises:
    ValueError: if spaCy is not installed, or `model` is no folder of a model.
  """

  model: Text
  abstract_words: Sequence[Text] = ABSTRACT_WORDS
  batch_size: PositiveInt = dataclasses.field(default=64, repr=False)

  def __post_init__(self):
    if importlib.util.find_spec("spacy") is None:
      raise ValueError(
        "data.SpacyPhrases needs spaCy, which is not installed; run pip install 'lmops_jax[grit]'."
      )
    if not self.model.startswith("<") and not (self._folder / "config.cfg").is_file():
      raise ValueError(
        f"data.SpacyPhrases.model={self.model!r} is no folder of a spaCy model, which has a "
        "config.cfg; fetch one, such as en_core_web_trf, and give the folder with that file."
      )

  @property
  def _folder(self) -> Path:
    return Path(os.path.expanduser(self.model))

  def fingerprint(self) -> str:
    files = ((self._folder / name) for name in ("config.cfg", "meta.json"))
    contents = [path.read_bytes() for path in files if path.is_file()]
    return digest([*contents, "\0".join(self.abstract_words)])

  def phrases(self, captions: Sequence[str]) -> list[Phrases]:
    """The phrases of each caption.

    Raises:
      ValueError: if the model cannot be loaded, or has no dependency parser.
    """
    return [phrases_of(doc, self.abstract_words) for doc in self._parsed(captions)]

  def _parsed(self, captions: Sequence[str]) -> Iterator[Doc]:
    for doc in self._language.pipe(captions, batch_size=self.batch_size):
      if not doc.has_annotation("DEP"):
        raise ValueError(
          f"data.SpacyPhrases.model={self.model!r} parses no dependencies (its parts are "
          f"{', '.join(self._language.pipe_names) or 'none'}); take a model with a parser."
        )
      yield doc

  @functools.cached_property
  def _language(self) -> Language:
    import spacy

    try:
      return spacy.load(self._folder, exclude=["ner"])
    except Exception as error:  # each part of a model has errors of its own
      raise ValueError(
        f"data.SpacyPhrases.model={self.model!r} cannot be loaded by spaCy {spacy.__version__} "
        f"({' '.join(str(error).split())})."
      ) from error
