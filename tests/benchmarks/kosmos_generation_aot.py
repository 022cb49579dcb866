"""Generation with the published Kosmos-2 on one v5e chip, compiled ahead of time, without a TPU.

The programs of `lmops generate` at 1.66B parameters in bfloat16: pictures to vectors, the prompt of
a picture and `<grounding> An image of` (71 tokens), and the loop over 64 new tokens, greedy. Bytes
are the compiler's own. The least time of a call, or of a token, is that of its arithmetic or of
reading its arguments once, whichever is longer.

  TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/benchmarks/kosmos_generation_aot.py

Needs libtpu (`pip install 'lmops_jax[tpu]'`).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.decoding import loop
from lmops_jax.decoding.lengths import bucket
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.transformer import Transformer, unstack_layers
from lmops_jax.pretrained import families, importing
from lmops_jax.sizing import aot, chips
from lmops_jax.sizing.flops import forward_flops_per_token

NUM_PROMPT, NUM_NEW, EOS = 71, 64, 2
ROWS = (1, 8)


def published():
  """The family, the configuration in bfloat16, and the parameters' shapes."""
  family = families.by_name("kosmos-2")
  config = family.read_config(families.ConfigReader({"model_type": "kosmos-2"}, "config.json"))
  config = family.with_choices(config, dtype="bfloat16", param_dtype="bfloat16")
  return family, config, nn.unbox(importing.abstract_params(family, config))


def programs(rows: int, partitioner) -> list[aot.Program]:
  """What the chip runs for so many rows, the rest of the parameters held beside."""
  family, config, params = published()
  everywhere = jax.sharding.NamedSharding(partitioner.mesh, jax.sharding.PartitionSpec())

  def placed(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

  def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

  model, text = family.module(config), Transformer(config.text)
  seeing = placed({name: params[name] for name in ("vision", "connector")})
  reading = placed(jax.eval_shape(unstack_layers, params["text"]))
  size, slots = config.vision.image_size, config.vectors_per_image
  options = GenerationOptions(max_new_tokens=NUM_NEW)
  plan, knobs = loop.plan_of(options, (EOS,)), loop.knobs_of(options, NUM_NEW)
  width = bucket(NUM_PROMPT)
  inputs = (
    reading, knobs, array(rows, width), array(rows, width, dtype=bool), array(rows),
    array(rows, dtype=bool), None, array(rows, bucket(slots), config.text.width, dtype=jnp.float32),
    array(rows, width))
  prefill = jax.jit(functools.partial(loop.prefill, text), static_argnums=(0, 1))
  decode = jax.jit(functools.partial(loop.decode, text), static_argnums=0, donate_argnums=3)

  def start():
    return placed(jax.eval_shape(functools.partial(loop.prefill, text, plan, NUM_NEW), *inputs))

  trunk, tokens = config.vision.trunk, config.vision.num_patches + 1
  of_text = functools.partial(forward_flops_per_token, config.text)
  return [
    aot.Program(
      f"pictures, {rows}",
      lambda: jax.jit(lambda params, images: model.apply(
        {"params": params}, images, method="image_vectors")).lower(
          seeing, array(rows, size, size, 3, dtype=jnp.uint8)),
      rows * tokens * forward_flops_per_token(trunk, tokens, unembedding=False),
      bytes_beside=num_bytes(reading)),
    aot.Program(
      f"prompt, {rows}", lambda: prefill.lower(plan, NUM_NEW, *inputs),
      rows * width * of_text(width, unembedding=False), bytes_beside=num_bytes(seeing)),
    aot.Program(
      f"tokens, {rows}",
      lambda: decode.lower(plan, reading, knobs, start(), array(), array(rows, 1, dtype=bool)),
      rows * of_text(width), bytes_beside=num_bytes(seeing)),
  ]


def num_bytes(tree) -> int:
  """Bytes of arrays given as shapes."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main():
  slice_ = chips.topology("v5e:1x1")
  partitioner = MeshConfig(data=1).build(aot.tpu_devices(slice_))
  print("| program, rows | GiB, of 15.75 | arguments | beside | temporaries | least ms a call or "
        "token | compiled in |\n" + "| --- " * 7 + "|")
  for rows in ROWS:
    for program in programs(rows, partitioner):
      found = aot.compile_program(program, partitioner)
      fits = "" if found.fits(slice_.chip.memory_bytes) else ", does not fit"
      seconds = max(program.flops / slice_.chip.flops_per_sec,
                    found.argument_bytes / slice_.chip.bytes_per_sec)
      gib = [f"{x / 2**30:.2f}" for x in (
        found.needed_bytes, found.argument_bytes, program.bytes_beside, found.temporary_bytes)]
      print(f"| {program.name} | {gib[0]}{fits} | {' | '.join(gib[1:])} | {seconds * 1e3:.1f} | "
            f"{found.seconds:.0f} s |", flush=True)


if __name__ == "__main__":
  main()
