"""Pictures with a class: of texts and memes, of things, and of what a sentence says of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmops_jax.data.lines import jsonl_rows
from lmops_jax.data.tasks.pictures.source import Source, fields_of, picture_files
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import is_there, printable, read_text

SENTIMENTS = ("negative", "positive")
NO_YES = ("no", "yes")
FALSE_TRUE = ("false", "true")
ENTAILMENTS = ("entailment", "neutral", "contradiction")
_MAPPING = "LOC_synset_mapping.txt"
# Kosmos-1's three pairs, with the paper's description of each animal.
LOOK_ALIKES: dict[str, dict[str, str]] = {
  "woodpecker": {
    "three toed woodpecker":
      "It has black and white stripes throughout the body and a yellow crown.",
    "downy woodpecker": "It has white spots on black wings and some red on the crown.",
  },
  "penguin": {
    "Gentoo penguin": "It has a black head and a white patch above the eyes.",
    "royal penguin": "It has a white face and a yellow crown.",
  },
  "sparrow": {
    "black throated sparrow": "It has white underparts and a black bib on the throat.",
    "fox sparrow": "It has reddish-brown plumage and a streaked breast.",
  },
}


def rendered_sst2(source: Source) -> Iterator[Example | None]:
  """Folders `negative` and `positive` of pictures of sentences."""
  folder = source.part(source.split)
  for label, name in enumerate(SENTIMENTS):
    if not (folder / name).is_dir():
      raise ValueError(f"{printable(folder)} has no folder {name} of the task {source.name}.")
    for path in picture_files(folder / name):
      place = path.relative_to(source.folder)
      yield source.example(str(place), source.prompt, [place], options=_spaced(SENTIMENTS),
                           label=label)


def hateful_memes(source: Source) -> Iterator[Example | None]:
  """JSON lines with `img`, a path, and `label`, 1 for hate speech; a meme's `text` is not read."""
  path = source.file(f"{source.split}.jsonl", f"{source.split}_seen.jsonl")
  for number, row in jsonl_rows(path):
    where = f"{printable(path)}:{number}"
    if not isinstance(row.get("img"), str) or row.get("label") not in (0, 1):
      raise ValueError(
        f"{where} has img={row.get('img')!r} and label={row.get('label')!r}; expected a path and 0 "
        "or 1. Test splits without labels cannot be used."
      )
    yield source.example(row["img"], source.prompt, [row["img"]], options=_spaced(NO_YES),
                         label=int(row["label"]))


def nlvr2(source: Source) -> Iterator[Example | None]:
  """JSON lines with `identifier`, `sentence` and `label`, "True" or "False" of a pair of pictures.

  The identifier without its last number names the pictures; those of "train" lie in the folder
  that their row calls `directory`.
  """
  path = source.file(f"{source.split}.json", f"{source.split}.jsonl")
  for number, row in jsonl_rows(path):
    where = f"{printable(path)}:{number}"
    identifier, sentence = (_text(row, name, where) for name in ("identifier", "sentence"))
    label = str(row.get("label")).lower()  # some copies have a JSON boolean
    if label not in FALSE_TRUE:
      raise ValueError(
        f"{where} has the label {row.get('label')!r}; expected \"True\" or \"False\".")
    stem, folder = identifier.rpartition("-")[0], source.split
    if "directory" in row:
      folder = f"images/{source.split}/{row['directory']}"
    prompt = fields_of(source.prompt, sentence=sentence)
    yield source.example(
      identifier, prompt, [f"{folder}/{stem}-img{i}.png" for i in (0, 1)],
      options=_spaced(FALSE_TRUE), label=FALSE_TRUE.index(label))


def esnli_ve(source: Source) -> Iterator[Example | None]:
  """CSV with `pairID`, `Flickr30kID`, `hypothesis`, `gold_label` and `explanation`.

  The answer is the label and, behind "because", its explanation.
  """
  path = source.file(f"esnlive_{source.split}.csv")
  table = csv.DictReader(io.StringIO(read_text(path)))
  for number, row in enumerate(table, 1):
    where = f"{printable(path)}, row {number},"
    key, picture, hypothesis, label, told = (
      _text(row, name, where)
      for name in ("pairID", "Flickr30kID", "hypothesis", "gold_label", "explanation"))
    if label not in ENTAILMENTS:
      raise ValueError(
        f"{where} has gold_label={label!r}; expected one of {', '.join(ENTAILMENTS)}.")
    told = told.strip().rstrip(".")
    yield source.example(
      f"{key}:{number}", fields_of(source.prompt, hypothesis=hypothesis), [picture],
      answers=[f"{label} because {told}."] if told else ())


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
  value = row.get(name)
  if not isinstance(value, str):
    raise ValueError(f"{where} has {value!r} in its field {name}; expected a text.")
  return value


def imagenet(source: Source) -> Iterator[Example | None]:
  """A folder of pictures for each class, whose name is to be generated; see `class_names`."""
  names = class_names(source)
  for of_class in _folders(source.part(source.split)):
    if of_class.name not in names:
      raise ValueError(
        f"{printable(of_class)} is a folder of a class that {_MAPPING} does not name; give the "
        "mapping of this data set, or none."
      )
    for path in picture_files(of_class):
      place = path.relative_to(source.folder)
      yield source.example(str(place), source.prompt, [place], answers=[names[of_class.name]])


def class_names(source: Source) -> dict[str, str]:
  """The name of each class by its folder's name; classes may share one ("crane").

  It is the first name behind the folder's in `LOC_synset_mapping.txt` ("n01440764 tench, Tinca
  tinca"), or without that file the folder's own, with blanks for underscores.

  Raises:
    ValueError: for a line of the mapping without a name.
  """
  path = source.folder / _MAPPING
  if not is_there(path):
    return {of.name: of.name.replace("_", " ") for of in _folders(source.part(source.split))}
  found = {}
  for number, line in enumerate(read_text(path).splitlines(), 1):
    synset, _, names = line.strip().partition(" ")
    if synset and not names.strip():
      raise ValueError(f"{printable(path)}:{number} names no class behind {synset!r}.")
    if synset:
      found[synset] = names.split(",")[0].strip()
  return found


def _folders(folder: Path) -> list[Path]:
  return sorted(path for path in folder.iterdir() if path.is_dir())


def look_alikes(source: Source) -> Iterator[Example | None]:
  """A folder of pictures for each of Kosmos-1's six animals, underscores for blanks in its name."""
  for category, classes in LOOK_ALIKES.items():
    fields = {"category": category}
    for i, (name, text) in enumerate(classes.items(), 1):
      fields |= {f"name{i}": name, f"text{i}": text, f"short{i}": _short(name, category)}
    prompt = fields_of(source.prompt, **fields)
    for name in classes:
      for path in picture_files(source.part(name.replace(" ", "_"), name)):
        place = path.relative_to(source.folder)
        yield source.example(str(place), prompt, [place], answers=[_short(name, category), name])


def _short(name: str, category: str) -> str:
  return name.removesuffix(f" {category}")


def _spaced(words: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(f" {word}" for word in words)
