# ruff: noqa: E402  malloc is set before jax is imported
"""Times a training step of the semi-causal objective against a causal step, and against PyTorch.

    python tests/benchmarks/semi_causal_vs_torch.py --output results/semi_causal_vs_torch.md

The proportions are MetaLM's (arXiv:2206.06336, section 3.1) at a quarter of the widths and a
quarter of the layers: a decoder of 6 x 512 and an encoder of 6 x 256 whose last two layers are
trained, a linear connector, post-norm with DeepNorm's scale, sinusoids in the decoder, learned
positions in the encoder, tied output matrix; rows of 1,024 tokens, spans of 33 to 64 tokens that
are a quarter of each row; AdamW, float32. Three steps take turns and the table gives the median:

* causal: the decoder alone on the same rows,
* semi-causal: spans through the encoder,
* PyTorch, semi-causal: a plain twin with the same weights. It reads all spans of a batch in one
  call too, each padded to the longest, runs the frozen layers without gradients, and learns with
  `torch.optim.AdamW` (fused). Its losses are compared with ours along the way.

"cost over FLOPs" is what the semi-causal step takes more than the causal one, over what it computes
more: (time ratio) / (ratio of matrix products that the step needs, frozen layers counted forwards
only, padding and logits of positions that are not learned not counted).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from lmops_jax.data.span_rows import SpanRows
from lmops_jax.data.spans import NoSpans, RandomSpans
from lmops_jax.models.connectors import LinearConnectorConfig
from lmops_jax.models.encoders import TextEncoderConfig
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.models.universal import Docking, UniversalConfig, UniversalLM
from lmops_jax.sizing.flops import forward_flops_per_token
from lmops_jax.systems.metalm.training import learner
from lmops_jax.training import optimizers

WINDOW, TOP = 64, 2
SHORT = 512  # tokens of rows whose scores are written out, as they are fastest
BOS, EOS, PAD = 1, 2, 0
RATE, BETAS, EPS, DECAY = 1e-4, (0.9, 0.98), 1e-6, 0.01


def universal(layers: int, width: int, length: int, vocab: int) -> UniversalConfig:
  """Decoder and encoder, whose width is half of the decoder's."""
  shared = dict(
    vocab_size=vocab, num_layers=layers, norm="layer", norm_placement="post", final_norm=False,
    residual_scale="deepnorm", branch_gain="deepnorm", initialization="xavier", activation="gelu",
    gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-5,
    scan_layers=False)
  text = TransformerConfig(
    **shared, width=width, num_heads=width // 64, mlp_width=4 * width, max_length=length,
    positions="sinusoidal", tied_embeddings=True, embedding_scale=math.sqrt(width),
    attention="xla" if length <= SHORT else "chunked")
  trunk = TransformerConfig(
    **shared, width=width // 2, num_heads=max(width // 128, 1), mlp_width=2 * width, max_length=512,
    positions="learned", causal=False)
  return UniversalConfig(
    text, reader=Docking(TextEncoderConfig(trunk, TOP), LinearConnectorConfig(), False))


class Rows:
  """Packed rows of made-up documents, as `SpanRows` takes them."""

  bos_id, eos_id, pad_id = BOS, EOS, PAD

  def __init__(self, num: int, length: int, vocab: int):
    self.length, rng = length, np.random.default_rng(0)
    # Ids by Zipf's law, and the end of a document once in 400 tokens.
    ids = 3 + np.minimum(rng.zipf(1.2, (num, length + 1)), vocab - 3) - 1
    self.rows = np.where(rng.random(ids.shape) < 1 / 400, EOS, ids).astype(np.int32)
    self.rows[:, 0] = BOS

  def __len__(self):
    return len(self.rows)

  def batch(self, indices):
    rows = self.rows[np.asarray(indices)]
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "example_id": np.asarray(indices),
            "loss_mask": np.ones((len(rows), self.length), np.float32)}


