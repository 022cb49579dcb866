"""Texts that stand in front of every row: read once, alone or in groups, and attended to by all.

Groups (structured prompting, arXiv 2212.06713, section 2) do not see each other. They are aligned
at their ends, so that what follows is equally far from all of them: a group of n tokens lies at
positions W - n .. W - 1 and rows go on at W, W being the longest group's length or more. A
common front of f tokens, a BOS for instance, lies at the first positions of every group and stands
once in front of the rows; the other tokens then lie at W - n + f .. W + f - 1, and rows go on at
W + f. A row's own tokens then weigh as much as there are groups. One group is an ordinary
context.

Adaptive parallel encoding (arXiv 2502.05431) weighs the groups beside front and row by a
temperature and a scale, and a row's own tokens by 1 (`scale=1`); with both 1 these are parallel
context windows (arXiv 2212.10947).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding.group_store import GroupStore
from lmops_jax.decoding.lengths import bucket
from lmops_jax.decoding.prompts import Prompt, checked, padded
from lmops_jax.mesh.meshes import activated, shards_of
from lmops_jax.models.cache import Adaptive, KVCache, Prefix, constrain_heads, empty_cache
from lmops_jax.models.partitioning import constrain
from lmops_jax.models.transformer import unstack_layers

_TOKENS_AT_ONCE = 2048  # read in one call on each device
_WRITTEN_OUT = 512  # tokens; longer groups skip later keys and hold no [W,W] scores
_TABLES = ("learned", "sinusoidal")  # positions that end


def read_text(model, params, text: Prompt | Sequence[int], partitioner=None) -> Prefix:
  """An ordinary context, with all its special tokens; see `read_groups` for the rest."""
  text = checked(text, model.config.token_width, "the text")
  row = padded([text], 1, len(text))
  return read_groups(
    model, params, row.tokens, row.valid, partitioner=partitioner, vectors=row.vectors,
    vector_index=row.vector_index)


def read_groups(
  model,
  params,
  ids,
  mask,
  *,
  window: int | None = None,
  bos_id: int | None = None,
  front: Sequence[int] = (),
  scale: float | None = None,
  temperature: float = 1.0,
  group_scale: float = 1.0,
  partitioner=None,
  spread: bool = False,
  progress: Callable[[int], None] | None = None,
  vectors=None,
  vector_index=None,
  store: GroupStore | None = None,
) -> Prefix:
  """Reads M groups of demonstrations, each on its own.

  Memory and time grow linearly with M; groups of one call run side by side, over the mesh's data
  axis if there is one.

  Args:
    model: a causal `Transformer`.
    params: its parameters, layers stacked or not.
    ids: `[M,W] int32`, each group at its row's end, without BOS.
    mask: `[M,W] bool`, False for what is in front.
    window: the positions that groups end at, at least W; None is W.
    bos_id: token in front of every group, None for none.
    front: more tokens in front of every group, behind BOS.
    scale: what a row's own tokens weigh; None is M (at least 1).
    temperature: T, which divides the scores of the groups' tokens, front apart.
    group_scale: S; the logarithm of their summed exponentials is multiplied by S T.
    partitioner: mesh to run on; None is the default device.
    spread: leave the keys and values spread over the mesh's data axis, for contexts larger than a
      device; rows are then to be split over other axes (`rows_partitioner`). False puts all on
      every device.
    progress: called with the number of groups read since the last call.
    vectors: `[M,m,D]` that stand in the place of some of the ids, of images for instance, or None.
    vector_index: `[M,W] int32`, which of its group's vectors stands where, -1 for a word; None if
      `vectors` is.
    store: takes what it has of these groups, and keeps what it has not; one process only.

  Raises:
    ValueError: for an encoder, ids outside of the vocabulary, an empty group or one that is not at
      its row's end, a window that is too short or beyond the model's positions, a scale or a
      temperature that is not positive, or vectors that do not fit (`prompts.checked`).
  """
  config = model.config
  ids, mask = np.asarray(ids, np.int32), np.asarray(mask, bool)
  if vectors is not None or vector_index is not None:
    ids, vectors, vector_index = _with_vectors(config, ids, mask, vectors, vector_index)
  front = [*([] if bos_id is None else [bos_id]), *front]
  _check(config, ids, mask, window, front, scale, temperature, group_scale)
  num_groups, width = ids.shape
  if num_groups == 0:
    ids, mask, width = np.zeros((1, 0), np.int32), np.zeros((1, 0), bool), 0
  window = width if window is None else window
  end = window + len(front)
  check_length(config, end, 0)
  columns = bucket(max(end, 1))
  of_front = slice(columns - end, columns - window)
  tokens, valid = (np.zeros((len(ids), columns), kind) for kind in (np.int32, bool))
  if width:
    tokens[:, columns - width :], valid[:, columns - width :] = ids, mask
  if vectors is not None:
    in_front = ((0, 0), (columns - width, 0))
    vector_index = np.pad(vector_index, in_front, constant_values=-1)
  tokens[:, of_front], valid[:, of_front] = front, True
  positions = np.maximum(np.arange(columns) - (columns - end), 0).astype(np.int32)

  over_groups = None if partitioner is None else partitioner.with_batch_over("data")
  arrays = {"tokens": tokens, "valid": valid}
  if vectors is not None:
    arrays |= {"vectors": vectors, "vector_index": vector_index}
  params = unstack_layers(nn.unbox(params))
  if config.attention == "xla" and columns > _WRITTEN_OUT:
    model = model.clone(config=dataclasses.replace(config, attention="chunked"))
  read = functools.partial(
    _held, model, params, positions=positions, mesh=over_groups, progress=progress)
  with activated(over_groups):
    if store is None:
      held, order = read(arrays, spread=spread)
    else:
      held, order = _through(store, read, arrays, positions, over_groups, spread)
    adaptive = None
    if num_groups and (temperature, group_scale) != (1, 1):
      adaptive = Adaptive(
        *_sliced(held, of_front.start, len(front)), np.arange(len(front), dtype=np.int32)[None],
        np.float32(temperature), np.float32(group_scale * temperature))
  # A copy, since the programs above may still read `valid` itself.
  seen = np.pad(valid, ((0, len(order) - len(valid)), (0, 0)))
  seen[int(adaptive is None) :, of_front] = False  # once for all groups, or apart from them
  slots = seen[order].reshape(1, -1)
  cache = KVCache(
    *held, positions=np.tile(positions, len(order))[None], valid=slots,
    branch=np.zeros(slots.shape, np.int32), length=np.int32(slots.shape[1]),
  )
  weight = max(num_groups, 1) if scale is None else scale
  return Prefix(cache, np.int32(end), np.float32(math.log(weight)), adaptive)


def rows_partitioner(partitioner, spread: bool):
  """The mesh as rows behind a prefix use it: over fsdp alone when the prefix is `spread`."""
  if partitioner is None or not spread:
    return partitioner
  return partitioner.with_batch_over("fsdp")


def check_length(config, end: int, num_tokens: int, what: str = "a row") -> None:
  """Raises ValueError if position tables end before `end + num_tokens`."""
  if config.positions in _TABLES and end + num_tokens > config.max_length:
    raise ValueError(
      f"{what} has {num_tokens} tokens behind a prefix that ends at position {end}, and this "
      f"model's {config.positions} positions end at {config.max_length}; shorten the groups."
    )


def check_model(config, prefix: Prefix) -> None:
  """Raises ValueError for the prefix of another model."""
  keys = prefix.cache.keys
  found = (len(keys), keys[0].shape[1], keys[0].shape[3])
  wanted = (config.num_layers, config.key_heads, config.head_width)
  if found != wanted:
    raise ValueError(
      f"the prefix has {found[0]} layers of {found[1]} key heads of width {found[2]}, and the "
      f"model {wanted[0]} of {wanted[1]} of width {wanted[2]}; read it with this model."
    )


def _check(config, ids, mask, window, front, scale, temperature, group_scale):
  if not config.causal:
    raise ValueError(
      "models.TransformerConfig.causal is False: an encoder's tokens see later ones, so groups "
      "cannot be read ahead; load a decoder."
    )
  if ids.ndim != 2 or ids.shape != mask.shape:
    raise ValueError(f"groups have ids {ids.shape} and mask {mask.shape}; expected [M,W] both.")
  num_groups, width = ids.shape
  factors = {"scale": scale, "temperature": temperature, "group_scale": group_scale}
  for name, factor in factors.items():
    if factor is not None and not (math.isfinite(factor) and factor > 0):
      raise ValueError(f"{name}={factor} must be finite and positive.")
  if num_groups == 0 and scale is not None:
    raise ValueError(f"scale={scale} is given without any group to weigh against; leave it out.")
  lengths = mask.sum(axis=1)
  for m in range(num_groups):
    if not mask[m, width - lengths[m] :].all() or not lengths[m]:
      raise ValueError(
        f"group {m} is {'not at the end of its row' if lengths[m] else 'empty'}; pad groups on the "
        "left, without holes."
      )
  if window is not None and window < width:
    raise ValueError(f"window={window} is shorter than the longest group of {width} tokens.")
  reach = config.sliding_window
  if num_groups > 1 and reach is not None and (window or width) >= reach:
    raise ValueError(
      f"groups reach over {window or width} positions and this model's attention over the latest "
      f"{reach} (models.TransformerConfig.sliding_window), so their beginnings are out of sight; "
      "use shorter groups."
    )
  if num_groups > 1 and config.momentum is not None:
    raise ValueError(
      f"this model's attention adds a decayed sum over earlier tokens (models.TransformerConfig."
      f"momentum={config.momentum}), which {num_groups} groups side by side do not have; read one "
      "group."
    )
  if config.momentum is not None and (temperature, group_scale) != (1, 1):
    raise ValueError(
      f"temperature={temperature} and group_scale={group_scale} weigh scores, which this model's "
      f"decayed sum (models.TransformerConfig.momentum={config.momentum}) does not have; leave "
      "them out."
    )
  used = np.append(ids[mask], front)
  bad = used[(used < 0) | (used >= config.vocab_size)]
  if bad.size:
    raise ValueError(
      f"the groups hold token id {int(bad[0])}, outside of the model's vocabulary of "
      f"{config.vocab_size}; encode them with the model's own tokenizer."
    )


def _with_vectors(config, ids, mask, vectors, vector_index):
  """The groups' ids with 0 in slots, and vectors and index as `prompts.padded` makes them."""
  shapes = [np.shape(x) for x in (ids, mask, vector_index)]
  of_vectors = np.shape(vectors)
  if len(set(shapes)) > 1 or len(of_vectors) != 3 or of_vectors[0] != len(ids):
    raise ValueError(
      f"groups have ids {shapes[0]}, mask {shapes[1]}, vector_index {shapes[2]} and vectors "
      f"{of_vectors}; expected [M,W] and, of vectors, [M,m,{config.token_width}]."
    )
  vectors, vector_index = np.asarray(vectors), np.asarray(vector_index)
  groups = [
    checked(Prompt(*given), config.token_width, f"group {m}")
    for m, given in enumerate(zip(ids, vectors, np.where(mask, vector_index, -1)))
  ]
  rows = padded(groups, *ids.shape)
  return rows.tokens, rows.vectors, rows.vector_index


