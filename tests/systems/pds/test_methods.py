"""What the scoring methods ask of data and mesh, and how they count their cost."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax import control
from lmops_jax.mesh import meshes
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.sizing import flops, solve_cost
from lmops_jax.systems.pds import methods, pretrain, scorer
from lmops_jax.training import optimizers

LENGTH, VOCAB = 8, 32
CONFIG = TransformerConfig(
  vocab_size=VOCAB, num_layers=1, width=16, num_heads=2, mlp_width=24, max_length=LENGTH
)
SGD = optimizers.sgd(0.1)


class _Instances:
  """Random sequences, with what the methods read of `data.instances.Instances`."""

  length, vocab_size = LENGTH, VOCAB

  def __init__(self, num, seed):
    rng = np.random.default_rng(seed)
    self.rows = rng.integers(0, VOCAB, (num, LENGTH + 1)).astype(np.int32)
    self.ids = rng.permutation(num) + 10**12
    self.mask = (np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (num, 1))).astype(np.float32)

  def __len__(self):
    return len(self.rows)

  def tokens(self, indices):
    return self.rows[indices]

  def num_tokens(self, indices):
    return 1 + self.mask[indices].sum(1).astype(int)

  def batch(self, indices):
    return {
      "tokens": self.rows[indices, :-1], "targets": self.rows[indices, 1:],
      "loss_mask": self.mask[indices], "example_id": self.ids[indices],
    }


class _Context:
  """Of a stage: the folder, the manifest's values and the log."""

  def __init__(self, directory):
    self.directory, self.extra, self.flops, self.lines = directory, {}, 0.0, []

  def log(self, text):
    self.lines.append(text)

  def progress(self, total, unit, description):
    from lmops_jax.host import progress
    return progress.Progress(total, unit, description, quiet=True)


class _Bench(methods.Bench):
  """A bench whose proxy is at its initialisation."""

  def proxy_params(self, step=None):
    return _initial_params()


@functools.cache
def _initial_params():
  init = jax.jit(Transformer(CONFIG).init)
  return nn.unbox(init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def _bench(directory, *, num_target, num_proxies, devices=8, num_corpus=64, **proxy):
  directory.mkdir(exist_ok=True)
  prepared = types.SimpleNamespace(
    corpus=_Instances(num_corpus, 0), target_dev=_Instances(num_target, 1)
  )
  config = pretrain.Pretrain(CONFIG, SGD, num_steps=4, batch_size=8, **proxy)
  partitioner = meshes.MeshConfig(data=devices).build(jax.devices()[:devices])
  return _Bench(
    _Context(directory), prepared, config, methods.ProxySet(num_proxies), partitioner
  )


@pytest.mark.parametrize("micro_batch_size", [5, 64])
def test_the_target_loss_is_the_exact_mean_whatever_the_mesh_divides(tmp_path, micro_batch_size):
  bench = _bench(tmp_path, num_target=33, num_proxies=20)
  params = bench.proxy_params()
  rows = {k: v for k, v in bench.target_batch(None).items() if k != "example_id"}
  assert len(rows["tokens"]) == 33
  want, want_grad = jax.value_and_grad(lambda p: bench.example_losses(p, rows).mean())(params)
  with bench.partitioner.activate():
    target_loss = bench.target_loss(None, micro_batch_size)
    got, got_grad = jax.jit(jax.value_and_grad(target_loss))(params)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got_grad, want_grad)
  assert len(target_loss.data["tokens"]) % target_loss.batch_size == 0
  assert target_loss.batch_size % 8 == 0


def test_runs_of_the_proxy_take_target_instances_one_after_another(tmp_path):
  bench = _bench(tmp_path, num_target=33, num_proxies=20)
  runs = [dataclasses.replace(bench, proxy_run=run) for run in range(3)]
  assert [run.proxy_stage for run in runs] == ["proxy", "proxy_2", "proxy_3"]
  taken = [set(run.target_batch(16)["example_id"].tolist()) for run in runs]
  assert [len(ids) for ids in taken] == [16] * 3 and not taken[0] & taken[1]
  assert set(bench.prepared.target_dev.ids.tolist()) - taken[0] - taken[1] < taken[2]
  assert runs[2].target_batch(None).keys() == bench.target_batch(None).keys()
  np.testing.assert_array_equal(
    runs[2].target_batch(None)["example_id"], bench.target_batch(None)["example_id"])


