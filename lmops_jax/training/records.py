"""What a run shows, records and keeps, and the figures that hooks measure on its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Evaluate(NamedTuple):
  """A hook: figures of the parameters before the first step, every `every` steps and at the end.

  Attributes:
    name: the figures are recorded as `<name>/<figure>`.
    every: steps between two evaluations.
    figures: `params -> {figure: number}`.
  """

  name: str
  every: int
  figures: Callable[[Any], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Records:
  """What a run shows, records and keeps; none of it changes what is learned.

  Attributes:
    checkpoint_every: steps between checkpoints; None writes only one at the end, and one if the run
      is asked to stop.
    params_at: steps (0 to num_steps) whose parameters stay in `params/<step>`.
    log_every: steps between records; the last step always makes a record.
    flops_per_token: operations of a training step for each position, for rates and `flops`.
    description: names the run in progress lines and errors.
    progress: makes the progress display from `(total, unit, description, initial=)`; None is
      `lmops_jax.host.progress.Progress`.
    tensorboard: also write event files through clu, which imports TensorFlow.
  """

  checkpoint_every: int | None = None
  params_at: Sequence[int] = ()
  log_every: int = 10
  flops_per_token: float | None = None
  description: str = "train"
  progress: Callable | None = None
  tensorboard: bool = True


def check(num_steps: int, hooks: Sequence[Evaluate], records: Records) -> None:
  """Raises ValueError for numbers of steps that are out of range."""
  periods = {"num_steps": num_steps, "log_every": records.log_every}
  if records.checkpoint_every is not None:
    periods["checkpoint_every"] = records.checkpoint_every
  periods |= {f"evaluators[{hook.name!r}]": hook.every for hook in hooks}
  for name, value in periods.items():
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  outside = [step for step in records.params_at if not 0 <= step <= num_steps]
  if outside:
    raise ValueError(
      f"params_at names step {outside[0]}, outside the run's 0 to num_steps={num_steps}."
    )
