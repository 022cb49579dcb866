"""Continuous batching: many requests share the steps of one model, each for as long as it runs.

A fixed number of slots. A job waits in a queue of bounded length, joins at the next step when a
slot is free, and leaves when it is done or nobody wants it any more. Its tokens are those of
`Generator` with its options and its `row_id`, and depend on no other job but for the rounding of
sums (the cache is as wide as the longest row needs).

One thread calls `step` or `run`, and owns the device; any thread may submit and cancel jobs and
read what comes of them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import queue
import threading
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from lmops_jax.decoding import loop as loop_lib
from lmops_jax.decoding import slots as slots_lib
from lmops_jax.decoding.generate import GREEDY, checked_prompts, for_decoding
from lmops_jax.decoding.lengths import bucket
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt, padded
from lmops_jax.decoding.text import TextStream, check_stop
from lmops_jax.mesh.meshes import Partitioner, activated, shards_of

_SMALLEST = 64  # columns of the cache
_PER_JOB = ("max_new_tokens", "temperature", "top_p", "seed", "eos_ids")


class Full(Exception):
  """The queue has no room for the jobs; the sentence says how many wait."""


class Piece(NamedTuple):
  """What a step adds to a job's answer.

  Attributes:
    row_id: the job's.
    text: that is certain now; may be empty, and lag behind the ids.
    ids: new tokens, one or none.
    logprobs: of each id, see `results.Generated`.
    finish_reason: None if more will come; else "eos", "stop" or "length".
    error: one sentence if the job broke off, and then this is its last piece; else None.
  """

  row_id: int
  text: str = ""
  ids: tuple[int, ...] = ()
  logprobs: tuple[float, ...] = ()
  finish_reason: str | None = None
  error: str | None = None

  @property
  def is_last(self) -> bool:
    """Whether nothing comes after it."""
    return self.finish_reason is not None or self.error is not None


@dataclasses.dataclass(eq=False)
class Job:
  """One answer that is asked for.

  Attributes:
    prompt: token ids.
    options: greedy or sampled; of the filters only `top_p`, and no beams.
    stop: texts that end the answer, which is cut before them.
    row_id: with the seed, decides what is drawn; see `Generator.generate_ids`.
    pieces: what has come and not been taken; the last has `is_last`. Several jobs may share one.
    cancelled: set by who does not want the rest; no further piece is certain to come then.
  """

  prompt: Sequence[int]
  options: GenerationOptions = GREEDY
  stop: Sequence[str] = ()
  row_id: int = 0
  pieces: queue.SimpleQueue[Piece] = dataclasses.field(default_factory=queue.SimpleQueue)
  cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(eq=False)
class _Running:
  """A job in its slot."""

  job: Job
  stream: TextStream
  eos_ids: tuple[int, ...]
  plan: loop_lib.Plan
  knobs: loop_lib.Knobs
  num_new: int = 0

  @property
  def length(self) -> int:
    """Tokens of prompt and answer."""
    return len(self.job.prompt) + self.num_new


class Batcher:
  """The slots, the queue in front of them, and the model behind them.

  Attributes:
    num_slots: jobs that run at the same time.
    max_waiting: jobs that wait for a slot beside them.
    max_length: most tokens of a prompt and its answer together.
  """

  def __init__(
    self, model, params, tokenizer, partitioner: Partitioner | None = None, *,
    num_slots: int = 8, max_waiting: int = 64, max_length: int | None = None,
  ):
    """
    Args:
      model: `Transformer`.
      params: its parameters, as `Generator` takes them.
      tokenizer: see `text`.
      partitioner: mesh to run on, over whose batch axes there is nothing to divide; None is the
        default device.
      num_slots, max_waiting: see the class.
      max_length: None is the model's.

    Raises:
      ValueError: a model that does not generate, or numbers that make no sense.
    """
    config = model.config
    if not config.causal:
      raise ValueError(
        "models.TransformerConfig.causal is False: an encoder cannot continue a text; load a "
        "decoder to serve.")
    for name, value, least in (
      ("num_slots", num_slots, 1), ("max_waiting", max_waiting, 0),
      ("max_length", config.max_length if max_length is None else max_length, 2),
    ):
      if value < least:
        raise ValueError(f"Batcher has {name}={value}, which must be at least {least}.")
    if shards_of(partitioner) > 1:
      raise ValueError(
        f"the mesh divides a batch into {shards_of(partitioner)} parts, and the slots of a server "
        "are not divided; take a mesh with the axis tensor alone.")
    self.num_slots, self.max_waiting = num_slots, max_waiting
    self.max_length = min(max_length or config.max_length, config.max_length)
    self._model, self._tokenizer, self._partitioner = model, tokenizer, partitioner
    self._params = for_decoding(model, nn.unbox(params), partitioner)
    self._running: list[_Running | None] = [None] * num_slots
    self._waiting: collections.deque[Job] = collections.deque()
    self._changed = threading.Condition()
    self._is_closed = False
    self._state: loop_lib.State | None = None
    self._idle_knobs = loop_lib.knobs_of(GREEDY, 1)
    self._read = jax.jit(functools.partial(slots_lib.read, model), static_argnums=0)
    self._put = jax.jit(slots_lib.put, donate_argnums=0)
    self._step = jax.jit(
      functools.partial(slots_lib.step, model), static_argnums=0, donate_argnums=3)
    self._resized = jax.jit(slots_lib.resized, static_argnums=1)

  @property
  def num_running(self) -> int:
    """Slots in use."""
    return sum(running is not None for running in self._running)

  @property
  def num_waiting(self) -> int:
    """Jobs in the queue."""
    return len(self._waiting)

  def check(self, job: Job) -> None:
    """Refuses a job that `submit` would not take; needs no device.

    Raises:
      ValueError: an empty or foreign prompt, one that is too long with its new tokens, an empty
        stop text, or options that slots do not have.
    """
    check_stop(job.stop)
    neutral = dataclasses.replace(
      GREEDY, **{name: getattr(job.options, name) for name in _PER_JOB})
    if job.options != neutral:
      raise ValueError(
        f"the slots of a server have the options {', '.join(_PER_JOB)}, and the job has others, "
        f"{job.options}; use Generator for those.")
    longest = len(job.prompt) + job.options.max_new_tokens
    if longest > self.max_length:
      raise ValueError(
        f"the prompt has {len(job.prompt)} tokens and {job.options.max_new_tokens} more are asked "
        f"for, and this server's limit is {self.max_length} tokens; shorten the prompt or ask for "
        "fewer.")
    checked_prompts(self._model.config, [job.prompt], job.options)

  def submit(self, *jobs: Job) -> None:
    """Puts all of the jobs into the queue, or none.

    Raises:
      ValueError: as `check`.
      Full: if there are not enough places.
      RuntimeError: after `close`.
    """
    for job in jobs:
      self.check(job)
    with self._changed:
      if self._is_closed:
        raise RuntimeError("the server is about to end.")
      places = self.max_waiting + self.num_slots - self.num_running - len(self._waiting)
      if len(jobs) > places:
        raise Full(
          f"{len(self._waiting)} answers wait already, and {self.num_running} of "
          f"{self.num_slots} slots are in use; try again in a while.")
      self._waiting.extend(jobs)
      self._changed.notify_all()

  def run(self) -> None:
    """Steps until `close`; what then runs or waits breaks off. An error ends the jobs only."""
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._is_closed or self._waiting or self.num_running)
        if self._is_closed:
          break
      try:
        self.step()
      except Exception:
        traceback.print_exc()
    self._break_off("the server ends.")

  def close(self) -> None:
    """Lets `run` return after the step that is under way."""
    with self._changed:
      self._is_closed = True
      self._changed.notify_all()

  def step(self) -> None:
    """Lets jobs leave and join, and gives every job that runs one token more.

    Raises:
      Exception: what the model raised; the jobs that ran or waited have then broken off.
    """
    try:
      with activated(self._partitioner):
        self._leave()
        self._join()
        if self.num_running:
          self._advance()
    except Exception as error:  # memory, a device: those who asked are told, the next may succeed
      self._state = None
      self._break_off(f"the model failed ({type(error).__name__}).")
      raise

  def _leave(self):
    for slot, running in enumerate(self._running):
      if running is not None and running.job.cancelled.is_set():
        self._running[slot] = None
    with self._changed:
      wanted = [job for job in self._waiting if not job.cancelled.is_set()]
      self._waiting = collections.deque(wanted)

  def _join(self):
    for slot in [i for i, running in enumerate(self._running) if running is None]:
      with self._changed:
        job = self._waiting.popleft() if self._waiting else None
      if job is not None:  # one a slot and step, so that those who run are not kept waiting
        self._start(job, slot)

  def _start(self, job, slot):
    """Reads the prompt; the job takes the slot unless its first token is its last."""
    eos_ids = job.options.eos_ids
    eos_ids = tuple(self._tokenizer.stop_ids if eos_ids is None else eos_ids)
    plan = loop_lib.plan_of(job.options, ())  # where a job ends is seen here, job by job
    running = _Running(
      job, TextStream(self._tokenizer, check_stop(job.stop), job.prompt), eos_ids, plan,
      loop_lib.knobs_of(job.options, 1))
    self._running[slot] = running  # so that an error reaches it
    width = min(bucket(len(job.prompt)), self._model.config.max_length)
    batch = padded([Prompt(list(job.prompt))], 1, width, "right")
    row, chosen = self._read(
      plan, self._params, running.knobs, batch.tokens, batch.valid,
      np.array([job.row_id], np.int32))
    self._take(slot, *(np.asarray(x)[0] for x in chosen))
    if self._running[slot] is not None:
      self._fit(width)
      self._state = self._put(self._state, row, np.int32(slot))

  def _advance(self):
    self._fit()
    used = [running for running in self._running if running is not None]
    knobs = slots_lib.stacked(
      self._idle_knobs if running is None else running.knobs for running in self._running)
    free = np.array([running is None for running in self._running])
    plan = slots_lib.joint_plan(running.plan for running in used)
    self._state, chosen = self._step(plan, self._params, knobs, self._state, free)
    tokens, log_probs = (np.asarray(x) for x in chosen)
    for slot in np.flatnonzero(~free):
      self._take(slot, tokens[slot], log_probs[slot])

  def _take(self, slot, token, log_prob):
    """Hands a job its new token; the slot is free again if that was the last."""
    running = self._running[slot]
    running.num_new += 1
    if np.isnan(log_prob):
      piece = Piece(running.job.row_id, error="the model's logits are not finite.")
    else:
      piece = self._piece(running, int(token), float(log_prob))
    if piece.is_last:
      self._running[slot] = None
    running.job.pieces.put(piece)

  def _piece(self, running, token, log_prob) -> Piece:
    stream, reason = running.stream, None
    text = stream.add([token])
    if stream.stopped:
      reason = "stop"
    elif token in running.eos_ids:
      reason = "eos"
    elif running.num_new == running.job.options.max_new_tokens:
      reason = "length"
    if reason is not None:
      text += stream.finish()
    return Piece(running.job.row_id, text, (token,), (log_prob,), reason)

  def _fit(self, least: int = 0):
    """Gives the cache as many columns as the longest row needs for its next token."""
    needed = max(least, *(running.length + 1 for running in self._running if running is not None))
    size = min(max(_SMALLEST, 1 << (needed - 1).bit_length()), self._model.config.max_length)
    if self._state is None:
      self._state = slots_lib.empty(self._model.config, self.num_slots, size)
      return
    has = self._state.chosen.history.shape[-1]
    if size > has or 4 * size <= has:  # not to and fro between two sizes
      self._state = self._resized(self._state, size)

  def _break_off(self, sentence):
    with self._changed:
      jobs = [*(running.job for running in self._running if running is not None), *self._waiting]
      self._running = [None] * self.num_slots
      self._waiting.clear()
    for job in jobs:
      job.pieces.put(Piece(job.row_id, error=sentence))
