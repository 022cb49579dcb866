# ruff: noqa: E402  malloc is set before jax is imported
"""Times generation and option scoring against transformers in PyTorch: same weights, same machine.

    python tests/benchmarks/generation_vs_torch.py --model SmolLM2.gguf --text wiki.test.txt \\
        --task sst2/test.jsonl --train sst2/train.jsonl --output results/generation_vs_torch.md

The model is exported to a folder that transformers loads, so both sides hold the same float32
numbers. Both take turns, and the table gives the median. What is timed:

* prefill: prompts of 512 tokens of the text until the first new token (`max_new_tokens=1`),
* decode: 64 further tokens after prompts of 64, the time until the first token taken off,
* beam 8: the same with eight beams of one prompt,
* scoring: 500 rows after 8 demonstrations, two answer options each; once after a first call.
  PyTorch does one forward pass a row, rows sorted by length in batches of 16, logits at the last
  position only; and, a second time, with the demonstrations' keys and values computed once and
  repeated for each batch.

PyTorch runs with its SDPA attention and key/value cache; "compiled" is its static cache under
torch.compile. Bounds: bytes of weights read for each step against the bandwidth of reading the
output matrix, operations against the speed of large float32 products, both measured in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pydoc_data.topics
import resource
import statistics
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

from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.scoring import OptionScorer, Request, total
from lmops_jax.pretrained import exporting
from lmops_jax.pretrained import model as model_lib
from lmops_jax.sizing.flops import forward_flops_per_token, matmul_params

PREFILL, PROMPT, NEW, BEAMS, SHOTS, ROWS, ROW_BATCH = 512, 64, 64, 8, 8, 500, 16


def clock(function) -> tuple[float, float]:
  """Wall and processor seconds of a call."""
  before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
  function()
  wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
  return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def take_turns(functions: dict, repeats: int) -> dict[str, tuple[float, float, float]]:
  """Median wall and processor seconds of each, and seconds of its first call."""
  first = {name: clock(f)[0] for name, f in functions.items()}
  times = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      times[name].append(clock(function))
  return {
    name: (*(statistics.median(column) for column in zip(*rows)), first[name])
    for name, rows in times.items()
  }


def machine() -> tuple[float, float]:
  """Bytes and float32 operations a second: reading a large matrix, multiplying large ones."""
  matrix = jnp.ones((49152, 576), jnp.float32)
  vector = jnp.ones((1, 576), jnp.float32)
  square = jnp.ones((2048, 2048), jnp.float32)
  read = jax.jit(lambda v, m: v @ m.T)
  product = jax.jit(lambda a: a @ a)

  def fastest(function):
    function().block_until_ready()
    return min(clock(lambda: function().block_until_ready())[0] for _ in range(20))

  return (
    matrix.nbytes / fastest(lambda: read(vector, matrix)),
    2 * 2048**3 / fastest(lambda: product(square)),
  )


class Peer:
  """transformers' side."""

  def __init__(self, folder: Path, compiled: bool = False):
    self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    self.model.eval()
    self._options = {}
    if compiled:
      self._options = {"cache_implementation": "static"}
      self.model.forward = torch.compile(self.model.forward, dynamic=False)

  def generate(self, prompts, num_new, num_beams=1):
    ids = torch.tensor(prompts)
    with torch.inference_mode():
      out = self.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new,
        do_sample=False, num_beams=num_beams, pad_token_id=0, **self._options,
      )
    return out[:, ids.shape[1] :].tolist()

  def score(self, prefix, rows, options, share_prefix):
    """Best option of each row; every option is one token."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    choices = [0] * len(rows)
    with torch.inference_mode():
      for start in range(0, len(rows), ROW_BATCH):
        part = order[start : start + ROW_BATCH]
        texts = [rows[i] if share_prefix else prefix + rows[i] for i in part]
        width = max(map(len, texts))
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for j, text in enumerate(texts):
          ids[j, width - len(text) :] = torch.tensor(text)
          mask[j, width - len(text) :] = 1
        cache, positions = None, mask.cumsum(1).clamp(min=1) - 1
        if share_prefix:
          cache = self.model(torch.tensor([prefix]), use_cache=True, logits_to_keep=1)
          cache = cache.past_key_values
          cache.batch_repeat_interleave(len(part))
          mask = torch.cat([torch.ones(len(part), len(prefix), dtype=torch.long), mask], 1)
          positions = positions + len(prefix)
        logits = self.model(
          ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
          use_cache=cache is not None, logits_to_keep=1,
        ).logits[:, -1]
        best = logits[:, options].argmax(1).tolist()
        for i, choice in zip(part, best):
          choices[i] = choice
    return choices


def generation_rows(generator, peers, ids, repeats):
  """Rows of the table and whether both sides chose the same tokens."""
  rows = []
  for name, batch, length, num_new, beams in (
    ("prefill, batch 1", 1, PREFILL, 1, 1), ("prefill, batch 8", 8, PREFILL, 1, 1),
    ("decode, batch 1", 1, PROMPT, NEW, 1), ("decode, batch 16", 16, PROMPT, NEW, 1),
    (f"beam {BEAMS}", 1, PROMPT, NEW, BEAMS),
  ):
    prompts = [ids[i * length : (i + 1) * length] for i in range(batch)]
    answers: dict[str, list] = {}

    def ours(num=num_new, prompts=prompts, beams=beams, answers=answers):
      options = GenerationOptions(
        max_new_tokens=num, min_new_tokens=num, num_beams=beams, eos_ids=(0,)
      )
      answers["JAX"] = [g.ids for g in generator.generate_ids(prompts, options)]

    functions = {"JAX": ours}
    for label, peer in peers.items():
      if beams > 1 and label != "PyTorch":
        continue

      def theirs(num=num_new, peer=peer, label=label, prompts=prompts, beams=beams,
                 answers=answers):
        answers[label] = peer.generate(prompts, num, beams)

      functions[label] = theirs
    if num_new > 1:
      base = take_turns(
        {label: (lambda f=f: f(num=1)) for label, f in functions.items()}, repeats
      )
    full = take_turns(functions, repeats)
    tokens = batch * (length if num_new == 1 else num_new - 1)
    for label, (wall, processor, first) in full.items():
      if num_new > 1:
        wall, processor = wall - base[label][0], processor - base[label][1]
      rows.append(dict(
        name=name, side=label, tokens_per_sec=tokens / wall, wall=wall, processor=processor,
        first=first, same=answers[label] == answers["JAX"], batch=batch, beams=beams,
        decode=num_new > 1,
      ))
      print(rows[-1], file=sys.stderr, flush=True)
  return rows


def scoring_rows(source, params, tokenizer, peer, args, repeats):
  """Rows of the table for option scoring, and the accuracy of each side."""
  words = (" negative", " positive")
  read = lambda path: [json.loads(line) for line in Path(path).open(encoding="utf-8")]  # noqa: E731
  test, train = read(args.task)[:ROWS], read(args.train)
  demonstrations = [next(r for r in train[20 * k :] if r["label"] == k % 2) for k in range(SHOTS)]
  shape = "Review: {}\nSentiment:"
  prefix = "".join(shape.format(r["text"]) + words[r["label"]] + "\n\n" for r in demonstrations)
  texts = [shape.format(r["text"]) for r in test]
  prefix_ids = tokenizer.encode(prefix)
  row_ids = [tokenizer.encode(prefix + text)[len(prefix_ids) :] for text in texts]
  options = [tokenizer.encode(word, add_special=False) for word in words]
  labels = [row["label"] for row in test]
  answers = {}
  scorer = OptionScorer(source.model, params)
  requests = [Request(prefix_ids + ids, options) for ids in row_ids]

  def ours():
    answers["JAX"] = [int(np.argmax(total(scores))) for scores in scorer.score(requests)]

  def theirs(share):
    return lambda: answers.update({
      f"PyTorch{', shared prefix' if share else ''}": peer.score(
        prefix_ids, row_ids, [o[0] for o in options], share
      )
    })

  functions = {"JAX": ours, "PyTorch": theirs(False), "PyTorch, shared prefix": theirs(True)}
  out = []
  for label, (wall, processor, first) in take_turns(functions, repeats).items():
    right = np.mean([a == b for a, b in zip(answers[label], labels)])
    same = np.mean([a == b for a, b in zip(answers[label], answers["JAX"])])
    out.append(dict(
      side=label, rows_per_sec=len(test) / wall, wall=wall, processor=processor, first=first,
      accuracy=right, same=same,
    ))
    print(out[-1], file=sys.stderr, flush=True)
  return out, len(prefix_ids), float(np.mean(list(map(len, row_ids))))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True)
  parser.add_argument("--text", help="default: the Python language reference")
  parser.add_argument("--task", help="JSON lines with text and label; leaves out scoring without")
  parser.add_argument("--train", help="rows of the demonstrations; default: the task's own")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--no-compiled", action="store_true", help="leave out torch.compile")
  parser.add_argument("--output")
  args = parser.parse_args()
  args.train = args.train or args.task
  load = os.getloadavg()[0]
  source = model_lib.load(args.model, scan_layers=False)
  tokenizer, params, config = source.tokenizer(), source.params(), source.config
  text = Path(args.text).read_text(encoding="utf-8") if args.text else "\n".join(
    pydoc_data.topics.topics.values()
  )
  ids = tokenizer.encode(text[:100_000], add_special=False)
  bandwidth, speed = machine()
  with tempfile.TemporaryDirectory() as folder:
    exporting.export(Path(folder) / "model", source, params)
    peers = {"PyTorch": Peer(Path(folder) / "model")}
    if not args.no_compiled:
      peers["PyTorch, compiled"] = Peer(Path(folder) / "model", compiled=True)
  generator = Generator(source.model, params, tokenizer)
  rows = generation_rows(generator, peers, ids, args.repeats)
  read_bytes = 4 * matmul_params(config)
  forward = forward_flops_per_token(config, PREFILL)
  lines = [
    f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax "
    f"{jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, load "
    f"{load:.1f} at the start. Reading {bandwidth / 1e9:.1f} GB/s, float32 products "
    f"{speed / 1e9:.0f} GFLOP/s. {Path(args.model).name}, float32; median of {args.repeats}.",
    "",
    "| row | side | tokens/s | against PyTorch | wall s | processor s | first call s | "
    "of bandwidth | of product speed | same tokens |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    peer = next(r for r in rows if r["name"] == row["name"] and r["side"] == "PyTorch")
    steps = row["tokens_per_sec"] / (row["batch"])  # a step serves all rows and beams at once
    used = f"{steps * read_bytes / bandwidth:.0%}" if row["decode"] else ""
    flops = row["tokens_per_sec"] * row["beams"] * (
      forward if not row["decode"] else 2 * matmul_params(config)
    )
    lines.append(
      f"| {row['name']} | {row['side']} | {row['tokens_per_sec']:,.0f} | "
      f"{row['tokens_per_sec'] / peer['tokens_per_sec']:.2f} | {row['wall']:.2f} | "
      f"{row['processor']:.2f} | {row['first']:.1f} | {used} | {flops / speed:.0%} | "
      f"{'yes' if row['same'] else 'no'} |"
    )
  if args.task:
    scored, prefix, rest = scoring_rows(
      source, params, tokenizer, peers["PyTorch"], args, 1
    )
    peer = scored[1]["rows_per_sec"]
    lines += [
      "",
      f"Scoring: {ROWS} rows, {SHOTS} demonstrations of {prefix} tokens together, rows of "
      f"{rest:.0f} tokens.",
      "",
      "| side | rows/s | against PyTorch | wall s | processor s | first call s | accuracy | same "
      "choice |",
      "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
      f"| {r['side']} | {r['rows_per_sec']:.1f} | {r['rows_per_sec'] / peer:.2f} | "
      f"{r['wall']:.1f} | {r['processor']:.1f} | {r['first']:.1f} | {r['accuracy']:.3f} | "
      f"{r['same']:.1%} |"
      for r in scored
    ]
  table = "\n".join(lines) + "\n"
  print(table)
  if args.output:
    Path(args.output).write_text(
      "# Generation and scoring against PyTorch\n\nWritten by "
      "`tests/benchmarks/generation_vs_torch.py`, whose docstring says what is timed.\n\n" + table
    )


if __name__ == "__main__":
  main()
