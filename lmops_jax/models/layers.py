"""The parts of a transformer's blocks: norms, products, attention, MLP, and the block itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.models import cached_attention
from lmops_jax.models import momentum as momentum_lib
from lmops_jax.models import positions as positions_lib
from lmops_jax.models.attention import self_attention
from lmops_jax.models.attention_scores import Pattern
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.dropout import dropped, folded
from lmops_jax.models.partitioning import constrain
from lmops_jax.models.positions import Angles
from lmops_jax.models.products import matrix_product

INIT_STDDEV = 0.02


def _gelu(x):
  """`x Phi(x)` by `erf`, as in PyTorch; by `erfc` it takes three times as long on a CPU."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


_ACTIVATIONS = {
  "silu": nn.silu,
  "gelu": _gelu,
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "relu": nn.relu,
}


class Sequence(NamedTuple):
  """What attention needs to know besides the hidden states.

  Attributes:
    angles: the angles that turn queries and keys, or None.
    segment_ids: `[B,S] int32`, or None for one segment.
    bias: `[H,S,S] float32`, added to the scores, or None.
  """

  angles: Angles | None = None
  segment_ids: jax.Array | None = None
  bias: jax.Array | None = None


class Slots(NamedTuple):
  """Where cached attention writes and what it sees.

  Attributes:
    angles: the angles that turn queries and keys of the new tokens, or None.
    start: `[] int32`, the first slot to write.
    mask: `[B,S,M] bool`, or None for `fresh` tokens, which see each other only.
    distance: `[B,S,M] int32`, key position minus query position; None with `mask` None.
    segment_ids: `[B,S] int32` for `fresh` tokens, which keep padding apart.
    readout: `[B,R] int32`, new tokens to report on, or None.
  """

  angles: Angles | None
  start: jax.Array
  mask: jax.Array | None = None
  distance: jax.Array | None = None
  segment_ids: jax.Array | None = None
  readout: jax.Array | None = None


def activation(name: str):
  """The function of one of `config.ACTIVATIONS`."""
  return _ACTIVATIONS[name]


class Norm(nn.Module):
  """Base of all norms: computed in float32 over the last axes, which have the names `axes`."""

  config: TransformerConfig
  axes: tuple[str, ...] = ("embed",)

  def _mean(self, x):
    return jnp.mean(x, axis=tuple(range(-len(self.axes), 0)), keepdims=True)

  def _scale(self, x):
    return self._parameter("scale", nn.initializers.ones_init(), x)

  def _bias(self, x):
    return self._parameter("bias", nn.initializers.zeros_init(), x)

  def _parameter(self, name, init, x):
    init = nn.with_logical_partitioning(init, self.axes)
    return self.param(name, init, x.shape[-len(self.axes) :], jnp.dtype(self.config.param_dtype))


class RMSNorm(Norm):
  """`x / sqrt(mean(x^2) + eps) * scale` (arXiv:1910.07467)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    scale = self._scale(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(self._mean(jnp.square(wide)) + c.norm_eps)
    return (wide * inverse * scale).astype(c.dtype)


class OutsideRMSNorm(Norm):
  """`x / (sqrt(mean(x^2)) + eps) * scale + bias`.

  It is the norm in the code of arXiv 2402.17759; derivatives are finite if `x` is 0.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    scale, bias = self._scale(x), self._bias(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = self._mean(jnp.square(wide))
    root = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return (wide / (root + c.norm_eps) * scale + bias).astype(c.dtype)


class LayerNorm(Norm):
  """`(x - mean) / sqrt(variance + eps) * scale + bias`."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    scale, bias = self._scale(x), self._bias(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - self._mean(wide)
    inverse = jax.lax.rsqrt(self._mean(jnp.square(centred)) + c.norm_eps)
    return (centred * inverse * scale + bias).astype(c.dtype)


def norm(
  config: TransformerConfig, name: str | None = None, axes: tuple[str, ...] = ("embed",)
) -> Norm:
  """The norm that a configuration names, over the last axes, given by their logical names."""
  return _NORMS[config.norm](config, axes, name=name)


_NORMS = {"rms": RMSNorm, "layer": LayerNorm, "rms_outside": OutsideRMSNorm}


def unit_length(x: jax.Array, smallest: float = 0.0) -> jax.Array:
  """`x` with each vector of its last axis divided by its length, in float32.

  Vectors shorter than `smallest` are divided by that instead, so the derivative at 0 is finite.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if not smallest:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, smallest**2))


def table_init(config: TransformerConfig, width: int):
  """Initializer of embeddings and other tables, whose rows have this width."""
  deviations = {"normal": INIT_STDDEV, "fan_in": 1.0, "xavier": width**-0.5}
  return nn.initializers.normal(deviations[config.initialization])