class Ours:
  """This library's step."""

  def __init__(self, config: UniversalConfig, batches):
    model = UniversalLM(config)
    rules = {".*": optimizers.adamw(RATE, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=DECAY,
                                   clip_norm=None)}
    if config.reader is not None:
      rules = {"reader/(?!top/).*": None, **rules}
    self.params = nn.unbox(model.init(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    optimizer = optimizers.partition(rules)
    taught = learner(model, optimizer, 1, None)
    self.key = jax.random.key(0)
    self.batches = [{k: jnp.asarray(v) for k, v in b.items()} for b in batches]
    self.state = taught.init(self.key, jax.tree.map(jnp.copy, self.params))
    self.compiled = jax.jit(taught.step, donate_argnums=0).lower(
      self.state, self.batches[0], self.key).compile()

  def step(self, number: int) -> float:
    batch = self.batches[number % len(self.batches)]
    self.state, metrics = self.compiled(self.state, batch, self.key)
    return float(metrics["loss_sum"] / metrics["num_examples"])


class Layers(torch.nn.Module):
  """Post-norm layers with the weights of one of our stacks."""

  def __init__(self, params, config: TransformerConfig, first: int, last: int):
    super().__init__()
    self.scale, self.heads = config.residual_factor, config.num_heads
    self.causal, self.eps = config.causal, config.norm_eps

    def parameter(*path, shape):
      x = params
      for name in path:
        x = x[name]
      return torch.nn.ParameterList(
        torch.from_numpy(np.asarray(x[i]).reshape(shape).copy()) for i in range(first, last))

    d, f = config.width, config.mlp_width
    at = "attention"
    self.qkv_kernel = torch.nn.ParameterList(
      torch.cat(k, 1) for k in zip(*(
        parameter(at, n, "kernel", shape=(d, d)) for n in ("query", "key", "value"))))
    self.qkv_bias = torch.nn.ParameterList(
      torch.cat(b) for b in zip(*(
        parameter(at, n, "bias", shape=(d,)) for n in ("query", "key", "value"))))
    self.out_kernel = parameter(at, "out", "kernel", shape=(d, d))
    self.out_bias = parameter(at, "out", "bias", shape=(d,))
    self.up_kernel = parameter("mlp", "up", "kernel", shape=(d, f))
    self.up_bias = parameter("mlp", "up", "bias", shape=(f,))
    self.down_kernel = parameter("mlp", "down", "kernel", shape=(f, d))
    self.down_bias = parameter("mlp", "down", "bias", shape=(d,))
    self.norms = torch.nn.ModuleDict({
      name: torch.nn.ParameterList(
        [*parameter(name, "scale", shape=(d,)), *parameter(name, "bias", shape=(d,))])
      for name in ("attention_norm", "mlp_norm")})

  def forward(self, x, mask=None):
    num = len(self.out_kernel)

    def normed(y, name, i):
      table = self.norms[name]
      return F.layer_norm(y, y.shape[-1:], table[i], table[num + i], self.eps)

    for i in range(num):
      b, s, d = x.shape
      q, k, v = (x @ self.qkv_kernel[i] + self.qkv_bias[i]).view(
        b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
      y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
      y = y.transpose(1, 2).reshape(b, s, d) @ self.out_kernel[i] + self.out_bias[i]
      x = normed(self.scale * x + y, "attention_norm", i)
      y = F.gelu(x @ self.up_kernel[i] + self.up_bias[i]) @ self.down_kernel[i] + self.down_bias[i]
      x = normed(self.scale * x + y, "mlp_norm", i)
    return x


class Twin(torch.nn.Module):
  """The semi-causal model in PyTorch, from our parameters."""

  def __init__(self, config: UniversalConfig, params):
    super().__init__()
    text, reader = config.text, config.reader.encoder.trunk
    low = reader.num_layers - TOP

    def parameter(x):
      return torch.nn.Parameter(torch.from_numpy(np.asarray(x).copy()))

    self.words = parameter(params["text"]["embedding"])
    self.scale = text.embedding_scale
    self.register_buffer("sinusoids", sinusoids(text.width, text.max_length))
    self.decoder = Layers(params["text"]["layers"], text, 0, text.num_layers)
    trunk = params["reader"]["trunk"]
    self.encoder_words = parameter(trunk["embedding"])
    self.encoder_positions = parameter(trunk["position_embedding"])
    self.lower = Layers(trunk["layers"], reader, 0, low)
    self.top = Layers(params["reader"]["top"]["layers"], reader, 0, TOP)
    connector = params["reader_connector"]["dense"]
    self.connector = parameter(connector["kernel"].reshape(reader.width, text.width))
    self.connector_bias = parameter(connector["bias"].reshape(text.width))
    self.lower.requires_grad_(False)
    self.encoder_words.requires_grad_(False)
    self.encoder_positions.requires_grad_(False)

  def forward(self, batch):
    with torch.no_grad():
      ids, is_real = batch["span_ids"], batch["span_mask"]
      mask = is_real[:, None, None, :]
      x = self.encoder_words[ids] + self.encoder_positions[: ids.shape[1]]
      x = self.lower(x, mask)
    x = self.top(x, mask)
    vectors = x[batch["span_place"]] @ self.connector + self.connector_bias
    tokens = batch["tokens"]
    words = self.words[tokens].view(-1, self.words.shape[1])
    words = words.index_put((batch["row_place"],), vectors).view(*tokens.shape, -1)
    hidden = self.decoder(words * self.scale + self.sinusoids[: tokens.shape[1]])
    learned = batch["loss_mask"]
    return F.cross_entropy(hidden[learned] @ self.words.T, batch["targets"][learned])


def sinusoids(width: int, length: int) -> torch.Tensor:
  """Sines, then cosines, of positions, as `models.positions` has them."""
  half = width // 2
  rates = np.exp(-math.log(10_000) / (half - 1) * np.arange(half, dtype=np.float32))
  angles = np.arange(length, dtype=np.float32)[:, None] * rates
  return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32))


class Peer:
  """PyTorch's step."""

  def __init__(self, config, params, batches):
    self.model = Twin(config, params)
    trained = [p for p in self.model.parameters() if p.requires_grad]
    self.optimizer = torch.optim.AdamW(
      trained, RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    self.batches = [spans_apart(batch) for batch in batches]

  def step(self, number: int) -> float:
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.model(self.batches[number % len(self.batches)])
    loss.backward()
    self.optimizer.step()
    return float(loss.detach())


def spans_apart(batch):
  """A packed batch with each span in a row of its own, padded to the longest."""
  spans, row_place = [], []
  segments, index = batch["encoder_segments"], batch["vector_index"]
  for row in range(len(segments)):
    for number in range(1, segments[row].max(initial=0) + 1):
      at = np.flatnonzero(segments[row] == number)
      spans.append(batch["encoder_tokens"][row, at])
      row_place += [row * index.shape[1] + int(np.flatnonzero(index[row] == p)[0]) for p in at[1:]]
  longest = max(map(len, spans))
  ids = np.stack([np.pad(x, (0, longest - len(x))) for x in spans])
  mask = np.stack([np.arange(longest) < len(x) for x in spans])
  is_used = mask.copy()
  is_used[:, 0] = False  # the start token's vector is left out
  return {
    "span_ids": torch.from_numpy(ids).long(), "span_mask": torch.from_numpy(mask),
    "span_place": tuple(torch.from_numpy(x) for x in np.nonzero(is_used)),
    "row_place": torch.tensor(row_place), "tokens": torch.from_numpy(batch["tokens"]).long(),
    "targets": torch.from_numpy(batch["targets"]).long(),
    "loss_mask": torch.from_numpy(batch["loss_mask"] > 0)}


def needed_flops(config: UniversalConfig, batches) -> tuple[float, float]:
  """Products of a causal and of a semi-causal step, the second as far as it needs them."""
  rows, length = batches[0]["tokens"].shape
  causal = 3 * rows * length * forward_flops_per_token(config.text, length)
  encoder = config.reader.encoder.trunk
  spans = [np.bincount(s[s > 0]) for b in batches for s in b["encoder_segments"]]
  sizes = np.concatenate([x[1:] for x in spans]) if spans else np.zeros(0)
  low = encoder.num_layers - TOP
  weight = (low + 3 * TOP) / encoder.num_layers  # forwards only below the top
  encoding = sum(
    n * forward_flops_per_token(encoder, int(n), unembedding=False) for n in sizes) * weight
  connecting = 3 * 2 * encoder.width * config.text.width * sizes.sum()
  num_known = sum(np.sum(b["loss_mask"] == 0) for b in batches)
  logits = 3 * 2 * config.text.width * config.text.vocab_size * num_known
  return causal, causal + (encoding + connecting - logits) / len(batches)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--vocab", type=int, default=8192)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--output")
  args = parser.parse_args()
  load = os.getloadavg()[0]
  config = universal(args.layers, args.width, args.length, args.vocab)
  rows = Rows(4 * args.batch, args.length, args.vocab)
  indices = np.arange(4 * args.batch).reshape(4, -1)
  plain = [SpanRows(rows, NoSpans()).batch(i) for i in indices]
  spanned = [SpanRows(rows, RandomSpans(min(WINDOW, args.length // 4))).batch(i) for i in indices]
  semi = Ours(config, spanned)
  sides = {"causal": Ours(dataclasses.replace(config, reader=None), plain), "semi-causal": semi,
           "PyTorch, semi-causal": Peer(config, semi.params, spanned)}
  times = {name: [] for name in sides}
  losses = {name: [] for name in sides}
  for number in range(2 + args.steps):
    for name, side in sides.items():
      began, cpu = time.perf_counter(), time.process_time()
      losses[name].append(side.step(number))
      times[name].append((time.perf_counter() - began, time.process_time() - cpu))
  median = {name: np.median(found[2:], axis=0) for name, found in times.items()}
  causal, semi_causal = needed_flops(config, spanned)
  ratio, ideal = median["semi-causal"][0] / median["causal"][0], semi_causal / causal
  apart = np.max(np.abs(np.array(losses["semi-causal"]) - losses["PyTorch, semi-causal"]))
  lines = [
    f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax "
    f"{jax.__version__}, torch {torch.__version__}, load {load:.1f} at the start. {args.layers} "
    f"layers, widths {args.width} and {args.width // 2}, {args.batch} rows of {args.length} "
    f"tokens, {args.vocab:,} words; median of {args.steps} steps.",
    "",
    "| step | ms | processor ms | rows/s | against PyTorch |",
    "|---|---|---|---|---|",
  ]
  peer = median["PyTorch, semi-causal"][0]
  for name, (wall, cpu) in median.items():
    against = f"{peer / wall:.2f}" if "semi" in name else ""
    lines.append(
      f"| {name} | {1e3 * wall:,.0f} | {1e3 * cpu:,.0f} | {args.batch / wall:.2f} | {against} |")
  lines += [
    "",
    f"A semi-causal step takes {ratio:.2f} times a causal one and needs {ideal:.2f} times the "
    f"products: cost over FLOPs {ratio / ideal:.2f}.",
    f"Losses of {2 + args.steps} steps differ from PyTorch's by at most {apart:.1e}.",
  ]
  table = "\n".join(lines) + "\n"
  print(table)
  if args.output:
    Path(args.output).write_text(
      "# A semi-causal step against a causal one and against PyTorch\n\nWritten by "
      "`tests/benchmarks/semi_causal_vs_torch.py`, whose docstring says what is timed.\n\n" + table)


if __name__ == "__main__":
  main()
