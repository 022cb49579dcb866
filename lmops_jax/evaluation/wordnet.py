"""Sets of synonyms of English words, from WordNet's own database files in a local folder.

What is read of it (wndb(5WN)): `index.POS`, a line for each word with the offsets of its sets, and
`POS.exc`, a line for each irregular form with its base forms. A word's sets, over all parts of
speech, are its own and those of its base forms, as METEOR 1.5 has them: base forms are what the
exceptions say, or else the first regular one that WordNet has (morphy(7WN), without its rules for
"ful" and for words of several parts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmops_jax.host.foreign_files import is_there, read_text
from lmops_jax.host.words import shortened

_SHOWN = 60  # characters of a bad line
_PARTS = ("noun", "verb", "adj", "adv")
# Endings and what stands for them in the base form, of nouns, verbs and adjectives in this order.
_ENDINGS = (
  ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
  ("men", "man"), ("ies", "y"),
  ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"),
  ("ing", ""),
  ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)


@dataclasses.dataclass(frozen=True)
class WordNet:
  """Words of WordNet in lower case.

  Attributes:
    sets: of each word, its sets of synonyms: part of speech and offset, such as "noun02121620".
    bases: of each irregular form, its base forms over all parts of speech.
  """

  sets: Mapping[str, frozenset[str]]
  bases: Mapping[str, tuple[str, ...]]

  def synonyms(self, word: str) -> frozenset[str]:
    """The sets of a word and of its base forms; none if WordNet does not have it.

    Args:
      word: in lower case.
    """
    none: frozenset[str] = frozenset()
    bases = self.bases[word] if word in self.bases else (self._regular(word),)
    return none.union(*(self.sets.get(each, none) for each in (word, *bases)))

  def _regular(self, word: str) -> str:
    """The first regular base form that is a word; the word itself if there is none."""
    if word.endswith("ss") or len(word) <= 2:
      return word
    forms = (word.removesuffix(end) + base for end, base in _ENDINGS if word.endswith(end))
    return next((form for form in forms if form in self.sets), word)


def read(folder: Path | str) -> WordNet:
  """Reads a folder of WordNet's database files, such as those of version 3.0.

  Args:
    folder: has `index.POS` and `POS.exc` of noun, verb, adj and adv.

  Raises:
    ValueError: a missing file, or a line that is not as these files have it, named.
  """
  folder = Path(folder).expanduser()
  for name in (*(f"index.{part}" for part in _PARTS), *(f"{part}.exc" for part in _PARTS)):
    if not is_there(folder / name):
      raise ValueError(
        f"{folder} has no {name}; give the folder of WordNet's database files, such as dict of its "
        "own archive or /usr/share/wordnet of Debian's package wordnet-base.")
  sets: dict[str, frozenset[str]] = {}
  bases: dict[str, tuple[str, ...]] = {}
  for part in _PARTS:
    for word, offsets in _of_index(folder / f"index.{part}"):
      own = frozenset(part + offset for offset in offsets)
      sets[word] = sets.get(word, frozenset()) | own
    for form, own_bases in _of_exceptions(folder / f"{part}.exc"):
      bases[form] = (*bases.get(form, ()), *own_bases)
  return WordNet(sets, bases)


def _of_index(path: Path) -> Iterator[tuple[str, list[str]]]:
  """Words and the offsets of their sets; lines of the licence on top begin with blanks."""
  for number, line in enumerate(read_text(path).splitlines(), 1):
    if line.startswith("  "):
      continue
    fields = line.split()  # word, part, number of sets, of pointers, pointers, two counts, offsets
    counts = [int(field) if field.isdecimal() else 0 for field in fields[2:4]]
    num_sets = counts[0] if counts else 0
    if num_sets < 1 or len(fields) != 6 + sum(counts):
      raise _not_a("a word with the offsets of its sets", path, number, line)
    yield fields[0], fields[-num_sets:]


def _of_exceptions(path: Path) -> Iterator[tuple[str, list[str]]]:
  """Irregular forms and their base forms."""
  for number, line in enumerate(read_text(path).splitlines(), 1):
    form, *bases = line.split() or [""]
    if not bases:
      raise _not_a("a form with its base forms", path, number, line)
    yield form, bases


def _not_a(what: str, path: Path, number: int, line: str) -> ValueError:
  return ValueError(
    f"{path}:{number}: {shortened(line, _SHOWN)!r} is not {what}; fetch the file again.")
