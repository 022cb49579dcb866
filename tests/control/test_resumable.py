"""The resumable solve: equal to the plain one, and bitwise the same after any interruption."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import pmp_scores, pmp_scores_resumable

pytestmark = pytest.mark.usefixtures("fast_compile")

# Counters and a random key in the state, besides moments.
OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(0.05), optax.add_noise(0.01, 0.5, key=0))


class _Stop(Exception):
  pass


class _Keeper:
  """Keeps what is saved in an `.npz` file; stops after a number of saves."""

  def __init__(self, path, stop_after=None):
    self.path, self.stop_after, self.num_saves = path, stop_after, 0
    self.progress = []

  def load(self):
    return dict(np.load(self.path)) if self.path.exists() else None

  def save(self, tree):
    np.savez(self.path, **{k.replace("/", "|"): np.asarray(v) for k, v in tree.items()})
    self.num_saves += 1
    if self.num_saves == self.stop_after:
      raise _Stop


def _solve(problem, keeper, **kw):
  def load():
    tree = keeper.load()
    return tree and {k.replace("|", "/"): v for k, v in tree.items()}
  return pmp_scores_resumable(
    problem.example_losses, problem.target_loss, OPTIMIZER, *problem.args, proxy=problem.proxy,
    **{**dict(groups=2, segment_steps=3), **kw}, load=load, save=keeper.save,
    progress=lambda *done: keeper.progress.append(done))


def _problem(toy):
  problem = toy.regression(num_steps=7)
  params = {**problem.params, "b": jnp.asarray(problem.params["b"], jnp.bfloat16)}
  return problem._replace(params=params)


def _assert_same_bits(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


def test_every_interruption_gives_the_same_bits(toy, tmp_path):
  problem = _problem(toy)
  undisturbed = _Keeper(tmp_path / "undisturbed.npz")
  want = _solve(problem, undisturbed)
  assert undisturbed.num_saves == 6  # three segments in each pass
  assert undisturbed.progress == [(i + 1, 6) for i in range(6)]
  for stop_after in range(1, 7):
    path = tmp_path / f"{stop_after}.npz"
    with pytest.raises(_Stop):
      _solve(problem, _Keeper(path, stop_after))
    resumed = _Keeper(path)
    _assert_same_bits(_solve(problem, resumed), want)
    assert resumed.num_saves == 6 - stop_after
  _assert_same_bits(_solve(problem, _Keeper(tmp_path / "6.npz")), want)  # finished: only assembled


@pytest.mark.parametrize("segment_steps, trajectory", [(2, "all"), (100, 3)])
def test_resumable_is_the_plain_solve(x64, toy, tmp_path, segment_steps, trajectory):
  problem = toy.regression(num_steps=7)
  got = _solve(problem, _Keeper(tmp_path / "x.npz"), segment_steps=segment_steps,
               trajectory=trajectory, keep_costates=True)
  want = pmp_scores(problem.example_losses, problem.target_loss, OPTIMIZER, *problem.args,
                    proxy=problem.proxy, groups=2, keep_costates=True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, want)


@pytest.mark.parametrize("change", ["groups", "weights", "params", "segment_steps"])
def test_resuming_another_solve_is_refused(toy, tmp_path, change):
  problem = _problem(toy)
  with pytest.raises(_Stop):
    _solve(problem, _Keeper(tmp_path / "x.npz", stop_after=2))
  kw = {}
  if change == "weights":
    problem = problem._replace(weights=problem.weights * 1.5)
  elif change == "params":
    problem = problem._replace(params={**problem.params, "scale": 0.5})
  else:
    kw = {change: 2} if change == "segment_steps" else {change: 3}
  with pytest.raises(ValueError, match="belongs to other arguments"):
    _solve(problem, _Keeper(tmp_path / "x.npz"), **kw)


def test_a_damaged_save_is_named(toy, tmp_path):
  problem, path = _problem(toy), tmp_path / "x.npz"
  with pytest.raises(_Stop):
    _solve(problem, _Keeper(path, stop_after=2))
  tree = dict(np.load(path))
  np.savez(path, **{k: v for k, v in tree.items() if k != "states|0"})
  with pytest.raises(ValueError, match="incomplete: it has no 'states/0'"):
    _solve(problem, _Keeper(path))
  np.savez(path, **{**tree, "states|0": tree["states|0"][..., :0]})
  with pytest.raises(ValueError, match="holds an array of"):
    _solve(problem, _Keeper(path))
