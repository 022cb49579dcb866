"""The resumable solve: equal to the plain one, and bitwise the same after any interruption."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import SolveOptions, TrainingRun, pmp_scores, solve

# Counters and a random key in the state, besides moments.
OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(0.05), optax.add_noise(0.01, 0.5, key=0))


class _Stop(Exception):
  pass


class _Store:
  """Keeps what is saved in memory, as NumPy arrays; stops after a number of saves."""

  def __init__(self, saved=None, stop_after=None):
    self.saved = {} if saved is None else saved  # step -> (arrays, extra)
    self.stop_after, self.num_saves = stop_after, 0
    self.progress = []

  def latest_step(self):
    return max(self.saved, default=None)

  def save(self, step, arrays, extra):
    self.saved[step] = ({k: np.array(v) for k, v in arrays.items()}, dict(extra))
    self.num_saves += 1

  def extra(self, step):
    return self.saved[step][1]

  def restore(self, step, abstract):
    arrays, extra = self.saved[step]
    assert arrays.keys() == abstract.keys()
    return {k: jax.device_put(jnp.asarray(v), abstract[k].sharding)
            for k, v in arrays.items()}, extra

  def after(self, *done):
    self.progress.append(done)
    if self.num_saves == self.stop_after:
      raise _Stop


def _solve(problem, store, **kw):
  log = kw.pop("log", None)
  run = TrainingRun(problem.example_losses, OPTIMIZER, *problem.args)
  options = SolveOptions(**{**dict(groups=2, segment_steps=3), **kw})
  return solve(run, problem.target_loss, options, proxy=problem.proxy, store=store,
               progress=store.after, log=log)


def _problem(toy):
  problem = toy.regression(num_steps=7)
  params = {**problem.params, "b": jnp.asarray(problem.params["b"], jnp.bfloat16)}
  return problem._replace(params=params)


def _assert_same_bits(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


def test_every_interruption_gives_the_same_bits(toy):
  problem = _problem(toy)
  undisturbed = _Store()
  want = _solve(problem, undisturbed)
  assert undisturbed.num_saves == 6  # three segments in each pass
  assert undisturbed.progress == [(i + 1, 6) for i in range(6)]
  for stop_after in range(1, 7):
    stopped = _Store(stop_after=stop_after)
    with pytest.raises(_Stop):
      _solve(problem, stopped)
    resumed = _Store(stopped.saved)
    _assert_same_bits(_solve(problem, resumed), want)
    assert resumed.num_saves == 6 - stop_after


def test_a_solve_goes_on_with_the_steps_that_a_store_keeps(toy):
  """The forward pass's, and the newest: what `CheckpointStore` is told to keep."""
  problem = _problem(toy)
  want = _solve(problem, _Store())
  stopped = _Store(stop_after=4)
  with pytest.raises(_Stop):
    _solve(problem, stopped)
  assert sorted(stopped.saved) == [1, 2, 3, 4]
  del stopped.saved[3], stopped.saved[2]  # the third segment is reversed already
  _assert_same_bits(_solve(problem, _Store(stopped.saved)), want)


@pytest.mark.parametrize("segment_steps, trajectory", [
  pytest.param(2, "all", marks=pytest.mark.slow), (100, 3)])
def test_resumable_is_the_plain_solve(x64, toy, segment_steps, trajectory):
  problem = toy.regression(num_steps=7)
  got = _solve(problem, _Store(), segment_steps=segment_steps,
               trajectory=trajectory, keep_costates=True)
  want = pmp_scores(problem.example_losses, problem.target_loss, OPTIMIZER, *problem.args,
                    proxy=problem.proxy, groups=2, keep_costates=True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, want)


