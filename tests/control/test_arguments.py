"""What the solvers accept, and what they refuse with one sentence before compiling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import (
  PmpResult,
  ProjectedGradient,
  SolveOptions,
  TrainingRun,
  check_result,
  controlled_run,
  directional_scores,
  gradient_norms,
  hvp_and_scores,
  improve_policy,
  influence_direction,
  mean_target_loss,
  pmp_scores,
  pmp_scores_by_target,
  policy_gradient,
  project_simplex,
  simulate,
  solve,
  solve_weights,
  stationarity_gap,
)
from lmops_jax.sizing.solve_cost import influence_passes, solve_passes

SGD = optax.sgd(0.1)


def _kw(problem):
  return dict(
    example_losses=problem.example_losses, target_loss=problem.target_loss, optimizer=SGD,
    params=problem.params, batches=problem.batches, weights=problem.weights, proxy=problem.proxy)


def _with(tree, **leaves):
  return {**tree, **leaves}


BAD = {
  "no_steps": (lambda p: dict(batches=jax.tree.map(lambda x: x[:0], p.batches),
                              weights=p.weights[:0]), "each must be at least 1"),
  "empty_batch": (lambda p: dict(batches=jax.tree.map(lambda x: x[:, :0], p.batches),
                                 weights=p.weights[:, :0]), "each must be at least 1"),
  "no_leaf": (lambda p: dict(batches={}), "batches has no array leaf"),
  "uneven_leaves": (lambda p: dict(batches=_with(p.batches, y=p.batches["y"][:, :2])),
                    r"batches\['y'\] has leading axes \(5, 2\), other leaves have \(5, 4\)"),
  "flat_leaf": (lambda p: dict(batches=_with(p.batches, y=p.batches["y"][0])),
                r"batches\['y'\] has shape \(4,\); expected leading axes \[T, B\]"),
  "weights_shape": (lambda p: dict(weights=p.weights[:, :3]),
                    r"weights has shape \(5, 3\); expected \[T, B\] = \(5, 4\)"),
  "negative_weight": (lambda p: dict(weights=-p.weights), r"weights\[0, 0\] is -0"),
  "nan_weight": (lambda p: dict(weights=p.weights * np.nan), "must be finite and >= 0"),
  "infinite_weight": (lambda p: dict(weights=p.weights + np.inf), "must be finite and >= 0"),
  "every_k": (lambda p: dict(every_k=0), "every_k=0 must be an integer of at least 1"),
  "every_k_float": (lambda p: dict(every_k=1.5), "every_k=1.5 must be an integer of at least 1"),
  "groups_low": (lambda p: dict(groups=0), r"groups .* must be an integer in \[1, 5\], got 0"),
  "groups_high": (lambda p: dict(groups=6), r"groups .* must be an integer in \[1, 5\], got 6"),
  "both": (lambda p: dict(groups=2, every_k=2), "both choose when proxies are scored"),
  "samples": (lambda p: dict(proxy_samples=6),
              r"proxy_samples .* must be an integer in \[1, 5\], got 6"),
  "samples_and_groups": (lambda p: dict(proxy_samples=1, groups=2), "both choose when proxies"),
  "sample_seed": (lambda p: dict(proxy_samples=1, sample_seed=-1), "sample_seed=-1 must be"),
  "objective": (lambda p: dict(objective="Area"),
                "objective='Area' must be 'area' or 'terminal'"),
  "trajectory": (lambda p: dict(trajectory="disk"), "trajectory='disk' must be 'all', 'sqrt'"),
  "slots": (lambda p: dict(trajectory=0), "trajectory=0 must be .* an integer of at least 1"),
  "hvp_mode": (lambda p: dict(hvp_mode="double_vjp"),
               "hvp_mode='double_vjp' must be 'jvp_of_grad' or"),
  "micro_batch": (lambda p: dict(micro_batch_size=3), "micro_batch_size=3 does not divide"),
  "proxy_batch": (lambda p: dict(proxy_batch_size=0), "proxy_batch_size=0 must be an integer"),
  "no_proxies": (lambda p: dict(proxy=jax.tree.map(lambda x: x[:0], p.proxy)),
                 "proxy has leading axes"),
  "integer_params": (lambda p: dict(params=_with(p.params, b=np.zeros(4, int))),
                     r"params\['b'\] has dtype int"),
  "no_params": (lambda p: dict(params={}), "params has no array leaf"),
  "optimizer": (lambda p: dict(optimizer=0.1), "optimizer must be an optax.GradientTransformation"),
  "target_not_scalar": (lambda p: dict(target_loss=lambda q: q["v"]),
                        r"target_loss returned an array of shape \(4,\); expected a scalar"),
  "losses_scalar": (lambda p: dict(example_losses=lambda q, b: jnp.mean(b["y"])),
                    r"example_losses returned an array of shape \(\) for a batch of 4"),
  "losses_tuple": (lambda p: dict(example_losses=lambda q, b: (b["y"], b["y"])),
                   "example_losses returned a tuple"),
  "losses_integer": (lambda p: dict(example_losses=lambda q, b: b["y"].astype(int)),
                     "expected floating point"),
  "not_a_function": (lambda p: dict(target_loss=1.0), "target_loss must be a function"),
  "weights_text": (lambda p: dict(weights="x"), "weights must be an array of numbers, got 'x'"),
  "weights_ragged": (lambda p: dict(weights=[[1, 2], [3]]), "weights must be an array of numbers"),
  "weights_complex": (lambda p: dict(weights=1j * p.weights), "expected real numbers"),
  "text_in_batches": (lambda p: dict(batches=_with(p.batches, name=np.full((5, 4), "a"))),
                      r"batches\['name'\] must be an array of numbers, got .*U1"),
  "text_in_proxy": (lambda p: dict(proxy=_with(p.proxy, name=np.full(7, None))),
                    r"proxy\['name'\] must be an array of numbers"),
  "text_in_params": (lambda p: dict(params=_with(p.params, name="a")),
                     r"params\['name'\] must be an array of numbers, got 'a'"),
  "missing_parameter": (lambda p: dict(params={"w": p.params["w"]}),
                        r"fails on a batch with the leaves \['x'\], \['y'\]: KeyError: 'b'"),
  "parameter_shape": (lambda p: dict(params=_with(p.params, w=np.ones((5, 4)))),
                      "example_losses fails on a batch .*dot_general"),
  "proxy_of_another_structure": (lambda p: dict(proxy={"q": np.ones(7)}),
                                 r"example_losses fails on proxy with the leaves \['q'\]: KeyErr"),
  "losses_of_one_argument": (lambda p: dict(example_losses=lambda q: q), "takes 1 positional"),
  "losses_of_no_parameter": (lambda p: dict(example_losses=lambda q, b: b["y"]),
                             "example_losses does not depend on params"),
  "losses_in_numpy": (lambda p: dict(example_losses=lambda q, b: np.asarray(q["b"])),
                      "example_losses fails on a batch .*numpy"),
  "constant_target": (lambda p: dict(target_loss=lambda q: 3.0),
                      "target_loss does not depend on params"),
  "target_that_raises": (lambda p: dict(target_loss=lambda q: q["z"]),
                         "target_loss fails: KeyError: 'z'"),
  "line_search_optimizer": (lambda p: dict(optimizer=optax.lbfgs()),
                            "optimizer cannot take a step on params.* missing"),
  "mask_of_other_parameters": (lambda p: dict(optimizer=optax.masked(SGD, {"q": True})),
                               "optimizer cannot take a step on params"),
  "hessian": (lambda p: dict(hessian="no"), "hessian='no' must be True or False"),
  "keep_costates": (lambda p: dict(keep_costates=1), "keep_costates=1 must be True or False"),
  "device_rows": (lambda p: dict(device_rows=4), "device_rows must be a DeviceRows or None, got 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(toy, name):
  problem = toy.regression()
  change, message = BAD[name]
  with pytest.raises(ValueError, match=message) as error:
    pmp_scores(**_kw(problem) | change(problem))
  assert "\n" not in str(error.value)


def _run(problem):
  return controlled_run(
    problem.example_losses, problem.target_loss, SGD, problem.params,
    jax.tree.map(lambda x: x[0], problem.batches), 3)


OTHERS = {
  "segment_steps": (lambda p: SolveOptions(segment_steps=0),
                    "segment_steps=0 must be an integer of at least 1"),
  "undecided": (lambda p: _solve(p, options=SolveOptions(trajectory="auto")),
                "trajectory='auto' must be decided before a solve"),
  "run": (lambda p: solve(p, p.target_loss), "run must be a control.TrainingRun"),
  "store": (lambda p: _solve(p, store={}), "store.latest_step must be a function"),
  "progress": (lambda p: _solve(p, store=_Store, progress=1),
               r"progress \(or None\) must be a function"),
  "no_store": (lambda p: _solve(p, log=print), "give it a store"),
  "start": (lambda p: _solve(
    p._replace(params=_with(p.params, scale=np.nan)), store=_Store),
    "params has norm nan; a run must start from finite"),
  "no_targets": (lambda p: pmp_scores_by_target(p.example_losses, 3, SGD, *p.args),
                 "target_losses must be a list"),
  "target_used_up": (lambda p: pmp_scores_by_target(p.example_losses, iter([1]), SGD, *p.args),
                     "target_losses must be a list"),
  "one_target": (lambda p: pmp_scores_by_target(
    p.example_losses, [lambda q: q["z"]], SGD, *p.args), "one of target_losses fails: KeyError"),
  "outer_lr": (lambda p: _weights(p, outer_lr="a"), "outer_lr must be finite and >= 0"),
  "outer_lr_negative": (lambda p: _weights(p, outer_lr=-1.0), "outer_lr must be finite"),
  "outer_epochs": (lambda p: _weights(p, outer_epochs=0), "outer_epochs must be an integer >= 1"),
  "outer_losses": (lambda p: _weights(p, example_losses=None), "example_losses must be a function"),
  "outer_target": (lambda p: _weights(p, target_loss="x"), "target_loss must be a function"),
  "outer_gamma": (lambda p: _weights(p, gamma="x"), "gamma must be an array of numbers"),
  "outer_indices": (lambda p: _weights(p, batch_indices="x"), "batch_indices must be an array"),
  "mask": (lambda p: controlled_run(*_functions(p), p.params, p.proxy, 3, mask=np.full(7, 0.5)),
           "mask has dtype float32; expected bool"),
  "monitor": (lambda p: controlled_run(
    *_functions(p), p.params, p.proxy, 3, monitor=lambda q: q["z"]), "monitor fails on params"),
  "no_run": (lambda p: improve_policy(None, p.weights, ProjectedGradient(), 0.1),
             "run must be what controlled_run makes"),
  "rule": (lambda p: _improve(p, rule="projected"), "rule must be a rule such as"),
  "rule_class": (lambda p: _improve(p, rule=ProjectedGradient), "rule must be a rule such as"),
  "rule_method": (lambda p: _improve(p, rule=ProjectedGradient("x")), "method='x'"),
  "rate": (lambda p: _improve(p, rate=None), "rate must be finite and >= 0, got None"),
  "rates": (lambda p: _improve(p, rate=np.ones(3)), "rate must be finite and >= 0"),
  "line_search": (lambda p: _improve(p, line_search="no"), "line_search must be True or False"),
  "policy": (lambda p: policy_gradient(_run(p), "x"), "the policy must be an array of numbers"),
  "policy_shape": (lambda p: policy_gradient(_run(p), np.ones((2, 4))), r"expected \[T, N\]"),
  "online_policy": (lambda p: simulate(_run(p), lambda s: s.nothing), "the policy fails on"),
  "directions": (lambda p: simulate(_run(p), directions=[p.target_loss]), "must be a dict"),
  "direction": (lambda p: simulate(_run(p), directions={"a": lambda q: q["w"]}),
                r"directions\['a'\] returned an array of shape \(3, 4\)"),
  "observe": (lambda p: simulate(_run(p), observe=3), r"observe \(or None\) must be a function"),
  "damping": (lambda p: _influence(p, damping="x"), "damping must be finite and >= 0"),
  "tolerance": (lambda p: _influence(p, tolerance=None), "tolerance must be finite"),
  "scale": (lambda p: _influence(p, method="lissa", scale=0.0), "scale must be finite and > 0"),
  "seed": (lambda p: _influence(p, seed=0.5), "seed must be an integer"),
  "target_grad": (lambda p: _influence(p, target_grad={**p.params, "b": "x"}),
                  "target_grad must have the structure and shapes of params"),
  "direction_tree": (lambda p: directional_scores(p.example_losses, p.params, {"w": 1.0}, p.proxy),
                     "direction must have the structure and shapes of params"),
  "scored_losses": (lambda p: directional_scores(
    lambda q, b: jnp.mean(p.example_losses(q, b)), p.params, p.params, p.proxy),
    r"returned an array of shape \(\) for data of 7 examples"),
  "scored_data": (lambda p: directional_scores(
    p.example_losses, p.params, p.params, {"q": np.ones(3)}), "example_losses fails on data"),
  "norms": (lambda p: gradient_norms(
    lambda q, b: jnp.mean(p.example_losses(q, b)), p.params, p.proxy), r"shape \(\) for data of 7"),
  "norms_params": (lambda p: gradient_norms(
    p.example_losses, _with(p.params, b=np.zeros(4, int)), p.proxy), "has dtype int"),
  "target_data": (lambda p: mean_target_loss(None, p.proxy), "example_losses must be a function"),
  "projected": (lambda p: project_simplex("x"), "values must be an array of numbers"),
  "projection_mask": (lambda p: project_simplex([1.0, 2.0], [True] * 3), "mask does not broadcast"),
  "gap": (lambda p: stationarity_gap(np.ones((3, 4)), np.ones((2, 4))), "expected the same"),
  "passes": (lambda p: solve_passes(SGD, p.params, 3, SolveOptions(groups=0)),
             r"groups .* in \[1, 3\], got 0"),
  "passes_optimizer": (lambda p: solve_passes(None, p.params, 3), "optimizer must be an optax"),
  "passes_of_influence": (lambda p: influence_passes("x", 3, curvature="fisher"), "method must be"),
}


class _Store:
  """Of functions that are never called."""
  latest_step = save = extra = restore = print


def _functions(problem):
  return problem.example_losses, problem.target_loss, SGD


def _solve(problem, **kw):
  run = TrainingRun(problem.example_losses, SGD, *problem.args)
  return solve(run, problem.target_loss, proxy=problem.proxy, **kw)


def _weights(problem, **kw):
  given = dict(zip(("example_losses", "target_loss", "optimizer"), _functions(problem)))
  return solve_weights(**given | dict(
    params=problem.params, data=problem.proxy, num_steps=3, outer_lr=0.1) | kw)


def _improve(problem, rule=None, rate=0.1, **kw):
  run = _run(problem)
  return improve_policy(run, run.uniform(), rule or ProjectedGradient(), rate, **kw)


def _influence(problem, target_grad=None, **kw):
  return influence_direction(
    problem.example_losses, target_grad or problem.params, problem.params, problem.batches, **kw)


@pytest.mark.parametrize("name", OTHERS)
def test_bad_arguments_of_other_functions_are_refused(toy, name):
  call, message = OTHERS[name]
  with pytest.raises(ValueError, match=message) as error:
    call(toy.regression())
  assert "\n" not in str(error.value)


def test_an_influence_of_no_finite_gradient_is_told(toy):
  problem = toy.regression()
  with pytest.raises(FloatingPointError, match="check that target_grad is finite"):
    _influence(problem, jax.tree.map(lambda x: x * np.nan, problem.params), damping=1.0,
               iterations=1, curvature="fisher")


def test_empty_target_data_is_refused(toy):
  problem = toy.regression()
  with pytest.raises(ValueError, match="the target data has leading axes"):
    mean_target_loss(problem.example_losses, jax.tree.map(lambda x: x[:0], problem.proxy))
  with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
    mean_target_loss(problem.example_losses, problem.proxy, 0)


def test_inside_jit_as_written_in_the_signature(toy):
  problem = toy.regression()
  want = pmp_scores(**_kw(problem))

  @jax.jit
  def solve(params, batches, weights, proxy):
    return pmp_scores(problem.example_losses, problem.target_loss, SGD, params, batches, weights,
                      objective="area", trajectory="all", proxy=proxy, every_k=1, groups=None)
  got = solve(problem.params, problem.batches, problem.weights, problem.proxy)
  assert isinstance(got, PmpResult)
  assert got.scores.shape == (5, 4) and got.proxy_scores.shape == (7,)
  assert got.target_losses.shape == (6,) and got.costates is None
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_second_call_does_not_trace_again(toy):
  problem = toy.regression()
  calls = []
  def losses(params, batch):
    calls.append(1)
    return problem.example_losses(params, batch)
  kw = _kw(problem) | dict(example_losses=losses)
  pmp_scores(**kw)
  first = len(calls)
  pmp_scores(**kw | dict(weights=problem.weights * 2), segment_steps=3)
  assert len(calls) - first <= 2  # the argument checks alone (abstract evaluation)


def test_any_pytree_of_parameters_and_batches(x64, toy):
  # Tuples, a scalar, a matrix; integer and boolean batch leaves; a closure over a captured array.
  table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
  params = ((jnp.ones((2, 2)), [jnp.asarray(0.5)]), {"bias": jnp.zeros(2)})
  def losses(p, batch):
    (matrix, [scale]), rest = p
    index, (flip,) = batch
    value = jnp.sum((table[index] @ matrix * scale + rest["bias"]) ** 2, axis=-1)
    return jnp.where(flip, -value, value)
  def target(p):
    return jnp.sum(p[0][0] ** 2) * p[0][1][0] + jnp.sum(jnp.sin(p[1]["bias"] + 1))
  rng = np.random.default_rng(1)
  problem = toy.Problem(
    losses, target, params, (rng.integers(0, 5, size=(4, 3)), (rng.integers(0, 2, (4, 3)) > 0,)),
    np.full((4, 3), 0.2), (np.arange(5), (np.zeros(5, bool),)))
  optimizer = optax.adam(0.05, eps_root=1e-12)
  _, want, want_proxy = toy.unrolled(problem, optimizer, with_proxy=True)
  got = pmp_scores(losses, target, optimizer, *problem.args, proxy=problem.proxy, trajectory=2)
  np.testing.assert_allclose(got.scores, want, atol=1e-9)
  np.testing.assert_allclose(got.proxy_scores, want_proxy.sum(0), atol=1e-9)


def test_bfloat16_leaves(toy):
  problem = toy.regression()
  params = {**problem.params, "w": jnp.asarray(problem.params["w"], jnp.bfloat16)}
  got = check_result(pmp_scores(
    problem.example_losses, problem.target_loss, optax.adamw(0.01), params, problem.batches,
    problem.weights, proxy=problem.proxy, groups=2, trajectory=2, micro_batch_size=2))
  assert got.params["w"].dtype == jnp.bfloat16
  assert got.scores.dtype == got.proxy_scores.dtype == jnp.float32
  got = pmp_scores(problem.example_losses, problem.target_loss, SGD, params, problem.batches,
                   problem.weights)
  want = toy.unrolled(problem, SGD)[1]
  np.testing.assert_allclose(got.scores, want, atol=0.1 * np.abs(want).max())


def test_numpy_and_python_scalars(toy):
  got = pmp_scores(lambda p, b: (p - b) ** 2, lambda p: p ** 2, SGD, 1.5,
                   np.ones((2, 3), np.float32), [[0.1, 0.2, 0.3]] * 2)
  assert got.params.shape == () and got.scores.shape == (2, 3)
  assert (got.scores > 0).all()


def test_uniform_weights_by_default(toy):
  problem = toy.regression()
  kw = _kw(problem)
  got, want = pmp_scores(**kw | dict(weights=None)), pmp_scores(
    **kw | dict(weights=np.full((5, 4), 0.25)))
  np.testing.assert_array_equal(got.scores, want.scores)


def test_losses_as_pytrees(toy):
  # Arrays inside a Partial are arguments of the compiled program: new data, no new compilation.
  problem = toy.regression()
  num_traces = []
  def target(data, params):
    num_traces.append(1)
    return jnp.mean(problem.example_losses(params, data))
  kw = _kw(problem)
  for scale in (1.0, 2.0):
    data = jax.tree.map(lambda x: scale * x, problem.proxy)  # noqa: B023
    got = pmp_scores(**kw | dict(target_loss=jax.tree_util.Partial(target, data)))
    if scale == 1.0:
      first = len(num_traces)
  assert len(num_traces) == first + 1  # the argument check
  want = pmp_scores(**kw | dict(
    target_loss=lambda p: jnp.mean(problem.example_losses(p, jax.tree.map(jnp.asarray, data)))))
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 2, 3, 7, 50])
def test_mean_target_loss(x64, toy, batch_size):
  problem = toy.regression()
  params = jax.tree.map(jnp.asarray, problem.params)
  target = mean_target_loss(problem.example_losses, problem.proxy, batch_size)
  want = lambda p: jnp.mean(problem.example_losses(p, problem.proxy))  # noqa: E731
  np.testing.assert_allclose(target(params), want(params), rtol=1e-12)
  got, want = jax.grad(target)(params), jax.grad(want)(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)


def test_hvp_and_scores_is_the_dense_hessian(x64, toy):
  problem = toy.regression()
  params = jax.tree.map(jnp.asarray, problem.params)
  batch = jax.tree.map(lambda x: x[0], problem.batches)
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  losses = lambda v: problem.example_losses(unravel(v), batch)  # noqa: E731
  u = jnp.cos(flat)
  hvp, scores = hvp_and_scores(problem.example_losses, params, unravel(u), batch,
                               jnp.asarray(problem.weights[0]))
  hessian = jax.hessian(lambda v: problem.weights[0] @ losses(v))(flat)
  np.testing.assert_allclose(jax.flatten_util.ravel_pytree(hvp)[0], hessian @ u, rtol=1e-9)
  np.testing.assert_allclose(scores, jax.jacobian(losses)(flat) @ u, rtol=1e-10)
  v = jnp.sin(flat)
  hv, _ = hvp_and_scores(problem.example_losses, params, unravel(v), batch,
                         jnp.asarray(problem.weights[0]))
  np.testing.assert_allclose(u @ jax.flatten_util.ravel_pytree(hv)[0],
                             v @ jax.flatten_util.ravel_pytree(hvp)[0], rtol=1e-10)


def test_divergence_is_reported_with_its_step(toy):
  def run(eta, num_steps, target=lambda p: jnp.sum(jnp.square(p))):
    return pmp_scores(lambda p, b: b * jnp.sum(jnp.square(p)) / 2, target, optax.sgd(eta),
                      jnp.ones(2), np.ones((num_steps, 1)), None)
  check_result(run(0.5, 5))
  # eta = 4 is above 2 / lambda_max: |lambda_{T-k}| = sqrt(2) 3^{k+1} / 4, beyond 1e4 T at k = 12.
  linear = lambda p: jnp.sum(p)  # noqa: E731
  with pytest.raises(FloatingPointError, match=r"costate diverged.* at step 18 of 30"):
    check_result(run(4.0, 30, linear))
  with pytest.raises(FloatingPointError, match=r"training loss is inf at step \d+ of 200"):
    check_result(run(4.0, 200))
  with pytest.raises(FloatingPointError, match="training loss is nan at step 0 of 3"):
    check_result(pmp_scores(lambda p, b: b * p, lambda p: p ** 2, SGD, 1.0,
                            np.full((3, 1), np.nan), None))
