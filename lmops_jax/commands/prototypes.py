"""`lmops prototypes predict` and `inspect`: a trained classifier, and why it decides.

They are actions of the system `prototypes` that have options of their own instead of a gin file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SYSTEM = "prototypes"
_EPILOG = """\
examples:
  lmops prototypes predict --model WORKDIR --text "a film to forget"
  lmops prototypes predict --model WORKDIR --input rows.jsonl > said.jsonl
  lmops prototypes inspect --model WORKDIR

WORKDIR is that of a finished run of lmops prototypes, or a folder of Classifier.save.
"""


def _options(parser: argparse.ArgumentParser, text: str) -> None:
  parser.description, parser.epilog = text, _EPILOG
  parser.add_argument("--model", required=True, metavar="DIR")


def _predict_options(parser) -> None:
  _options(parser, "Tell the class of texts, with the prototypes behind it and their nearest rows.")
  add = parser.add_argument
  add("--text", action="append", default=[], help="may be given several times")
  add("--input", metavar="FILE", help='JSON lines with "text"')
  add("--field", default="text", help='field of the text in --input (default "text")')
  add("--other", metavar="FIELD", help="field of the second text, of a classifier of pairs")
  add("--behind", type=int, default=3, metavar="N", help="prototypes shown (default 3)")


def _inspect_options(parser) -> None:
  _options(parser, "List a classifier's prototypes: weight, class, purity and nearest rows.")
  parser.add_argument("--nearest", type=int, default=3, metavar="N", help="rows shown (default 3)")
  parser.add_argument("--json", action="store_true", help="a JSON object a prototype")


def _predict(arguments) -> int:
  """Prints a JSON object a text."""
  texts = list(arguments.text)
  if arguments.input is not None:
    from lmops_jax.data.lines import jsonl_rows

    for number, row in jsonl_rows(Path(arguments.input)):
      fields = {"--field": arguments.field, "--other": arguments.other}
      fields = {option: field for option, field in fields.items() if field is not None}
      for option, field in fields.items():
        if not isinstance(row.get(field), str):
          raise ValueError(
            f"{arguments.input}:{number} has no text in the field {field!r}; name it with {option}."
          )
      found = tuple(row[field] for field in fields.values())
      texts.append(found if arguments.other else found[0])
  if not texts:
    raise ValueError("there is nothing to tell the class of; give --text or --input.")
  if arguments.behind < 1:
    raise ValueError(f"--behind {arguments.behind} must be 1 or more.")
  from lmops_jax.systems.prototypes import load_classifier

  classifier = load_classifier(arguments.model)
  said, behind = classifier.predict_proba(texts), classifier.explain(texts, arguments.behind)
  names = [str(name) for name in classifier.classes_]
  for text, row, found in zip(texts, said, behind):
    given = zip(("text", "other"), [text] if isinstance(text, str) else text)
    print(json.dumps({
      **dict(given), "label": names[int(row.argmax())],
      "probabilities": {name: round(float(p), 6) for name, p in zip(names, row)},
      "behind": [
        {**one._asdict(), "label": str(one.label), "weight": round(one.weight, 6)}
        for one in found]}, ensure_ascii=False))
  return 0


def _inspect(arguments) -> int:
  """Prints a line, or a JSON object, a prototype, the heaviest first."""
  if arguments.nearest < 1:
    raise ValueError(f"--nearest {arguments.nearest} must be 1 or more.")
  from lmops_jax.reporting.run_report import text_table
  from lmops_jax.systems.prototypes import load_classifier
  from lmops_jax.systems.prototypes.texts import shown

  found = sorted(
    load_classifier(arguments.model).inspect(arguments.nearest), key=lambda one: -one.weight)
  if arguments.json:
    for one in found:
      print(json.dumps({**one._asdict(), "label": str(one.label)}, ensure_ascii=False))
    return 0
  rows = [("prototype", "class", "weight", "purity", "since step", "nearest rows")]
  for one in found:
    first, *others = (shown(text)[:70] for text in one.texts)
    rows.append((str(one.slot), str(one.label), f"{one.weight:.1%}", f"{one.purity:.0%}",
                 str(one.born), first))
    rows += [("", "", "", "", "", text) for text in others]
  print(text_table(rows))
  return 0


ACTIONS = {"predict": (_predict_options, _predict), "inspect": (_inspect_options, _inspect)}