def test_a_surrogate_is_used_in_every_segment_and_asked_for_first(toy):
  problem = toy.regression(num_steps=7)
  optimizer = optax.lion(0.02)
  run = TrainingRun(problem.example_losses, optimizer, *problem.args)
  def resumable(store, **kw):
    return solve(run, problem.target_loss, SolveOptions(segment_steps=4, **kw),
                 proxy=problem.proxy, store=store, progress=store.after)
  empty = _Store()
  with pytest.raises(ValueError, match="Every score would be 0.*scale_by_lion"):
    resumable(empty)
  assert empty.num_saves == 0
  kw = dict(surrogate="clipped_straight_through")
  stopped = _Store(stop_after=3)
  with pytest.raises(_Stop):
    resumable(stopped, **kw)
  got = resumable(_Store(stopped.saved), **kw)
  want = pmp_scores(problem.example_losses, problem.target_loss, optimizer, *problem.args,
                    proxy=problem.proxy, **kw)
  np.testing.assert_allclose(got.proxy_scores, want.proxy_scores, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_sampled_proxies_do_not_depend_on_the_segments(x64, toy):
  problem = toy.regression(num_steps=7)
  kw = dict(groups=None, proxy_samples=2, sample_seed=3)
  got = _solve(problem, _Store(), **kw)
  want = pmp_scores(problem.example_losses, problem.target_loss, OPTIMIZER, *problem.args,
                    proxy=problem.proxy, **kw)
  np.testing.assert_allclose(got.proxy_scores, want.proxy_scores, rtol=1e-9, atol=1e-11)


def test_norms_are_logged_segment_by_segment(toy):
  problem, lines = _problem(toy), []
  result = _solve(problem, _Store(), log=lines.append)
  assert [line.split(":")[0] for line in lines] == [
    "steps 7 to 7 of 7", "steps 4 to 6 of 7", "steps 1 to 3 of 7"]
  norms, grads = np.asarray(result.costate_norms), np.asarray(result.target_grad_norms)
  assert f"|lambda| {norms[5]:.4g} to {norms[3]:.4g} backwards" in lines[1]
  assert lines[-1].endswith(f"{grads.max():.4g}")


def test_a_run_that_diverges_stops_in_its_segment():
  keeper = _Store()
  # theta is multiplied by -999 a step: 13 steps leave float32.
  losses = lambda theta, batch: 0.5 * jnp.square(theta[0]) + 0 * batch  # noqa: E731
  with pytest.raises(FloatingPointError, match="after step 14 of 40, .* finite before step 10"):
    solve(TrainingRun(losses, optax.sgd(1e3), jnp.ones(1), np.zeros((40, 2))),
          lambda theta: theta[0], SolveOptions(segment_steps=5), store=keeper)
  assert keeper.num_saves == 2  # segments of five that were sound


def test_an_adjoint_that_diverges_stops_in_its_segment():
  # At theta = 0 the run stands still whatever the rate, but the costate grows 999-fold a step.
  keeper = _Store()
  losses = lambda theta, batch: 0.5 * jnp.square(theta[0]) + 0 * batch  # noqa: E731
  with pytest.raises(FloatingPointError, match="costate diverged: its norm is .* at step 38 of 40"):
    solve(TrainingRun(losses, optax.sgd(1e3), jnp.zeros(1), np.zeros((40, 2))),
          lambda theta: theta[0], SolveOptions(segment_steps=10), store=keeper)
  assert keeper.num_saves == 4  # the forward pass; no segment of the reverse pass


@pytest.mark.parametrize("change", ["groups", "weights", "params", "segment_steps"])
def test_resuming_another_solve_is_refused(toy, change):
  problem, stopped = _problem(toy), _Store(stop_after=2)
  with pytest.raises(_Stop):
    _solve(problem, stopped)
  kw = {}
  if change == "weights":
    problem = problem._replace(weights=problem.weights * 1.5)
  elif change == "params":
    problem = problem._replace(params={**problem.params, "scale": 0.5})
  else:
    kw = {change: 2} if change == "segment_steps" else {change: 3}
  with pytest.raises(ValueError, match="belongs to other arguments"):
    _solve(problem, _Store(stopped.saved), **kw)


def test_two_exchanged_batches_are_another_solve(toy):
  problem, stopped = _problem(toy), _Store(stop_after=2)
  with pytest.raises(_Stop):
    _solve(problem, stopped)
  batches = jax.tree.map(np.array, problem.batches)
  for leaf in jax.tree.leaves(batches):
    leaf[[0, 1]] = leaf[[1, 0]]
  with pytest.raises(ValueError, match="belongs to other arguments"):
    _solve(problem._replace(batches=batches), _Store(stopped.saved))