@pytest.mark.slow
def test_scores_do_not_depend_on_whether_the_mesh_divides_the_rows(tmp_path):
  """33 target instances and 21 proxies on 8 devices and on one; the norms are kept and logged."""
  method = methods.PMP(
    SGD, num_steps=3, batch_size=8, micro_batch_size=12,
    options=control.SolveOptions(segment_steps=2))
  benches = [
    _bench(tmp_path / str(n), num_target=33, num_proxies=21, devices=n) for n in (1, 8)
  ]
  want, got = (method.score_proxies(bench) for bench in benches)
  assert want.shape == (1, 21) and np.abs(want).min() > 0
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-4)
  context = benches[0].context
  sizes = {"costate_norms": [3], "target_grad_norms": [3], "target_losses": [4]}
  assert {name: [len(row) for row in rows] for name, rows in context.extra.items()} == sizes
  np.testing.assert_allclose(  # lambda_T is the target's gradient
    context.extra["costate_norms"][0][-1], context.extra["target_grad_norms"][0][-1], rtol=1e-6
  )
  assert [line.split(":")[0:2] for line in context.lines] == [
    ["pds@4", " steps 3 to 3 of 3"], ["pds@4", " steps 1 to 2 of 3"]
  ]
  assert "|lambda|" in context.lines[0]


def test_direction_scores_of_any_number_of_rows(tmp_path):
  benches = [
    _bench(tmp_path / str(n), num_target=33, num_proxies=21, devices=n) for n in (1, 2)
  ]
  want, got = (methods.OneStep(micro_batch_size=12).score_proxies(bench) for bench in benches)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-4)


@pytest.mark.parametrize("make, devices", [
  (functools.partial(methods.PMP, SGD, num_steps=2, batch_size=8), 1),
  (methods.OneStep, 8),
])
def test_scores_over_gradient_norm_or_length(tmp_path, make, devices):
  bench = _bench(tmp_path / "x", num_target=9, num_proxies=11, devices=devices)
  params, rows = bench.proxy_params(), bench.proxies
  (tmp_path / "plain").mkdir()
  plain = make().score_proxies(bench)[0]
  losses = {k: v for k, v in rows.items() if k != "example_id"}
  slopes = jax.jit(jax.jacobian(bench.example_losses))(params, losses)
  squares = sum(np.square(x).reshape(11, -1).sum(1) for x in jax.tree.leaves(slopes))
  want = {"gradient_norm": np.sqrt(squares), "sqrt_length": np.sqrt(rows["loss_mask"].sum(1))}
  for name, divisor in want.items():
    bench.context.directory = tmp_path / name
    bench.context.directory.mkdir()
    got = make(divide_by=name).score_proxies(bench)[0]
    np.testing.assert_allclose(got, plain / divisor, rtol=1e-3, atol=1e-5 * np.abs(got).max())


