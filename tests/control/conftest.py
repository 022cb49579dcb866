"""Small training problems and the independent gradient: autodiff through the whole run."""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


class TrainingProblem(NamedTuple):
  """Arrays are NumPy float64, so that they follow the precision of the test."""
  example_losses: Any  # (params, batch) -> [B]
  target_loss: Any  # params -> []
  params: Any
  batches: Any  # [T, B, ...]
  weights: np.ndarray  # [T, B]
  proxy: Any  # [M, ...]

  @property
  def args(self):
    return self.params, self.batches, self.weights


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def toy():
  return types.SimpleNamespace(
    regression=_regression, language_model=_language_model, unrolled=_unrolled, Problem=
    TrainingProblem)


def _mlp_losses(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"])
  return jnp.square(hidden @ params["v"] * params["scale"] - batch["y"])


_MLP_DEV = np.random.default_rng(5)
_MLP_DEV = {"x": _MLP_DEV.normal(size=(6, 3)), "y": _MLP_DEV.normal(size=6)}


def _mlp_target(params):
  # A new array: jax 0.10.2 remembers the dtype of a NumPy constant across x64 modes.
  dtype = jax.dtypes.canonicalize_dtype(np.float64)
  return jnp.mean(_mlp_losses(params, {k: v.astype(dtype) for k, v in _MLP_DEV.items()}))


def _regression(num_steps=5, batch_size=4, num_proxies=7, seed=0):
  """A two-layer network with a scalar leaf; the same function objects at every call."""
  rng = np.random.default_rng(seed)
  params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=4),
            "scale": 0.7}
  batches = {"x": rng.normal(size=(num_steps, batch_size, 3)),
             "y": rng.normal(size=(num_steps, batch_size))}
  weights = rng.uniform(size=(num_steps, batch_size)) / batch_size
  proxy = {"x": rng.normal(size=(num_proxies, 3)), "y": rng.normal(size=num_proxies)}
  return TrainingProblem(_mlp_losses, _mlp_target, params, batches, weights, proxy)


_VOCAB, _LENGTH, _WIDTH = 11, 5, 6


def _lm_losses(params, batch):
  """One causal attention block and a gated layer; masked token mean."""
  tokens, mask = batch["tokens"], batch["loss_mask"]
  x = params["embedding"][tokens]
  def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)
  q, k, v = (norm(x) @ params[name] for name in ("query", "key", "value"))
  logits = jnp.einsum("bqd,bkd->bqk", q, k) / np.sqrt(_WIDTH)
  causal = np.tril(np.ones((_LENGTH, _LENGTH), bool))
  x = x + jax.nn.softmax(jnp.where(causal, logits, -1e9)) @ v
  h = norm(x)
  x = x + (jax.nn.silu(h @ params["gate"]) * (h @ params["up"])) @ params["down"]
  logits = norm(x) @ params["embedding"].T
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  mask = mask.astype(nats.dtype)
  return jnp.sum(nats * mask, -1) / jnp.maximum(jnp.sum(mask, -1), 1)


def _sequences(rng, *shape):
  tokens = rng.integers(0, _VOCAB - 2, size=(*shape, _LENGTH + 1))  # the last ids never occur
  mask = np.ones((*shape, _LENGTH), np.float32)
  mask[..., -1] = rng.integers(0, 2, size=shape)
  return {"tokens": tokens[..., :-1].astype(np.int32), "targets": tokens[..., 1:].astype(np.int32),
          "loss_mask": mask}


_LM_DEV = _sequences(np.random.default_rng(7), 5)


def _lm_target(params):
  return jnp.mean(_lm_losses(params, _LM_DEV))


def _language_model(num_steps=5, batch_size=4, num_proxies=6, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"embedding": (_VOCAB, _WIDTH), "query": (_WIDTH, _WIDTH), "key": (_WIDTH, _WIDTH),
            "value": (_WIDTH, _WIDTH), "gate": (_WIDTH, 8), "up": (_WIDTH, 8),
            "down": (8, _WIDTH)}
  params = {k: 0.5 * rng.normal(size=s) for k, s in shapes.items()}
  return TrainingProblem(
    _lm_losses, _lm_target, params, _sequences(rng, num_steps, batch_size),
    np.full((num_steps, batch_size), 1 / batch_size), _sequences(rng, num_proxies))


def _unrolled(problem, optimizer, objective="area", with_proxy=False):
  """`(A, -dA/dweights [T, B], -dA/deps [T, M])` by reverse mode through the run.

  `eps[t, n]` times the loss of proxy n is added to the loss of step t; its gradient is None unless
  asked for.
  """
  params, batches, weights, proxy = jax.tree.map(
    jnp.asarray, (problem.params, problem.batches, problem.weights, problem.proxy))
  eps = jnp.zeros((weights.shape[0], jax.tree.leaves(proxy)[0].shape[0]))
  value, (by_weight, by_eps) = _value_and_gradients(
    problem.example_losses, problem.target_loss, optimizer, objective, with_proxy, weights, eps,
    params, batches, proxy)
  return value, -np.asarray(by_weight), -np.asarray(by_eps) if with_proxy else None


@functools.partial(jax.jit, static_argnums=range(5))
def _value_and_gradients(example_losses, target_loss, optimizer, objective, with_proxy, weights,
                         eps, params, batches, proxy):
  def objective_value(weights, eps):
    def step(state, xs):
      params, opt_state = state
      batch, weights, eps = xs
      def loss(p):
        total = jnp.sum(weights * example_losses(p, batch))
        return total + jnp.sum(eps * example_losses(p, proxy)) if with_proxy else total
      updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
      params = optax.apply_updates(params, updates)
      return (params, opt_state), target_loss(params)
    _, values = jax.lax.scan(step, (params, optimizer.init(params)), (batches, weights, eps))
    return values.sum() if objective == "area" else values[-1]

  return jax.value_and_grad(objective_value, (0, 1))(weights, eps)
