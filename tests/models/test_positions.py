"""xPos against its formula, and the sinusoids of fairseq with their row of padding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models import positions as positions_lib
from lmops_jax.models.transformer import Transformer, TransformerConfig

WIDTH, CENTRE = 8, 16
CONFIG = TransformerConfig(
  vocab_size=23, num_layers=2, width=16, num_heads=2, mlp_width=24, max_length=40,
  positions="none", xpos=True, rotary_interleaved=True)


def _turned(x, position, of_keys, centre=CENTRE):
  """A query or key `[WIDTH]` at a position, by the library."""
  frequencies = positions_lib.rotary_frequencies(WIDTH, 1e4)
  at = np.array([[position]], np.int32)
  angles = positions_lib.xpos_angles(at, positions_lib.rotary_angles(at, frequencies), centre)
  x = jnp.asarray(x, jnp.float32)[None, None, None]
  return np.asarray(
    positions_lib.rotary(x, angles.keys if of_keys else angles.queries, True), np.float64)[0, 0, 0]


def _by_the_formula(x, position, sign, length):
  """The paper's equations in float64, with the centre in the middle of `length` keys."""
  pair = np.arange(WIDTH // 2)
  theta = np.repeat(10000.0 ** (-2 * pair / WIDTH), 2)
  zeta = np.repeat((pair / (WIDTH / 2) + 0.4) / 1.4, 2)
  turned = np.stack([-x[1::2], x[::2]], -1).reshape(-1)
  scale = zeta ** (sign * (position - length // 2) / 512)
  return (x * np.cos(position * theta) + turned * np.sin(position * theta)) * scale


def test_xpos_equals_its_formula():
  q, k = np.random.default_rng(0).normal(size=(2, WIDTH))
  for n, m in ((0, 0), (30, 2), (511, 700), (2047, 0)):
    for centre, length in ((CENTRE, 32), (1024, 2048)):
      np.testing.assert_allclose(
        _turned(q, n, False, centre), _by_the_formula(q, n, 1, length), rtol=2e-4, atol=1e-5)
      np.testing.assert_allclose(
        _turned(k, m, True, centre), _by_the_formula(k, m, -1, length), rtol=2e-4, atol=1e-5)


def test_products_of_xpos_depend_on_distance_only_and_decay():
  q, k = np.random.default_rng(1).normal(size=(2, WIDTH))

  def product(n, m, x=q, y=k):
    return _turned(x, n, False) @ _turned(y, m, True)

  assert product(7, 4) == pytest.approx(product(103, 100), rel=1e-4)
  assert product(7, 4) != pytest.approx(product(4, 7), rel=1e-2)
  slowest = np.eye(WIDTH)[-1]  # turns by a thousandth of a radian a position
  far = [product(n, 0, slowest, slowest) / np.cos(n * 1e4 ** (-6 / 8)) for n in (0, 512, 1024)]
  np.testing.assert_allclose(far, [1, (0.75 + 0.4) / 1.4, ((0.75 + 0.4) / 1.4) ** 2], rtol=1e-4)


def test_xpos_without_decay_is_rotary(monkeypatch):
  monkeypatch.setattr(positions_lib, "_XPOS_SMOOTHING", 1e12)  # zeta is 1
  x = np.random.default_rng(2).normal(size=WIDTH).astype(np.float32)
  angles = positions_lib.rotary_angles(
    np.array([[29]], np.int32), positions_lib.rotary_frequencies(WIDTH, 1e4))
  want = positions_lib.rotary(x[None, None, None], angles, True)[0, 0, 0]
  for of_keys in (False, True):
    np.testing.assert_allclose(_turned(x, 29, of_keys), want, rtol=1e-6, atol=1e-7)


@functools.cache
def _params(config):
  made = jax.jit(Transformer(config).init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
  return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, nn.unbox(made["params"]))


def test_a_model_with_xpos_alone_sees_distances_only():
  tokens = np.random.default_rng(0).integers(0, 23, (1, 9)).astype(np.int32)
  apply = jax.jit(lambda p: Transformer(CONFIG).apply({"params": _params(CONFIG)}, tokens, p))
  at = np.arange(9, dtype=np.int32)[None]
  want = apply(at)
  np.testing.assert_allclose(apply(at + 25), want, rtol=1e-4, atol=1e-5)
  assert np.abs(apply(2 * at) - want).max() > 1e-2


def test_sinusoids_are_fairseqs_table_and_zero_for_padding():
  width, offset = 10, 2
  half = width // 2
  frequencies = np.exp(-np.arange(half) * np.log(10000) / (half - 1))
  table = np.arange(7)[:, None] * frequencies
  table = np.concatenate([np.sin(table), np.cos(table)], 1)
  table[1] = 0  # of the id of padding
  at = np.array([[-1, 0, 1, 2, 3, -1]], np.int32)
  for form in (np.asarray, jnp.asarray):
    got = positions_lib.sinusoids(form(at), width, offset)
    np.testing.assert_allclose(got[0], table[at[0] + offset], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes, message", [
  ({"positions": "rotary"}, "xpos=True turns queries and keys itself.*positions='rotary'; choose"),
  ({"positions": "alibi"}, "and positions='alibi'; choose one of those"),
  ({"head_dim": 5}, "head_dim=5 must be even"),
])
def test_xpos_beside_what_it_replaces_is_refused(changes, message):
  options = dict(vocab_size=23, width=16, num_heads=2, positions="none", xpos=True)
  with pytest.raises(ValueError, match=message):
    TransformerConfig(**options | changes)
