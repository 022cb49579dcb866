"""What is written comes back bit for bit, also on another mesh; what does not fit is named."""

import contextlib
import errno
import os
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmops_jax.control import SolveOptions, TrainingRun, solve
from lmops_jax.host import seals
from lmops_jax.mesh import processes
from lmops_jax.mesh.checkpoints import (
  CheckpointStore,
  DamagedError,
  UnreadableError,
  load_params,
  save_params,
)
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.training import optimizers

OPTIMIZER = optimizers.adamw(0.1)
ADAM = optax.adam(0.1)


class State(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: Any


def new_state(params, optimizer):
  return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _state(seed=0, width=8):
  rng = np.random.default_rng(seed)
  params = {"a": {"kernel": jnp.asarray(rng.normal(size=(width, 4)), jnp.float32)},
            "scale": jnp.asarray(rng.normal(size=4), jnp.float32)}
  return new_state(params, OPTIMIZER)


def _abstract(tree, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
  )


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def store(tmp_path):
  store = CheckpointStore(tmp_path / "c", max_to_keep=2, keep_steps=(1,))
  yield store
  store.close()


def test_states_and_extra_values_come_back(store):
  assert store.latest_step() is None
  extra = {"pending": {"loss": 0.1 + 0.2, "n": 3}}
  store.save(5, _state(), extra)
  store.wait()
  state, got = store.restore(5, _abstract(_state(1)))
  _assert_same(state, _state())
  assert got == extra


def test_newest_and_chosen_steps_are_kept(store):
  for step in (1, 2, 3, 4):
    store.save(step, _state(step))
  store.wait()
  assert store.all_steps() == [1, 3, 4] and store.latest_step() == 4
  store.save(4, _state(40))
  store.wait()
  _assert_same(store.restore(4, _abstract(_state()))[0], _state(40))


def test_saving_does_not_touch_the_count_of_polls_for_a_stop(store, monkeypatch):
  asked = []
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
  for step in (1, 2, 3):
    store.save(step, _state(step))
  store.wait()
  assert store.all_steps() == [1, 2, 3] and not asked


def test_buffers_may_be_donated_after_save(store):
  state = _state()
  want = jax.tree.map(np.array, state)
  store.save(1, state)
  jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
  store.wait()
  jax.tree.map(np.testing.assert_array_equal, store.restore(1, _abstract(_state()))[0], want)


def test_restores_onto_another_mesh(store):
  store.save(1, _state())
  store.wait()
  mesh = MeshConfig(2, 4).build().mesh

  def sharded(x):
    spec = P("fsdp") if x.shape == (8, 4) else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  state, _ = store.restore(1, jax.tree.map(sharded, _state()))
  assert state.params["a"]["kernel"].sharding.spec == P("fsdp")
  _assert_same(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, _state()))


def test_other_shapes_are_named(store):
  store.save(1, _state())
  store.wait()
  with pytest.raises(ValueError, match=r"has shape \(8, 4\) at .*kernel.* wants shape \(6, 4\)"):
    store.restore(1, _abstract(_state(width=6)))


def test_other_optimizer_is_named(store):
  store.save(1, _state())
  store.wait()
  other = new_state(_state().params, optimizers.sgd(0.1))
  with pytest.raises(ValueError, match="the model wants nothing"):
    store.restore(1, _abstract(other))


def test_params_round_trip_with_and_without_target(tmp_path):
  params = _state().params
  save_params(tmp_path / "deep" / "er", params)
  _assert_same(load_params(tmp_path / "deep" / "er"), params)
  _assert_same(load_params(tmp_path / "deep" / "er", jax.eval_shape(lambda: params)), params)
  save_params(tmp_path / "deep" / "er", _state(9).params)
  _assert_same(load_params(tmp_path / "deep" / "er"), _state(9).params)
  with pytest.raises(ValueError, match=r"has shape \(8, 4\) at a/kernel .* wants shape \(6, 4\)"):
    load_params(tmp_path / "deep" / "er", jax.eval_shape(lambda: _state(width=6).params))


def test_sharded_params_load_on_one_device(tmp_path):
  mesh = MeshConfig(8).build().mesh
  params = {"w": jax.device_put(np.arange(16.0, dtype=np.float32), NamedSharding(mesh, P("data")))}
  save_params(tmp_path / "p", params)
  loaded = load_params(tmp_path / "p")
  assert len(loaded["w"].sharding.device_set) == 1
  np.testing.assert_array_equal(loaded["w"], np.arange(16.0))


def test_missing_and_damaged_params_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"no parameters at {tmp_path}/p"):
    load_params(tmp_path / "p")
  save_params(tmp_path / "p", _state().params)
  for path in (tmp_path / "p").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/p cannot be read"):
    load_params(tmp_path / "p")


def flip_a_bit(path):
  """As a failing disk does: same size, same times."""
  status, data = path.stat(), bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def _saved(store, *steps):
  for step in steps:
    store.save(step, _state(step), {"step": step})
  store.wait()