def product_init(config: TransformerConfig, num_inputs: int, num_outputs: int, gain: float = 1.0):
  """Initializer of a matrix from `num_inputs` to `num_outputs` numbers, times `gain`."""
  if config.initialization == "normal":
    return nn.initializers.normal(INIT_STDDEV * gain)
  if config.initialization == "xavier":
    return nn.initializers.normal(math.sqrt(2 / (num_inputs + num_outputs)) * gain)
  bound = num_inputs**-0.5 * gain
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class Projection(nn.Module):
  """A linear map from the axes `inputs` to the axes `outputs` of `[B,S,*inputs]`.

  It is written as a product of two matrices: with more axes XLA on a CPU copies an operand of the
  weight gradient into another order, at twice the cost of the step.
  """

  config: TransformerConfig
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  axes: tuple[str, ...]
  use_bias: bool = False
  gain: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    width = math.prod(self.inputs)
    init = product_init(c, width, math.prod(self.outputs), self.gain)
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(init, self.axes),
      (*self.inputs, *self.outputs),
      jnp.dtype(c.param_dtype),
    )
    leading = x.shape[: x.ndim - len(self.inputs)]
    out = matrix_product(x.reshape(-1, width), kernel.astype(c.dtype).reshape(width, -1))
    out = out.reshape(*leading, *self.outputs)
    if self.use_bias:
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[len(self.inputs) :]),
        self.outputs,
        jnp.dtype(c.param_dtype),
      )
      out = out + bias.astype(c.dtype)
    return out


class Attention(nn.Module):
  """Self-attention with grouped key/value heads, `[B,S,D]` to same."""

  config: TransformerConfig

  def setup(self):
    c = self.config
    d, h, k, e = (c.width,), c.num_heads, c.key_heads, c.head_width
    gain = c.branch_factor
    self.query = Projection(c, d, (h, e), ("embed", "heads", "head_dim"), c.qkv_bias)
    self.key = Projection(c, d, (k, e), ("embed", "kv_heads", "head_dim"), c.qkv_bias)
    self.value = Projection(c, d, (k, e), ("embed", "kv_heads", "head_dim"), c.qkv_bias, gain)
    if c.sub_norm:
      self.inner_norm = norm(c, axes=("heads", "head_dim"))
    self.out = Projection(c, (h, e), d, ("heads", "head_dim", "embed"), c.out_bias, gain)

  def __call__(self, x, sequence: Sequence, keys=None):
    """`keys [B]` are those of dropout, or None."""
    q, k, v = self._project(x, sequence.angles)
    return self._merged(self._attend(q, k, v, sequence.segment_ids, keys, sequence.bias))

  def extend(self, x, slots: Slots, keys, values, shared=None):
    """Writes the new keys and values and attends; returns the output, both caches, the readout.

    `shared` are the `cached_attention.Shared` keys that all rows see, or None. The readout is None,
    or output `[B,R,D]` and queries `[B,R,H,E]`.
    """
    q, k, v = self._project(x, slots.angles)
    keys, values = (
      jax.lax.dynamic_update_slice_in_dim(
        old, new.swapaxes(1, 2).astype(old.dtype), slots.start, axis=2)
      for old, new in ((keys, k), (values, v))
    )
    if slots.mask is None:
      out = self._attend(q, k, v, slots.segment_ids)
    else:
      shared = None if shared is None else shared.astype(q.dtype)
      out = cached_attention.cached_attention(
        q, keys.astype(q.dtype), values.astype(q.dtype), slots.mask, slots.distance,
        self._slopes(), shared,
      )
      out = self._with_cached_momentum(out, values.astype(q.dtype), slots, shared)
    out, found = self._merged(out), None
    if slots.readout is not None:
      index = slots.readout[:, :, None]
      found = (jnp.take_along_axis(out, index, axis=1),
               jnp.take_along_axis(q, index[..., None], axis=1))
    return out, keys, values, found

  def _project(self, x, angles):
    q, k, v = self.query(x), self.key(x), self.value(x)
    c = self.config
    if c.attention_scale is not None:  # every kind of attention scales by E^-0.5
      q = q * jnp.asarray(c.attention_scale * c.head_width**0.5, q.dtype)
    if angles is not None:
      of_keys = angles.queries if angles.keys is None else angles.keys
      q = positions_lib.rotary(q, angles.queries, c.rotary_interleaved)
      k = positions_lib.rotary(k, of_keys, c.rotary_interleaved)
    return q, k, v

  def _merged(self, heads):
    return self.out(self.inner_norm(heads) if self.config.sub_norm else heads)

  def _attend(self, q, k, v, segment_ids, keys=None, bias=None):
    c = self.config
    pattern = Pattern(c.causal, c.sliding_window, self._slopes())
    # Parameters are made with one token, which kernels for whole sequences on a mesh refuse.
    kind = "xla" if self.is_initializing() else c.attention
    out = self_attention(
      q, k, v, segment_ids, pattern=pattern, kind=kind, chunk=c.attention_chunk,
      dropout=c.attention_dropout, keys=keys, bias=bias,
    )
    if not c.momentum:
      return out
    flat = v.reshape(*v.shape[:2], -1)  # one product for all heads
    term = momentum_lib.momentum_term(flat, c.momentum, segment_ids=segment_ids)
    return _added(out, term.reshape(v.shape))

  def _with_cached_momentum(self, out, values, slots: Slots, shared):
    c = self.config
    if not c.momentum:
      return out
    term = momentum_lib.momentum_term_cached(values, slots.mask, slots.distance, c.momentum)
    if shared is not None:
      term = term + momentum_lib.momentum_term_cached(
        shared.values, *shared.visible(), c.momentum
      )
    return _added(out, term)

  def _slopes(self):
    c = self.config
    return positions_lib.alibi_slopes(c.num_heads) if c.positions == "alibi" else None


