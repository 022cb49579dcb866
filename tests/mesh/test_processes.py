"""Requests to stop, alone and among several processes, and what tells of a lost peer."""

import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from lmops_jax.mesh import processes


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch):
  handler = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(processes._Requests, "arrived", False)
  monkeypatch.setattr(processes._Requests, "polls", 0)
  yield
  signal.signal(signal.SIGTERM, handler)


def test_sigterm_interrupts_or_waits_for_what_can_save():
  processes.handle_sigterm()
  with processes.saving_on_request():
    os.kill(os.getpid(), signal.SIGTERM)
    assert processes.stop_requested()
  with pytest.raises(processes.Terminated):
    processes.stop_between()
  processes.handle_sigterm()
  with pytest.raises(processes.Terminated):
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_among_several_processes_stays_after_the_one_call_that_tells_it(monkeypatch):
  asked = []

  def service(number):  # as jax's: true at one number, of a count that goes up by one
    asked.append(number)
    return number == 3

  monkeypatch.setattr(processes, "count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service)
  assert [processes.stop_requested() for _ in range(5)] == [False, False, True, True, True]
  assert asked == [1, 2, 3]
  with pytest.raises(processes.Terminated):
    processes.stop_between()


@pytest.mark.parametrize("text, lost", [
  ("INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1", True),
  ("UNAVAILABLE: The coordination service found a task without heartbeats", True),
  ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes", False),
])
def test_errors_of_jax_that_tell_of_a_lost_peer(text, lost):
  assert processes.is_lost_peer(jax.errors.JaxRuntimeError(text)) == lost
  assert not processes.is_lost_peer(ValueError(text))


def test_one_process_fetches_arrays_and_numbers_and_leaves_nobody():
  got = processes.fetch({"a": jax.numpy.arange(3), "b": 2.0})
  assert type(got["a"]) is np.ndarray and list(got["a"]) == [0, 1, 2] and got["b"] == 2.0
  assert processes.count() == 1
  processes.leave_others(1)  # returns
