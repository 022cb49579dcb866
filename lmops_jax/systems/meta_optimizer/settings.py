"""What one seed's study is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  NonEmpty,
  NonNegative,
  PositiveInt,
  component,
)
from lmops_jax.systems.meta_optimizer import metrics
from lmops_jax.systems.meta_optimizer.finetune import OBJECTIVES
from lmops_jax.systems.meta_optimizer.prompts import NEWLINES, NUM_ORDERS
from lmops_jax.systems.meta_optimizer.record import READOUTS

GRID = tuple(digit / 10**power for power in (4, 3, 2, 1) for digit in range(1, 10))
TUNE_ON = ("validation", "evaluation")
CONTROLS = ("untrained", "untrained_but_tables")


@component(module="meta_optimizer")
@dataclasses.dataclass(frozen=True)
class Study:
  """What one seed's study does.

  Attributes:
    demonstrations: k.
    order: of the demonstrations, 0 to 4; 0 is the shuffle's own.
    rates: learning rates to choose from.
    objective: of finetuning, "lm" or "layer_causal" (see `finetune`).
    tune_on: "validation", training rows that are not demonstrated; or "evaluation", the reported
      rows themselves, as in the paper.
    validation_rows: at most so many.
    evaluation_rows: at most so many, drawn by a shuffle of seed 1; None for all.
    readout: "prompt" records at the last token of a prompt, as the paper says; "first_label" at the
      first label's token put behind it, as its script does.
    newline: line breaks in texts become a "space" or, as in the script, "eos".
    kendall: "tau_b" (the script) or "tau_a" (the paper).
    kendall_rows: rows whose attention to demonstrations is compared.
    batch_rows: queries at a time.
    rates_at_once: learning rates at a time; each holds its own key and value projections.
    controls: of `CONTROLS`: the same on random weights, all of them or all but embeddings and
      norms.

  Raises:
    ValueError: naming the field, for values out of range.
  """

  demonstrations: Count = 32
  order: Annotated[int, Ge(0), Lt(NUM_ORDERS)] = 0
  rates: Annotated[Sequence[NonNegative], NonEmpty, Distinct] = GRID
  objective: Literal[OBJECTIVES] = "lm"
  tune_on: Literal[TUNE_ON] = "validation"
  validation_rows: PositiveInt = 200
  evaluation_rows: PositiveInt | None = 2000
  readout: Literal[READOUTS] = "prompt"
  newline: Literal[NEWLINES] = "space"
  kendall: Literal[metrics.KENDALL_VARIANTS] = "tau_b"
  kendall_rows: PositiveInt = 100
  batch_rows: PositiveInt = 16
  rates_at_once: PositiveInt = 4
  controls: Annotated[Sequence[Literal[CONTROLS]], Distinct] = ("untrained",)

  @property
  def needs_validation(self) -> bool:
    """Whether a rate is chosen on training rows that are not demonstrated."""
    return self.tune_on == "validation" and len(self.rates) > 1
