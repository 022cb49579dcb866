"""What the compiled solver costs, by XLA's own accounts: FLOPs and bytes of the fused step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.control import SolveOptions, TrainingRun, adjoint, mean_target_loss, pmp
from lmops_jax.control.dynamics import init_state
from lmops_jax.control.problem import Problem
from lmops_jax.control.training_run import prepare, shardings_of
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training.losses import lm_example_losses

SGD = optax.sgd(0.1)


def _setup(config, batch_size, length, num_steps=2):
  tokens = np.random.default_rng(0).integers(
    0, config.vocab_size, size=(num_steps, batch_size, length + 1)).astype(np.int32)
  batches = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:],
             "loss_mask": np.ones((num_steps, batch_size, length), np.float32)}
  losses = lm_example_losses(Transformer(config), chunk=length)
  params = nn.unbox(
    Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
  batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batches)
  return losses, params, batches, batch


def _compile(fn, *args):
  return jax.jit(fn).lower(*args).compile()


@pytest.mark.slow
def test_flops_of_the_fused_step():
  # An unrolled model, since XLA counts the body of a loop once.
  config = TransformerConfig(vocab_size=256, num_layers=2, width=64, num_heads=2, mlp_width=256,
                             scan_layers=False)
  losses, params, _, batch = _setup(config, 4, 32)
  target = mean_target_loss(losses, batch)
  weights = jnp.full((2, 4), 0.25)
  flops = lambda fn, *args: _compile(fn, *args).cost_analysis()["flops"]  # noqa: E731
  forward = flops(lambda p: jnp.mean(losses(p, batch)), params)
  problem = Problem(losses, target, SGD.update, lambda t: batch, weights, None, SolveOptions())
  state = init_state(SGD.init, SGD.update, params)
  carry, _ = jax.eval_shape(problem.first_carry, state)
  step = flops(problem.reverse, carry, state, jnp.ones((), jnp.int32))
  assert step <= 8.3 * forward + 3.1 * forward  # the target has as many tokens as the batch

  def hvp_alone(params, u):
    grad = jax.grad(lambda p: weights[0] @ losses(p, batch))
    return jax.jvp(grad, (params,), (u,))[1]
  with_scores = lambda params, u: adjoint.hvp_scores_losses(  # noqa: E731
    losses, params, u, batch, weights[0])
  assert flops(with_scores, params, params) <= 1.01 * flops(hvp_alone, params, params)


@pytest.mark.slow
def test_memory_of_the_solve(full_compile):
  # Many parameters, two tokens: what is left above the stored trajectory is the parameters, the
  # costate, the cotangent and the Hessian product.
  config = TransformerConfig(vocab_size=512, num_layers=8, width=128, num_heads=2, mlp_width=512)
  num_steps = 4
  losses, params, batches, batch = _setup(config, 1, 2, num_steps)
  size = 4 * sum(x.size for x in jax.tree.leaves(params))
  target = mean_target_loss(losses, batch)
  weights = np.ones((num_steps, 1), np.float32)

  def temporary(trajectory):
    arguments = prepare(TrainingRun(losses, SGD, params, batches, weights), target, None,
                        SolveOptions(trajectory=trajectory))
    return pmp._solve.lower(
      *arguments, shardings_of(arguments[0].params)
    ).compile().memory_analysis().temp_size_in_bytes

  with full_compile():
    activations = _compile(
      lambda p, u: adjoint.hvp_scores_losses(losses, p, u, batch, jnp.ones(1)), params, params
    ).memory_analysis().temp_size_in_bytes
    assert activations < size
    assert temporary("all") - num_steps * size <= 4 * size + activations
