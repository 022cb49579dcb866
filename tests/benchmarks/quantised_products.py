"""Times products with weights of 8 bits, kept so in memory, against those with float32 ones.

    python tests/benchmarks/quantised_products.py

`x [T,K] @ w [K,N]`, where w is Q8_0: a number of 8 bits for each weight, a scale for 32 of them.
Plain jax has these ways, and no other that reads the 8 bits within the product's loop:

* whole: all weights become float32, then a product,
* tiles: the same for some columns at a time, whose weights stay in a cache,
* blocks: products of the 8 bits as float32, 32 rows at a time, whose sums are scaled.

GB/s are those of the weights that lie in memory: 4 bytes each, or 1.125.
"""

import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

BLOCK, TILE = 32, 512
SHAPES = ((576, 49152), (2048, 8192))  # the output matrix of SmolLM2-135M, an MLP of 1B


def fastest(function, *args) -> float:
  """Milliseconds, the least of ten calls."""
  function(*args).block_until_ready()
  taken = []
  for _ in range(10):
    began = time.perf_counter()
    function(*args).block_until_ready()
    taken.append(time.perf_counter() - began)
  return 1e3 * min(taken)


def as_float(bits, scales):
  """`[K,N] float32` of `[K,N] int8` and `[K/32,N]`."""
  blocks = bits.reshape(-1, BLOCK, bits.shape[1]).astype(jnp.float32)
  return (blocks * scales[:, None]).reshape(bits.shape)


@jax.jit
def plain(x, w):
  return x @ w


@jax.jit
def whole(x, bits, scales):
  return x @ as_float(bits, scales)


@jax.jit
def tiles(x, bits, scales):
  apart = [y.reshape(len(y), -1, TILE).swapaxes(0, 1) for y in (bits, scales)]
  # Behind a barrier, so that a tile is written before the product reads it.
  out = jax.lax.map(lambda tile: x @ jax.lax.optimization_barrier(as_float(*tile)), tuple(apart))
  return out.swapaxes(0, 1).reshape(len(x), -1)


@jax.jit
def blocks(x, bits, scales):
  parts = jnp.einsum("tbj,bjn->btn", x.reshape(len(x), -1, BLOCK),
                     bits.reshape(-1, BLOCK, bits.shape[1]).astype(jnp.float32))
  return (parts * scales[:, None]).sum(0)


def main() -> None:
  rng = np.random.default_rng(0)
  print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}\n")
  print("| K x N | rows | float32 ms | GB/s | whole ms | tiles ms | GB/s | blocks ms |")
  print("|---|---|---|---|---|---|---|---|")
  for depth, width in SHAPES:
    bits = jnp.asarray(rng.integers(-127, 128, (depth, width)), jnp.int8)
    scales = jnp.asarray(rng.random((depth // BLOCK, width)), jnp.float32)
    w = as_float(bits, scales)
    for rows in (1, 16):
      x = jnp.asarray(rng.normal(size=(rows, depth)), jnp.float32)
      want = plain(x, w)
      apart = 1e-4 * float(jnp.abs(want).max())
      for way in (whole, tiles, blocks):
        np.testing.assert_allclose(way(x, bits, scales), want, rtol=0, atol=apart)
      dense = fastest(plain, x, w)
      first, second, third = (fastest(way, x, bits, scales) for way in (whole, tiles, blocks))
      print(f"| {depth:,} x {width:,} | {rows} | {dense:.2f} | {4e-6 * w.size / dense:.1f} | "
            f"{first:.2f} | {second:.2f} | {1.125e-6 * w.size / second:.1f} | {third:.2f} |")


if __name__ == "__main__":
  main()
