"""Decoder-only transformer of the Mistral and Llama type (arXiv:2310.06825, arXiv:2302.13971).

RMSNorm before each part, rotary positions (arXiv:2104.09864, the half-rotating form of the
Hugging Face checkpoints), SwiGLU (arXiv:2002.05202), grouped key/value heads (arXiv:2305.13245),
no biases, embeddings tied or not. Every parameter and every block input carries logical axis names
(batch, sequence, embed, mlp, heads, kv_heads, head_dim, vocab, layers).

Parameters, with layers always stacked on a leading axis, whether the blocks run under `scan` or
unrolled, so that checkpoints do not depend on that choice:

    embedding [V,D]
    layers/attention_norm/scale [L,D]    layers/mlp_norm/scale [L,D]
    layers/attention/{query [L,D,H,E], key, value [L,D,K,E], out [L,H,E,D]}/kernel
    layers/mlp/{gate, up [L,D,F], down [L,F,D]}/kernel
    final_norm/scale [D]
    unembedding [D,V]                    (absent when tied)

Left out: sliding-window attention, dropout, key/value caches.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.attention import causal_attention

REMAT_POLICIES = ("none", "full", "dots")
_INIT_STDDEV = 0.02
_CONSTANT_ANGLES = 1 << 20  # rotary numbers that a program may hold as constants


@gin.register(module="models")
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape and execution choices of a `Transformer`.

  Attributes:
    vocab_size: V; None until a system fills it from its vocabulary with `dataclasses.replace`.
    num_layers: L.
    width: D.
    num_heads: H query heads.
    num_kv_heads: K key/value heads, a divisor of H; None is H.
    head_dim: E, even; None is D / H.
    mlp_width: F.
    max_length: longest sequence accepted.
    tied_embeddings: the output matrix is the embedding.
    rope_base: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    attention: one of `attention.ATTENTION_KINDS`.
    attention_chunk: queries a block, for "chunked".
    scan_layers: run the blocks under `lax.scan` (compiles once) or unrolled (more to compile,
      fewer copies). Parameters and results are the same.
    remat: what the backward pass recomputes in each block: "none", "full" (all of it), "dots" (all
      but the products with weights).
    dtype: of activations and products. Norms, softmax and logits are float32.
    param_dtype: of parameters.

  Raises:
    ValueError: naming the field, for values that do not make a model.
  """

  vocab_size: int | None = None
  num_layers: int = 2
  width: int = 64
  num_heads: int = 2
  num_kv_heads: int | None = None
  head_dim: int | None = None
  mlp_width: int = 192
  max_length: int = 1024
  tied_embeddings: bool = False
  rope_base: float = 1e4
  norm_eps: float = 1e-5
  attention: str = "xla"
  attention_chunk: int = 128
  scan_layers: bool = True
  remat: str = "none"
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    from lmops_jax.models.attention import supports_forward_mode  # also refuses unknown kinds

    supports_forward_mode(self.attention)
    name = "models.TransformerConfig"
    for field in (
      "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width",
      "max_length", "attention_chunk",
    ):
      value = getattr(self, field)
      optional = field in ("vocab_size", "num_kv_heads", "head_dim")
      if not (value is None and optional) and (
        not isinstance(value, int) or isinstance(value, bool) or value < 1
      ):
        raise ValueError(f"{name}.{field}={value!r} must be an integer of at least 1.")
    if self.head_dim is None and self.width % self.num_heads:
      raise ValueError(
        f"{name}.width={self.width} is not a multiple of num_heads={self.num_heads}; "
        "change one of them or set head_dim."
      )
    if self.key_heads > self.num_heads or self.num_heads % self.key_heads:
      raise ValueError(
        f"{name}.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}."
      )
    if self.head_width % 2:
      raise ValueError(
        f"{name}.head_dim={self.head_width} must be even, rotary positions turn pairs of numbers."
      )
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"{name}.remat={self.remat!r} is not one of {', '.join(REMAT_POLICIES)}.")
    for field in ("rope_base", "norm_eps"):
      if not getattr(self, field) > 0:
        raise ValueError(f"{name}.{field}={getattr(self, field)!r} must be positive.")
    for field in ("dtype", "param_dtype"):
      if getattr(self, field) not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(
          f"{name}.{field}={getattr(self, field)!r} is not one of float32, bfloat16, float16, "
          "float64."
        )

  @property
  def head_width(self) -> int:
    """E."""
    return self.head_dim or self.width // self.num_heads

  @property
  def key_heads(self) -> int:
    """K."""
    return self.num_kv_heads or self.num_heads


