"""Finetuning of key and value projections on demonstrations, one plain SGD step for each.

The setting that arXiv 2212.10559 (section 4.1) compares in-context learning with: one epoch over
the demonstrations of the prompt in their order, batches of one, no momentum, decay or clipping; the
loss is the mean cross-entropy of all tokens after BOS. Only the trained leaves are carried from
step to step and differentiated.

The objective "layer_causal" is that of arXiv 2311.07772, with which information flows as it does in
context: each layer is trained by the loss of its own attention's output, as if that stood right
below the final norm and the output matrix.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models import layers
from lmops_jax.models.cache import empty_cache
from lmops_jax.models.transformer import unstack_layers

OBJECTIVES = ("lm", "layer_causal")
_TRAINED = ("key", "value")


class Finetuned(NamedTuple):
  """What finetuning left.

  Attributes:
    params: all parameters; those that are not trained are the same arrays as before.
    losses: `[k] float32`, nats a token of each demonstration before its own step.
    train_q: `[k,n,L,H*E] float32`, scaled queries of each demonstration's tokens, heads
      concatenated, at the weights of its own forward pass, as attention reads them: rotary ones
      turned. Rows of padding and of BOS are there and mean nothing.
  """

  params: object
  losses: jax.Array
  train_q: jax.Array


def kv_finetune(
  model, params, demo_ids, demo_mask, lr, *, num_front: int = 1, objective: str = "lm"
) -> Finetuned:
  """One SGD step on each demonstration in turn; may be traced, and `vmap`ped over `lr`.

  Args:
    model: a causal `Transformer`.
    params: its parameters, layers stacked or not.
    demo_ids: `[k,n] int32`, BOS and the demonstration's tokens, padded on the right; k may be 0.
    demo_mask: `[k,n] bool`, True for tokens, BOS included.
    lr: learning rate, finite and at least 0.
    num_front: BOS tokens in front of each row, which are not predicted; if 0, the row's first token
      is not predicted.
    objective: "lm", or "layer_causal" (see the module), whose loss is the mean over layers, while
      each layer takes the gradient of its own.

  Raises:
    ValueError: for an unknown objective, an encoder, arrays of other shapes, a row without a token
      to predict, padding that is not at the end, or a bad learning rate.
    FloatingPointError: if a loss is not finite; it names the step. Not raised if `lr` is traced:
      see `check_losses`.
  """
  if not model.config.causal:
    raise ValueError(
      "models.TransformerConfig.causal is False: an encoder does not predict the next token; load "
      "a decoder."
    )
  if objective not in OBJECTIVES:
    raise ValueError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}.")
  if objective == "layer_causal" and model.config.norm_placement == "post":
    raise ValueError(
      "objective='layer_causal' puts the final norm behind a layer's attention, and a model with "
      "norm_placement='post' has none; use 'lm'."
    )
  _check_demonstrations(demo_ids, demo_mask, num_front)
  traced = isinstance(lr, jax.core.Tracer)
  if not traced:
    check_rate(lr)
  found = Finetuned(*_finetune(
    model, nn.unbox(params), demo_ids, demo_mask, lr, num_front, objective))
  if not traced and not isinstance(found.losses, jax.core.Tracer):
    check_losses(found.losses, lr)
    # No loss follows the last step, so its weights themselves are looked at.
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in key_value_leaves(found.params))
    if not finite:
      raise FloatingPointError(
        f"finetuning with lr={float(lr):g} made weights that are not finite in step "
        f"{len(found.losses) - 1}, the last; lower the learning rate."
      )
  return found


def check_rate(lr) -> None:
  """Raises ValueError for a learning rate that is negative or not finite."""
  if not (math.isfinite(lr) and lr >= 0):
    raise ValueError(f"lr={lr} must be finite and at least 0.")


def check_losses(losses, lr) -> None:
  """Raises FloatingPointError for losses `[k]`; it names the first step with one not finite."""
  bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
  if bad.size:
    raise FloatingPointError(
      f"the loss of finetuning with lr={float(lr):g} is {np.asarray(losses)[bad[0]]} in step "
      f"{bad[0]} of {len(losses)}; lower the learning rate."
    )


def key_value_leaves(params) -> list:
  """The trained leaves, weights and biases of key and value projections, in the tree's order."""
  return _split(params)[0]


