"""What attention computes for queries at one position: output, scores before softmax, queries.

The context, which is in-context learning's demonstrations or nothing but BOS, is read once
(`decoding.prefixes.read_text`) and shared by all queries. Scores are computed for only one row of
the attention map, `[H, T]`.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding import prefixes
from lmops_jax.models import positions as positions_lib
from lmops_jax.models.cache import Prefix, empty_cache
from lmops_jax.models.cached_attention import visible_shared

READOUTS = ("prompt", "first_label")


def record(
  model, params, ids, mask, context: Prefix | None = None, readout: str = "prompt", *,
  label_ids=None,
) -> dict[str, jax.Array]:
  """Quantities of Q queries at the position `readout`, for every layer.

  Args:
    model: a causal `Transformer`.
    params: its parameters, layers stacked or not. Other values of the same shapes, such as
      finetuned ones, run the same program.
    ids: `[Q,t] int32`, a query's own tokens. BOS belongs into `context`, so that the records have
      the same shape with and without demonstrations.
    mask: `[Q,t] bool`, False for padding, on either side.
    context: what stands in front of every query, read with these `params`; None for nothing.
    readout: "prompt", the last token of `ids` (the paper's text); "first_label", the first label's
      token, which is put behind `ids` (the paper's script).
    label_ids: `[C] int`, the labels' tokens; None lets `pred` be any token, and needs readout
      "prompt".

  Returns:
    Arrays, float32 but for `pred`; T is t, or t + 1 with "first_label":

      attn_out `[Q,L,D]`: output of self-attention after its output projection, before it is added.
      raw `[Q,L,H,T]`: scores before softmax, scaled and with ALiBi's bias, to the query's own
        tokens; 0 for padding, and beyond a sliding window.
      ctx `[Q,L,P]`: the same to the context's slots, summed over heads; 0 for padding.
      q `[Q,L,H*E]`: scaled queries, heads concatenated; rotary ones are turned.
      pred `[Q] int32`: the most probable label (or token), the lowest of equal ones.

  Raises:
    ValueError: for an encoder, shapes that disagree, an empty query, an unknown readout, or a
      context of another model or too long for it.
  """
  if readout not in READOUTS:
    raise ValueError(f"readout={readout!r} is not one of {', '.join(READOUTS)}.")
  if not model.config.causal:
    raise ValueError(
      "models.TransformerConfig.causal is False: an encoder has no last token that answers; load a "
      "decoder."
    )
  if readout == "first_label" and label_ids is None:
    raise ValueError("readout='first_label' needs label_ids, whose first it puts behind a query.")
  if np.ndim(ids) != 2 or np.shape(ids) != np.shape(mask):
    raise ValueError(f"ids has shape {np.shape(ids)} and mask {np.shape(mask)}; expected [Q,t].")
  if not isinstance(mask, jax.core.Tracer):
    empty = np.flatnonzero(~np.asarray(mask, bool).any(axis=1))
    if empty.size:
      raise ValueError(f"query {empty[0]} is empty; give it at least one token.")
  if context is not None:
    prefixes.check_model(model.config, context)
    if not isinstance(context.end, jax.core.Tracer):
      num_tokens = np.shape(ids)[1] + (readout == "first_label")
      prefixes.check_length(model.config, int(context.end), num_tokens, "a query")
  labels = None if label_ids is None else jnp.asarray(label_ids, jnp.int32)
  return _record(
    model, nn.unbox(params), jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool), context, labels,
    readout,
  )


@functools.partial(jax.jit, static_argnames=("model", "readout"))
def _record(model, params, ids, mask, context, label_ids, readout):
  config = model.config
  num_queries, length = ids.shape
  columns = jnp.arange(length)
  prompt_end = jnp.max(jnp.where(mask, columns, -1), axis=1)
  place = prompt_end
  if readout == "first_label":
    ids, mask = (jnp.pad(x, ((0, 0), (0, 1))) for x in (ids, mask))
    place = prompt_end + 1
    here = jnp.arange(length + 1)[None] == place[:, None]
    ids, mask = jnp.where(here, label_ids[0], ids), mask | here
  start = 0 if context is None else context.end
  positions = start + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
  hidden, cache, found = model.apply(
    {"params": params}, ids, empty_cache(config, *ids.shape), positions=positions, valid=mask,
    shared=context, readout=place[:, None], method="extend",
  )
  at_prompt = jnp.take_along_axis(hidden, prompt_end[:, None, None], axis=1)[:, 0]
  logits = model.apply({"params": params}, at_prompt, method="unembed")
  if label_ids is not None:
    logits = logits[:, label_ids]

  queries = found.queries[:, :, 0].astype(jnp.float32)  # [L,Q,H,E]
  at = jnp.take_along_axis(positions, place[:, None], axis=1)  # [Q,1]
  distance = positions - at
  seen = mask & (distance <= 0)
  if config.sliding_window is not None:
    seen = seen & (-distance < config.sliding_window)
  own = jnp.stack([
    _scores(config, q, keys, distance) for q, keys in zip(queries, cache.keys)], axis=1)
  out = {
    "attn_out": found.attention[:, :, 0].astype(jnp.float32).swapaxes(0, 1),
    "raw": jnp.where(seen[:, None, None], own, 0),
    "q": (queries * config.head_width**-0.5).swapaxes(0, 1).reshape(
      num_queries, config.num_layers, -1),
    "pred": jnp.argmax(logits, axis=-1).astype(jnp.int32),
  }
  if context is None:
    out["ctx"] = jnp.zeros((num_queries, config.num_layers, 0), jnp.float32)
  else:
    seen, distance = visible_shared(
      context.cache.valid, context.cache.positions, at, config.sliding_window)
    before = jnp.stack([
      _scores(config, q, keys, distance[:, 0]).sum(axis=1)
      for q, keys in zip(queries, context.cache.keys)], axis=1)
    out["ctx"] = jnp.where(seen, before, 0)
  return out


def _scores(config, q, keys, distance):
  """Scores `[Q,H,M]` of `q [Q,H,E]` with `keys [Q or 1,K,M,E]` at `distance [Q,M]`."""
  num_queries, num_heads, width = q.shape
  grouped = q.reshape(num_queries, config.key_heads, -1, width)
  keys = keys.astype(jnp.float32)
  # Keys of all queries are not broadcast: XLA on a CPU (jax 0.10.2) then gave one score to all.
  if keys.shape[0] == 1:
    scores = jnp.einsum("qkge,kme->qkgm", grouped, keys[0])
  else:
    scores = jnp.einsum("qkge,qkme->qkgm", grouped, keys)
  scores = scores.reshape(num_queries, num_heads, -1)
  scores = scores * config.head_width**-0.5
  if config.positions == "alibi":
    slopes = positions_lib.alibi_slopes(config.num_heads)
    scores = scores - slopes[:, None] * jnp.abs(distance).astype(jnp.float32)[:, None]
  return scores


@functools.partial(jax.jit, static_argnames=("model",))
def predict(model, params, ids, mask, label_ids):
  """The most probable label `[Q] int32` behind `ids [Q,t]`, BOS included; the lowest of equals."""
  positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
  hidden, _ = model.apply(
    {"params": params}, ids, empty_cache(model.config, *ids.shape), positions=positions, valid=mask,
    fresh=True, method="extend",
  )
  end = jnp.max(jnp.where(mask, jnp.arange(ids.shape[1]), -1), axis=1)
  hidden = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
  logits = model.apply({"params": params}, hidden, method="unembed")
  return jnp.argmax(logits[:, label_ids], axis=-1).astype(jnp.int32)
