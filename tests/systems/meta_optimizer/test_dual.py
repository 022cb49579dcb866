"""Dual forms against attention, gradient descent and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.systems.meta_optimizer import dual

E, D, N, T = 5, 7, 40, 6


def _arrays(dtype=np.float64, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((E, D), (E, D), (N, D), (T, D), (E,))
  return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_attention_equals_the_updated_layer(dtype, tolerance):
  with jax.enable_x64(dtype == np.float64):
    arrays = _arrays(dtype)
    found = dual.dual_form(*arrays)
    assert found.out.dtype == dtype
    scale = np.max(np.abs(found.out))
    np.testing.assert_allclose(
      dual.attention_form(*arrays), found.out, rtol=0, atol=tolerance * scale)
  w_v, w_k, demo, query, q = _arrays(np.float64)
  x = np.concatenate([demo, query]).T
  want = w_v @ x @ (w_k @ x).T @ q
  np.testing.assert_allclose(found.out, want, rtol=0, atol=max(tolerance, 1e-12) * scale * 4)


def test_many_queries_at_once():
  w_v, w_k, demo, query, _ = _arrays(np.float32)
  q = np.random.default_rng(1).normal(size=(3, 2, E)).astype(np.float32)
  found = dual.dual_form(w_v, w_k, demo, query, q).out
  assert found.shape == q.shape
  np.testing.assert_allclose(
    found[1, 1], dual.dual_form(w_v, w_k, demo, query, q[1, 1]).out, rtol=1e-5)


def test_the_update_is_a_sum_over_demonstrations_in_any_order():
  with jax.enable_x64(True):
    w_v, w_k, demo, query, q = _arrays()
    whole = dual.dual_form(w_v, w_k, demo, query, q)
    order = np.random.default_rng(1).permutation(N)
    shuffled = dual.dual_form(w_v, w_k, demo[order], query, q)
    np.testing.assert_allclose(shuffled.dw_icl, whole.dw_icl, rtol=1e-12, atol=1e-12)
    parts = [dual.dual_form(w_v, w_k, part, query, q) for part in (demo[:11], demo[11:])]
    np.testing.assert_allclose(
      parts[0].dw_icl + parts[1].dw_icl, whole.dw_icl, rtol=1e-12, atol=1e-12)
    none = dual.dual_form(w_v, w_k, demo[:0], query, q)
    assert not none.dw_icl.any()
    np.testing.assert_allclose(none.out, none.w_zsl @ q, rtol=1e-12)


@pytest.mark.parametrize("loss", [
  lambda y, t: jnp.sum((y - t) ** 2),
  lambda y, t: -jnp.sum(jax.nn.log_softmax(y) * jax.nn.softmax(t)),
  lambda y, t: jnp.sum(jnp.tanh(y) * t),
])
def test_a_step_of_gradient_descent_is_linear_attention(loss):
  with jax.enable_x64(True):
    rng = np.random.default_rng(2)
    w0, x, targets, new = (rng.normal(size=s) for s in ((E, D), (N, D), (N, E), (3, D)))
    lr = 0.3
    grad = jax.grad(lambda w: sum(loss(w @ a, t) for a, t in zip(x, targets)))(w0)
    errors = -lr * jax.vmap(jax.grad(loss))(x @ w0.T, targets)
    np.testing.assert_allclose(
      dual.gd_linear_dual(w0, x, errors, new), new @ (w0 - lr * grad).T, rtol=1e-12, atol=1e-12)


def test_several_steps_are_exact_with_each_steps_own_errors():
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    w0, x, targets, new = (rng.normal(size=s) for s in ((E, D), (4, D), (4, E), (D,)))
    w, errors = w0, []
    for a, t in zip(x, targets):
      errors.append(-0.1 * 2 * (w @ a - t))
      w = w + np.outer(errors[-1], a)
    np.testing.assert_allclose(
      dual.gd_linear_dual(w0, x, np.stack(errors), new), w @ new, rtol=1e-12)


def test_the_finetuned_head():
  with jax.enable_x64(True):
    w_v, w_k, _, query, q = _arrays()
    rng = np.random.default_rng(4)
    dw_v, dw_k = rng.normal(size=(2, E, D))
    zero = np.zeros_like(w_v)
    assert not dual.finetuned_update(w_v, w_k, zero, zero, query).any()
    update = dual.finetuned_update(w_v, w_k, dw_v, dw_k, query)
    before = dual.dual_form(w_v, w_k, query[:0], query, q).w_zsl
    after = dual.dual_form(w_v + dw_v, w_k + dw_k, query[:0], query, q).w_zsl
    np.testing.assert_allclose(before + update, after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place, shape, match", [
  (1, (E, D + 1), "w_v has shape"), (2, (N, D + 1), "x_demo has shape"),
  (3, (T, D - 1), "x_query has shape"), (4, (E + 1,), "q has shape"), (4, (), "q has shape"),
  (0, (E,), "w_v has shape .*expected 2 axes"),
])
def test_shapes_that_disagree_are_refused(place, shape, match):
  arrays = _arrays()
  arrays[place] = np.zeros(shape)
  for form in (dual.dual_form, dual.attention_form):
    with pytest.raises(ValueError, match=match):
      form(*arrays)


def test_shapes_of_the_linear_layer_and_the_finetuned_head():
  w0, x, errors = np.zeros((E, D)), np.zeros((N, D)), np.zeros((N, E))
  for bad in ((w0, x, errors[:3], x[0]), (w0, x[:, 1:], errors, x[0]), (w0, x, errors.T, x[0])):
    with pytest.raises(ValueError, match="do not belong together"):
      dual.gd_linear_dual(*bad)
  with pytest.raises(ValueError, match="last axis must be 7"):
    dual.gd_linear_dual(w0, x, errors, np.zeros(E))
  with pytest.raises(ValueError, match="dw_k has shape"):
    dual.finetuned_update(w0, w0, w0, w0[:2], x)
