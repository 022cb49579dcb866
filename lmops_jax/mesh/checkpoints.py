"""Checkpoints on disk. The only module that knows orbax.

Two kinds: the training states that a `CheckpointStore` keeps for exact resume, written while
training goes on, and plain parameter trees (`save_params`, `load_params`) for later stages. Both
become visible by one rename, so what a kill leaves behind is never read.

A training state is hashed once it is on disk, and read back only if it still has those hashes. Only
what has other files, sizes or hashes is called damaged and dropped; what could not be read is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lmops_jax.host import foreign_files, progress, seals
from lmops_jax.host.whole_files import json_text, write_json
from lmops_jax.mesh import processes

_HASHES = "hashes.json"  # in a finished step's folder: its files, their bytes and hashes


class CheckpointStore:
  """Training states by step in one folder, written and read by all processes of a job together.

  The hashes of a finished step's files are noted beside them while work goes on. A step whose files
  changed later (a failing disk, a partial copy), or that was killed before it was noted, is found
  out and dropped, and the one before it is used. Of several processes the first one judges for all.

  Args:
    directory: made when it is not there.
    max_to_keep: newest states kept; None keeps all.
    keep_steps: steps whose states are kept in any case.
    chained: a step is of no use without the kept ones before it.
  """

  def __init__(
    self, directory: Path, max_to_keep: int | None = 1, keep_steps: Collection[int] = (),
    chained: bool = False,
  ):
    if max_to_keep is not None and max_to_keep < 1:
      raise ValueError(f"max_to_keep={max_to_keep} must be at least 1, or None to keep all.")
    self._directory = Path(directory).absolute()
    self._needed = sorted(keep_steps) if chained else []
    self._sound: set[int] = set()  # steps that were read whole and found as they were noted
    self._noting: Future | None = None
    self._thread = ThreadPoolExecutor(1, "checkpoint-hashes")
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
      self._delete(step)
    self._manager.save(step, args=items, force=True)
    if jax.process_index() == 0:
      self._noting = self._thread.submit(self._note, step)

  def latest_step(self) -> int | None:
    """Newest finished step that is whole, None when there is none.

    Newer ones are deleted, and a line says so; so are those that need an older one that is damaged.

    Raises:
      UnreadableError: if a step cannot be read, which says nothing of what it holds.
    """
    self.wait()
    steps = self.all_steps()
    useless = self._useless(steps) if jax.process_index() == 0 else {}
    for step in steps[len(steps) - first_says(len(useless)):][::-1]:
      self._drop(step, useless.get(step))
    return self._manager.latest_step()

  def drop_from(self, step: int, what: str) -> None:
    """Deletes that step and all later ones, which all processes know to be of no use."""
    for later in self.all_steps()[::-1]:
      if later >= step:
        self._drop(later, what)

  def restore_latest(self, abstract) -> tuple[int, Any, dict[str, Any]] | None:
    """`(step, state, extra)` of the newest step that is whole, None when there is no step.

    Args:
      abstract: as for `restore`.

    Raises:
      ValueError: as `restore`.
    """
    step = self.latest_step()
    return None if step is None else (step, *self.restore(step, abstract))

  def _useless(self, steps: list[int]) -> dict[int, str]:
    """What is wrong with the newest of these steps (ascending), down to the first that is whole."""
    found: dict[int, str] = {}
    for needed in self._needed:
      if steps and needed <= steps[-1] and (what := self._damage(needed)):
        later = [step for step in steps if step >= needed]
        found = {step: what if step == needed else f"it needs step {needed}: {what}"
                 for step in later}
        steps = steps[:-len(later)]
        break
    for step in steps[::-1]:
      if (what := self._damage(step)) is None:
        break
      found[step] = what
    return found

  def _damage(self, step: int) -> str | None:
    """What is wrong with a step's files, None for nothing."""
    if step in self._sound:
      return None
    folder = self._directory / str(step)
    try:
      text = (folder / _HASHES).read_bytes()
      noted = foreign_files.parse_json(text, folder / _HASHES)
      if json_text(noted).encode() != text:
        raise ValueError
      found = seals.damage(folder, noted, ignored=(_HASHES,))
    except FileNotFoundError:
      return f"its file {_HASHES} is missing: it was not finished"
    except ValueError:
      return f"its file {_HASHES} is damaged"
    except OSError as error:
      raise _unreadable(folder, error) from error
    if found is None:
      self._sound.add(step)
    return found

  def _require(self, step: int) -> Path:
    """The folder of a step that is whole."""
    self.wait()
    what = self._damage(step) if jax.process_index() == 0 else None
    path = self._directory / str(step)
    if first_says(what is not None):
      raise DamagedError(
        f"The checkpoint {path} is damaged ({what or 'as process 0 found'}); delete it to go on "
        "without it.")
    return path

  def _drop(self, step: int, what: str | None) -> None:
    older = [s for s in self.all_steps() if s < step]
    if jax.process_index() == 0:
      then = f"going on from step {older[-1]}" if older else "there is none before it"
      progress.log(f"checkpoint {self._directory / str(step)} is dropped ({what}); {then}")
    self._delete(step)

  def _delete(self, step: int) -> None:
    self._sound.discard(step)
    self._manager.delete(step)

  def all_steps(self) -> list[int]:
    """Finished steps, ascending."""
    return sorted(self._manager.all_steps())

  def extra(self, step: int) -> dict[str, Any]:
    """The extra values of a step.

    Raises:
      ValueError: as `restore`.
    """
    path = self._require(step)
    with _reading(path):
      return self._manager.restore(
        step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]

  def restore(self, step: int, abstract) -> tuple[Any, dict[str, Any]]:
    """The state and the extra values of a step.

    Args:
      step: one of `all_steps()`.
      abstract: tree of `ShapeDtypeStruct` with the shardings wanted, which may be of another mesh.

    Raises:
      ValueError: when the checkpoint holds other arrays than `abstract`, is damaged, or cannot be
        read.
    """
    path = self._require(step)
    with _reading(path):
      # A message of orbax names the shapes but not the array; the metadata does both.
      stored = self._manager.item_metadata(step)["state"]
      _check_same(stored, abstract, path)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), extra=ocp.args.JsonRestore()
        ),
      )
    return restored["state"], restored["extra"]

  def wait(self) -> None:
    """Returns when everything that `save` started is on disk; raises what failed."""
    noting, self._noting = self._noting, None
    if noting is not None:
      noting.result()
    self._manager.wait_until_finished()

  def _note(self, step: int) -> None:
    """Notes the hashes of a step's files when all of them are there."""
    self._manager.wait_until_finished()
    folder = self._directory / str(step)
    write_json(folder / _HASHES, seals.contents(folder))

  def close(self) -> None:
    """Waits and frees the writer's threads."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._manager.close()


def first_says(value: int) -> int:
  """The first process's value, in all processes of the job; all of them must call it."""
  if jax.process_count() == 1:
    return int(value)
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class _Manager(ocp.CheckpointManager):
  """orbax's manager, except that it does not ask jax's preemption service.

  The service keeps one number a process, which `processes.stop_requested` counts up. orbax would
  put its step there, at a save and from its own thread later, and a request to stop would be
  missed.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class MismatchError(ValueError):
  """A checkpoint that holds other arrays than the program expects."""


class DamagedError(ValueError):
  """A checkpoint whose files are not what was written."""


class UnreadableError(ValueError):
  """A checkpoint that could not be read, which may be sound."""


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
  with ocp.StandardCheckpointer() as checkpointer, _reading(directory):
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


def check_params(directory: Path, abstract) -> None:
  """Raises MismatchError unless a tree that `save_params` wrote has these names and shapes.

  No array is read.
  """
  directory = Path(directory).absolute()
  with ocp.StandardCheckpointer() as checkpointer, _reading(directory):
    stored = checkpointer.metadata(directory).item_metadata.tree
  _check_same(stored, abstract, directory)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
  """Turns errors within into an `UnreadableError`, except mismatches and the loss of a process."""
  try:
    yield
  except MismatchError:
    raise
  except Exception as error:
    if processes.is_lost_peer(error):
      raise
    raise _unreadable(path, error) from error


def _unreadable(path, error):
  reason = str(error).strip().splitlines()
  return UnreadableError(
    f"The checkpoint {path} cannot be read ({type(error).__name__}: "
    f"{reason[0][:200] if reason else 'no message'}); it was left as it is, run the same command "
    "again when it can be read."
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
