"""What the processes of one job need of each other: to stop together, and to read shared arrays.

A job of several processes runs the same program on all hosts in step. Nothing here imports jax
before it is needed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lmops_jax.host import manifests, progress

_PATIENCE_MS = 10_000  # after which a line says that another process is waited for


class Terminated(BaseException):
  """SIGTERM arrived; not an Exception, so that nothing mistakes it for a failure."""


class _Requests:
  """What this process knows of requests to stop. One a process, as its signal handler is."""
  savers = 0  # regions that save and stop by themselves
  arrived = False
  polls = 0
  all_end = False  # every process of the job is on its way out


def handle_sigterm() -> None:
  """Makes SIGTERM end this process, or let the work that can save its state do so first.

  With several processes jax's preemption service takes SIGTERM instead, and tells all of them.
  """
  with contextlib.suppress(ValueError):  # not in the main thread
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number, frame) -> None:
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
  _Requests.arrived = True
  if not _Requests.savers:
    raise Terminated


@contextlib.contextmanager
def saving_on_request() -> Iterator[None]:
  """Inside, SIGTERM does not interrupt: the work polls `stop_requested`, saves, and raises."""
  _Requests.savers += 1
  try:
    yield
  finally:
    _Requests.savers -= 1


def stop_requested() -> bool:
  """Whether to save and stop now. All processes must call it at the same points of their work.

  With several processes it is True from the same call on in each of them, a few calls after one of
  them got SIGTERM.
  """
  if count() > 1 and not _Requests.arrived:
    from jax.experimental import multihost_utils
    _Requests.polls += 1
    # It says True once only, perhaps when the caller has nothing left to stop.
    _Requests.arrived = multihost_utils.reached_preemption_sync_point(_Requests.polls)
  return _Requests.arrived


def stop_between() -> None:
  """Raises `Terminated`, between two works, if the processes of this job are asked to stop."""
  if stop_requested():
    raise Terminated


def count() -> int:
  """Processes of this job."""
  return sys.modules["jax"].process_count() if is_joined() else 1


def is_joined() -> bool:
  """Whether jax knows of other processes; asks without importing jax or starting a backend."""
  return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def told_by(env: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
  """Address of the coordinator, number of processes, index of this one, None if not given.

  Raises:
    ValueError: for a number that is none.
  """
  return (env.get("JAX_COORDINATOR_ADDRESS") or None, _integer(env, "JAX_NUM_PROCESSES"),
          _integer(env, "JAX_PROCESS_ID"))


def are_expected(env: Mapping[str, str]) -> bool:
  """Whether an environment tells of other processes of this job, or asks to look for them.

  Raises:
    ValueError: for a number that is none.
  """
  num = told_by(env)[1]
  if num is not None:
    return num > 1
  tasks = max(_integer(env, "SLURM_NTASKS") or 1, _integer(env, "OMPI_COMM_WORLD_SIZE") or 1)
  # A step of one task, or an interactive shell within an allocation, is a job by itself.
  tasks = 1 if "SLURM_JOB_ID" in env and "SLURM_PROCID" not in env else tasks
  tpu_workers = env.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
  kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
  multislice = "MEGASCALE_COORDINATOR_ADDRESS" in env
  asked = env.get("LMOPS_DISTRIBUTED") == "1"
  return asked or tasks > 1 or tpu_workers > 1 or kubernetes or multislice


def _integer(env: Mapping[str, str], name: str) -> int | None:
  if name not in env:
    return None
  try:
    return int(env[name])
  except ValueError:
    raise ValueError(f"The environment variable {name}={env[name]!r} is not an integer.") from None


def place() -> tuple[int, int]:
  """Index of this process and the number of processes, of a job that it has joined.

  Unlike jax's own functions it starts no backend, for which all processes would have to come.
  """
  from jax._src import distributed  # as orbax does: jax shows them nowhere else
  return distributed.global_state.process_id, distributed.global_state.num_processes


def put_text(key: str, text: str) -> None:
  """Leaves a text for the other processes of this job, under a key that is used once."""
  from jax._src import distributed
  distributed.global_state.client.key_value_set(f"lmops/{key}", text)


def get_text(key: str, whose: str) -> str:
  """A text that another process leaves; waits for it as long as that process lives.

  Args:
    whose: the process, for the line that says for whom this one waits.
  """
  import jax
  from jax._src import distributed

  told = False
  while True:
    try:
      return distributed.global_state.client.blocking_key_value_get(f"lmops/{key}", _PATIENCE_MS)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
    if not told:
      progress.log(f"waiting for {whose} of this job")
      told = True


def fetch(tree: Any) -> Any:
  """The values of a tree of arrays as NumPy arrays, in every process.

  Arrays that several processes hold in parts are gathered, so all of them must call this.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  def leaf(x):
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(leaf, tree)


# What backends say when a peer is gone: gloo and NCCL, the coordination service.
_LOST = ("connection closed by peer", "connection reset by peer", "connection refused",
         "broken pipe", "gloo", "nccl", "coordination service", "coordination agent", "heartbeat",
         "another task")


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error, or what caused it, is jax's word that another process of the job has gone."""
  return any(map(_tells_of_a_lost_peer, manifests.chain(error)))


def _tells_of_a_lost_peer(error: BaseException) -> bool:
  names = {kind.__name__ for kind in type(error).__mro__}
  text = str(error).lower()
  return bool(names & {"JaxRuntimeError", "XlaRuntimeError"}) and any(s in text for s in _LOST)


def end_together() -> None:
  """Notes that all processes of the job have agreed to end."""
  _Requests.all_end = True


def leave_others(code: int) -> None:
  """After an error, ends this process at once if it is one of several; else does nothing.

  An ordinary exit first meets the others at jax's shutdown barrier, and they may be waiting for
  this one elsewhere. This way they see that it is gone. If all have agreed to end, they do meet
  there, since jax kills those that are left without the first one.
  """
  if is_joined():
    sys.stdout.flush()
    sys.stderr.flush()
    if _Requests.all_end:
      with contextlib.suppress(Exception):
        sys.modules["jax"].distributed.shutdown()
    os._exit(code)
