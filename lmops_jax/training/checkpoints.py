"""Checkpoints on disk. The only module that knows orbax.

Two kinds: the training states that a `CheckpointStore` keeps for exact resume, written while
training goes on, and plain parameter trees (`save_params`, `load_params`) for later stages. Both
become visible by one rename, so what a kill leaves behind is never read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lmops_jax import progress
from lmops_jax.whole_files import write_json

_SIZES = "sizes.json"  # in a finished step's folder: its files and their bytes


class CheckpointStore:
  """Training states by step in one folder, written and read by all processes of a job together.

  The sizes of a finished step's files are noted beside them, so that a step that was cut short
  later (by a failing disk, by a partial copy) is found out, dropped, and the one before it used.

  Args:
    directory: made when it is not there.
    max_to_keep: newest states kept; None keeps all.
    keep_steps: steps whose states are kept in any case.
  """

  def __init__(
    self, directory: Path, max_to_keep: int | None = 1, keep_steps: Collection[int] = ()
  ):
    if max_to_keep is not None and max_to_keep < 1:
      raise ValueError(f"max_to_keep={max_to_keep} must be at least 1, or None to keep all.")
    self._directory = Path(directory).absolute()
    self._unsized: int | None = None  # the step whose sizes are not noted yet
    policy = checkpoint_managers.AnyPreservationPolicy([
      checkpoint_managers.LatestN(max_to_keep),
      checkpoint_managers.CustomSteps(tuple(keep_steps)),
    ])
    self._manager = _Manager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy, cleanup_tmp_directories=True
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "extra": ocp.JsonCheckpointHandler(),
      },
    )

  def save(self, step: int, state, extra_json: dict[str, Any] | None = None) -> None:
    """Starts writing; the arrays may be donated or changed as soon as this returns.

    Args:
      step: steps done; a step that is there already is written anew.
      state: any pytree of arrays.
      extra_json: small JSON values that belong to it.
    """
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra_json or {})
    )
    self.wait()
    if step in self._manager.all_steps():
      self._manager.delete(step)
    self._manager.save(step, args=items, force=True)
    self._unsized = step

  def latest_step(self) -> int | None:
    """Newest finished step whose files are whole, None when there is none.

    Newer ones are deleted, and a line says so.
    """
    newest_first = self.all_steps()[::-1]
    damage = []
    if jax.process_index() == 0:  # whose findings hold for all
      damage = list(itertools.takewhile(bool, map(self._damage, newest_first)))
    num_damaged = len(damage)
    if jax.process_count() > 1:
      num_damaged = int(multihost_utils.broadcast_one_to_all(np.int32(num_damaged)))
    for step, what in itertools.zip_longest(newest_first[:num_damaged], damage):
      self._drop(step, what)
    return self._manager.latest_step()

  def restore_latest(self, abstract) -> tuple[int, Any, dict[str, Any]] | None:
    """`(step, state, extra)` of the newest step that can be read, None when there is no step.

    Args:
      abstract: as for `restore`.

    Raises:
      ValueError: the checkpoint holds other arrays than `abstract`, or no step can be read.
    """
    while (step := self.latest_step()) is not None:
      try:
        return step, *self.restore(step, abstract)
      except UnreadableError as error:
        # What one process cannot read, others may: several have no way back from here.
        if jax.process_count() > 1 or len(self.all_steps()) == 1:
          raise
        self._drop(step, str(error))
    return None

  def _damage(self, step: int) -> str | None:
    """What is wrong with a step's files, None for nothing or where sizes were not noted."""
    folder = self._directory / str(step)
    try:
      sizes = json.loads((folder / _SIZES).read_text(encoding="utf-8"))
    except FileNotFoundError:
      return None  # killed between the step's end and the note
    except ValueError:
      return f"its {_SIZES} is damaged"
    for name, size in sizes.items():
      path = folder / name
      found = path.stat().st_size if path.is_file() else None
      if found != size:
        has = "is missing" if found is None else f"has {found} bytes"
        return f"its file {name} {has} of {size}"
    return None

  def _drop(self, step: int, what: str) -> None:
    older = [s for s in self.all_steps() if s < step]
    if jax.process_index() == 0:
      then = f"going on from step {older[-1]}" if older else "there is none before it"
      progress.log(f"checkpoint {self._directory / str(step)} is dropped ({what}); {then}")
    self._manager.delete(step)

  def all_steps(self) -> list[int]:
    """Finished steps, ascending."""
    return sorted(self._manager.all_steps())

  def extra(self, step: int) -> dict[str, Any]:
    """The extra values of a step."""
    try:
      return self._manager.restore(
        step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
    except Exception as error:
      raise _unreadable(self._directory / str(step), error) from error

  def restore(self, step: int, abstract) -> tuple[Any, dict[str, Any]]:
    """The state and the extra values of a step.

    Args:
      step: one of `all_steps()`.
      abstract: tree of `ShapeDtypeStruct` with the shardings wanted, which may be of another mesh.

    Raises:
      ValueError: when the checkpoint holds other arrays than `abstract`, or cannot be read.
    """
    path = self._directory / str(step)
    # A message of orbax names the shapes but not the array; the metadata does both.
    try:
      stored = self._manager.item_metadata(step)["state"]
      _check_same(stored, abstract, path)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), extra=ocp.args.JsonRestore()
        ),
      )
    except MismatchError:
      raise
    except Exception as error:
      raise _unreadable(path, error) from error
    return restored["state"], restored["extra"]

  def wait(self) -> None:
    """Returns when everything that `save` started is on disk; raises what failed."""
    self._manager.wait_until_finished()
    step, self._unsized = self._unsized, None
    if step is not None and jax.process_index() == 0:
      folder = self._directory / str(step)
      write_json(folder / _SIZES, {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*")) if path.is_file()})

  def close(self) -> None:
    """Waits and frees the writer's threads."""
    try:
      self.wait()
    finally:
      self._manager.close()


class _Manager(ocp.CheckpointManager):
  """orbax's, but it does not ask jax's preemption service.

  The service keeps one number a process, which `processes.stop_requested` counts up. orbax would
  put its step there, at a save and from its own thread later, and a request to stop would be
  missed.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class MismatchError(ValueError):
  """A checkpoint that holds other arrays than the program expects."""


class UnreadableError(ValueError):
  """A checkpoint that is damaged."""


def save_params(directory: Path, params) -> None:
  """Writes a tree of arrays and waits; `directory` appears when it is complete.

  What was there before is replaced. Parents are made.
  """
  directory = Path(directory).absolute()
  directory.parent.mkdir(parents=True, exist_ok=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory, params, force=True)
    checkpointer.wait_until_finished()


def load_params(directory: Path, abstract=None):
  """Reads a tree that `save_params` wrote.

  Args:
    directory: as given to `save_params`.
    abstract: tree of `ShapeDtypeStruct`, with shardings where they are wanted; None gives plain
      dictionaries of arrays on this process's first device.

  Raises:
    FileNotFoundError: when nothing is there.
    ValueError: when it holds other arrays than `abstract`, or cannot be read.
  """
  directory = Path(directory).absolute()
  if not directory.is_dir():
    raise FileNotFoundError(f"There are no parameters at {directory}.")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      stored = checkpointer.metadata(directory).item_metadata.tree
      if abstract is None:
        abstract = jax.tree.map(
          lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored
        )
      else:
        _check_same(stored, abstract, directory)
        abstract = jax.tree.map(
          lambda leaf: leaf
          if getattr(leaf, "sharding", None) is not None
          else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
          abstract,
        )
      return checkpointer.restore(directory, abstract)
    except MismatchError:
      raise
    except Exception as error:
      raise _unreadable(directory, error) from error



def _unreadable(path, error):
  reason = str(error).strip().splitlines()
  return UnreadableError(
    f"The checkpoint {path} cannot be read ({type(error).__name__}: "
    f"{reason[0][:200] if reason else 'no message'}); delete it to go on without it."
  )


def _check_same(stored, abstract, path):
  """Compares names and shapes; dtypes are left to the reader."""
  stored, wanted = (
    {_name(key): tuple(np.shape(leaf) if np.isscalar(leaf) else leaf.shape)
     for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (getattr(stored, "tree", stored), abstract)
  )
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      has, wants = (
        f"shape {side[name]}" if name in side else "nothing" for side in (stored, wanted)
      )
      raise MismatchError(
        f"The checkpoint {path} has {has} at {name} and the model wants {wants}; restore it with "
        "the model and optimizer that wrote it."
      )


def _name(path) -> str:
  """One spelling for a position in named tuples and in the dictionaries they are stored as."""
  parts = (
    getattr(part, "key", getattr(part, "name", getattr(part, "idx", None))) for part in path
  )
  return "/".join(str(part) for part in parts)