@pytest.mark.parametrize("order", [1, 2])
def test_in_run_values_count_every_proxy_of_every_epoch(tmp_path, order):
  method = methods.InRun(SGD, order=order, epochs=2, batch_size=8, micro_batch_size=4)
  benches = [
    _bench(tmp_path / str(n), num_target=9, num_proxies=21, devices=n) for n in (1, 2)]
  got, on_mesh = (method.score_proxies(bench) for bench in benches)
  np.testing.assert_allclose(on_mesh, got, rtol=1e-3, atol=1e-5 * np.abs(got).max())
  bench = benches[0]
  params, rows = bench.proxy_params(), bench.proxies
  target = {k: v for k, v in bench.target_batch(None).items() if k != "example_id"}
  losses = bench.example_losses
  index, weights = method._batches(21)
  assert np.bincount(index[weights > 0], minlength=21).tolist() == [2] * 21
  want, slope = np.zeros(21), jax.jit(jax.grad(lambda p: losses(p, target).mean()))
  gradient = jax.jit(jax.grad(lambda p, batch: losses(p, batch).sum() / 8))
  curvature = jax.jit(lambda p, change: jax.jvp(slope, (p,), (change,))[1])
  slopes = jax.jit(lambda p, batch, along: jax.jvp(lambda q: losses(q, batch), (p,), (along,))[1])
  for chosen in (own[of > 0] for own, of in zip(index, weights)):
    batch = {k: v[chosen] for k, v in rows.items() if k != "example_id"}
    change = jax.tree.map(lambda g: -0.1 * g, gradient(params, batch))
    along = slope(params)
    if order == 2:
      along = jax.tree.map(lambda g, h: g + h / 2, along, curvature(params, change))
    want[chosen] += 0.1 / 8 * np.asarray(slopes(params, batch, along))
    params = jax.tree.map(jnp.add, params, change)
  np.testing.assert_allclose(got[0], want, rtol=1e-3, atol=1e-5 * np.abs(want).max())
  assert bench.context.flops / flops.forward_flops_per_token(CONFIG, LENGTH) == (
    6 * LENGTH * (8 * 6 + 9 * (3 if order == 1 else 9)))


def test_a_trajectory_is_decided_before_the_method_scores(tmp_path):
  bench = _bench(tmp_path, num_target=9, num_proxies=16, devices=1)
  method = methods.PMP(SGD, num_steps=2, batch_size=8, device_bytes=1e12,
                       options=control.SolveOptions(trajectory="auto"))
  with pytest.raises(ValueError, match="trajectory='auto' must be decided before a solve"):
    method.score_proxies(bench)
  assert method.decided(bench).options == control.SolveOptions(trajectory="all")
  assert bench.context.lines[0].startswith("pds: trajectory 'all' for states of")


def test_inner_batches_may_be_drawn_from_the_proxies(tmp_path, monkeypatch):
  seen = []

  def solve(run, *_, proxy, **__):
    seen.append(np.asarray(run.batches["tokens"]).reshape(-1, LENGTH))
    ones = jnp.ones(run.num_steps)
    return control.PmpResult(
      jnp.ones(run.weights.shape), jnp.ones(len(proxy["tokens"])), jnp.ones(run.num_steps + 1),
      run.params, ones, ones, ones, None)

  monkeypatch.setattr(control, "solve", solve)
  bench = _bench(tmp_path, num_target=9, num_proxies=16, devices=1)
  for where in ("corpus", "proxies"):
    methods.PMP(SGD, num_steps=2, batch_size=8, inner_data=where).score_proxies(bench)
  proxies = {row.tobytes() for row in bench.proxies["tokens"]}
  drawn = [{row.tobytes() for row in rows} for rows in seen]
  assert drawn[1] == proxies and not drawn[0] <= proxies
  with pytest.raises(ValueError, match=r"INNER_BATCH_SIZE\) of 17, more than the 16 proxies"):
    methods.PMP(SGD, batch_size=17, inner_data="proxies").score_proxies(bench)


