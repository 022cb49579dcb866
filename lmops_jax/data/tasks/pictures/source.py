"""Where the rows of a task with pictures come from, and how a reader makes one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lmops_jax.data.boxes import GRID, Box
from lmops_jax.data.documents import document_id
from lmops_jax.data.multimodal import Picture
from lmops_jax.data.named_datasets import Tfds
from lmops_jax.data.tasks.task import Example, problem_of
from lmops_jax.data.tfds_images import StoredPicture
from lmops_jax.host.foreign_files import printable, require_regular

_FIELD = re.compile(r"\{(\w+)\}")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def published_grid() -> int:
  """The side of the published model's grid."""
  return GRID


class NotThere(ValueError):
  """The folder has no such part; for rows to draw demonstrations from this is no error."""


class Source(NamedTuple):
  """What a reader reads.

  Attributes:
    name: the task's.
    folder: folder with the annotations; for some tasks a file.
    pictures: folder that the annotations' paths of pictures start from.
    split: the part to read.
    prompt: text with fields of a row in braces, and `<image>` for its pictures.
    grid: tells the side of the model's grid, on which boxes in texts are written.
    dataset: what is read instead of the folder.
  """

  name: str
  folder: Path
  pictures: Path
  split: str
  prompt: str
  grid: Callable[[], int] = published_grid
  dataset: Tfds | None = None

  def example(
    self, key: str, prompt: str, pictures: Sequence[Path | str | Picture | StoredPicture], *,
    options: Sequence[str] = (), label: int = -1, answers: Sequence[str] = (),
    option_pictures: Sequence[Path | str] = (), boxes: Sequence[Box] = (),
    categories: Sequence[str] = (),
  ) -> Example | None:
    """A row, or None for one that cannot be evaluated on.

    Args:
      key: the row's name within the data, from which its id comes.
      pictures, option_pictures: paths relative to `pictures` of the source, or pictures.
      boxes, categories: see `Example`.
    """
    def placed(picture):
      return str(self.pictures / picture) if isinstance(picture, str | Path) else picture

    found = Example(
      document_id(f"{self.name}:{key}"), prompt, tuple(options), label,
      tuple(answer for answer in answers if answer.strip()), (),
      tuple(map(placed, pictures)), tuple(map(placed, option_pictures)),
      boxes=tuple(boxes), categories=tuple(categories),
    )
    return None if problem_of(found) else found

  def file(self, *patterns: str) -> Path:
    """The one file in the folder that fits the first pattern with any fitting file.

    Raises:
      NotThere: if no file fits any pattern.
      ValueError: if several fit that pattern.
    """
    for pattern in patterns:
      fitting = sorted(self.folder.glob(pattern))
      if len(fitting) > 1:
        raise ValueError(
          f"{printable(self.folder)} has several files {pattern} ("
          f"{', '.join(printable(path.name) for path in fitting)}) for the task {self.name}; leave "
          "one of them there."
        )
      if fitting:
        require_regular(fitting[0])
        return fitting[0]
    raise NotThere(
      f"{printable(self.folder)} has no file {' or '.join(patterns)} for the task {self.name} (it "
      f"has {_contents(self.folder)})."
    )

  def part(self, *names: str) -> Path:
    """The first of some sub-folders that is there.

    Raises:
      NotThere: if none is.
    """
    found = next((path for name in names if (path := self.folder / name).is_dir()), None)
    if found is None:
      raise NotThere(
        f"{printable(self.folder)} has no folder {' or '.join(names)} for the task {self.name} (it "
        f"has {_contents(self.folder)})."
      )
    return found


def picture_files(folder: Path) -> Iterator[Path]:
  """The pictures of a folder by name, hidden files left out."""
  for path in sorted(folder.iterdir()):
    if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
      yield path


def fields_of(prompt: str, **fields: str) -> str:
  """A prompt with its fields put in at once, so that braces in their text stay as they are."""
  return _FIELD.sub(lambda match: fields[match[1]], prompt)


def _contents(folder: Path) -> str:
  names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
  shown = ", ".join(map(printable, names[:8])) or "nothing"
  return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
