"""How much memory the activations of a transformer take, roughly and without compiling.

An estimate to plan with: what a backward pass keeps of each block, one block's working set, one
chunk of logits, and the copies of parameters that `fsdp` gathers for use. The compiler knows better
(`lmops aot`); tests hold the two to a factor of two of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lmops_jax.models.attention import queries_at_a_time
from lmops_jax.models.config import TransformerConfig
from lmops_jax.training import losses


def activation_bytes(
  config: TransformerConfig, rows: float, length: int, *, platform: str, num_fsdp: int = 1,
  num_tensor: int = 1, loss_chunk: int | None = None, unembedding: bool = True,
  backward: bool = True, tangents: bool = False,
) -> float:
  """Bytes on one device for one micro-batch.

  Args:
    config: the model's, with `vocab_size`.
    rows: examples of the micro-batch on this device.
    length: S.
    platform: decides the size of a chunk of logits, and how many heads' scores exist at a time.
    num_fsdp, num_tensor: sizes of the mesh axes.
    loss_chunk: positions whose logits exist at a time; None lets the loss choose.
    unembedding: whether the loss has logits.
    backward: False for a forward pass alone.
    tangents: whether forward-mode derivatives stand beside the values, which doubles everything.
  """
  c = config
  item = jnp.dtype(c.dtype).itemsize
  positions = rows * length
  heads = c.num_heads * c.head_width / num_tensor
  mlp = c.mlp_width / num_tensor
  products = heads + 2 * c.key_heads * c.head_width / num_tensor + c.width + (1 + c.gated_mlp) * mlp
  working = positions * item * (products + 5 * c.width + 2 * mlp)
  by_heads = platform == "cpu" and num_fsdp == num_tensor == 1
  working += _scores_bytes(c, rows, length, by_heads)
  if c.remat == "none":
    in_float32 = 6 * c.width + heads  # three forms of each norm's input, attention's output
    if c.attention == "chunked":  # each row's largest score, its sum and a factor of the quotient's
      in_float32 += 3 * c.num_heads / num_tensor
    kept = positions * (item * (products + 4 * c.width + heads + 4 * mlp) + 4 * in_float32)
    if c.attention == "xla":  # the others compute scores again
      kept += rows * c.num_heads * length**2 * (4 + item)
  else:
    kept = positions * item * (c.width + products * (c.remat == "dots"))
  blocks = working + backward * c.num_layers * kept
  head = 0.0
  if unembedding:
    chunk = loss_chunk or losses.default_chunk(rows, length, c.vocab_size, platform)
    head = 12.0 * rows * min(chunk, length) * c.vocab_size / num_tensor + 8.0 * positions * c.width
  gathered = 0.0
  if num_fsdp > 1:
    tables = c.vocab_size * c.width * (1 + unembedding) / num_tensor
    layer = (c.width * c.head_width * 2 * (c.num_heads + c.key_heads)
             + (2 + c.gated_mlp) * c.width * c.mlp_width) / num_tensor
    gathered = (4 + item) * tables + 2 * item * layer
  return (1 + tangents) * (blocks + head + gathered)


def kept_bytes(function: Callable, inputs: tuple, *fixed) -> int:
  """What the backward pass of any function keeps, from its traced program; nothing is allocated.

  Args:
    function: of `(*inputs, *fixed)`.
    inputs: shapes of what is differentiated, such as parameters.
    fixed: shapes of what is not, such as a batch.
  """
  def pull(inputs, *fixed):
    return jax.vjp(lambda *given: function(*given, *fixed), *inputs)[1]

  kept = jax.eval_shape(pull, inputs, *fixed)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kept))


def _scores_bytes(config: TransformerConfig, rows: float, length: int, by_heads: bool) -> float:
  """Scores and probabilities of one block; `by_heads`: chunked attention's, of one at a time."""
  per_score = 8 + jnp.dtype(config.dtype).itemsize
  if config.attention == "xla":
    return rows * config.num_heads * length**2 * per_score
  if config.attention == "chunked":
    heads, chunk = rows * config.num_heads, config.attention_chunk
    if by_heads and not config.relative_buckets:  # queries of one key head in one row
      heads, chunk = config.num_heads / config.key_heads, queries_at_a_time(chunk, length)
    return heads * min(chunk, length) * length * per_score
  return rows * length * config.num_heads * 4.0  # a kernel keeps a sum a row