def test_an_outer_loop_weighs_the_proxies_run_after_run(tmp_path, monkeypatch):
  """Runs on weighted proxies in a common order, and a step along the scores of each."""
  runs, found = [], [np.linspace(-1, 2, 16) ** 2, np.cos(np.arange(16))]

  def solve(run, *_, proxy, **__):
    runs.append((np.asarray(run.batches["tokens"]), run.weights))
    ones = jnp.ones(run.num_steps)
    return control.PmpResult(
      jnp.ones(run.weights.shape), jnp.asarray(found[len(runs) - 1]), jnp.ones(run.num_steps + 1),
      run.params, ones, ones, ones, None)

  monkeypatch.setattr(control, "solve", solve)
  bench = _bench(tmp_path, num_target=9, num_proxies=16, devices=1)
  loop = control.OuterLoop(rate=0.8, epochs=2, rule=control.SignGradient())
  method = methods.PMP(SGD, num_steps=3, batch_size=8, inner_data="proxies", outer=loop)
  got, = method.score_proxies(bench)
  gamma = np.full(16, 1 / 16)
  for epoch, scores in enumerate(found):
    tokens, weights = runs[epoch]
    same = (tokens[:, :, None] == bench.proxies["tokens"]).all(-1)  # [T,B,M]
    assert (same.sum(-1) == 1).all()
    drawn = same.argmax(-1)
    np.testing.assert_allclose(weights, 16 / 8 * gamma[drawn], rtol=1e-5)
    # An epoch of the order has two batches: the first run takes three, the second goes on there.
    pair = drawn[:2] if epoch == 0 else drawn[1:]
    assert sorted(pair.ravel()) == list(range(16))
    gamma = np.maximum(gamma + 0.8 / 16 * np.sign(scores - gamma @ scores), 0)
    gamma /= gamma.sum()
  np.testing.assert_allclose(got, 16 * gamma, rtol=1e-5)
  assert len(set(np.round(got, 4))) == 4  # up or down, twice
  num_zero = np.count_nonzero(gamma == 0)
  assert 0 < num_zero < 16 and bench.context.lines[1] == (
    f"pds@4: target loss 1.0000 after run 2 of 2; {num_zero} proxies now weigh 0")
  with pytest.raises(ValueError, match='set pds.PMP.inner_data to "proxies"'):
    dataclasses.replace(method, inner_data="corpus")
  with pytest.raises(ValueError, match="set pds.PMP.divide_by to None"):
    dataclasses.replace(method, divide_by="gradient_norm")


def _data_rater(bench, num_windows):
  """Trains a rater where every other instance is one of the target's; what it gives the proxies."""
  bench.prepared.corpus.rows[::2] = bench.prepared.target_dev.rows[np.arange(32) % 9]
  config = scorer.Scorer(SGD, inference_batch_size=16)
  method = methods.DataRater(
    optimizers.sgd(0.3), optimizers.adamw(3e-3, eps=1e-12, clip_norm=None), lifetime=6,
    num_windows=num_windows, batch_size=16, target_batch_size=8, micro_batch_size=8)
  method.fit_scorer(bench, config)
  rater = scorer.Annotator(
    scorer.View(bench.prepared), bench.context.directory, config, bench.proxy, bench.partitioner)
  return rater.shard(0, 64).scores[bench.proxy_indices]


def test_a_data_rater_puts_the_like_of_the_target_first(tmp_path):
  bench = _bench(tmp_path / "x", num_target=9, num_proxies=32, devices=1)
  values = _data_rater(bench, 40)
  like_target = bench.proxy_indices % 2 == 0
  assert values[like_target].min() > values[~like_target].max()
  assert [row["step"] for row in bench.context.extra["windows"]] == [10, 20, 30, 40]
  per_token, of_rater = (
    flops.forward_flops_per_token(CONFIG, LENGTH, unembedding=has) for has in (True, False))
  # A window: two steps of 3 and 8 passes, the target's gradient and its loss at two steps.
  assert bench.context.flops == pytest.approx(40 * 2 * LENGTH * (
    16 * (2 * 11 * per_token + 2 * 4 * of_rater) + 8 * 5 * per_token))


@pytest.mark.slow
def test_a_data_rater_is_the_same_on_a_mesh(tmp_path):
  got, want = (
    _data_rater(_bench(tmp_path / str(n), num_target=9, num_proxies=32, devices=n), 3)
    for n in (2, 1))
  # Weights do not depend on the mean: that of the ratings is left to rounding.
  np.testing.assert_allclose(
    got - got.mean(), want - want.mean(), atol=1e-3 * np.ptp(want))


