# ruff: noqa: E402  malloc is set before jax is imported
"""Times a docked language model against transformers' port of Kosmos-2 in PyTorch: same weights.

    python tests/benchmarks/kosmos_vs_torch.py --layers 8 --output results/kosmos_vs_torch.md

The model has the published widths (decoder 2048 x 8192, tower 1024 x 4096, 65,037 ids, 64 vectors
an image) and `--layers` of the 24 layers of each stack, at random weights, which the port writes
into a folder and this library loads. Both sides hold float32 and take turns; the table gives the
median. What is timed:

* encode: images to their vectors, 1 and 8 at a time,
* prefill: an image and three words, and the first new token, encoding included,
* decode: 32 new tokens behind these, with the image's vectors made beforehand,
* phrase grounding: an image and `<grounding><phrase> three words</phrase>`, and as many tokens as a
  box takes, four (`<object>`, two cells, `</object>`), free, by greedy search, encoding included,
* caption: an image and three words, and 32 new tokens by greedy search, encoding included,
* beam 5: the same for one image with five beams,
* candidates: eight context images and one of six candidates in each of six prompts, the
  log-probability of one token after each (a Raven item). This library encodes each of the 14 images
  once and reads the common beginning once. The port encodes the 14 images once too and reads six
  whole prompts in one batch; a second row encodes 54 images, as its processor hands them over.

PyTorch runs with its SDPA attention and key/value cache.

What bounds a row: the operations that its side computes over the machine's speed in a large float32
product, or the bytes of weights and of cached keys and values that it reads over the speed of a
copy, whichever takes longer; both speeds are measured at the start. "of it" is that time over the
time taken. Weights count once for each call of the tower and for each pass of the decoder.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from generation_vs_torch import take_turns

from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.scoring import OptionScorer, Request
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained import model as model_lib
from lmops_jax.sizing import docked, flops

NEW, SIZE, SLOTS, VOCAB = 32, 224, 64, 65_037
BOS, IMAGE, IMAGE_END, FIRST_SLOT = 0, 64_003, 64_004, 4
CAPTION, SO_FAR, NEXT, QUESTION = [712, 1648, 9], [300, 301], [400, 401, 402], [500, 501, 502]
YES, NUM_CONTEXT, NUM_CANDIDATES = 777, 8, 6
GROUNDING, PHRASE, PHRASE_END, BOX_TOKENS = 64_012, 64_007, 64_008, 4
WHERE = [GROUNDING, PHRASE, 10, 43867, 302, PHRASE_END]


def build(layers: int):
  """The port at the published widths, with weights large enough for tokens to differ."""
  torch.manual_seed(0)
  config = transformers.Kosmos2Config(
    text_config=dict(layers=layers, vocab_size=VOCAB),
    vision_config=dict(num_hidden_layers=layers), latent_query_num=SLOTS,
    attn_implementation="sdpa")
  model = transformers.Kosmos2ForConditionalGeneration(config).float().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:
        parameter.copy_(parameter.shape[-1] ** -0.5 * torch.randn_like(parameter))
  return model


def row(parts):
  """Ids of words and image blocks, and which are slots; an image is an `int` of its own number."""
  ids, index = [BOS], [-1]
  for part in parts:
    if isinstance(part, list):
      ids, index = ids + part, index + [-1] * len(part)
    else:
      ids += [IMAGE, *range(FIRST_SLOT, FIRST_SLOT + SLOTS), IMAGE_END]
      index += [-1, *range(part * SLOTS, (part + 1) * SLOTS), -1]
  return ids, index


class Peer:
  """transformers' side."""

  def __init__(self, model):
    self.model = model

  @torch.inference_mode()
  def encode(self, pixels):
    return self.model.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
                                         return_dict=True).pooler_output

  @torch.inference_mode()
  def continued(self, vectors, num_new, num_beams=1, words=CAPTION):
    ids, index = row([0, words])
    ids = torch.tensor([ids] * len(vectors))
    slots = torch.tensor([[int(i >= 0) for i in index]] * len(vectors))
    out = self.model.generate(
      image_embeds=vectors, input_ids=ids, image_embeds_position_mask=slots,
      attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new,
      do_sample=False, num_beams=num_beams)
    return out[:, ids.shape[1] :].tolist()

  @torch.inference_mode()
  def candidates(self, pixels, each_anew):
    rows = [row(item(c)) for c in range(NUM_CANDIDATES)]
    ids = torch.tensor([ids for ids, _ in rows])
    slots = torch.tensor([[int(i >= 0) for i in index] for _, index in rows])
    wanted = [i for c in range(NUM_CANDIDATES) for i in (*range(NUM_CONTEXT), NUM_CONTEXT + c)]
    vectors = self.encode(pixels[wanted]) if each_anew else self.encode(pixels)[wanted]
    logits = self.model(
      input_ids=ids, image_embeds=vectors, image_embeds_position_mask=slots,
      attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1).logits[:, -1]
    return torch.log_softmax(logits, -1)[:, YES].tolist()


