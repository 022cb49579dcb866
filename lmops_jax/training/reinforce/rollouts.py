"""Rollouts: responses of the policy to prompts, judged by a reward, as batches for PPO and GRPO.

The prompts of a step, how long responses may be, which of several is taken, and what is sampled are
functions of (seed, step), so with the same parameters a step has the same rollouts whenever it is
asked for. A batch of B responses holds, for prompts of at most P tokens and responses of at most R
with their end slot:

    tokens, positions, segment_ids [B,P+R-1] int32   prompt, set to the right of its P columns, and
                                                     response, but for the last of its R columns
    targets [B,R] int32        response, with an end token in its end slot
    loss_mask [B,R] float32    1 up to the end slot
    log_probs, reference [B,R] float32   nats under the policy that wrote it, and the reference
    score [B] float32, is_cut [B] float32, example_id [B] int64

The end slot stands behind a response that was cut, too: every response ends (Promptist).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from lmops_jax.data import batches as batches_lib
from lmops_jax.host.hashing import draw_indices, order_key
from lmops_jax.mesh.meshes import Partitioner, single_device
from lmops_jax.models.transformer import Transformer
from lmops_jax.training.reinforce import networks
from lmops_jax.training.reinforce.journal import Journal
from lmops_jax.training.reinforce.rewards import Reward, Rollout, judged


class Question(NamedTuple):
  """A prompt to respond to.

  Attributes:
    id: a stable number.
    text: as rewards see it.
    ids: its tokens, at least one.
  """

  id: int
  text: str
  ids: Sequence[int]


class Answer(NamedTuple):
  """A response.

  Attributes:
    text: its text.
    ids: its tokens, the end token included unless it was cut.
    is_cut: whether it ended because there was no room for more.
  """

  text: str
  ids: Sequence[int]
  is_cut: bool


# `(policy's params, prompts' ids, seed of the step) -> for each prompt its answers`. All processes
# of a job call it alike and get all answers. `decoding.rollouts.Responder` is one.
Respond = Callable[[Any, Sequence[Sequence[int]], int], list[list[Answer]]]


class RolloutError(ValueError):
  """A run whose policy has left what was allowed."""


class Rollouts:
  """A source of batches, see the module. `training.sources.Source` is its contract.

  Args:
    model: the policy, a decoder.
    reference: parameters that the policy must stay near, on the mesh; they stay as they are.
    questions: what is asked; each step takes some of them, as `batches.batch_indices` says.
    respond: writes the answers.
    reward: judges them; of several processes each one asks it for its own rows.
    batch_size: B, responses of a step.
    seed: of all choices.
    prompt_length: P.
    response_length: most new tokens, R - 1.
    end_id: the end token of responses that were cut.
    group_size: responses taken of each question, at random from those that `respond` gives.
    live_blocks: let the reference be its top blocks on the policy's trunk, see
      `networks.on_live_trunk`; None is all of it.
    partitioner: the partitioner of the run; None is one device.
    journal: a file that gets every rollout as a JSON line; None for none.
    min_kl, max_kl: the nats a response by which the policy may have left the reference, a batch's
      mean of `log_probs - reference`; beyond them the run ends. None for any. Answers of a search
      are no samples, so that their mean may fall below 0.

  Raises:
    ValueError: for a prompt that is too long or empty, fewer questions than a batch needs, or
      lengths beyond the model's.
  """

  reads_params = True

  def __init__(
    self, model: Transformer, reference, questions: Sequence[Question], respond: Respond,
    reward: Reward, *, batch_size: int, seed: int, prompt_length: int, response_length: int,
    end_id: int, group_size: int = 1, live_blocks: int | None = None,
    partitioner: Partitioner | None = None, journal: Path | None = None,
    min_kl: float | None = None, max_kl: float | None = None,
  ):
    _check(model.config, questions, batch_size, prompt_length, response_length, group_size)
    self._questions, self._respond, self._reward = list(questions), respond, reward
    self._batch_size, self._group_size, self._seed = batch_size, group_size, seed
    self._prompt_length, self._num_slots = prompt_length, response_length + 1
    self._end_id, self._reference = end_id, nn.unbox(reference)
    self._partitioner = partitioner or single_device()
    self._min_kl = -np.inf if min_kl is None else min_kl
    self._max_kl = np.inf if max_kl is None else max_kl
    self._journal = None if journal is None else Journal(_own(journal))
    self._log_probs = _log_probs_of(model, self._partitioner, live_blocks)

  def batch(self, step: int, params: Any = None) -> dict[str, np.ndarray]:
    """The rollouts of a step.

    Args:
      step: counted from 0.
      params: the policy's.

    Returns:
      The rows of this process, see the module.

    Raises:
      RewardError: see `rewards.judged`.
      RolloutError: if the policy has left the bounds of its divergence.
      ValueError: if `respond` gives fewer answers than are taken, or longer ones than fit.
    """
    asked, answers = self._answers(step, params)
    arrays = self._arrays(asked, answers)
    arrays |= self._nats(arrays, params)
    kl = ((arrays["log_probs"] - arrays["reference"]) * arrays["loss_mask"]).sum(axis=1)
    self._check_kl(float(kl.mean()))
    own = batches_lib.host_rows(self._batch_size, jax.process_index(), jax.process_count())
    asked, answers, kl = asked[own], answers[own], kl[own]
    rollouts = [
      Rollout(question.text, answer.text, tuple(_content(answer)), answer.is_cut)
      for question, answer in zip(asked, answers)]
    scores, parts = judged(self._reward, rollouts)
    if self._journal is not None:
      self._journal.write(step, (
        {"prompt": rollout.prompt, "response": rollout.response, "score": float(scores[i]),
         "parts": {name: float(values[i]) for name, values in parts.items()},
         "kl": float(kl[i]), "num_tokens": len(rollout.ids), "is_cut": rollout.is_cut,
         "example_id": question.id}
        for i, (question, rollout) in enumerate(zip(asked, rollouts))))
    return {name: value[own] for name, value in arrays.items()} | {
      "score": scores.astype(np.float32),
      "is_cut": np.array([rollout.is_cut for rollout in rollouts], np.float32),
      "example_id": np.array([question.id for question in asked], np.int64),
    }

  def _answers(self, step: int, params) -> tuple[list[Question], list[Answer]]:
    """The questions of a step, each as often as it is answered, and the answers."""
    count = self._group_size
    index = batches_lib.batch_indices(
      len(self._questions), self._batch_size // count, self._seed, step)
    questions = [self._questions[i] for i in index]
    seed = order_key(step, self._seed)
    found = self._respond(params, [question.ids for question in questions], seed)
    taken = []
    for row, (question, answers) in enumerate(zip(questions, found, strict=True)):
      if len(answers) < count:
        raise ValueError(
          f"the prompt {question.text!r} has {len(answers)} answers and group_size={count}; raise "
          "decoding.GenerationOptions.num_return_sequences."
        )
      chosen = draw_indices(np.arange(len(answers)), count, order_key(row, seed))
      taken.extend(answers[i] for i in chosen)
    return [question for question in questions for _ in range(count)], taken

  def _arrays(self, asked, answers) -> dict[str, np.ndarray]:
    """Tokens and masks."""
    num, width, slots = len(asked), self._prompt_length, self._num_slots
    tokens = np.full((num, width + slots), self._end_id, np.int32)
    segments = np.zeros((num, width + slots), np.int32)
    for row, (question, answer) in enumerate(zip(asked, answers)):
      ids = [*_content(answer), self._end_id if answer.is_cut else answer.ids[-1]]
      if len(ids) > slots:
        raise ValueError(
          f"an answer to the prompt {question.text!r} has {len(ids)} tokens with its end, and "
          f"response_length={slots - 1} leaves room for {slots}; raise it."
        )
      whole = slice(width - len(question.ids), width + len(ids))
      tokens[row, whole], segments[row, whole] = [*question.ids, *ids], 1
    mask = segments[:, width:].astype(np.float32)
    segments = segments[:, :-1]
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    return {"tokens": tokens[:, :-1], "positions": positions, "segment_ids": segments,
            "targets": tokens[:, width:], "loss_mask": mask}

  def _nats(self, arrays, params) -> dict[str, np.ndarray]:
    """Log-probabilities under the policy and the reference, from one program: equal if they are."""
    batch = self._partitioner.place_rows(arrays)
    with self._partitioner.activate():
      found = [np.asarray(self._log_probs(p, params, batch)) for p in (params, self._reference)]
    return dict(zip(("log_probs", "reference"), found))

  def _check_kl(self, kl: float) -> None:
    if not self._min_kl <= kl <= self._max_kl:  # NaN too
      raise RolloutError(
        f"the policy is {kl:.4g} nats a response from its reference, outside of min_kl="
        f"{self._min_kl:g} and max_kl={self._max_kl:g}; raise the coefficient of the penalty, "
        "lower the learning rate, or widen the bounds."
      )


@functools.lru_cache(maxsize=16)
def _log_probs_of(model, partitioner, live_blocks):
  """The jitted log-probabilities of `(parameters, the policy's, batch)`; sources of one model and
  mesh share the compiled program."""

  def log_probs(params, policy, batch):
    if live_blocks is None:
      return networks.log_probs(model, params, batch)
    mixed = networks.on_live_trunk(policy, params, live_blocks)
    return networks.log_probs(model, mixed, batch, params)

  return jax.jit(log_probs, out_shardings=partitioner.replicated)


def _content(answer: Answer) -> Sequence[int]:
  """The tokens of an answer without its end token."""
  return answer.ids if answer.is_cut else answer.ids[:-1]


def _own(path: Path) -> Path:
  """Each process of a job writes its own rows."""
  path, index = Path(path), jax.process_index()
  return path if index == 0 else path.with_name(f"{path.stem}-{index}{path.suffix}")


def _check(config, questions, batch_size, prompt_length, response_length, group_size) -> None:
  if batch_size % group_size:
    raise ValueError(
      f"batch_size={batch_size} is not a multiple of group_size={group_size}; choose a multiple.")
  batches_lib.num_steps_per_epoch(len(questions), batch_size // group_size)
  if prompt_length + response_length > config.max_length:
    raise ValueError(
      f"prompt_length={prompt_length} and {response_length} new tokens are beyond the "
      f"{config.max_length} positions of the model; shorten one of them."
    )
  for question in questions:
    if not 0 < len(question.ids) <= prompt_length:
      raise ValueError(
        f"the prompt {question.text!r} has {len(question.ids)} tokens, and prompt_length="
        f"{prompt_length}; leave it out, or raise the length."
      )
