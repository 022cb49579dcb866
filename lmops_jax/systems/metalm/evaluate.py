"""Stage `evaluate`: perplexities of unseen text, and what an arm answers.

Every question is a choice by `decoding.scoring`. Small models find some words likely whatever they
are asked, so what is compared is how much more likely an option is than otherwise: a passage than
it is behind a line end alone (GPT-3, arXiv:2005.14165, section 2.4), a label word than it is on
average over a task's rows (batch calibration, arXiv:2309.17249). What is given is encoded for arms
with an encoder, and read as words by the others; the tokens are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  NonEmpty,
  PositiveInt,
  Seeds,
  Text,
  component,
)
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.instances import Instances
from lmops_jax.data.span_examples import SpecialIds
from lmops_jax.data.tasks import Example, Task, demonstrations
from lmops_jax.decoding.scoring import OptionScorer, Request, total
from lmops_jax.evaluation.examples import map_examples
from lmops_jax.host.whole_files import write_json
from lmops_jax.models.transformer import Transformer
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm import prompts
from lmops_jax.systems.metalm.arms import PREFIX, SEMI, Arm, Models
from lmops_jax.systems.metalm.tasks import (
  FILE_KIND,
  NEXT_PASSAGE,
  SAME_DOCUMENT,
  with_words,
)
from lmops_jax.systems.metalm.texts import Prepared
from lmops_jax.systems.metalm.training import SpanLosses
from lmops_jax.text.vocabularies import Vocabulary

RESULTS_FILE = "results.json"
OWN, COMMON, PLAIN = "own", "common", "plain"
BEFORE = "trained"  # the model that is not finetuned
OTHER_WORDS = "same_document, other words"
_NO_CONTENT = "\n"  # what passages are compared behind


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Evaluate:
  """How arms are measured.

  Attributes:
    num_rows: unseen rows for perplexities, at most.
    batch_size: of them at a time.
    shots: numbers of demonstrations.
    draws: seeds of the demonstrations; accuracies are means over them.
    other_words: label words of "same document" for models that were finetuned with others.
  """

  num_rows: PositiveInt = 128
  batch_size: PositiveInt = 32
  shots: Annotated[Sequence[Count], NonEmpty, Distinct] = (0, 1, 4)
  draws: Seeds = (0, 1)
  other_words: Annotated[tuple[Text, Text], Distinct] = ("two", "one")


def run(
  context: pipeline.StageContext, *, config: Evaluate, models: Models, arm: Arm, params: Any,
  tuned: Mapping[str, Any], prepared: Prepared, tasks: Mapping[str, Task], partitioner,
) -> None:
  """Writes `results.json`.

  `losses` are `losses_of`. `answers` has by model (`BEFORE`, or what was finetuned) and task a row
  for each number of demonstrations and draw: `shots`, `draw`, `right`, `num` and `num_dropped`.

  Args:
    params: of the trained model. tuned: of the finetuned ones, by mode.
    prepared: the texts. tasks: by name.
  """
  vocabulary = prepared.vocabulary
  unseen = prepared.validation
  index = np.arange(min(config.num_rows, len(unseen)))
  common = common_mask(models, unseen, index, vocabulary.vocab_size)
  losses = losses_of(arm, params, unseen, index, common, config.batch_size, partitioner)
  other = with_words(tasks[SAME_DOCUMENT], config.other_words)
  shots = tuple(config.shots)
  by_model = {BEFORE: [(tasks[NEXT_PASSAGE], NEXT_PASSAGE, (0,)),
                       (tasks[FILE_KIND], FILE_KIND, shots)]}
  for mode in tuned:
    by_model[mode] = [(tasks[SAME_DOCUMENT], SAME_DOCUMENT, (0,)), (other, OTHER_WORDS, shots),
                      (tasks[FILE_KIND], FILE_KIND, shots)]
  answers: dict[str, dict[str, list]] = {}
  with context.progress(sum(map(len, by_model.values())), "tasks") as bar:
    for which, own in by_model.items():
      asking = Asking(arm, params if which == BEFORE else tuned[which], vocabulary, partitioner)
      answers[which] = {}
      for task, name, of_shots in own:
        answers[which][name] = [
          asking.counted(task, num, draw) for num in of_shots
          for draw in (config.draws if num else (0,))]
        bar.update()
  write_json(context.directory / RESULTS_FILE, {"losses": losses, "answers": answers})


def common_mask(
  models: Models, unseen: Instances, index: np.ndarray, vocab_size: int
) -> np.ndarray:
  """Places that every arm learns of the unseen rows `index [n]`, `[n,S] float32`."""
  masks = [
    models.arm(name, vocab_size).validation(unseen).batch(index)["loss_mask"]
    for name in (PREFIX, SEMI)]
  return masks[0] * masks[1]


def losses_of(
  arm: Arm, params, unseen: Instances, index: np.ndarray, common: np.ndarray, batch_size: int,
  partitioner,
) -> dict[str, Any]:
  """Nats a token of the unseen rows `index [n]`.

  Args:
    common: see `common_mask`.
    batch_size: rows at a time.

  Returns:
    `own`: of the tokens that the arm learns, given its spans. `common`: of the tokens that all arms
    learn, each given its own spans. `plain`: of the latter, read by the decoder alone as words.
    And `num_tokens` of each.
  """
  batch = arm.validation(unseen).batch(index)
  encoded = {name: value for name, value in batch.items() if name != "example_id"}
  words = {name: batch[name] for name in ("tokens", "targets")}
  views = {
    OWN: (encoded, batch["loss_mask"]), COMMON: (encoded, common), PLAIN: (words, common)}
  example_sums = _sums(SpanLosses(arm.model))
  found, num_tokens = {}, {}
  for name, (given, mask) in views.items():
    sums = map_examples(
      example_sums, params, {**given, "counted": mask}, batch_size, partitioner)
    num_tokens[name] = int(mask.sum())
    if not num_tokens[name]:
      raise ValueError(
        f"no token of {len(index)} unseen rows is learned by all arms; raise "
        "metalm.Evaluate.num_rows."
      )
    found[name] = float(sums.sum() / num_tokens[name])
  return {**found, "num_tokens": num_tokens}


@functools.lru_cache
def _sums(losses: SpanLosses) -> Callable:
  """`(params, batch) -> [B]`, nats of the places that `counted` marks."""
  def sums(params, batch):
    return jnp.sum(losses.token_losses(params, batch) * batch["counted"], axis=1)

  return jax.jit(sums)


class Asking:
  """A trained model that chooses among options."""

  def __init__(
    self, arm: Arm, params: Any, vocabulary: Vocabulary, partitioner,
    ids: SpecialIds | None = None, images: ImageSettings | None = None,
  ):
    """
    Args:
      ids, images: of a model that reads pictures, see `prompts.SpanReader`; the special ids of
        others are the vocabulary's.
    """
    self._vocabulary, self._max_length = vocabulary, arm.config.text.max_length
    self._ids = vocabulary if ids is None else ids
    self._reader = prompts.SpanReader(arm.model, params, self._ids, images)
    self._scorer = OptionScorer(Transformer(arm.config.text), params["text"], partitioner)

  def counted(self, task: Task, shots: int, draw: int) -> dict[str, int]:
    """How many rows of a task are right behind `shots` demonstrations, drawn by a seed."""
    shown = demonstrations(task.train, shots, draw)
    values, num_dropped = self.values(task.rows, shown)
    if len({row.options for row in task.rows}) == 1:  # labels, which may be likely by themselves
      values = calibrated(values)
    elif not any(row.images for row in task.rows):
      values -= self.values([row._replace(prompt=_NO_CONTENT) for row in task.rows], ())[0]
    right = int((values.argmax(axis=1) == [row.label for row in task.rows]).sum())
    return {"shots": shots, "draw": draw, "right": right, "num": len(task.rows),
            "num_dropped": num_dropped}

  def values(
    self, rows: Sequence[Example], shown: Sequence[Example]
  ) -> tuple[np.ndarray, int]:
    """Log-probabilities of the options, and how many demonstrations had no room in all.

    Args:
      rows: each with as many options.
      shown: demonstrations in front of each.

    Returns:
      `[N,options] float64`, nats, and the number.
    """
    vocabulary = self._vocabulary
    options = [vocabulary.encode_batch(row.options) for row in rows]
    behind = prompts.answered(shown, vocabulary)
    made, dropped = zip(*(
      prompts.fitted(behind, row, of_row, self._ids, self._max_length)
      for row, of_row in zip(prompts.asked(rows, vocabulary, self._ids), options)))
    scores = self._scorer.score([
      Request(prompt, of_row) for prompt, of_row in zip(self._reader.prompts(made), options)])
    return np.stack([total(of_row) for of_row in scores]), sum(dropped)


def calibrated(values: np.ndarray) -> np.ndarray:
  """Log-probabilities `[N,options]` less the logarithm of each option's mean share over the rows.

  An option's share in a row is its probability among the row's options.
  """
  shares = values - np.logaddexp.reduce(values, axis=1, keepdims=True)
  return shares - np.logaddexp.reduce(shares, axis=0)