def item(candidate):
  """A Raven item with one of its candidates, as parts of a row."""
  return [SO_FAR, *range(NUM_CONTEXT), NEXT, NUM_CONTEXT + candidate, QUESTION]


class Ours:
  """This library's side; pixels are normalised floats, as the port takes them."""

  def __init__(self, source, params):
    text = Transformer(source.config.text)
    self.generator = Generator(text, params["text"])
    self.scorer = OptionScorer(text, params["text"])
    self.encoded = jax.jit(lambda images: source.model.apply(
      {"params": params}, images, method="image_vectors"))

  def encode(self, pixels):
    return np.asarray(self.encoded(pixels))

  def continued(self, vectors, num_new, num_beams=1, words=CAPTION):
    ids, index = row([0, words])
    prompts = [Prompt(ids, of_picture, index) for of_picture in vectors]
    options = GenerationOptions(
      max_new_tokens=num_new, min_new_tokens=num_new, num_beams=num_beams, eos_ids=(2,))
    return [answer.ids for answer in self.generator.generate_ids(prompts, options)]

  def candidates(self, pixels):
    vectors = self.encode(pixels).reshape(len(pixels) * SLOTS, -1)
    rows = [row(item(c)) for c in range(NUM_CANDIDATES)]
    requests = [Request(Prompt(ids, vectors, index), [[YES]]) for ids, index in rows]
    return [float(scores[0][0]) for scores in self.scorer.score(requests)]


class Costs:
  """Operations and bytes of each row, counted from shapes."""

  def __init__(self, config, params):
    def size(tree):
      return sum(4 * math.prod(x.shape) for x in jax.tree.leaves(tree))

    self._config, self._of_picture = config, docked.encoding_flops(config)
    self._tower, self._decoder = size([params["vision"], params["connector"]]), size(params["text"])

  def encode(self, pictures):
    return pictures * self._of_picture, self._tower

  def read(self, rows, length, before=0):
    """A pass of the decoder over `length` new tokens of each row, behind `before` others."""
    text = self._config.text
    # A prompt has logits at its last position alone; attention is that of the middle position.
    head = 2 * text.token_width * text.vocab_size
    each = flops.forward_flops_per_token(text, 2 * before + length, unembedding=False)
    cached = 2 * 4 * rows * before * text.num_layers * text.key_heads * text.head_width
    return rows * (length * each + head), self._decoder + cached

  def continued(self, pictures, num_new, beams=1, words=CAPTION):
    start = len(row([0, words])[0])
    steps = [self.read(pictures * beams, 1, start + i) for i in range(num_new - 1)]
    return added(self.read(pictures, start), *steps)

  def candidates(self, pictures, shared):
    length = len(row(item(0))[0])
    alone = len(row([NUM_CONTEXT, QUESTION])[0]) - 1
    if not shared:
      return added(self.encode(pictures), self.read(NUM_CANDIDATES, length))
    return added(self.encode(pictures), self.read(1, length - alone),
                 self.read(NUM_CANDIDATES, alone, length - alone))


def added(*costs):
  return tuple(map(sum, zip(*costs)))


