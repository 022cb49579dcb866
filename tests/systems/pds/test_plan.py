"""What PDS says it will take, against what the compiler says of the same programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax import control
from lmops_jax.config import resolve
from lmops_jax.config.refusals import ConfigError
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.shared_stages import language_training
from lmops_jax.sizing import aot, flops, solve_cost, solve_plan, solve_programs
from lmops_jax.sizing.budget import Memory
from lmops_jax.sizing.training import abstract_train_state
from lmops_jax.systems.pds import methods, plan, pretrain, programs
from lmops_jax.systems.pds.programs import Sizes
from lmops_jax.training import loop, losses, optimizers, sources

LENGTH, VOCAB = 64, 512
PAPER = [f"{name} = 'unread'" for name in (
  "CORPUS_PATH", "TARGET_PATH", "TARGET_TEST_PATH", "VOCABULARY_PATH")]


def _model(**kwargs):
  from lmops_jax.models.transformer import TransformerConfig
  sizes = dict(num_layers=4, width=128, num_heads=4, mlp_width=384, max_length=LENGTH)
  return TransformerConfig(**sizes | kwargs)


def _pretrain(**kwargs):
  return pretrain.Pretrain(**dict(
    model=_model(), optimizer=optimizers.adamw(1e-3), num_steps=4, batch_size=16) | kwargs)


def _pmp(**kwargs):
  options = control.SolveOptions(**dict(segment_steps=3, micro_batch_size=8) | kwargs)
  return methods.PMP(optimizers.adamw(1e-3, eps_root=1e-8), options=options, num_steps=6,
                     batch_size=16, micro_batch_size=8)


@pytest.fixture(scope="module", params=["layer", "step"])
def mesh(request):
  return MeshConfig(data=2, fsdp=4, reduction=request.param).build()


# --------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("remat, accumulate", [("none", 1), ("full", 2)])
def test_pretraining_against_the_compiler(mesh, remat, accumulate):
  config = _pretrain(model=_model(remat=remat), accumulate=accumulate)
  compiled = aot.compile_program(
    programs.pretrain_program(config, VOCAB, LENGTH, mesh, Memory(), "pretrain"), mesh)
  phase = plan._training("pretrain", config, VOCAB, LENGTH, mesh, Memory(), "cpu")
  parts = phase.parts
  # Arguments are exactly the state and the batch.
  held = parts["params"] + parts["opt_state"] + parts["data"]
  assert compiled.argument_bytes == pytest.approx(held, rel=1e-3)
  planned = parts["accumulators"] + parts["activations"] + parts["gathered"]
  assert 0.5 < compiled.temporary_bytes / planned < 2
  # The blocks are computed again with remat, the logits are not on this size.
  ratio = compiled.counts.product_flops * 8 / compiled.program.flops
  assert (1.0 < ratio < 1.15) if remat == "none" else (1.2 < ratio < 1.5)
  assert phase.flops == config.num_steps * compiled.program.flops


def test_the_compiled_step_is_the_one_that_the_loop_runs(mesh, monkeypatch, tmp_path):
  config = _pretrain()
  program = programs.pretrain_program(config, VOCAB, LENGTH, mesh, Memory(), "pretrain")
  with mesh.activate():
    text = program.lower().as_text()
  seen = []
  def step_of(*args, **kwargs):
    step = original(*args, **kwargs)
    def run(*inputs):
      seen.append(step.lower(*inputs).as_text())
      return step(*inputs)
    return run
  original = loop.compiled_step
  monkeypatch.setattr(loop, "compiled_step", step_of)
  model = programs.language_models.language_model(config.model, VOCAB, LENGTH)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (config.batch_size, LENGTH)).astype(np.int32)
  batch = {"tokens": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}
  language_training.fit(
    model, losses.lm_example_losses(model), dataclasses.replace(config, num_steps=1),
    sources.Batches(lambda step: batch), mesh, directory=tmp_path, seed=0, description="one step")
  assert seen[0] == text


@pytest.mark.parametrize("kwargs", [
  pytest.param({}, marks=pytest.mark.slow),
  pytest.param({"trajectory": 1, "groups": 2}, marks=pytest.mark.slow),
  {"trajectory": "sqrt"},
])
def test_the_solve_against_the_compiler(mesh, kwargs):
  method, proxy, proxy_set = _pmp(**kwargs), _pretrain(), methods.ProxySet(64)
  solve = (method, proxy, proxy_set, VOCAB, LENGTH, mesh, 16)
  policy = method.options.trajectory
  forward, reverse = (
    aot.compile_program(p, mesh) for p in programs.solve_programs(*solve, policy))
  sizes = plan.solve_parts(*solve, "cpu")
  parts, segment = sizes.on_device, method.options.segment_steps
  slots = solve_plan.device_state_copies(policy, segment)
  copies = slots if slots < segment else segment
  # The state is an argument, and with the carry the cotangents and sums over a group.
  groups = 2 * parts["params"] * (method.options.groups is not None)
  state = parts["params"] + parts["opt_state"]
  carry = parts["costate"] + parts["opt_state"] + groups
  assert forward.argument_bytes == pytest.approx(state + parts["data"], rel=0.1)
  assert reverse.argument_bytes == pytest.approx(state + carry + parts["data"], rel=0.1)
  planned = sizes.device_bytes - parts["given"] + copies * sizes.state
  measured = reverse.argument_bytes + reverse.temporary_bytes
  assert 0.5 < measured / planned < 1.5
  assert reverse.program.bytes_beside == parts["given"] == parts["params"]
  for compiled in (forward, reverse):
    ratio = compiled.counts.product_flops * 8 / compiled.program.flops
    assert 0.95 < ratio < 1.3, (compiled.program.name, ratio)
    assert compiled.counts.unknown_loops == 0


def test_flops_of_the_phases_are_those_of_the_whole_solve(mesh):
  """Forward, reverse and off-batch scores add up to what is counted, from each run of the proxy."""
  method, proxy, proxy_set = _pmp(every_k=2), _pretrain(), methods.ProxySet(64)
  phases = plan._solve(
    method, proxy, proxy_set, VOCAB, LENGTH, mesh, Memory(), Sizes(24, 100), "cpu", runs=3)
  model = programs.language_models.language_model(proxy.model, VOCAB, LENGTH)
  params = abstract_train_state(model, proxy.optimizer, mesh).params
  passes = solve_cost.solve_passes(
    method.optimizer, params, 6, method.options, in_segments=True)
  per_row = LENGTH * flops.forward_flops_per_token(model.config, LENGTH)
  want = 3 * per_row * (passes.batch * 16 + passes.target * 24 + passes.proxy * 64)
  assert sum(phase.flops for phase in phases) == pytest.approx(want)


def test_a_planned_mesh_has_the_shardings_of_a_real_one(mesh):
  planned = MeshConfig(data=2, fsdp=4, reduction=mesh.reduction).plan(8)
  config = _pretrain()
  of = lambda m: plan._training(  # noqa: E731
    "pretrain", config, VOCAB, LENGTH, m, Memory(), "cpu").parts
  assert of(planned) == of(mesh)
  with pytest.raises(ValueError, match="does not fit 9 devices"):
    MeshConfig(data=2, fsdp=4).plan(9)


# -------------------------------------------------------------------------------------- trajectory


def test_auto_takes_what_fits():
  method, partitioner = _pmp(trajectory="auto", segment_steps=6), MeshConfig().plan(8)
  parts = plan.solve_parts(
    method, _pretrain(), methods.ProxySet(64), VOCAB, LENGTH, partitioner, 16, "tpu")
  rest = parts.device_bytes
  margin = 0.5 * parts.on_device["activations"]
  for copies, want in ((6, "all"), (4, 4), (1, 1)):
    memory = Memory(rest + margin + copies * parts.state)
    assert plan.resolve_trajectory(method, parts, memory) == want
  assert plan.resolve_trajectory(method, parts, Memory(rest + 1.5 * parts.state)) == 1
  on_host = Memory(rest + 4 * parts.state, parts.on_host + 6 * parts.state)
  assert plan.resolve_trajectory(method, parts, on_host) == "host"
  with pytest.raises(ValueError, match="does not fit"):
    plan.resolve_trajectory(method, parts, Memory(rest))
  assert plan.planned_trajectory(method, parts, Memory(rest)) == 1
  assert plan.planned_trajectory(method, parts, on_host) == "host"
  with pytest.raises(ValueError, match="set pds.PMP.device_bytes"):
    plan.resolve_trajectory(method, parts, Memory())
  assert plan.resolve_trajectory(_pmp(trajectory="sqrt"), parts, Memory()) == "sqrt"
  starts_alone = Memory(rest + margin + 4 * parts.state, parts.on_host + 5 * parts.state)
  assert plan.resolve_trajectory(method, parts, starts_alone) == 4
  with pytest.raises(ValueError, match="raise control.SolveOptions.segment_steps .now 6."):
    plan.resolve_trajectory(_pmp(trajectory="all", segment_steps=6), parts, Memory(1e9, 1.0))


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size, count", [
  ("160m", 162_417_408), ("470m", 468_239_360), ("1b", 1_004_348_928), ("1.7b", 1_741_785_088)])
def test_the_papers_sizes(size, count):
  """Parameters of the published models, and the published batches, in one command each."""
  job = resolve.load([f"pds/paper_{size}.gin"], owed="named").run()
  partitioner = job.mesh.plan(64)
  found = {p.name: p for p in job.system.phases(
    partitioner, Memory(95e9), num_target=1024, num_corpus=1000, platform="tpu")}
  assert found["pretrain"].num_params == found["solve pds, reverse"].num_params == count
  per_token = flops.forward_flops_per_token(
    dataclasses.replace(job.system.pretrain.model, vocab_size=32_000), 1024)
  assert found["pretrain"].flops == 3 * 100_000 * 512 * 1024 * per_token
  assert found["solve pds, forward"].flops == 5 * 3 * 100 * 256 * 1024 * per_token
  # Parameters and AdamW's two moments in float32, over all devices.
  state = found["pretrain"].parts["params"] + found["pretrain"].parts["opt_state"]
  assert state == pytest.approx(12 * count / 64, rel=0.001)


def test_whole_solve_of_the_paper():
  """The specification's account of the reference's scheme (8.1), scores at every tenth step."""
  job = resolve.load(["pds/paper_160m.gin"], owed="named").run()
  found = {p.name: p.flops / 5 for p in job.system.phases(
    job.mesh.plan(8), Memory(95e9), num_target=1024, num_corpus=1, platform="tpu")}
  # Its 137.8M parameters in products, and of its 37.7 MFLOP of attention the causal half.
  per_token = 2 * 137.8e6 + 37.7e6 / 2
  proxies, batch, target = (rows * 1024 * per_token for rows in (163_840, 256, 1024))
  assert found["solve pds, off-batch scores"] == pytest.approx(10 * 3 * proxies, rel=0.002)
  assert found["solve pds, forward"] == pytest.approx(100 * 3 * batch, rel=0.002)
  # Products 8, and the states of a segment once more; plain SGD needs no gradient in reverse.
  assert found["solve pds, reverse"] == pytest.approx(
    100 * (8 * batch + 3 * batch + 3 * target), rel=0.002)


def test_bad_input(mesh):
  with pytest.raises(ConfigError, match="vocab_size=32000"):
    programs.vocabulary_size(_model(), object())
  assert programs.vocabulary_size(_model(vocab_size=7), object()) == 7
  with pytest.raises(ConfigError, match="12 instances of a batch do not split"):
    programs.abstract_batch(mesh, 12, LENGTH)
  with pytest.raises(ValueError, match="trajectory"):
    solve_programs.segment_programs(
      control.TrainingRun(losses.lm_example_losses, optimizers.sgd(0.1), {}, {},
                          jax.ShapeDtypeStruct((2, 4), jnp.float32)),
      None, None, control.SolveOptions(trajectory="auto"))