def num_params(config: TransformerConfig) -> int:
  """Number of parameters, from abstract evaluation: nothing is allocated."""
  shapes = jax.eval_shape(
    lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def rotary_angles(positions, width: int, base: float):
  """Cosines and sines of `positions * base ** (-2i / E)` for `i < E/2`.

  Args:
    positions: `[B,S]` or `[1,S]` int32. A NumPy array gives NumPy results, which a traced program
      holds as constants; traced, XLA on a CPU computes them again for every head and layer.
    width: E.
    base: of the frequencies.

  Returns:
    Two `[B or 1,S,1,E/2] float32`.
  """
  xp = np if isinstance(positions, np.ndarray) else jnp
  frequencies = base ** (-np.arange(width // 2, dtype=np.float32) / np.float32(width // 2))
  angles = positions[:, :, None, None].astype(np.float32) * frequencies.astype(np.float32)
  return xp.cos(angles), xp.sin(angles)


def rotary(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs `(x[i], x[i + E/2])` of `[B,S,H,E]` by their angle; products are float32."""
  cos, sin = angles
  half = x.shape[-1] // 2
  first, second = x[..., :half], x[..., half:]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (arXiv:1910.07467)."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)),
      (x.shape[-1],),
      jnp.dtype(c.param_dtype),
    )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + c.norm_eps)
    return (wide * inverse * scale).astype(c.dtype)


class Projection(nn.Module):
  """A linear map without bias from the axes `inputs` to the axes `outputs`, `[B,S,*inputs]` first.

  Written as a product of two matrices: with more axes XLA on a CPU copies an operand of the weight
  gradient into another order, at twice the cost of the step.
  """

  config: TransformerConfig
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(nn.initializers.normal(_INIT_STDDEV), self.axes),
      (*self.inputs, *self.outputs),
      jnp.dtype(c.param_dtype),
    )
    leading = x.shape[: x.ndim - len(self.inputs)]
    width = math.prod(self.inputs)
    out = x.reshape(-1, width) @ kernel.astype(c.dtype).reshape(width, -1)
    return out.reshape(*leading, *self.outputs)


class Attention(nn.Module):
  """Causal self-attention with rotary positions and grouped key/value heads, `[B,S,D]` to same."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, angles, segment_ids):
    c = self.config
    d, e = c.width, c.head_width

    def project(name, num_heads, axis):
      return Projection(c, (d,), (num_heads, e), ("embed", axis, "head_dim"), name=name)(x)

    q = rotary(project("query", c.num_heads, "heads"), angles)
    k = rotary(project("key", c.key_heads, "kv_heads"), angles)
    v = project("value", c.key_heads, "kv_heads")
    out = causal_attention(q, k, v, segment_ids, kind=c.attention, chunk=c.attention_chunk)
    return Projection(c, (c.num_heads, e), (d,), ("heads", "head_dim", "embed"), name="out")(out)


class SwiGLU(nn.Module):
  """`down(silu(gate(x)) * up(x))`, `[B,S,D]` to same."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    d, f = (c.width,), (c.mlp_width,)
    gate = Projection(c, d, f, ("embed", "mlp"), name="gate")(x)
    up = Projection(c, d, f, ("embed", "mlp"), name="up")(x)
    return Projection(c, f, d, ("mlp", "embed"), name="down")(nn.silu(gate) * up)


class Block(nn.Module):
  """One pre-norm layer, `[B,S,D]` to `([B,S,D], None)` as `nn.scan` wants it."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, angles, segment_ids):
    c = self.config
    x = nn.with_logical_constraint(x, ("batch", "sequence", "embed"))
    x = x + Attention(c, name="attention")(
      RMSNorm(c, name="attention_norm")(x), angles, segment_ids
    )
    x = x + SwiGLU(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x))
    return nn.with_logical_constraint(x, ("batch", "sequence", "embed")), None


class Transformer(nn.Module):
  """Tokens to hidden states, and hidden states to logits.

  Attributes:
    config: with `vocab_size` set.
    with_unembedding: False leaves out the output matrix of an untied model, for a trunk that
      feeds another head.
  """

  config: TransformerConfig
  with_unembedding: bool = True

  def setup(self):
    c = self.config
    if c.vocab_size is None:
      raise ValueError(
        "models.TransformerConfig.vocab_size is not set; take it from the vocabulary with "
        "dataclasses.replace(config, vocab_size=...)."
      )
    table = nn.with_logical_partitioning(
      nn.initializers.normal(_INIT_STDDEV), ("vocab", "embed")
    )
    shape = (c.vocab_size, c.width)
    self.embedding = self.param("embedding", table, shape, jnp.dtype(c.param_dtype))
    if self.with_unembedding and not c.tied_embeddings:
      matrix = nn.with_logical_partitioning(
        nn.initializers.normal(_INIT_STDDEV), ("embed", "vocab")
      )
      self.unembedding = self.param("unembedding", matrix, shape[::-1], jnp.dtype(c.param_dtype))
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, prevent_cse=False, policy=_remat_policy(c.remat))
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c)
    self.final_norm = RMSNorm(c)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Hidden states after the final norm.

    Args:
      tokens: `[B,S] int32`, below `vocab_size`; an id outside makes the result NaN.
      positions: `[B,S] int32` for the rotary embedding; None is 0..S-1.
      segment_ids: `[B,S] int32`; attention stays within equal ids. None is one segment.

    Returns:
      `[B,S,D]` in `config.dtype`.

    Raises:
      ValueError: if `S` exceeds `config.max_length`.
    """
    c = self.config
    length = tokens.shape[1]
    if length > c.max_length:
      raise ValueError(
        f"A batch has {length} positions and models.TransformerConfig.max_length is "
        f"{c.max_length}; raise it or use shorter sequences."
      )
    if positions is None:
      arange = np.arange if length * c.head_width <= _CONSTANT_ANGLES else jnp.arange
      positions = arange(length, dtype=np.int32)[None]
    angles = rotary_angles(positions, c.head_width, c.rope_base)
    # Gathered over embed before the lookup: XLA would otherwise replicate the activations.
    table = nn.with_logical_constraint(self.embedding, ("vocab", None))
    x = jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(c.dtype)
    x = nn.with_logical_constraint(x, ("batch", "sequence", "embed"))
    if c.scan_layers or self.is_initializing():
      x, _ = self.layers(x, angles, segment_ids)
    else:
      x = self._unrolled(x, angles, segment_ids)
    return self.final_norm(x)

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits `[...,V] float32` of hidden states `[...,D]`."""
    return project_to_vocabulary(hidden, self.output_matrix())

  def output_matrix(self) -> jax.Array:
    """The matrix `[D,V]` in `config.dtype` that takes hidden states to logits."""
    c = self.config
    if not c.tied_embeddings:
      return self.unembedding.astype(c.dtype)
    # Transposed once, behind a barrier: folded into the products, XLA on a CPU computes the
    # gradient [V,D] from strided operands, 2.3 times slower than [D,V].
    return jax.lax.optimization_barrier(self.embedding.astype(c.dtype).T)

  def logits(self, tokens, positions=None, segment_ids=None) -> jax.Array:
    """Next-token logits `[B,S,V] float32`; arguments as in `__call__`."""
    return self.unembed(self(tokens, positions, segment_ids))

  def _unrolled(self, x, angles, segment_ids):
    """The blocks one by one on slices of the stacked parameters."""
    c = self.config
    stacked = nn.unbox(self.variables["params"]["layers"])

    def layer(params, x):
      return Block(c, parent=None).apply({"params": params}, x, angles, segment_ids)[0]

    if c.remat != "none":
      layer = jax.checkpoint(layer, prevent_cse=True, policy=_remat_policy(c.remat))
    for i in range(c.num_layers):
      x = layer(jax.tree.map(lambda p, i=i: p[i], stacked), x)
    return x


def project_to_vocabulary(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
  """Logits `[...,V]`, at least float32, of hidden states `[...,D]` and a matrix `[D,V]`."""
  flat = hidden.reshape(-1, hidden.shape[-1])
  logits = jnp.matmul(
    flat, matrix, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32)
  )
  return logits.reshape(*hidden.shape[:-1], matrix.shape[-1])


def _remat_policy(name: str):
  if name == "full":
    return jax.checkpoint_policies.nothing_saveable
  return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
