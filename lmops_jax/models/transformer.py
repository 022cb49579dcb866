"""The transformer of all language models here: decoders, encoders, and the text tower of CLIP.

One module, whose parts `TransformerConfig` chooses. The defaults are those of Mistral and Llama
(arXiv:2310.06825, arXiv:2302.13971): RMSNorm before each part, rotary positions (arXiv:2104.09864,
the half-rotating form of the Hugging Face checkpoints), SwiGLU (arXiv:2002.05202), grouped
key/value heads (arXiv:2305.13245), no biases. Every parameter and every block input carries logical
axis names (batch, sequence, embed, mlp, heads, kv_heads, head_dim, vocab, layers).

These are the parameters. Layers are always stacked on a leading axis, whether the blocks run under
`scan` or unrolled, so that checkpoints do not depend on that choice:

    embedding [V,D]
    layers/attention_norm/scale [L,D]    layers/mlp_norm/scale [L,D]
    layers/attention/{query [L,D,H,E], key, value [L,D,K,E], out [L,H,E,D]}/kernel
    layers/mlp/{gate, up [L,D,F], down [L,F,D]}/kernel
    final_norm/scale [D]
    unembedding [D,V]                    (absent when tied)

and, if the configuration asks for them, `bias` beside each `kernel` and each layer norm's
`scale`, layers/attention/inner_norm/scale [L,H,E] and layers/mlp/inner_norm/scale [L,F],
position_embedding [max_length + position_offset, D], relative_bias [buckets, H],
token_type_embedding [N,D], embedding_norm, embedding_in [W,D] and embedding_out [D,W] for
embeddings of width W (with narrow embeddings all tables have that width, and head_transform [D,W]
is in place of embedding_out), head_transform, head_norm, unembedding_bias [V], pooler,
detector/{transform, out}.

Dropout is that of `models.dropout`; without keys a model is deterministic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models import cache as cache_lib
from lmops_jax.models import cached_attention
from lmops_jax.models import layers as layers_lib
from lmops_jax.models import positions as positions_lib
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.detector import Detector
from lmops_jax.models.dropout import dropped, folded
from lmops_jax.models.layers import Block, Projection, Sequence, Slots
from lmops_jax.models.partitioning import constrain
from lmops_jax.models.products import project_to_vocabulary, remat_policy
from lmops_jax.models.vectors import replaced

_CONSTANT_ANGLES = 1 << 20  # the most rotary numbers that a program holds as constants


def num_params(config: TransformerConfig) -> int:
  """Number of parameters, from abstract evaluation: nothing is allocated."""
  init = functools.partial(Transformer(config).init, jax.random.key(0))
  shapes = jax.eval_shape(init, jnp.zeros((1, 1), jnp.int32))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def unstack_layers(params):
  """The same parameters with `layers` as a tuple of L trees instead of one stacked tree.

  Cached decoding reads every weight for every token; from separate arrays it does so without
  slicing them out first. `Transformer.extend` takes both forms. Stacked arrays stay as they are.
  """
  stacked = params["layers"]
  if isinstance(stacked, tuple):
    return params
  num_layers = jax.tree.leaves(stacked)[0].shape[0]
  return {**params, "layers": tuple(_one_layer(stacked, i) for i in range(num_layers))}


@jax.jit
def _one_layer(stacked, i):
  return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), stacked)


class Transformer(nn.Module):
  """Tokens to hidden states, and hidden states to logits.

  Attributes:
    config: a configuration with `vocab_size` set.
    with_unembedding: False leaves out the head (output matrix of an untied model, its bias, the
      masked-LM transform), for a trunk that feeds another head.
    with_embedding: False also leaves out the token embeddings, for a trunk that gets its vectors
      through `encode`.
    make_mlp: makes the second part of each block, see `layers.Block`.
  """

  config: TransformerConfig
  with_unembedding: bool = True
  with_embedding: bool = True
  make_mlp: Callable[[TransformerConfig], nn.Module] = layers_lib.MLP

  def setup(self):
    c = self.config
    if c.vocab_size is None and self.with_embedding:
      raise ValueError(
        "models.TransformerConfig.vocab_size is not set; take it from the vocabulary with "
        "dataclasses.replace(config, vocab_size=...)."
      )
    if self.with_embedding:
      self._setup_embedding()
      if self.with_unembedding:
        self._setup_head()
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, prevent_cse=False, policy=remat_policy(c.remat))
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0),
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, self.make_mlp)
    if c.final_norm:
      self.final_norm = layers_lib.norm(c)
    if c.pooler:
      self.pooler = Projection(c, (c.width,), (c.width,), ("embed", None), True)
    if c.detector:
      self.detector = Detector(c)

  def _matrix(self, name, shape, axes, init=None):
    init = layers_lib.table_init(self.config, shape[-1]) if init is None else init(self.config)
    init = nn.with_logical_partitioning(init, axes)
    return self.param(name, init, shape, jnp.dtype(self.config.param_dtype))

  def _setup_embedding(self):
    c = self.config
    self.embedding = self._matrix("embedding", (c.vocab_size, c.token_width), ("vocab", "embed"))
    if c.positions == "learned":
      self.position_embedding = self._matrix(
        "position_embedding", (c.max_length + c.position_offset, c.table_width), (None, "embed")
      )
    if c.relative_buckets:
      self.relative_bias = self._matrix(
        "relative_bias", (c.relative_buckets, c.num_heads), (None, "heads"),
        functools.partial(layers_lib.table_init, width=c.width))
    if c.num_token_types:
      self.token_type_embedding = self._matrix(
        "token_type_embedding", (c.num_token_types, c.table_width), (None, "embed"))
    if c.embedding_norm:
      self.embedding_norm = layers_lib.norm(c)
    if c.token_width != c.width:
      self.embedding_in = Projection(
        c, (c.token_width,), (c.width,), (None, "embed"), c.narrow_embeddings)

  def _setup_head(self):
    c = self.config
    if c.token_width != c.table_width:
      self.embedding_out = Projection(c, (c.width,), (c.token_width,), ("embed", None))
    if c.head_transform:
      self.head_transform = Projection(c, (c.width,), (c.table_width,), ("embed", None), True)
      self.head_norm = layers_lib.norm(c)
    if not c.tied_embeddings:
      shape = (c.token_width, c.vocab_size)
      self.unembedding = self._matrix(
        "unembedding", shape, ("embed", "vocab"),
        functools.partial(layers_lib.product_init, num_inputs=shape[0], num_outputs=shape[1]))
    if c.unembedding_bias:
      self.unembedding_bias = self.param(
        "unembedding_bias",
        nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",)),
        (c.vocab_size,), jnp.dtype(c.param_dtype),
      )

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    token_types: jax.Array | None = None,
    vectors: jax.Array | None = None,
    vector_index: jax.Array | None = None,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Hidden states after the last block and the final norm.

    Args:
      tokens: `[B,S] int32`, below `vocab_size`; an id outside makes the result NaN.
      positions: `[B,S] int32` for rotary, learned and sinusoidal positions; None is 0..S-1. ALiBi,
        relative biases and windows go by the distance on the sequence axis.
      segment_ids: `[B,S] int32`; attention stays within equal ids. None is one segment. Padding of
        an encoder is a segment of its own.
      token_types: `[B,S] int32`, for models that have them; None is 0.
      vectors: `[B,M,W]`, vectors in place of word embeddings, see `embed`; None is none.
      vector_index: `[B,S] int32`, the vector at each position; given with `vectors`.
      keys: `[B]` typed keys of dropout, one for each example; None drops nothing.

    Returns:
      `[B,S,D]` in `config.dtype`.

    Raises:
      ValueError: if `S` exceeds `config.max_length`, and as `embed` does.
    """
    if self.is_initializing():
      self._touch_everything(tokens)
    positions = self._positions(tokens, positions)
    x = self.embed(tokens, positions, token_types, vectors, vector_index)
    x = dropped(x, folded(keys, 0), self.config.embedding_dropout)
    return self.encode(x, positions, segment_ids, keys)

  def embed(
    self, tokens, positions=None, token_types=None, vectors=None, vector_index=None
  ) -> jax.Array:
    """Embeddings `[B,S,D]`: words, or vectors in their place, times the scale, plus positions.

    Args:
      tokens: `[B,S] int32`; a token in the place of a vector is never read.
      positions: `[B,S] int32`, as in `__call__`.
      token_types: `[B,S] int32`, as in `__call__`.
      vectors: `[B,M,W]`, W being the width of word embeddings (D unless `embedding_width` says
        otherwise). They are scaled and get positions as words do.
      vector_index: `[B,S] int32`, the row's vector at each position; negative is a word.

    Raises:
      ValueError: as `vectors.replaced` does.
    """
    c = self.config
    positions = self._positions(tokens, None) if positions is None else positions
    # Gathered over embed before the lookup: XLA would otherwise replicate the activations.
    table = constrain(self.embedding, ("vocab", None))
    x = jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(c.dtype)
    x = replaced(x, vectors, vector_index)
    if c.embedding_scale != 1.0:
      x = x * jnp.asarray(c.embedding_scale, x.dtype)
    if c.token_width != c.table_width:
      x = self.embedding_in(x)
    if c.num_token_types:
      types = jnp.zeros(tokens.shape, jnp.int32) if token_types is None else token_types
      x = x + jnp.take(self.token_type_embedding, types, axis=0, mode="fill").astype(c.dtype)
    if c.positions == "learned":
      rows = positions + c.position_offset
      x = x + jnp.take(self.position_embedding, rows, axis=0, mode="fill").astype(c.dtype)
    elif c.positions == "sinusoidal":
      x = x + positions_lib.sinusoids(positions, c.table_width, c.position_offset).astype(c.dtype)
    if c.embedding_norm:
      x = self.embedding_norm(x)
    if c.table_width != c.width:
      x = self.embedding_in(x)
    return constrain(x, ("batch", "sequence", "embed"))

  def encode(
    self, x: jax.Array, positions=None, segment_ids=None, keys=None, bias: jax.Array | None = None
  ) -> jax.Array:
    """The blocks and the final norm on embeddings `[B,S,D]`.

    Args:
      x, positions, segment_ids, keys: as in `__call__`, but that rows with `positions` given may be
        longer than `max_length`, if no position is.
      bias: that of `score_bias`; None is the own one. A trunk without embeddings has none.
    """
    c = self.config
    positions = self._positions(x, None) if positions is None else positions
    sequence = self._sequence(x, positions, segment_ids, bias)
    if keys is not None:
      keys = jax.vmap(folded, (None, 0))(keys, jnp.arange(1, 1 + c.num_layers))  # [L,B]
    if c.scan_layers or self.is_initializing():
      x, _ = self.layers(x, sequence, keys)
    else:
      x = self._unrolled(x, sequence, keys)[-1]
    return self.final_norm(x) if c.final_norm else x

  def score_bias(self, length: int) -> jax.Array | None:
    """Relative biases `[H,S,S] float32` of sequences of that length, or None."""
    c = self.config
    if not (c.relative_buckets and self.with_embedding):
      return None
    wide = jnp.promote_types(self.relative_bias.dtype, jnp.float32)
    return positions_lib.relative_bias(
      jnp.asarray(self.relative_bias, wide), length, c.relative_distance)

  def all_hidden(
    self, tokens, positions=None, segment_ids=None, token_types=None, vectors=None,
    vector_index=None,
  ) -> jax.Array:
    """Embeddings and each block's output, `[L+1,B,S,D]`; the last one after the final norm."""
    positions = self._positions(tokens, positions)
    x = self.embed(tokens, positions, token_types, vectors, vector_index)
    states = self._unrolled(x, self._sequence(x, positions, segment_ids))
    if self.config.final_norm:
      states[-1] = self.final_norm(states[-1])
    return jnp.stack([x, *states])

  def extend(
    self, tokens, cache: cache_lib.KVCache, *, positions, valid=None, branch=None, fresh=False,
    shared: cache_lib.Prefix | None = None, readout=None, vectors=None, vector_index=None,
  ) -> tuple[jax.Array, cache_lib.KVCache] | tuple[
    jax.Array, cache_lib.KVCache, cache_lib.Readout]:
    """Hidden states of new tokens that also see the cache, and the cache with them added.

    Args:
      tokens: `[B,S] int32`, written to the next S slots of every row.
      cache: a cache with S free slots; more tokens than slots would overwrite the last ones, which
        the caller must rule out.
      positions: `[B,S] int32`; one beyond a table of positions makes the result NaN.
      valid: `[B,S] bool`, False for padding, which no token ever sees; None is all True.
      branch: `[B,S] int32`, see `KVCache.branch`; None is 0.
      fresh: promises (statically) an empty cache, so that attention looks at the new tokens only.
      shared: a prefix in front of every row, held once; positions go on from `shared.end`.
      readout: `[B,R] int32`, indices of new tokens whose attention is to be returned.
      vectors, vector_index: as in `embed`.

    Returns:
      `[B,S,D]` in `config.dtype`, as `__call__`; the cache; and with `readout` a `Readout`.

    Raises:
      ValueError: for a model that is not causal, and as `embed` does.
    """
    c = self.config
    if not c.causal:
      raise ValueError(
        "models.TransformerConfig.causal is False: an encoder sees later tokens, so it has no "
        "cache."
      )
    num_new = tokens.shape[1]
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    alone = fresh and branch is None and shared is None
    branch = jnp.zeros(tokens.shape, jnp.int32) if branch is None else branch
    x = self.embed(tokens, positions, None, vectors, vector_index)
    cache = cache_lib.with_slots(cache, positions, valid, branch)
    slots = Slots(self._angles(positions), cache.length)
    if alone:
      slots = slots._replace(segment_ids=valid.astype(jnp.int32))
    else:
      mask, distance = cache_lib.visible(cache, num_new, c.sliding_window)
      slots = slots._replace(mask=mask, distance=distance)
    slots = slots._replace(readout=readout)
    keys, values, found = list(cache.keys), list(cache.values), []
    for i, params in enumerate(self._layer_params()):
      before = None
      if shared is not None:
        before = cached_attention.of_layer(shared, i, positions, c.sliding_window)
      x, keys[i], values[i], of_layer = Block(c, self.make_mlp, parent=None).apply(
        {"params": params}, x, slots, keys[i], values[i], before, method="extend"
      )
      found.append(of_layer)
    x = self.final_norm(x) if c.final_norm else x
    cache = cache._replace(keys=tuple(keys), values=tuple(values), length=cache.length + num_new)
    if readout is None:
      return x, cache
    return x, cache, cache_lib.Readout(*(jnp.stack(part) for part in zip(*found)))

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits `[...,V] float32` of hidden states `[...,D]`."""
    c = self.config
    matrix = self.embedding if c.tied_embeddings else self.unembedding
    return project_to_vocabulary(
      self.readout(hidden), matrix.astype(c.dtype), self.output_bias(), transposed=c.tied_embeddings
    )

  def readout(self, hidden: jax.Array) -> jax.Array:
    """The factor of the output matrix, `[...,W]`; for most models the hidden states `[...,D]`."""
    c = self.config
    if c.head_transform:
      hidden = layers_lib.activation(c.activation)(self.head_transform(hidden))
      hidden = self.head_norm(hidden)
    return self.embedding_out(hidden) if c.token_width != c.table_width else hidden

  def output_matrix(self) -> jax.Array:
    """The matrix `[W,V]` in `config.dtype` from `readout` to logits, ready for many products."""
    c = self.config
    if not c.tied_embeddings:
      matrix = self.unembedding.astype(c.dtype)
    else:
      # Transposed once, behind a barrier: if it were folded into the products, XLA on a CPU would
      # compute the gradient [V,D] from strided operands, 2.3 times slower than [D,V].
      matrix = jax.lax.optimization_barrier(self.embedding.astype(c.dtype).T)
    # Gathered over embed here and not in every chunk of the loss.
    return constrain(matrix, (None, "vocab"))

  def output_bias(self) -> jax.Array | None:
    """The bias `[V]` of the logits, or None."""
    return self.unembedding_bias if self.config.unembedding_bias else None

  def logits(self, tokens, *args, **kwargs) -> jax.Array:
    """Next-token (or masked-token) logits `[B,S,V] float32`; arguments as in `__call__`."""
    return self.unembed(self(tokens, *args, **kwargs))

  def pooled(self, hidden: jax.Array) -> jax.Array:
    """BERT's sentence vector `[B,D]`: product and tanh on the first position of `[B,S,D]`."""
    return jnp.tanh(self.pooler(hidden[:, 0]))

  def detected(self, hidden: jax.Array) -> jax.Array:
    """ELECTRA's logits `[B,S] float32` that a token was replaced, from hidden states `[B,S,D]`."""
    return self.detector(hidden)

  def _positions(self, x, positions):
    """Positions as given, or 0..S-1, as a constant if that is small; checks the length."""
    c = self.config
    length = x.shape[1]
    if length > c.max_length:
      raise ValueError(
        f"A batch has {length} positions and models.TransformerConfig.max_length is "
        f"{c.max_length}; raise it or use shorter sequences."
      )
    if positions is None:
      arange = np.arange if length * c.head_width <= _CONSTANT_ANGLES else jnp.arange
      positions = arange(length, dtype=np.int32)[None]
    return positions

  def _sequence(self, x, positions, segment_ids, bias=None):
    bias = self.score_bias(x.shape[1]) if bias is None else bias
    if bias is None and self.config.relative_buckets:
      raise ValueError(
        "models.TransformerConfig.relative_buckets is set and this trunk without embeddings has no "
        "table of biases; hand encode those of the trunk below, or set it to 0."
      )
    return Sequence(self._angles(positions), segment_ids, bias)

  def _angles(self, positions):
    return positions_lib.angles_at(positions, self.config)

  def _touch_everything(self, tokens):
    """Makes the parameters that `__call__` does not use, since Linen makes only those used."""
    c = self.config
    hidden = jnp.zeros((*tokens.shape, c.width), c.dtype)
    if self.with_unembedding:
      self.readout(hidden)
    if c.pooler:
      self.pooled(hidden)
    if c.detector:
      self.detected(hidden)

  def _layer_params(self):
    layers = nn.unbox(self.variables["params"]["layers"])
    if isinstance(layers, tuple):
      return layers
    leaves, tree = jax.tree.flatten(layers)
    # Split at once: the gradient is then joined at once, not added up from one padded part a layer.
    parts = [jax.lax.split(leaf, (1,) * self.config.num_layers) for leaf in leaves]
    return [tree.unflatten(jnp.squeeze(part, 0) for part in layer) for layer in zip(*parts)]

  def _unrolled(self, x, sequence, keys=None):
    """The blocks one by one; the output of each, `L x [B,S,D]`."""
    c = self.config

    def layer(params, x, keys):
      return Block(c, self.make_mlp, parent=None).apply({"params": params}, x, sequence, keys)[0]

    if c.remat != "none":
      layer = jax.checkpoint(layer, prevent_cse=True, policy=remat_policy(c.remat))
    states = []
    for i, params in enumerate(self._layer_params()):
      x = layer(params, x, None if keys is None else keys[i])
      states.append(x)
    return states
