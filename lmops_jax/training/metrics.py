"""Where the figures of a run go: JSON lines that survive a restart, and TensorBoard through clu."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lmops_jax.host import progress
from lmops_jax.host.whole_files import write_text


class MetricsLog:
  """Records by step, in `metrics.jsonl`, kept exactly as an undisturbed run would have them.

  A record is a flat dict with `step` and numbers that depend on the computation only; times go to
  `speed.jsonl` and TensorBoard. Only the first process writes.

  Args:
    directory: the folder of the files.
    history: the records up to the step that a run resumes from.
    tensorboard: write event files too, if clu and its TensorBoard writer are installed.
    resumed: keep the times of earlier attempts.
  """

  def __init__(self, directory: Path, history: list[dict[str, Any]], tensorboard: bool = True,
               resumed: bool = False):
    self._directory = Path(directory)
    self._writing = jax.process_index() == 0
    self.history = list(history)
    self._writer = None
    if not self._writing:
      return
    self._directory.mkdir(parents=True, exist_ok=True)
    write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.history))
    if not resumed:
      self._speed.unlink(missing_ok=True)
    if tensorboard:
      self._writer = _summary_writer(self._directory / "tensorboard")

  @property
  def _path(self) -> Path:
    return self._directory / "metrics.jsonl"

  @property
  def _speed(self) -> Path:
    return self._directory / "speed.jsonl"

  def write(self, record: dict[str, Any]) -> None:
    """Adds a record with `step`."""
    self.history.append(record)
    self._append(self._path, record)

  def write_speed(self, record: dict[str, Any]) -> None:
    """Adds rates, which are not part of the history."""
    self._append(self._speed, record)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()

  def _append(self, path, record):
    if not self._writing:
      return
    with path.open("a") as file:
      file.write(json.dumps(record) + "\n")
    if self._writer is not None:
      self._writer.write_scalars(record["step"], {k: v for k, v in record.items() if k != "step"})


class Sums:
  """Sums over the steps since the last record, in JSON values, so that checkpoints are exact.

  Args:
    steps: number of steps added so far.
    sums: sums by name, see `training.learner.Learner.step`; begun anew with every record.
    totals: totals by name, since the start of the run.
  """

  def __init__(self, steps: int = 0, sums: dict[str, float] | None = None,
               totals: dict[str, int] | None = None):
    self._steps, self._sums, self._totals = steps, dict(sums or {}), dict(totals or {})

  def as_json(self) -> dict[str, Any]:
    """The arguments that make this object again."""
    return {"steps": self._steps, "sums": dict(self._sums), "totals": dict(self._totals)}

  def add(self, found: Mapping[str, Any]) -> None:
    """Adds the sums of one step."""
    self._steps += 1
    for name, value in found.items():
      if name.startswith("num_"):
        into = self._sums if name == "num_examples" else self._totals
        into[name] = into.get(name, 0) + int(value)
      elif name not in ("nonfinite", "objective"):
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

  def take(self) -> dict[str, float]:
    """The record: means over examples, means over steps, totals. The sums begin anew."""
    num_examples = self._sums.pop("num_examples")
    of_examples = {name: value for name, value in self._sums.items() if name.endswith("_sum")}
    record = {name.removesuffix("_sum"): value / num_examples
              for name, value in of_examples.items()}
    record |= {name: value / self._steps for name, value in self._sums.items()
               if name not in of_examples}
    self._steps, self._sums = 0, {}
    return record | self._totals


class Rates:
  """Rates between records. The first interval compiles and is left out.

  Args:
    log: gets the rates.
    num_positions: token positions of a step, 0 if there are none.
    flops_per_token: operations for each position; None is unknown.
  """

  def __init__(self, log: MetricsLog, num_positions: int, flops_per_token: float | None):
    self._log, self._positions, self._flops = log, num_positions, flops_per_token
    self._last = None

  def record(self, step: int) -> None:
    """Notes that `step` steps are done by now."""
    now = time.monotonic()
    if self._last is not None and now > self._last[1]:
      rate = (step - self._last[0]) / (now - self._last[1])
      record = {"step": step, "steps_per_sec": rate}
      if self._positions:
        record["tokens_per_sec"] = rate * self._positions
        if self._flops:
          record["flops_per_sec"] = rate * self._positions * self._flops
      self._log.write_speed(record)
    self._last = (step, now)


def read_records(path: Path) -> list[dict[str, Any]]:
  """Records of a finished run's file of JSON lines."""
  return [json.loads(line) for line in Path(path).read_text().splitlines()]


def _summary_writer(directory):
  # find_spec, because the import takes seconds and brings TensorFlow.
  missing = [name for name in ("clu", "tensorboard") if importlib.util.find_spec(name) is None]
  if missing:
    progress.log(f"No TensorBoard files are written: {' and '.join(missing)} is not installed.")
    return None
  with _hidden_native_stderr():
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(directory))


@contextlib.contextmanager
def _hidden_native_stderr():
  """Hides the messages of TensorFlow's C++ code about absent GPUs while it is loaded.

  That code writes to the file descriptor before any of its own settings can stop it; Python errors
  still come through as exceptions.
  """
  sys.stderr.flush()
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)
