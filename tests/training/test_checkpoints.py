"""What is written comes back bit for bit, also on another mesh; what does not fit is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmops_jax.training import optimizers
from lmops_jax.training.checkpoints import CheckpointStore, load_params, save_params
from lmops_jax.training.mesh import MeshConfig
from lmops_jax.training.train_state import new_state

OPTIMIZER = optimizers.adamw(0.1)


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


def test_keeping_none_is_refused(tmp_path):
  with pytest.raises(ValueError, match="max_to_keep=0 must be at least 1"):
    CheckpointStore(tmp_path, max_to_keep=0)
