# ruff: noqa: E402  malloc is set before jax is imported
"""Times Stable Diffusion against diffusers in PyTorch: same random weights, float32, on a CPU.

    python tests/benchmarks/diffusion_vs_diffusers.py --output results/diffusion_vs_diffusers.md
    python tests/benchmarks/diffusion_vs_diffusers.py --size small

diffusers makes the networks at random, they are written into a folder, and this library loads that.
One side is in memory after the other, so that 24 GB do for the size of Stable Diffusion 1.5. The
table gives the median of the runs that follow a first one, and how far the two results are apart,
over the largest number. What is timed, for one picture:

* unet: a prediction with guidance, which is a batch of two,
* decode: latents to pixels,
* image: both texts' states, the predictions of all steps with guidance, DDIM's update, and pixels.
  The update is written out here on either side: a network is timed, not a sampler.

The speed is the operations of `sizing.diffusion` over the time, beside that of a large product of
float32 matrices on the same side.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lmops_jax.models.diffusion.autoencoder import Autoencoder, from_latents
from lmops_jax.models.diffusion.unet import UNet
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained.families import clip, diffusion
from lmops_jax.pretrained.families.family import ConfigReader
from lmops_jax.pretrained.importing import load_params
from lmops_jax.pretrained.sources import open_source
from lmops_jax.sizing import diffusion as sizing

GUIDANCE, POSITIONS, PRODUCT = 7.5, 77, 2048
FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SD = dict(  # Stable Diffusion 1.5
  unet=dict(sample_size=64, cross_attention_dim=768),
  vae=dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
  text=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
SMALL = dict(
  unet=dict(sample_size=16, block_out_channels=(32, 64, 64, 64), cross_attention_dim=64),
  vae=dict(block_out_channels=(32, 32, 64, 64), layers_per_block=2, sample_size=128),
  text=dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2))
SIZES = {"sd-1.5": SD, "small": SMALL}


def build(folder, fields):
  """Writes the three networks at random."""
  torch.manual_seed(0)
  vae = dict(fields["vae"])
  num = len(vae["block_out_channels"])
  vae |= dict(down_block_types=("DownEncoderBlock2D",) * num,
              up_block_types=("UpDecoderBlock2D",) * num)
  diffusers.UNet2DConditionModel(**fields["unet"]).save_pretrained(folder / "unet")
  diffusers.AutoencoderKL(**vae).save_pretrained(folder / "vae")
  transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields["text"])).save_pretrained(
    folder / "text_encoder")


def plan(steps):
  """Times and, of the signal, alpha^2 there and at the next time (DDIM)."""
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  signal = np.cumprod(1 - betas)
  gap = 1000 // steps
  times = np.arange(steps)[::-1] * gap + 1
  after = np.where(times >= gap, signal[times - gap], signal[0])
  return times, np.stack([signal[times], after], 1).astype(np.float32)


def stepped(x, noise, now, after):
  """DDIM's update."""
  clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
  return after**0.5 * clean + (1 - after) ** 0.5 * noise


class Peer:
  """diffusers' side, `[B,C,h,w]`."""

  name = "diffusers"

  def __init__(self, folder):
    self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    self.text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()

  @torch.inference_mode()
  def predict(self, latents, time, context):
    return self.unet(
      torch.tensor(latents), torch.tensor([time, time]), torch.tensor(context)).sample.numpy()

  @torch.inference_mode()
  def decode(self, latents):
    return self.vae.decode(torch.tensor(latents) / self.vae.config.scaling_factor).sample.numpy()

  @torch.inference_mode()
  def image(self, tokens, latents, times, signal):
    context = self.text(torch.tensor(tokens)).last_hidden_state
    x = torch.tensor(latents)
    for time_, (now, after) in zip(times, signal):
      without, with_text = self.unet(
        torch.cat([x, x]), torch.tensor([time_, time_]), context).sample.chunk(2)
      x = stepped(x, without + GUIDANCE * (with_text - without), float(now), float(after))
    return self.vae.decode(x / self.vae.config.scaling_factor).sample.numpy()

  def product(self, side):
    x = torch.randn(side, side)
    return median(lambda: x @ x, 5)


