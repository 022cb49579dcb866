"""Rescaled attention as one dense function, and logits of tokens behind groups.

`rescaled_attention` is arXiv 2212.06713, equation 3, written out; models compute it through
`models.cached_attention`, which adds `ln(scale)` to the scores of a row's own keys.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding import prefixes
from lmops_jax.models.cache import Prefix, empty_cache
from lmops_jax.models.transformer import unstack_layers


def rescaled_attention(q, k_demo, v_demo, k_test, v_test, scale, demo_bias=None, causal=True):
  """Attention of a test input's tokens to M groups and to itself.

  `A_ij` is proportional to `w_j exp(q_i . k_j / sqrt(dh))`, `w_j` being 1 for demonstrations and
  `scale` for the test's own tokens.

  Args:
    q: `[h,t,dh]`.
    k_demo: `[M,h,W,dh]`, keys of the groups. v_demo: values.
    k_test: `[h,t,dh]`. v_test: like it.
    scale: above 0; the paper's is M.
    demo_bias: added to the demonstrations' scores, `[M,W]` or broadcastable to `[h,t,M,W]`; large
      and negative hides padding.
    causal: a test token sees no later ones.

  Returns:
    `[h,t,dh]`; float32 softmax at least.

  Raises:
    ValueError: for a scale that is not finite and positive.
  """
  if not (math.isfinite(scale) and scale > 0):
    raise ValueError(f"scale={scale} must be finite and positive.")
  wide = jnp.promote_types(q.dtype, jnp.float32)
  h, t, dh = q.shape
  demo = jnp.einsum("htd,mhwd->htmw", q, k_demo).astype(wide) * dh**-0.5
  demo = (demo if demo_bias is None else demo + demo_bias).reshape(h, t, -1)
  own = jnp.einsum("htd,hsd->hts", q, k_test).astype(wide) * dh**-0.5 + math.log(scale)
  if causal:
    own = jnp.where(jnp.tril(jnp.ones((t, t), bool)), own, -jnp.inf)
  shares = jax.nn.softmax(jnp.concatenate([demo, own], axis=-1), axis=-1).astype(v_test.dtype)
  values = v_demo.transpose(1, 0, 2, 3).reshape(h, -1, dh)
  return shares @ jnp.concatenate([values, v_test], axis=1)


def structured_logits(model, params, prefix: Prefix, test_ids, test_mask=None) -> jax.Array:
  """Logits `[B,t,V] float32` of test inputs behind a prefix (`prefixes.read_groups`).

  Args:
    test_ids: `[B,t] int32`, without BOS, which the prefix holds.
    test_mask: `[B,t] bool`, False for padding on either side, whose logits are meaningless but
      finite; None is all True.

  Raises:
    ValueError: for ids outside the vocabulary, the prefix of another model, or positions beyond
      the model's tables.
  """
  test_ids = np.asarray(test_ids, np.int32)
  mask = np.ones(test_ids.shape, bool) if test_mask is None else np.asarray(test_mask, bool)
  if mask.shape != test_ids.shape or test_ids.ndim != 2:
    raise ValueError(f"test_ids {test_ids.shape} and test_mask {mask.shape} must both be [B,t].")
  bad = test_ids[mask & ((test_ids < 0) | (test_ids >= model.config.vocab_size))]
  if bad.size:
    raise ValueError(
      f"the test holds token id {int(bad[0])}, outside of the model's vocabulary of "
      f"{model.config.vocab_size}; encode it with the model's own tokenizer.")
  prefixes.check_model(model.config, prefix)
  prefixes.check_length(model.config, int(prefix.end), int(mask.sum(axis=1).max(initial=0)))
  return _logits(model, unstack_layers(params), prefix, test_ids, mask)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, prefix, ids, mask):
  positions = prefix.end + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
  hidden, _ = model.apply(
    {"params": params}, ids, empty_cache(model.config, *ids.shape), positions=positions, valid=mask,
    shared=prefix, method="extend",
  )
  return model.apply({"params": params}, hidden, method="unembed")