def machine_speeds() -> tuple[float, float]:
  """Operations a second of a float32 product, and bytes a second read and written by a copy."""
  def best(function, *inputs):
    function(*inputs).block_until_ready()
    times = []
    for _ in range(5):
      began = time.perf_counter()
      function(*inputs).block_until_ready()
      times.append(time.perf_counter() - began)
    return min(times)

  size, length = 2048, 1 << 26
  square, vector = jnp.ones((size, size)), jnp.ones((length,))
  return (2 * size**3 / best(jax.jit(jnp.matmul), square, square),
          2 * 4 * length / best(jax.jit(lambda x: x + 1), vector))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--rows", default="", help="only rows with this in their name")
  parser.add_argument("--output")
  args = parser.parse_args()
  load = os.getloadavg()[0]
  model = build(args.layers)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    source = model_lib.load(folder)
    params = source.params()
    ours, costs = Ours(source, params), Costs(source.config, params)
  peak, bandwidth = machine_speeds()
  peer = Peer(model)
  pixels = np.random.default_rng(0).normal(
    size=(NUM_CONTEXT + NUM_CANDIDATES, SIZE, SIZE, 3)).astype(np.float32)
  rows = []

  def time_row(name, unit, amount, of_ours, of_peers, cost):
    if args.rows not in name:
      return
    found = {}
    functions = {"JAX": lambda: found.update({"JAX": of_ours()})}
    for label, function in of_peers.items():
      functions[label] = lambda label=label, function=function: found.update({label: function()})
    for label, (wall, processor, first) in take_turns(functions, args.repeats).items():
      num_flops, num_bytes = cost[label]
      times = {"FLOPs": num_flops / peak, "bytes": num_bytes / bandwidth}
      bound = max(times, key=times.get)
      rows.append((name, label, unit, amount / wall, wall, processor, first,
                   agreement(found[label], found["JAX"]),
                   (num_flops / 1e9, num_bytes / 1e9, bound, times[bound] / wall)))
      print(rows[-1], file=sys.stderr, flush=True)

  for batch in (1, 8):
    time_row(f"encode, batch {batch}", "images/s", batch,
             lambda b=batch: ours.encode(pixels[:b]),
             {"PyTorch": lambda b=batch: peer.encode(pixels[:b]).numpy()},
             dict.fromkeys(("JAX", "PyTorch"), costs.encode(batch)))

  def time_answers(name, unit, amount, batch, *how):
    """A row of which an image is encoded and continued."""
    time_row(name, unit, amount,
             lambda: ours.continued(ours.encode(pixels[:batch]), *how),
             {"PyTorch": lambda: peer.continued(peer.encode(pixels[:batch]), *how)},
             dict.fromkeys(("JAX", "PyTorch"),
                           added(costs.encode(batch), costs.continued(batch, *how))))

  for batch in (1, 8):
    time_answers(f"prefill, batch {batch}", "rows/s", batch, batch, 1)
  for batch in (1, 8):
    made, theirs = ours.encode(pixels[:batch]), peer.encode(pixels[:batch])
    time_row(f"decode, batch {batch}", "tokens/s", batch * NEW,
             lambda made=made: ours.continued(made, NEW),
             {"PyTorch": lambda theirs=theirs: peer.continued(theirs, NEW)},
             dict.fromkeys(("JAX", "PyTorch"), costs.continued(batch, NEW)))
  for batch in (1, 8):
    time_answers(
      f"phrase grounding, batch {batch}", "rows/s", batch, batch, BOX_TOKENS, 1, WHERE)
  for batch, beams in ((1, 1), (8, 1), (1, 5)):
    name = f"caption, batch {batch}" if beams == 1 else f"caption, {beams} beams"
    time_answers(name, "tokens/s", batch * NEW, batch, NEW, beams)
  time_row(f"{NUM_CANDIDATES} candidates", "items/s", 1, lambda: ours.candidates(pixels),
           {"PyTorch": lambda: peer.candidates(pixels, False),
            "PyTorch, 54 images": lambda: peer.candidates(pixels, True)},
           {"JAX": costs.candidates(len(pixels), True),
            "PyTorch": costs.candidates(len(pixels), False),
            "PyTorch, 54 images": costs.candidates(54, False)})
  lines = [
    f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax "
    f"{jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, load "
    f"{load:.1f} at the start. {args.layers} of 24 layers, float32; median of {args.repeats}. A "
    f"product of 2048 x 2048 ran at {peak / 1e9:,.0f} GFLOP/s, a copy at {bandwidth / 1e9:.1f} "
    "GB/s.",
    "",
    "| row | side | speed | against PyTorch | wall s | processor s | first call s | agreement | "
    "GFLOP | GB | bound by | of it |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for name, label, unit, speed, wall, processor, first, same, bounds in rows:
    num_gflops, num_gbytes, bound, share = bounds
    of_peer = next(r[3] for r in rows if r[0] == name and r[1] == "PyTorch")
    lines.append(f"| {name} | {label} | {speed:.2f} {unit} | {speed / of_peer:.2f} | {wall:.2f} | "
                 f"{processor:.2f} | {first:.1f} | {same} | {num_gflops:,.0f} | {num_gbytes:.1f} | "
                 f"{bound} | {share:.0%} |")
  table = "\n".join(lines) + "\n"
  print(table)
  if args.output:
    Path(args.output).write_text(
      "# A docked language model against the port of Kosmos-2\n\nWritten by "
      "`tests/benchmarks/kosmos_vs_torch.py`, whose docstring says what is timed.\n\n" + table)


def agreement(found, wanted) -> str:
  """How far two answers are apart: tokens that are equal, or the largest difference."""
  if isinstance(found, list) and isinstance(found[0], list):
    same = np.mean([a == b for x, y in zip(found, wanted) for a, b in zip(x, y)])
    return f"{same:.0%} of tokens"
  return f"{np.abs(np.asarray(found) - np.asarray(wanted)).max():.1e}"


if __name__ == "__main__":
  main()
