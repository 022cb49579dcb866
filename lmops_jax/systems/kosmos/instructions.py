"""Files of instructions: prompts without pictures, and what a model should answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lmops_jax.config.setting_types import Text, component
from lmops_jax.data import files, matching
from lmops_jax.data.documents import document_id
from lmops_jax.data.lines import is_text, jsonl_rows
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record
from lmops_jax.host.foreign_files import printable

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_INSTANCES = "instances"


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class InstructionJsonl(ImageCorpus):
  """JSON lines of (instruction, input, output), of which the output is learned.

  A row with a list `instances` holds several inputs and outputs of one instruction, as the files of
  Unnatural Instructions do. The prompt is the instruction, and below it the input if there is one.
  Rows without an output are counted as "empty".

  Attributes:
    path: a file, a folder (all its JSON lines files), or a pattern with `*` and `**`.
    instruction_field, output_field: names of the fields ("inputs" and "targets" in FLAN).
    input_field: name of a field that may be missing; None: there is none.
  """

  path: Text
  instruction_field: Text = "instruction"
  output_field: Text = "output"
  input_field: Text | None = "input"

  def fingerprint(self) -> str:
    return files.fingerprint(repr(self), self._found().files)

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    found = self._found()
    left_out.add_all(found.left_out)
    for name, path in found.files:
      for number, row in jsonl_rows(path, left_out.counts):
        for place, parts in self._rows(row, f"{printable(path)}:{number}"):
          source = f"{name}:{number}{place}"
          if not all(parts):
            left_out.add("empty", source)
          elif not all(map(is_text, parts)):
            left_out.add("undecodable", source)
          else:
            yield Record(document_id(source), parts, 1, printable(source))

  def _found(self) -> matching.Found:
    return matching.matching(self.path, "kosmos.InstructionJsonl.path", _ENDINGS)

  def _rows(self, row: Mapping[str, Any], where: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Prompt and output of each instance, and where in the line it stands."""
    instances = row.get(_INSTANCES)
    if instances is None:
      yield "", self._parts(row, row, where)
      return
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
      raise ValueError(f"{where}: field {_INSTANCES!r} is not a list of objects; repair the line.")
    for number, instance in enumerate(instances, 1):
      place = f"#{number}"
      yield place, self._parts(row, instance, where + place)

  def _parts(self, row, instance, where: str) -> tuple[str, str]:
    prompt = self._text(row, "instruction_field", where)
    if self.input_field is not None and instance.get(self.input_field) is not None:
      prompt = f"{prompt}\n{self._text(instance, 'input_field', where)}".strip()
    return prompt, self._text(instance, "output_field", where)

  def _text(self, row: Mapping[str, Any], setting: str, where: str) -> str:
    field = getattr(self, setting)
    if not isinstance(row.get(field), str):
      found = f"a {type(row[field]).__name__}" if field in row else "nothing"
      raise ValueError(
        f"{where}: field {field!r} holds {found}, and kosmos.InstructionJsonl.{setting} names one "
        "with a text; name another field, or repair the line."
      )
    return row[field].strip()