@pytest.mark.parametrize("num_target", [3, 13])
def test_rho_loss_fits_its_batches_to_target_and_mesh(tmp_path, num_target):
  bench = _bench(tmp_path, num_target=num_target, num_proxies=11, accumulate=4)
  got = methods.RhoLoss(learning_rate=1e-2, epochs=2).score_proxies(bench)
  assert got.shape == (1, 11) and np.isfinite(got).all()
  num_steps = 2  # of eight rows, once an epoch
  per_token = flops.forward_flops_per_token(CONFIG, LENGTH)
  assert bench.context.flops == (3 * num_steps * 8 + 2 * 11) * LENGTH * per_token


def test_rho_loss_prefers_what_the_target_teaches(tmp_path):
  """Its sign (spec section 7): loss before less loss after fine-tuning on the target."""
  bench = _bench(tmp_path, num_target=16, num_proxies=32, devices=1)
  like_target = bench.prepared.target_dev.rows
  bench.prepared.corpus.rows[::2] = like_target[np.arange(32) % 16]  # every other instance
  indices = bench.proxy_indices
  scores = methods.RhoLoss(learning_rate=1e-2, epochs=20).score_proxies(bench)[0]
  assert scores[indices % 2 == 0].min() > 0
  assert scores[indices % 2 == 0].min() > scores[indices % 2 == 1].max()


def _counted(bench, method):
  """Operations over those of one forward pass over one instance."""
  bench.context.flops = 0.0
  method.score_proxies(bench)
  return bench.context.flops / (LENGTH * flops.forward_flops_per_token(CONFIG, LENGTH))


def test_costs_are_those_counted_by_hand(tmp_path, monkeypatch):
  def solve(run, *_, proxy, **__):
    return control.PmpResult(
      jnp.ones(run.weights.shape), jnp.ones(len(proxy["tokens"])), jnp.ones(run.num_steps + 1),
      run.params, *jnp.ones((3, run.num_steps)), None)

  monkeypatch.setattr(control, "solve", solve)
  zeros = lambda *args, **_: jnp.zeros(len(args[3]["tokens"]))  # noqa: E731
  monkeypatch.setattr(control, "directional_scores", zeros)
  monkeypatch.setattr(control, "influence_direction", lambda losses, grad, *_, **__: grad)
  bench = _bench(tmp_path, num_target=16, num_proxies=24, devices=1)
  base = methods.PMP(SGD, num_steps=5, batch_size=8, micro_batch_size=8,
                     options=control.SolveOptions(segment_steps=2))

  def replace(name, optimizer=SGD, divide_by=None, **kw):
    return dataclasses.replace(
      base, name=name, optimizer=optimizer, divide_by=divide_by,
      options=dataclasses.replace(base.options, **kw))

  # A step: forward 3, once more in its segment 3, Hessian product with slopes 8. The target: five
  # gradients and the loss at the start. The proxies: every step.
  solve = 5 * 8 * (3 + 3 + 8) + 16 * (5 * 3 + 1) + 24 * 5 * 3
  for method, want in [
    (base, solve),
    (replace("b", groups=2), solve - 24 * 3 * 3),
    (replace("c", every_k=2), solve - 24 * 2 * 3),
    (replace("d", hessian=False), solve - 5 * 8 * (8 - 3)),
    (replace("e", objective="terminal"), solve - 16 * 4 * 2),
    (replace("f", optimizer=optimizers.sgd(0.1, clip_norm=1.0)), solve + 5 * 8 * 3),
    (replace("h", proxy_samples=2), solve - 24 * 3 * 3),
    (replace("i", optimizer=optimizers.lion(0.1), surrogate="clipped_straight_through"),
     solve + 5 * 8 * 3),
    (replace("g", divide_by="gradient_norm"), solve + 24 * 3),
    (dataclasses.replace(base, name="j", inner_data="proxies",
                         outer=control.OuterLoop(1.0, epochs=3)), 3 * solve),
    (methods.OneStep(), (16 + 24) * 3),
    # 50 products, 8 probes, 20 power steps and a residual, of 6 passes each.
    (methods.InfluenceScores(num_hessian=8), (16 + 24) * 3 + (50 + 8 + 20 + 1) * 8 * 6),
    (methods.InfluenceScores(num_hessian=8, damping=1.0, curvature="hessian", iterations=2),
     (16 + 24) * 3 + (2 + 20 + 1) * 8 * 8),
  ]:
    assert _counted(bench, method) == pytest.approx(want), method


