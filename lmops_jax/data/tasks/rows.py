"""Rows of a dataset, under its own field names, to formatted rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmops_jax.data.documents import document_id
from lmops_jax.data.tasks.entries import Entry, Wording
from lmops_jax.data.tasks.task import Example, problem_of

_KEYS = "ABCDE"
_NOTHING = object()
NULL_FIELD = "N/A"  # Zhao et al. 2021, arXiv:2102.09690


def examples(
  rows: Iterator[tuple[str, Mapping[str, Any]]], entry: Entry, wording: Wording,
  labels: Sequence[int] | None = None,
) -> Iterator[Example | None]:
  """Formats rows; None stands for one that is left out.

  Args:
    rows: for each row, where it was found ("test.jsonl:3"), and its fields.
    entry: tells the fields' names.
    wording: tells how the rows read.
    labels: for each number that the data uses, the label it stands for; None: the same number.

  Raises:
    ValueError: for a missing field, or a label that is none of the task's; it names the row.
  """
  for where, row in rows:
    part = -1
    for part, fields in enumerate(READERS[entry.reader](row, where)):
      source = f"{where}#{part}" if part else where
      yield _example(fields, source, entry, wording, labels)
    if part < 0:
      yield None


def null_prompt(entry: Entry, wording: Wording) -> str | None:
  """The prompt with "N/A" in all fields; None for rows that have options of their own."""
  if not wording.words:
    return None
  return wording.prompt.format(**dict.fromkeys(entry.fields, NULL_FIELD))


def _example(fields, where, entry, wording, labels) -> Example | None:
  values = {name: _text(fields, places, where) for name, places in entry.fields.items()}
  identifier = document_id(where)
  prompt = wording.prompt.format(**values)
  if entry.metric != "accuracy":
    answers = _look(fields, entry.label, where)
    answers = tuple(map(str, answers if isinstance(answers, list) else [answers]))
    example = Example(identifier, prompt, (), -1, tuple(a for a in answers if a.strip()))
    return None if problem_of(example) else example
  choices = wording.words or _choices(fields, entry, where)
  if entry.num_choices not in (None, len(choices)):
    return None
  label = _label(fields, entry, wording.words, len(choices), labels, where)
  if wording.lower:
    choices = [choice[:1].lower() + choice[1:] for choice in choices]

  def fill(text):
    return tuple(text.format(**values, choice=choice) for choice in choices)

  example = Example(
    identifier, prompt, fill(wording.option), label,
    prompts=fill(wording.prompts) if wording.prompts else (),
  )
  return None if problem_of(example) else example


def _get(row: Any, path: str) -> Any:
  value = row
  for name in path.split("."):
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
      value = [item.get(name, _NOTHING) for item in value]
      if _NOTHING in value:
        return _NOTHING
    elif isinstance(value, Mapping) and name in value:
      value = value[name]
    else:
      return _NOTHING
  return value


def _look(row: Mapping[str, Any], places: str, where: str) -> Any:
  found = [v for place in places.split("|") if (v := _get(row, place)) is not _NOTHING]
  found = [value for value in found if not isinstance(value, Mapping)]
  if found:
    return next((value for value in found if value != []), [])
  raise ValueError(
    f"{where} has no field {places.replace('|', ' or ')} (it has "
    f"{', '.join(sorted(row)) or 'none'}); give rows with the dataset's own field names."
  )


def _text(row: Mapping[str, Any], places: str, where: str) -> str:
  for place in places.split("|"):
    values = [_get(row, path) for path in place.split("+")]
    if all(isinstance(value, str) for value in values):
      return " ".join(values)
  value = _look(row, places.replace("+", "|"), where)
  raise ValueError(f"{where} has {value!r} in its field {places}; expected a text.")


def _choices(row: Mapping[str, Any], entry: Entry, where: str) -> list[str]:
  for place in entry.choices.split("|"):
    values = [_get(row, path) for path in place.split(",")]
    if len(values) == 1 and isinstance(values[0], list):
      values = values[0]
    if values and all(isinstance(value, str) for value in values):
      return values
  raise ValueError(
    f"{where} has no options in {entry.choices.replace('|', ' or ')} (it has "
    f"{', '.join(sorted(row)) or 'none'}); give rows with the dataset's own field names."
  )


def _label(row, entry, words, count, labels, where) -> int:
  for place in entry.label.split("|"):
    path, _, kind = place.partition(":")
    value = _get(row, path)
    if value is not _NOTHING:
      break
  else:
    _look(row, "|".join(p.partition(":")[0] for p in entry.label.split("|")), where)
  number = int(value) if isinstance(value, bool) else value
  if isinstance(number, str):
    text, number = number.strip(), None
    if text.lstrip("-").isdigit():
      number = int(text) - (kind in ("key", "one"))
    elif kind == "key" and len(text) == 1 and text in _KEYS:
      number = _KEYS.index(text)
    elif words:
      return label_of_word(text, entry, words, where)
  elif isinstance(number, int):
    number -= kind == "one"
    if labels is not None and 0 <= number < len(labels):
      number = labels[number]
  if isinstance(number, int) and 0 <= number < count:
    return number
  names = f"the labels are {', '.join(words)}" if words else f"it has {count} options"
  raise ValueError(
    f"{where} has the label {value!r}; {names}. Test splits without labels cannot be used."
  )


def label_of_word(text: str, entry: Entry, words: Sequence[str], where: str) -> int:
  """The number of a label given as a word of the wording, of any wording, or as a class's name.

  Raises:
    ValueError: if it is none of them.
  """
  sets = [words, *(w.words for flavour in entry.flavours.values() for w in flavour.values())]
  named = [tuple(names.split("/")) for names in entry.classes]
  folded = text.strip().casefold()
  for candidates in sets:
    for i, word in enumerate(candidates):
      if folded == word.casefold():
        return i
  for i, names in enumerate(named):
    if folded in [name.casefold() for name in names] or folded == entry.classes[i].casefold():
      return i
  known = [*words, *(name for names in named for name in names)]
  raise ValueError(
    f"{where} has the label {text!r}; the labels are {', '.join(dict.fromkeys(known))}, or numbers."
  )


# Readers turn one row of the data into rows with the entry's names of fields.


def _as_is(row, where):
  yield row


def _copa(row, where):
  premise, cause = _text(row, "premise", where), _text(row, "question", where) == "cause"
  yield {
    **row, "stem": premise.removesuffix("."), "joint": "because" if cause else "so",
    "long_joint": "This happened because" if cause else "As a consequence,",
  }


def _winogrande(row, where):
  sentence = _text(row, "sentence", where)
  before, blank, after = sentence.partition("_")
  if not blank:
    raise ValueError(f"{where} has no _ in its sentence {sentence!r}, for the options to fill.")
  yield {**row, "before": before, "after": after}


def _winograd(row, where):
  text, pronoun = _text(row, "text", where), _text(row, "pronoun", where)
  start = _look(row, "pronoun_loc", where)
  if not isinstance(start, int) or text[start : start + len(pronoun)] != pronoun:
    raise ValueError(f"{where} has no {pronoun!r} at pronoun_loc={start!r} of its text {text!r}.")
  yield {**row, "before": text[:start], "after": text[start + len(pronoun) :]}


def _race(row, where):
  """Makes a row of each question: tfds stores all questions of an article in one."""
  if "questions" not in row:
    yield row
    return
  columns = (_look(row, name, where) for name in ("questions", "options", "answers"))
  for question, options, answer in zip(*columns, strict=True):
    yield {**row, "question": question, "options": options, "answer": answer}


def _coqa(row, where):
  """Makes a row of each question: the dataset stores all questions of a story in one."""
  if "questions" not in row:
    yield row
    return
  answers = _look(row, "answers.input_text", where)
  for question, answer in zip(_look(row, "questions", where), answers, strict=True):
    yield {**row, "question": question, "answer": answer or "none"}


def _unanswerable(row, where):
  answers = _look(row, "answers.text|answers", where)
  yield row if answers else {**row, "answers": ["none"]}


def _hellaswag(row, where):
  """Tells the activity in front of a scene, where the row names it."""
  activity = row.get("activity_label")
  told = {"told": f"{activity}: {_text(row, 'ctx|context', where)}"} if activity else {}
  yield {**row, **told}


def _labelled(row, where):
  """Leaves out rows on whose label people did not agree."""
  if _look(row, "label", where) not in (-1, "-1", "-"):
    yield row


def _polarity(row, where):
  """Makes labels of 0, bad, and 4, good, and leaves out 2, neither; plain labels stay."""
  if "polarity" not in row:
    yield row
  elif (polarity := _look(row, "polarity", where)) != 2:
    yield {**row, "label": {0: 0, 4: 1}.get(polarity, polarity)}


def _drop(row, where):
  """Takes all answers that people gave; the last one is that of the row itself."""
  if "answers" in row:
    yield row
  else:
    further = row.get("validated_answers") or []
    yield {**row, "answers": [*further, _text(row, "answer", where)]}


def _concepts(row, where):
  concepts = _look(row, "concepts", where)
  yield {**row, "concepts": ", ".join(concepts) if isinstance(concepts, list) else concepts}


READERS: dict[str, Callable[[Mapping[str, Any], str], Iterator[Mapping[str, Any]]]] = {
  "as_is": _as_is, "copa": _copa, "winogrande": _winogrande, "winograd": _winograd, "race": _race,
  "coqa": _coqa, "unanswerable": _unanswerable, "hellaswag": _hellaswag, "labelled": _labelled,
  "polarity": _polarity, "drop": _drop, "concepts": _concepts,
}