def test_one_flipped_bit_in_any_file_of_a_step_drops_it(store, tmp_path, capfd):
  _saved(store, 2, 4)
  number = 0
  while number < len(files := _files(tmp_path / "c" / "4")):  # data files have new names each time
    flip_a_bit(files[number])
    assert store.latest_step() == 2
    name = files[number].relative_to(tmp_path / "c" / "4")
    told = capfd.readouterr().err
    # A hash that differs from the noted one cannot tell whether the file or the note was damaged.
    blamed = "" if name.name == "hashes.json" else f"its file {name} "
    assert f"4 is dropped ({blamed}" in told
    _saved(store, 4)
    number += 1
  _assert_same(store.restore_latest(_abstract(_state()))[1], _state(4))


@pytest.mark.parametrize("damage", [
  lambda folder: (folder / "hashes.json").unlink(),
  lambda folder: (folder / "hashes.json").write_text("{}\n"),
  lambda folder: (folder / "hashes.json").write_text("[]\n"),
  lambda folder: (folder / "hashes.json").write_text('{"a": 1}'),
  lambda folder: (folder / "hashes.json").write_text("[" * 100_000),
  lambda folder: (folder / "hashes.json").write_bytes(b"\xff"),
  lambda folder: (folder / "another").write_text("x"),
  lambda folder: _files(folder / "state")[0].unlink(),
], ids=["missing", "nothing", "list", "other", "deep", "bytes", "file more", "file less"])
def test_a_step_that_is_not_as_noted_is_dropped(store, tmp_path, damage):
  _saved(store, 2, 4)
  damage(tmp_path / "c" / "4")
  assert store.restore_latest(_abstract(_state()))[0] == 2
  assert store.all_steps() == [2]


def test_a_damaged_step_is_not_read(store, tmp_path):
  _saved(store, 2)
  flip_a_bit(_files(tmp_path / "c" / "2" / "state")[-1])
  for read in (store.extra, lambda step: store.restore(step, _abstract(_state()))):
    with pytest.raises(DamagedError, match="/2 is damaged .its file state/.* does not hold"):
      read(2)
  assert store.latest_step() is None


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: shutil.rmtree(path.parents[1])])
def test_steps_that_need_a_damaged_one_go_with_it(tmp_path, damage):
  with contextlib.closing(CheckpointStore(
      tmp_path / "c", max_to_keep=1, keep_steps=(1, 2), chained=True)) as store:
    _saved(store, 1, 2, 3)
    damage(_files(tmp_path / "c" / "2" / "state")[0])
    assert store.latest_step() == 1 and store.all_steps() == [1]


def _failing(error):
  def fail(*_, **__):
    raise error

  return fail


def test_what_cannot_be_read_now_is_left(store, tmp_path, monkeypatch):
  _saved(store, 2, 4)
  error = OSError(errno.EIO, "Input/output error")
  left = r"checkpoint .*/4 cannot be read \(OSError: .*Input/output error\); it was left as it is"
  with monkeypatch.context() as patch, pytest.raises(UnreadableError, match=left):
    patch.setattr(seals, "hash_all", _failing(error))
    store.restore_latest(_abstract(_state()))
  with monkeypatch.context() as patch, pytest.raises(UnreadableError, match=left):
    patch.setattr(store._manager, "restore", _failing(error))
    store.restore_latest(_abstract(_state()))
  assert store.all_steps() == [2, 4]
  assert store.restore_latest(_abstract(_state()))[0] == 4


def test_a_lost_peer_is_not_blamed_on_the_checkpoint(store, tmp_path, monkeypatch):
  _saved(store, 2)
  lost = jax.errors.JaxRuntimeError("INTERNAL: Gloo all-gather failed: Connection closed by peer")
  monkeypatch.setattr(store._manager, "restore", _failing(lost))
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    store.restore_latest(_abstract(_state()))
  assert processes.is_lost_peer(caught.value) and store.all_steps() == [2]


class _Stop(Exception):
  pass


def _losses(params, batch):
  return jnp.square(jnp.tanh(batch["x"] @ params["w"]) - 0.3)


def _target_loss(params):
  return jnp.sum(jnp.square(params["w"]))


def _scores(folder, stop_after=None):
  """Of a solve of three segments in each pass; the second pass reads what the first one left."""
  rng = np.random.default_rng(0)
  batches = {"x": rng.normal(size=(6, 4, 3)).astype(np.float32)}
  params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
  store = CheckpointStore(folder, max_to_keep=2, keep_steps=(1, 2), chained=True)

  def progress(done, total):
    store.wait()
    if done == stop_after:
      raise _Stop

  with contextlib.closing(store):
    return solve(
      TrainingRun(_losses, ADAM, params, batches), _target_loss, SolveOptions(segment_steps=2),
      store=store, progress=progress).scores


@pytest.fixture(scope="module")
def undisturbed_scores(tmp_path_factory):
  return _scores(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop_after, damaged", [(2, 2), (3, 1), (4, 4)])
def test_a_solve_with_a_flipped_bit_in_its_state_gives_the_same_scores(
    tmp_path, undisturbed_scores, stop_after, damaged):
  with pytest.raises(_Stop):
    _scores(tmp_path, stop_after)
  flip_a_bit(max(_files(tmp_path / str(damaged) / "state"), key=lambda p: p.stat().st_size))
  np.testing.assert_array_equal(_scores(tmp_path), undisturbed_scores)


def test_keeping_none_is_refused(tmp_path):
  with pytest.raises(ValueError, match="max_to_keep=0 must be at least 1"):
    CheckpointStore(tmp_path, max_to_keep=0)