def _added(out, term):
  """Heads `[B,S,H,E]` plus a term for each group of them, `[B,S,K,E]`."""
  b, s, kv_heads, e = term.shape
  grouped = out.reshape(b, s, kv_heads, -1, e) + term[:, :, :, None]
  return grouped.reshape(out.shape)


class MLP(nn.Module):
  """`down(act(gate(x)) * up(x))`, or without gate `down(act(up(x)))`, `[B,S,D]` to same."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    d, f = (c.width,), (c.mlp_width,)
    act, options = activation(c.activation), (c.mlp_bias, c.branch_factor)
    if c.gated_mlp:
      gate = Projection(c, d, f, ("embed", "mlp"), *options, name="gate")(x)
      up = Projection(c, d, f, ("embed", "mlp"), *options, name="up")(x)
      hidden = act(gate) * up
    else:
      hidden = act(Projection(c, d, f, ("embed", "mlp"), *options, name="up")(x))
    if c.sub_norm:
      hidden = norm(c, "inner_norm", ("mlp",))(hidden)
    return Projection(c, f, d, ("mlp", "embed"), *options, name="down")(hidden)


class Block(nn.Module):
  """One layer, `[B,S,D]` to `([B,S,D], None)` as `nn.scan` wants it.

  `make_mlp` makes its second part of a configuration, a module `[B,S,D]` to same.
  """

  config: TransformerConfig
  make_mlp: Callable[[TransformerConfig], nn.Module] = MLP

  def setup(self):
    c = self.config
    self.attention_norm = norm(c)
    self.attention = Attention(c)
    self.mlp = self.make_mlp(c)
    if c.norm_placement != "parallel":
      self.mlp_norm = norm(c)

  def __call__(self, x, sequence: Sequence, keys=None):
    """`keys [B]` are those of this layer's dropout, or None."""
    of_attention = folded(keys, 0)
    x, _ = self._wired(x, lambda y: (self.attention(y, sequence, of_attention), None), keys)
    return x, None

  def extend(self, x, slots: Slots, keys, values, shared=None):
    """The layer on new tokens: `[B,S,D]`, keys and values with the tokens' added, the readout."""

    def attend(y):
      out, *rest = self.attention.extend(y, slots, keys, values, shared)
      return out, rest

    x, rest = self._wired(x, attend)
    return x, *rest

  def _wired(self, x, attend, keys=None):
    """The two parts, their norms and residual sums; `attend` also returns what it updates."""
    placement = self.config.norm_placement

    def drop(out, number):
      return dropped(out, folded(keys, number), self.config.residual_dropout)

    x = constrain(x, ("batch", "sequence", "embed"))
    if placement == "post":
      out, updated = attend(x)
      x = self.attention_norm(self._stream(x) + drop(out, 1))
      x = self.mlp_norm(self._stream(x) + drop(self.mlp(x), 2))
    elif placement == "parallel":
      normed = self.attention_norm(x)
      out, updated = attend(normed)
      x = self._stream(x) + drop(out, 1) + drop(self.mlp(normed), 2)
    else:
      out, updated = attend(self.attention_norm(x))
      x = self._stream(x) + drop(out, 1)
      x = self._stream(x) + drop(self.mlp(self.mlp_norm(x)), 2)
    return constrain(x, ("batch", "sequence", "embed")), updated

  def _stream(self, x):
    factor = self.config.residual_factor
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)