def _split(params):
  """Trained leaves, and a function that puts others in their place."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  places = [i for i, (path, _) in enumerate(leaves) if _is_trained(path)]

  def joined(trained):
    whole = [leaf for _, leaf in leaves]
    for place, leaf in zip(places, trained):
      whole[place] = leaf
    return jax.tree_util.tree_unflatten(structure, whole)

  return [leaves[i][1] for i in places], joined


def _is_trained(path) -> bool:
  keys = [getattr(part, "key", None) for part in path]
  return "attention" in keys and any(key in _TRAINED for key in keys)


def _finetune(model, params, ids, mask, lr, num_front, objective):
  after, losses, queries = _steps(
    model, params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool), lr, num_front, objective)
  return _split(params)[1](after), losses, queries


@functools.partial(jax.jit, static_argnames=("model", "num_front", "objective"))
def _steps(model, params, ids, mask, lr, num_front, objective):
  trained, joined = _split(params)
  config = model.config
  length = ids.shape[1]
  rows = jnp.arange(length)[None]

  def loss_of(trained, ids, mask):
    variables = {"params": joined(trained)}
    hidden, _, found = model.apply(
      variables, ids[None], empty_cache(config, 1, length), positions=rows, valid=mask[None],
      fresh=True, readout=rows, method="extend",
    )
    learned = mask[1:] & (jnp.arange(1, length) >= num_front)

    @jax.checkpoint
    def nats_a_token(hidden):
      logits = model.apply(variables, hidden[:-1], method="unembed")
      nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
        logits, ids[1:, None], axis=-1)[:, 0]
      return jnp.sum(jnp.where(learned, nats, 0)) / jnp.sum(learned)

    if objective == "lm":
      loss = nats_a_token(hidden[0])
    else:
      found = jax.lax.stop_gradient(found)
      losses = [
        nats_a_token(x[0]) for x in _after_attention(model, variables, ids[None], mask[None])]
      # Not divided in the gradient: each layer takes the step of its own loss.
      total = sum(losses)
      loss = total - jax.lax.stop_gradient(total * (1 - 1 / len(losses)))
    queries = found.queries[:, 0].astype(jnp.float32) * config.head_width**-0.5
    return loss, queries.reshape(*queries.shape[:2], -1).swapaxes(0, 1)

  def step(trained, example):
    (loss, queries), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, *example)
    trained = [leaf - (lr * grad).astype(leaf.dtype) for leaf, grad in zip(trained, grads)]
    return trained, (loss, queries)

  trained, (losses, queries) = jax.lax.scan(step, trained, (ids, mask))
  return trained, losses, queries


def _after_attention(model, variables, ids, mask):
  """For each layer, the final norm of the sum of its input and its attention's output, `[1,n,D]`.

  The inputs are constants, so that no layer's gradient reaches another layer or the queries.
  """
  config = model.config
  segments = mask.astype(jnp.int32)
  inputs = jax.lax.stop_gradient(
    model.apply(variables, ids, segment_ids=segments, method="all_hidden"))
  angles = model.apply(variables, jnp.arange(ids.shape[1])[None], method="_angles")
  sequence = layers.Sequence(angles, segments)
  for x, of in zip(inputs, unstack_layers(variables["params"])["layers"]):
    normed = layers.norm(config).apply({"params": of["attention_norm"]}, x)
    x = x + layers.Attention(config).apply({"params": of["attention"]}, normed, sequence)
    if config.final_norm:
      x = layers.norm(config).apply({"params": variables["params"]["final_norm"]}, x)
    yield x


def _check_demonstrations(ids, mask, num_front):
  if np.ndim(ids) != 2 or np.shape(ids) != np.shape(mask):
    raise ValueError(
      f"demo_ids has shape {np.shape(ids)} and demo_mask {np.shape(mask)}; expected [k,n] both."
    )
  if isinstance(mask, jax.core.Tracer):
    return
  lengths = np.asarray(mask, bool).sum(axis=1)
  for row, length in enumerate(lengths):
    if length <= max(num_front, 1):
      raise ValueError(
        f"demonstration {row} has {length} tokens with {num_front} in front, so none to predict; "
        "leave it out or give it a text."
      )
    if not np.asarray(mask, bool)[row, :length].all():
      raise ValueError(f"demonstration {row} is padded in front or has holes; pad at the end.")
