"""What generation hands back: the tokens behind each prompt, as they come and at the end."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from lmops_jax.decoding import beam as beam_lib


class Generated(NamedTuple):
  """The tokens that follow one prompt.

  Attributes:
    ids: new tokens, with the end token where one ended them.
    logprobs: of each id under the model's own distribution, `log_softmax(logits)` in float32 before
      temperature and filters, in nats.
    finish_reason: "eos" (an end token), "stop" (the caller ended it) or "length".
    score: of beam search, what hypotheses are ranked by; else None.
  """

  ids: list[int]
  logprobs: list[float]
  finish_reason: str
  score: float | None = None


class Watched:
  """Hands new tokens of a batch to the callback and remembers which rows it ended."""

  def __init__(self, callback, rows, plan, options):
    self._callback = callback
    self._rows = rows
    self._copies = plan.copies
    self._per_prompt = options.num_return_sequences
    self._given = np.zeros((len(rows), plan.copies), int)
    self._ended = np.zeros((len(rows), plan.copies), bool)
    self.seen = 0  # steps

  def look(self, state):
    """Calls back for what is new; returns which rows the callback has ended, `[B,c]`."""
    chosen = state.chosen
    size = state.prompt_length.shape[0]
    num_new = on_host(chosen.num_new).reshape(size, self._copies)
    history = on_host(chosen.history).reshape(size, self._copies, -1)
    lengths = on_host(state.prompt_length)
    self.seen = int(on_host(state.step))
    for row, i in enumerate(self._rows):
      for j in range(self._copies):
        given, there = self._given[row, j], num_new[row, j]
        if given < there and not self._ended[row, j]:
          ids = history[row, j, lengths[row] + given : lengths[row] + there].tolist()
          self._given[row, j] = there
          self._ended[row, j] = bool(self._callback(i * self._per_prompt + j, ids))
    ended = np.zeros((size, self._copies), bool)
    ended[: len(self._rows)] = self._ended
    return ended


def read_rows(state, prompt_lengths, plan, options, stopped):
  """`Generated` for each prompt and answer, from the final state."""
  del options
  rows = jax.tree.map(on_host, state.chosen)
  for b, length in enumerate(prompt_lengths):
    answers = []
    for j in range(plan.copies):
      r = b * plan.copies + j
      n = int(rows.num_new[r])
      ids = rows.history[r, length : length + n].tolist()
      reason = "stop" if stopped[b, j] else "eos" if ids[-1] in plan.eos_ids else "length"
      answers.append(Generated(ids, rows.log_probs[r, :n].tolist(), reason))
    yield answers


def read_beams(state, prompt_lengths, plan, options, stopped):
  """As `read_rows`: the best of all groups' finished hypotheses."""
  del stopped
  beams: beam_lib.Beams = jax.tree.map(on_host, state.chosen)

  def flat(x):
    return x.reshape(x.shape[0], plan.beam.num_beams, *x.shape[3:])

  scores, lengths = flat(beams.finished_scores), flat(beams.finished_length)
  history, log_probs = flat(beams.finished_history), flat(beams.finished_log_probs)
  for b, length in enumerate(prompt_lengths):
    answers = []
    for k in np.argsort(-scores[b], kind="stable")[: options.num_return_sequences]:
      n = int(lengths[b, k])
      ids = history[b, k, length : length + n].tolist()
      reason = "eos" if ids[-1] in plan.eos_ids else "length"
      answers.append(Generated(ids, log_probs[b, k, :n].tolist(), reason, float(scores[b, k])))
    yield answers


def on_host(array) -> np.ndarray:
  """A copy on the host, of an array of this or of all processes."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
  return np.array(array)
