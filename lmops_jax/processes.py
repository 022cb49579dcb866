"""What the processes of one job need of each other: to stop together, and to read shared arrays.

A job of several processes runs the same program on all hosts in step. Nothing here imports jax
before it is needed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any


class Terminated(BaseException):
  """SIGTERM arrived; not an Exception, so that nothing mistakes it for a failure."""


class _Requests:
  """What this process knows of requests to stop. One a process, as its signal handler is."""
  savers = 0  # regions that save and stop by themselves
  arrived = False
  polls = 0


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
    # Says True once only, which may be where the caller has nothing left to stop.
    _Requests.arrived = multihost_utils.reached_preemption_sync_point(_Requests.polls)
  return _Requests.arrived


def stop_between() -> None:
  """Raises `Terminated` where the processes of this job are asked to stop, between two works."""
  if stop_requested():
    raise Terminated


def count() -> int:
  """Processes of this job."""
  return sys.modules["jax"].process_count() if _is_joined() else 1


def _is_joined() -> bool:
  """Whether jax knows of other processes; asks without importing jax or starting a backend."""
  return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


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
  """Whether an error of jax says that another process of the job has gone."""
  names = {kind.__name__ for kind in type(error).__mro__}
  text = str(error).lower()
  return bool(names & {"JaxRuntimeError", "XlaRuntimeError"}) and any(s in text for s in _LOST)


def leave_others(code: int) -> None:
  """After an error, ends this process at once if it is one of several; else does nothing.

  An ordinary exit first meets the others at jax's shutdown barrier, and they may be waiting for
  this one elsewhere. This way they see that it is gone.
  """
  if _is_joined():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
