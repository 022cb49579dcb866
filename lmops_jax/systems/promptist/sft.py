"""Supervised fine-tuning of the policy on prompt pairs (arXiv 2212.09611, section 2.2).

A row is the user's prompt, the anchor, a blank, the engineered prompt and the end token; the loss
is on the engineered prompt and the end token only. Whether the authors appended an end token is not
published; without one decoding never ends. They kept parameters that were slightly underfitted by
validation loss, which leaves room for exploration: `select` and `select_step` choose.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import optax

from lmops_jax.config.setting_types import Decay, NonEmpty, PositiveInt, Seed, component
from lmops_jax.data import prompt_pairs, supervised
from lmops_jax.data.prompt_pairs import PairSource
from lmops_jax.mesh.meshes import single_device
from lmops_jax.pretrained import exporting
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.shared_stages import fine_tuning
from lmops_jax.shared_stages.fine_tuning import TRAIN, VALIDATION
from lmops_jax.sizing.budget import Phase
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.promptist import plan
from lmops_jax.systems.promptist.fitting import Fit

SELECTIONS = ("step", "nll")
EXPORTED = "transformers"  # the folder within the stage `export`


@component("SFT", module="promptist")
@dataclasses.dataclass(frozen=True)
class SupervisedTuning:
  """One run: prepare, train, export, report. Defaults are the paper's where it tells.

  Attributes:
    init: the model to start from, `@pretrained.load()`; the released policy is a GPT-2 small.
    pairs: where pairs come from.
    optimizer: an optax transformation.
    num_steps: optimizer steps.
    batch_size: sequences of a batch.
    length: predicted positions of a sequence.
    validation: where held-out pairs come from, which may share no text with `pairs`; empty holds
      out `validation_fraction` of the engineered prompts.
    validation_fraction: share of engineered prompts, drawn by (seed, text).
    eval_every: steps between two validations.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    accumulate: micro-batches of a step.
    pack: put several pairs into a sequence; a batch then holds more pairs than sequences.
    too_long: "drop" longer pairs, or make them an "error"; cut ones would lose their end token.
    select: "step" takes the parameters of `select_step`; "nll" those of the validation with the
      least loss, for which those of every validation are kept until the end.
    select_step: None is the last.
    seed: seed of the validation split and the order.

  Raises:
    ValueError: for values out of range or a model that cannot learn this.
  """

  init: PretrainedModel
  pairs: Annotated[Sequence[PairSource], NonEmpty]
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt = 15_000
  batch_size: PositiveInt = 256
  length: PositiveInt = 512
  validation: Sequence[PairSource] = ()
  validation_fraction: Decay = 0.01
  eval_every: PositiveInt = 500
  checkpoint_every: PositiveInt | None = 500
  accumulate: PositiveInt = 1
  pack: bool = False
  too_long: Literal["drop", "error"] = "drop"
  select: Literal[SELECTIONS] = "step"
  select_step: PositiveInt | None = None
  seed: Seed = 0
  name = "promptist-sft"

  def __post_init__(self):
    fine_tuning.check(self.init, self.batch_size, self.accumulate, self.length)
    if self.select == "nll" and self.select_step is not None:
      raise ValueError(
        f"select='nll' looks for the step itself, and select_step={self.select_step} is given; "
        "leave it out, or set select to 'step'."
      )
    if self.select == "nll" and not self.validation and not self.validation_fraction:
      raise ValueError(
        "select='nll' needs held-out pairs; give validation, or a validation_fraction above 0."
      )
    if (self.select_step or 1) > self.num_steps:
      raise ValueError(
        f"select_step={self.select_step} is beyond num_steps={self.num_steps}; lower it."
      )

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    return [
      skeleton.Stage(
        "prepare", self._prepare, together=False, checks=("batch_size",),
        reads=("pairs.fingerprint", "validation.fingerprint", "validation_fraction", "length",
               "pack", "too_long", "seed", "init.fingerprint"),
      ),
      skeleton.Stage(
        "train", functools.partial(self._train, partitioner=partitioner or single_device()),
        inputs=("prepare",), result="model",
        reads=("init", "optimizer", "num_steps", "batch_size", "eval_every", "checkpoint_every",
               "accumulate", "select", "select_step"),
      ),
      skeleton.Stage("export", self._export, inputs=("train",), together=False,
                     result="model for transformers"),
      skeleton.Stage("report", self._report, inputs=("prepare", "train"), together=False),
    ]

  def phases(self, partitioner, memory, *, platform: str, **sizes) -> list[Phase]:
    """What training takes; see `commands.plans.Planned`. Pairs are not read."""
    fit = Fit(self.optimizer, self.num_steps, self.batch_size)
    return [plan.tuning_phase(
      "train", fit, self.init.model, self.length,
      f"{self.batch_size} sequences in {self.accumulate} micro-batches", partitioner, platform,
      accumulate=self.accumulate, setting="promptist.SFT.batch_size")]

  def _prepare(self, context: pipeline.StageContext) -> None:
    tokenizer = self.init.tokenizer()
    if tokenizer.eos_id is None:
      raise ValueError(
        f"the tokenizer of {self.init.path} has no end token, without which the policy would never "
        "end a prompt; name its eos_token in tokenizer_config.json."
      )
    counts: Counter[str] = Counter()
    learned = prompt_pairs.read_pairs(self.pairs, counts)
    if self.validation:
      held_out = prompt_pairs.read_pairs(self.validation, counts)
      prompt_pairs.refuse_leakage(learned, held_out, VALIDATION)
    else:
      learned, held_out = prompt_pairs.split_pairs(
        learned, self.validation_fraction, self.seed, counts)
    context.extra["pairs"] = {name: n for name, n in sorted(counts.items()) if n}
    context.extra["kinds"] = dict(sorted(Counter(pair.kind for pair in learned).items()))
    told = ", ".join(f"{n} {name}" for name, n in context.extra["pairs"].items())
    context.log(f"pairs left out: {told or 'none'}")
    parts = {
      name: [supervised.encode_row(tokenizer, prompt_pairs.as_row(pair), pair.id, pair.where)
             for pair in pairs]
      for name, pairs in ((TRAIN, learned), (VALIDATION, held_out))}
    fine_tuning.write_rows(
      context, parts, tokenizer, self.length, pack=self.pack, too_long=self.too_long,
      batch_size=self.batch_size)

  @property
  def _tuning(self) -> fine_tuning.Tuning:
    kept = (self.select_step or self.num_steps,)
    if self.select == "nll":
      kept = (*range(self.eval_every, self.num_steps, self.eval_every), self.num_steps)
    return fine_tuning.Tuning(
      self.init, self.optimizer, self.num_steps, self.batch_size, self.length, self.eval_every,
      self.checkpoint_every, self.accumulate, self.seed, kept)

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    fine_tuning.train(context, self._tuning, partitioner, self._choose)

  def _choose(self, history: fine_tuning.History) -> int:
    if self.select == "step":
      return self.select_step or self.num_steps
    return best_step(history)

  def _export(self, context: pipeline.StageContext) -> None:
    if jax.process_count() > 1:
      context.log("a job of several processes exports nothing; run lmops export --checkpoint on "
                  "the stage train")
      return
    exporting.export(
      context.directory / EXPORTED, model_lib.load(str(context.input("train"))))

  def _report(self, context: pipeline.StageContext) -> None:
    fine_tuning.report(
      context, self._tuning, f"Supervised fine-tuning of {self.init.path.name} on prompt pairs")

  def table(self, summary: Mapping[str, Any]) -> str:
    """The validation losses of a finished run, for the terminal."""
    chosen = f"  the parameters of step {summary['chosen_step']} are the model"
    return f"{fine_tuning.table(summary)}\n{chosen}"


def best_step(history: fine_tuning.History) -> int:
  """The step after the start whose validation loss is least, the first of several.

  Args:
    history: records of a run with `step` and, of some, `validation/loss`.
  """
  losses = [(r[f"{VALIDATION}/loss"], r["step"]) for r in history
            if f"{VALIDATION}/loss" in r and r["step"]]
  return min(losses)[1]