def test_passes_of_the_plain_solve_and_of_other_trajectories():
  params = {"w": jnp.ones(3)}
  def count(in_segments=False, **kw):
    options = control.SolveOptions(**kw)
    return solve_cost.solve_passes(SGD, params, 7, options, in_segments=in_segments).batch
  assert count() == 7 * (3 + 8)
  assert count(in_segments=True, segment_steps=100) == 7 * (3 + 3 + 8)
  assert count(trajectory=1) == 7 * (3 + 8) + 3 * (6 * 5 // 2)  # again from the start each time
  assert count(in_segments=True, segment_steps=7, trajectory=1) == count(trajectory=1) + 7 * 3
  reads = lambda optimizer: (  # noqa: E731
    solve_cost.solve_passes(optimizer, params, 7).batch > count())
  assert not reads(optimizers.sgd(0.1, momentum=0.9, weight_decay=0.1))
  assert reads(optimizers.adamw(0.1, clip_norm=None))


@pytest.mark.parametrize(("method", "sizes", "message"), [
  (methods.PMP(SGD, num_target=40), {}, r"num_target=40 \(TARGET_INSTANCES\).* 33 instances"),
  (methods.OneStep(num_target=34), {}, r"TARGET_INSTANCES"),
  (methods.PMP(SGD, batch_size=65), {}, r"INNER_BATCH_SIZE\) of 65, more than the corpus's 64"),
  (methods.PMP(SGD, batch_size=12), {}, r"INNER_BATCH_SIZE\) of 12, which does not split"),
  (methods.InfluenceScores(num_hessian=128), {}, "num_hessian of 128"),
  (methods.RhoLoss(), {"num_proxies": 65}, r"num_proxies=65 \(PROXIES\) exceeds"),
])
def test_sizes_that_do_not_fit_are_refused_first(tmp_path, method, sizes, message):
  bench = _bench(tmp_path, **{"num_target": 33, "num_proxies": 8} | sizes)
  with pytest.raises(ValueError, match=message):
    method.score_proxies(bench)


def test_auto_takes_up_to_its_bound_and_tells_where_there_are_fewer():
  proxy_set, method = methods.ProxySet(max_proxies=20), methods.PMP(SGD, num_target="auto")
  assert proxy_set.most == 20 and [proxy_set.count(n) for n in (12, 20, 21)] == [12, 20, 20]
  ids = np.random.default_rng(0).permutation(64)
  np.testing.assert_array_equal(proxy_set.indices(ids), methods.ProxySet(20).indices(ids))
  np.testing.assert_array_equal(proxy_set.indices(ids[:12]), np.arange(12))
  assert [method.target_instances(n) for n in (33, 128, 500)] == [33, 128, 128]
  few, enough = {"num_corpus": 12, "num_target": 33}, {"num_corpus": 20, "num_target": 128}
  assert methods.fewer_than_most(method, proxy_set, **few) == [
    "all 12 instances of the corpus are proxies, fewer than pds.ProxySet.max_proxies=20",
    "method 'pds' takes all 33 instances of the target's dev part, fewer than max_target=128",
  ]
  assert methods.fewer_than_most(method, proxy_set, **enough) == []
  assert methods.fewer_than_most(methods.PMP(SGD), methods.ProxySet(8), **few) == []
  with pytest.raises(ValueError, match="the corpus has 3 instances, too few"):
    proxy_set.count(3)


def test_methods_of_the_whole_corpus_need_no_proxies():
  methods.check_sizes(
    methods.Perplexity(), methods.ProxySet(100), num_corpus=10, num_target=1, num_shards=7
  )