class Ours:
  """This library's side, given and giving `[B,C,h,w]`."""

  name = "lmops_jax"

  def __init__(self, folder):
    self.params, configs = {}, {}
    for part, family in (
      ("unet", diffusion.UNET), ("vae", diffusion.AUTOENCODER), ("text_encoder", clip.TEXT)
    ):
      path = folder / part / "config.json"
      fields = json.loads(path.read_text())
      configs[part] = family.read_config(ConfigReader(fields, str(path)))
      with open_source(folder / part, names=FILES) as source:
        self.params[part] = load_params(source, family, configs[part])
    self.config, self.vae_config = configs["unet"], configs["vae"]
    self.unet, self.vae = UNet(configs["unet"]), Autoencoder(configs["vae"])
    self.text = Transformer(configs["text_encoder"], with_unembedding=False)
    self._predict = jax.jit(self._predicted)
    self._decode = jax.jit(self._decoded)
    self._image = jax.jit(self._drawn)

  def _predicted(self, params, latents, time_, context):
    return self.unet.apply({"params": params["unet"]}, latents, time_, context)

  def _decoded(self, params, latents):
    return self.vae.apply(
      {"params": params["vae"]}, from_latents(self.vae_config, latents), method="decode")

  def _drawn(self, params, tokens, latents, times, signal):
    context = self.text.apply({"params": params["text_encoder"]}, tokens)

    def step(x, at):
      time_, (now, after) = at
      out = self._predicted(
        params, jnp.concatenate([x, x]), jnp.broadcast_to(time_, 2), context)
      without, with_text = jnp.split(out, 2)
      return stepped(x, without + GUIDANCE * (with_text - without), now, after), None

    x, _ = jax.lax.scan(step, latents, (times, signal))
    return self._decoded(params, x)

  def predict(self, latents, time_, context):
    return channels_first(self._predict(
      self.params, channels_last(latents), np.array([time_, time_]), context))

  def decode(self, latents):
    return channels_first(self._decode(self.params, channels_last(latents)))

  def image(self, tokens, latents, times, signal):
    return channels_first(
      self._image(self.params, tokens, channels_last(latents), times.astype(np.int32), signal))

  def product(self, side):
    x = jax.random.normal(jax.random.key(0), (side, side))
    multiply = jax.jit(jnp.matmul)
    return median(lambda: multiply(x, x).block_until_ready(), 5)


def channels_last(x):
  return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def channels_first(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


def median(call, repeats):
  """Seconds of a call, the median; the first one is left out."""
  taken = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    call()
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[1:])


def measure(side, work, repeats):
  """For each kind of work, seconds and the result; under "product", operations a second."""
  found = {"product": 2 * PRODUCT**3 / side.product(PRODUCT)}
  for name, inputs in work.items():
    call = functools.partial(getattr(side, name), *inputs)
    found[name] = median(call, repeats[name]), call()
    print(f"{side.name}: {name} {found[name][0]:.3f} s", flush=True)
  return found


def inputs_of(fields, steps):
  """What is computed, the same for both sides."""
  rng = np.random.default_rng(0)
  side, width = fields["unet"]["sample_size"], fields["unet"]["cross_attention_dim"]
  latents = rng.normal(size=(1, 4, side, side)).astype(np.float32)
  context = rng.normal(size=(2, POSITIONS, width)).astype(np.float32)
  tokens = rng.integers(0, 49_000, (2, POSITIONS))
  return {
    "predict": (np.concatenate([latents, latents]), 500, context), "decode": (latents,),
    "image": (tokens, latents, *plan(steps)),
  }


def operations(config, vae_config, steps):
  """Operations of each kind of work, that of the texts left out."""
  side = config.sample_size
  both = 2 * sizing.unet_flops(config, side, side, POSITIONS)
  decoded = sizing.decoder_flops(vae_config, side, side)
  return {"predict": both, "decode": decoded, "image": steps * both + decoded}


def table(found, counted, steps):
  ours, theirs = found["lmops_jax"], found["diffusers"]
  labels = {"predict": "UNet, guided", "decode": "decode", "image": f"image, {steps} steps"}
  yield "| | TFLOP | lmops_jax, s | diffusers, s | ratio | of a product | of a product | apart |"
  yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
  for name, label in labels.items():
    (mine, got), (other, want) = ours[name], theirs[name]
    shares = (counted[name] / seconds / side["product"] for seconds, side in (
      (mine, ours), (other, theirs)))
    apart = np.abs(got - want).max() / np.abs(want).max()
    yield (f"| {label} | {counted[name] / 1e12:.3f} | {mine:.3f} | {other:.3f} | "
           f"{other / mine:.2f} | " + " | ".join(f"{share:.0%}" for share in shares)
           + f" | {apart:.1e} |")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=SIZES, default="sd-1.5")
  parser.add_argument("--steps", type=int, default=4, help="of an image")
  parser.add_argument("--repeats", type=int, default=5, help="of a prediction and a decoding")
  parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
  parser.add_argument("--output", type=Path, help="a file for the table")
  options = parser.parse_args()
  torch.set_num_threads(options.threads)
  fields = SIZES[options.size]
  repeats = {"predict": options.repeats, "decode": options.repeats, "image": 1}
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    build(folder, fields)
    gc.collect()
    work = inputs_of(fields, options.steps)
    for kind in (Peer, Ours):
      side = kind(folder)
      found[kind.name] = measure(side, work, repeats)
      if kind is Ours:
        counted = operations(side.config, side.vae_config, options.steps)
      del side
      gc.collect()
  lines = [
    f"Stable Diffusion, size {options.size}, float32, {os.cpu_count()} cores of "
    f"{platform.machine()}; jax {jax.__version__}, torch {torch.__version__}, diffusers "
    f"{diffusers.__version__}.", "", *table(found, counted, options.steps)]
  text = "\n".join(lines) + "\n"
  print(text)
  if options.output:
    options.output.write_text(text)


if __name__ == "__main__":
  main()
