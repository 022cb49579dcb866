"""The table that `lmops list tasks` prints."""

from __future__ import annotations

from collections.abc import Mapping

from lmops_jax.data.tasks import installed_kind
from lmops_jax.data.tasks.pictures.registry import PICTURE_ENTRIES
from lmops_jax.data.tasks.registry import ENTRIES, Entry

_OF_PICTURES = {
  "raven": "candidates of each row", "imagenet": "a class's name", "seed-bench": "4 options a row",
  "flickr30k-entities": "boxes", "refcoco": "boxes", "refcoco-plus": "boxes", "refcocog": "boxes",
}


def table() -> str:
  """A line for each named task: metric, labels, source, templates by flavour."""
  lines = [("task", "metric", "answers", "source", "templates")]
  for name, entry in ENTRIES.items():
    lines.append((
      name, entry.metric, _answers(entry), entry.dataset or "JSON lines",
      _templates(entry.flavours),
    ))
  lines.append((
    installed_kind.NAME, "accuracy", "kinds of text", "installed packages",
    _templates(installed_kind.TEMPLATES),
  ))
  for name, of_pictures in PICTURE_ENTRIES.items():
    source = f"tfds, or {of_pictures.source}" if of_pictures.dataset else of_pictures.source
    lines.append((
      name, of_pictures.metric, ", ".join(of_pictures.words) or _OF_PICTURES.get(name, "open"),
      source, f"pictures {_indices(list(range(len(of_pictures.templates))))}",
    ))
  widths = [max(len(line[i]) for line in lines) for i in range(4)]
  return "\n".join(
    "  ".join(f"{cell:{width}}" for cell, width in zip(line, [*widths, 0])).rstrip()
    for line in lines
  )


def _answers(entry: Entry) -> str:
  if entry.metric != "accuracy":
    return "open"
  if not entry.words:
    return f"{entry.num_choices} options a row" if entry.num_choices else "options of each row"
  words = entry.words
  if len(words) > 6:
    return f"{', '.join(words[:3])}, ... ({len(words)})"
  return ", ".join(words)


def _templates(flavours: Mapping[str, Mapping[int, object]]) -> str:
  return "; ".join(f"{name} {_indices(list(of_flavour))}" for name, of_flavour in flavours.items())


def _indices(numbers: list[int]) -> str:
  if len(numbers) > 2 and numbers == list(range(len(numbers))):
    return f"0-{numbers[-1]}"
  return ",".join(map(str, numbers))
