"""How a transformer knows where a token stands: rotary, xPos, sinusoidal, ALiBi, relative biases.

Angles, tables and slopes that do not depend on the batch are NumPy arrays, which a traced program
holds as constants; traced, XLA on a CPU computes them again for every head and layer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.config import RopeScaling, TransformerConfig

_SINUSOID_BASE = 1e4
_XPOS_SMOOTHING, _XPOS_BASE = 0.4, 512  # the paper's gamma, and the distance of one whole decay


class Angles(NamedTuple):
  """Cosines and sines, each `[B or 1,S,1,R/2] float32`, that turn queries and keys.

  Attributes:
    queries: those for queries, and for keys if these have none of their own.
    keys: those for keys, or None.
  """

  queries: tuple[jax.Array, jax.Array]
  keys: tuple[jax.Array, jax.Array] | None = None


def angles_at(positions, config: TransformerConfig) -> Angles | None:
  """Angles of a model's queries and keys at `positions [B or 1,S] int32`; None if not turned."""
  c = config
  if not c.turns:
    return None
  frequencies = rotary_frequencies(c.rotary_width, c.rope_base, c.rope_scaling)
  amplitude = 1.0 if c.rope_scaling is None else c.rope_scaling.amplitude
  angles = rotary_angles(positions, frequencies, amplitude)
  return xpos_angles(positions, angles, c.max_length // 2) if c.xpos else Angles(angles)


def rotary_frequencies(width: int, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Radians a position for each pair: `base ** (-2i / width)`, `[width/2] float32`, stretched."""
  half = width // 2
  frequencies = base ** (-np.arange(half, dtype=np.float32) / np.float32(half))
  frequencies = frequencies.astype(np.float32)
  if scaling is None or scaling.kind == "dynamic":
    return frequencies
  if scaling.kind == "factors":
    return frequencies / np.asarray(scaling.factors, np.float32)
  stretched = frequencies / np.float32(scaling.factor)
  if scaling.kind == "linear":
    return stretched
  if scaling.kind == "yarn":
    kept = 1 - _yarn_line(width, base, scaling)
  else:
    turns = scaling.original_max_length * frequencies / (2 * np.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
  return (kept * frequencies + (1 - kept) * stretched).astype(np.float32)


def _yarn_line(width: int, base: float, scaling: RopeScaling) -> np.ndarray:
  """How far each frequency is stretched, `[width/2]`: 0 for the fastest, 1 for the slowest."""

  def number(turns):  # index of the frequency with so many turns in the original context
    return width * math.log(scaling.original_max_length / (turns * 2 * math.pi)) / (
      2 * math.log(base)
    )

  low, high = number(scaling.beta_fast), number(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  if low == high:
    high += 1e-3
  return np.clip((np.arange(width // 2) - low) / (high - low), 0, 1).astype(np.float32)


def rotary_angles(positions, frequencies: np.ndarray, amplitude: float = 1.0):
  """Cosines and sines of `positions * frequencies`, times `amplitude`.

  Args:
    positions: `[B,S]` or `[1,S]` int32; a NumPy array gives NumPy results.
    frequencies: `[R/2] float32`, see `rotary_frequencies`.
    amplitude: that of a `RopeScaling`.

  Returns:
    Two `[B or 1,S,1,R/2] float32`.
  """
  xp = np if isinstance(positions, np.ndarray) else jnp
  angles = positions[:, :, None, None].astype(np.float32) * frequencies
  cos, sin = xp.cos(angles), xp.sin(angles)
  if amplitude == 1:
    return cos, sin
  return cos * np.float32(amplitude), sin * np.float32(amplitude)


def xpos_angles(positions, angles: tuple[jax.Array, jax.Array], centre: int) -> Angles:
  """Angles whose amplitude grows with a query's position and falls with a key's (xPos).

  The product of a query at n and a key at m is a rotary one whose pair i is multiplied by
  `zeta_i^((n - m) / 512)`, `zeta_i = (i / (R/2) + 0.4) / 1.4` (arXiv:2212.10554, section 3.2), so
  that only the distance counts. The centre cancels in the product and keeps the powers small. It is
  fixed, not the middle of the present keys, so that keys in a cache stay as they were made.

  Args:
    positions: `[B,S]` or `[1,S]` int32; a NumPy array gives NumPy results.
    angles: those of `rotary_angles`.
    centre: the position whose amplitude is 1.
  """
  xp = np if isinstance(positions, np.ndarray) else jnp
  cos, sin = angles
  half = cos.shape[-1]
  ratio = np.arange(half, dtype=np.float32) / np.float32(half)
  decay = np.log((ratio + np.float32(_XPOS_SMOOTHING)) / np.float32(1 + _XPOS_SMOOTHING))
  steps = (positions - centre)[:, :, None, None].astype(np.float32) / np.float32(_XPOS_BASE)
  amplitude = xp.exp(steps * decay)
  return Angles((cos * amplitude, sin * amplitude), (cos / amplitude, sin / amplitude))


def rotary(x: jax.Array, angles: tuple[jax.Array, jax.Array], interleaved: bool = False):
  """Turns pairs of `[B,S,H,E]` by their angle; products are float32 (arXiv:2104.09864).

  The first `R` of the E dimensions turn, R being twice the angles' number. Pairs are
  `(x[i], x[i + R/2])`, or `(x[2i], x[2i + 1])` if interleaved.
  """
  cos, sin = angles
  half = cos.shape[-1]
  turning, rest = x[..., : 2 * half], x[..., 2 * half :]
  if interleaved:
    pairs = turning.reshape(*turning.shape[:-1], half, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.reshape(turning.shape)
  else:
    first, second = turning[..., :half], turning[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  if rest.shape[-1]:
    turned = jnp.concatenate([turned, rest], axis=-1)
  return turned.astype(x.dtype)


def sinusoids(positions, width: int, offset: int = 0):
  """Fixed position vectors `[...,width] float32`: sines, then cosines, of falling frequencies.

  The order and the spacing, `10000 ** (-i / (width/2 - 1))`, are those of fairseq. So is the zero
  vector of padding, which has a negative position here (there, the table's row `offset - 1`).

  Args:
    positions: `[...] int32`; a NumPy array gives NumPy results.
    width: width of a vector.
    offset: the table's row of position 0.
  """
  xp = np if isinstance(positions, np.ndarray) else jnp
  half = width // 2
  step = math.log(_SINUSOID_BASE) / max(half - 1, 1)
  frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-step))
  angles = (positions + offset)[..., None].astype(np.float32) * frequencies
  table = xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=-1)
  table = xp.where(positions[..., None] < 0, np.float32(0), table)
  return table if width % 2 == 0 else xp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, 1)])


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Each head's bias for one position of distance, `[H] float32` (arXiv:2108.12409).

  Slopes are `2 ** (-8h / n)` for h = 1..n, n being the largest power of two up to H; further heads
  take every other slope of the series for 2n.
  """
  power = 2 ** math.floor(math.log2(num_heads))

  def series(n):
    return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

  slopes = np.concatenate([series(power), series(2 * power)[::2][: num_heads - power]])
  return slopes.astype(np.float32)


def relative_buckets(distance: np.ndarray, num_buckets: int, far: int) -> np.ndarray:
  """The row of a table of biases for each distance, in both directions, `[...] int32`.

  Rows up to half of `num_buckets` are for the key's own place and earlier ones, the others for
  later ones. The first half of each are for one distance each; the rows of the second end at
  distances in a geometric series that reaches `far` (T5's code; arXiv:1910.10683, section 2.1).

  Args:
    distance: `[...] int`, key position minus query position.
    num_buckets: rows of the table, a multiple of 4.
    far: distance from which on all share the last row, more than a quarter of `num_buckets`.
  """
  half = num_buckets // 2
  single, size = half // 2, np.abs(distance)
  growth = np.log(np.maximum(size, single).astype(np.float32) / np.float32(single))
  growth = growth / np.float32(math.log(far / single)) * np.float32(half - single)
  shared = np.minimum(single + growth.astype(np.int32), half - 1)
  return (np.where(size < single, size, shared) + half * (distance > 0)).astype(np.int32)


def relative_bias(table: jax.Array, length: int, far: int) -> jax.Array:
  """Biases `[H,S,S]` of the scores of a sequence of `length` S from a table `[buckets,H]`."""
  distances = np.arange(1 - length, length)
  by_distance = table[relative_buckets(distances, table.shape[0], far)]  # [2S-1,H]
  index = jnp.arange(length)
  return by_distance[index[None, :] - index[:, None] + length - 1].transpose(2, 0, 1)