def _held(model, params, arrays, positions, mesh, progress, spread):
  """Keys and values `[1,K,n*columns,E]` of rows, and which row lies at each of the n places."""
  num_rows, columns = arrays["valid"].shape
  shards = shards_of(mesh)
  calls = -(-num_rows // (shards * max(1, _TOKENS_AT_ONCE // columns)))
  size = -(-num_rows // (calls * shards)) * shards
  missing, per_shard = calls * size - num_rows, size // shards
  arrays = {name: np.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
            for name, x in arrays.items()}
  held = _nothing(model.config, shards, calls * per_shard * columns)
  for first in range(0, calls * size, size):
    batch = {name: x[first : first + size] for name, x in arrays.items()}
    if mesh is not None:
      batch = mesh.place_batch(batch)
    held = _read(
      model, params, batch["tokens"], positions, batch["valid"], held, first // shards * columns,
      batch.get("vectors"), batch.get("vector_index"))
    if progress:
      jax.block_until_ready(held)
      progress(min(size, num_rows - first))
  if mesh is not None:
    held = _in_one_row(held, spread)
  return held, np.arange(calls * size).reshape(calls, shards, per_shard).swapaxes(0, 1).ravel()


def _through(store, read, arrays, positions, mesh, spread):
  """As `_held`, by way of a store: reads what it has not, and takes all from it."""
  valid = arrays["valid"]
  num_rows, columns = valid.shape
  paths = [
    store.path(positions[seen], *(None if x is None else x[row] if x.ndim > 2 else x[row][seen]
                                  for x in map(arrays.get, ("tokens", "vectors", "vector_index"))))
    for row, seen in enumerate(valid)]
  new = [row for row, path in enumerate(paths) if not path.exists()]
  if new:
    held, order = read({name: x[new] for name, x in arrays.items()}, spread=spread)
    for i, row in enumerate(new):
      start = int(np.flatnonzero(order == i)[0]) * columns
      store.write(paths[row], *(
        [np.asarray(layer[0, :, start : start + columns])[:, valid[row]] for layer in part]
        for part in held))
    del held
  total = -(-num_rows // shards_of(mesh)) * shards_of(mesh)
  found = [store.read(path, int(seen.sum())) for path, seen in zip(paths, valid)]

  def layer(part, i):
    x = np.zeros((1, found[0].shape[2], total * columns, found[0].shape[4]), found[0].dtype)
    for row, group in enumerate(found):
      x[0][:, row * columns + np.flatnonzero(valid[row])] = group[part, i]
    return _spread(x, spread)

  return tuple(tuple(layer(part, i) for i in range(found[0].shape[1])) for part in range(2)), (
    np.arange(total))


@functools.partial(jax.jit, static_argnums=1)
def _spread(x, spread):
  """`[1,K,slots,E]` with its slots over the data axis or on every device."""
  return constrain(x, (None, "kv_heads", "batch" if spread else None, "head_dim"))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nothing(config, num_shards, num_slots):
  """Room for keys and values, `[n,K,slots,E]` for each layer; each of n devices has one row."""
  return jax.tree.map(constrain_heads, empty_cache(config, num_shards, num_slots)[:2])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _read(
  model, params, tokens, positions, valid, held, start, vectors=None, vector_index=None
):
  """`held` with the keys and values of these groups from the slot `start` on.

  They are written where they stay, so that they are in memory once.
  """
  cache = model.apply(
    {"params": params}, tokens, empty_cache(model.config, *tokens.shape),
    positions=jnp.broadcast_to(positions, tokens.shape), valid=valid, fresh=True, vectors=vectors,
    vector_index=vector_index, method="extend",
  )[1]

  def put(room, new):  # [n,K,slots,E], [m,K,W,E]
    new = new.reshape(len(room), -1, *new.shape[1:]).swapaxes(1, 2)
    new = new.reshape(*room.shape[:2], -1, room.shape[3])
    return constrain_heads(jax.lax.dynamic_update_slice_in_dim(room, new, start, axis=2))

  return jax.tree.map(put, held, (cache.keys, cache.values))


@functools.partial(jax.jit, static_argnums=2)
def _sliced(held, start, length):
  """Some slots of every layer's keys and values, on every device."""
  def cut(x):
    return _spread(jax.lax.dynamic_slice_in_dim(x, start, length, axis=2), False)

  return jax.tree.map(cut, held)


def _in_one_row(held, spread):
  """`[n,K,slots,E]` to `[1,K,n*slots,E]`, spread over the data axis or on every device."""

  @jax.jit
  def one_row(x):
    return _spread(x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[3]), spread)

  def moved(x):
    row = one_row(x)
    x.delete()  # before the next layer
    return row

  return jax.tree.map(moved, held)
