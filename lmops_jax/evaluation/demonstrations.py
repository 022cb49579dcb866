"""Demonstrations in front of a prompt: which they are, and how many of them have room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lmops_jax.data.tasks import Example, Task, demonstrations

SEPARATOR = "\n\n"


class Shot(NamedTuple):
  """A demonstration.

  Attributes:
    text: with its answer and what separates it from the next.
    images: paths of the pictures that stand for each `<image>` of the text.
  """

  text: str
  images: tuple[str, ...] = ()


class Front(NamedTuple):
  """Demonstrations in front of every prompt, the first one farthest from it."""

  shots: tuple[Shot, ...] = ()

  @property
  def text(self) -> str:
    """That of all of them."""
    return "".join(shot.text for shot in self.shots)

  @property
  def images(self) -> tuple[str, ...]:
    """The pictures of all of them."""
    return tuple(path for shot in self.shots for path in shot.images)


NO_FRONT = Front()


def drawn(
  task: Task, *, shots: int = 0, seed: int = 0, train: Sequence[Example] | None = None,
  balanced: bool = False, separator: str = SEPARATOR,
) -> tuple[list[Example], Front]:
  """The rows of any task and the demonstrations in front of each.

  For arguments and errors see `in_context.evaluate`.
  """
  train = task.train or None if train is None else train
  shown = demonstrations(task.rows if train is None else train, shots, seed, balanced)
  used = {row.id for row in shown}
  rows = [row for row in task.rows if row.id not in used] if train is None else list(task.rows)
  if not rows:
    raise ValueError(
      f"the task {task.name} has {len(task.rows)} rows, all of them demonstrations; give others "
      "with --train."
    )
  return rows, Front(
    tuple(Shot(row.demonstration + separator, images_of(row)) for row in shown))


def images_of(row: Example) -> tuple[str, ...]:
  """The pictures of a row with its right answer."""
  own = row.option_images[row.label : row.label + 1] if row.option_images else ()
  return (*row.images, *own)


def pictures_of(rows: Sequence[Example], front: Front) -> list[str]:
  """The pictures of rows and of their demonstrations, each once."""
  paths = [path for row in rows for path in (*row.images, *row.option_images)]
  return list(dict.fromkeys([*front.images, *paths]))


def fitted(
  front: Front, num_images: int, make: Callable[[Front], Any], num_read: Callable[[Any], int], *,
  max_length: int | None, most_images: int | None,
) -> tuple[Any, int]:
  """A context behind as many demonstrations as fit, the first of which go first.

  Args:
    front: all demonstrations.
    num_images: pictures of the context itself.
    make: makes the context behind some of the demonstrations; nothing of the context is dropped, so
      behind none it may be refused, or still be too long.
    num_read: tokens that the model reads of what was made.
    max_length: the most of these; None is no limit.
    most_images: the most pictures; None is no limit.

  Returns:
    What was made, and how many demonstrations were left out.
  """
  for start in range(len(front.shots)):
    shown = Front(front.shots[start:])
    total_images = len(shown.images) + num_images
    if most_images is not None and total_images > most_images:
      continue
    made = make(shown)
    if max_length is None or num_read(made) <= max_length:
      return made, start
  return make(NO_FRONT), len(front.shots)
