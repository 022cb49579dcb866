"""Time and memory of many demonstrations: in groups, as one text, and in groups in PyTorch.

    python tests/benchmarks/structured_prompting_vs_torch.py --model SmolLM2.gguf \\
        --task sst2/test.jsonl --train sst2/train.jsonl --output FILE
    ... --task sst5/test.jsonl --train sst5/train.jsonl --words "very negative" negative neutral \\
        positive "very positive"      # answers of several tokens

For each number of demonstrations: reading them into keys and values, then 100 rows, by default with
two answer words of one token each. The model is exported to a folder that transformers loads, so
all sides hold the same float32 numbers, and all get the same groups of token ids.

* groups, JAX: `prefixes.read_groups` and `OptionScorer`, as `lmops structured-prompting`.
* one text, JAX: the same demonstrations as one ordinary context, attention in chunks; beyond the
  positions that the model was trained on, for its cost only.
* groups, PyTorch: the published way for Hugging Face models, plainly: a forward pass a group with
  `use_cache`, keys and values put together, then a forward pass a row with the logits at its last
  position, or, where an answer has several tokens, one of prompt and answer for each answer, with
  the mean of its tokens' log-probabilities; `ln M` on the row's own scores through a 4D mask.

Each side and number is a process of its own, and a second call is timed. Memory is the rise of the
peak resident size over reading and rows above what the process held with the model loaded. Where
JAX finds a GPU all sides run on it (products in TF32) and memory is the most that the side's
allocator gave out, with the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import process_memory  # beside this script

from lmops_jax.sizing.memory import keep_freed_memory

TEMPLATE = "Review: {text}\nSentiment: {label}"
SIDES = ("groups, JAX", "one text, JAX", "groups, PyTorch")


def inputs(args):
  """Groups, requests and labels, the same for every side."""
  from lmops_jax import pretrained
  from lmops_jax.data.tasks import demonstrations, jsonl_task
  from lmops_jax.evaluation import in_context
  from lmops_jax.systems.structured_prompting import pack

  source = pretrained.load(args.model, attention="chunked" if args.side == SIDES[1] else "xla")
  tokenizer = source.tokenizer()
  task = jsonl_task(args.task, TEMPLATE, tuple(args.words))
  pool = jsonl_task(args.train, TEMPLATE, tuple(args.words)).rows
  rows = demonstrations(task.rows, args.rows, seed=1000)
  encoder = in_context.Encoder(tokenizer, start=())
  demos = [encoder.encode(row.demonstration + "\n\n")
           for row in demonstrations(pool, args.count, seed=0)]
  budget = sum(map(len, demos)) if args.side == SIDES[1] else args.window
  groups = pack(demos, budget)
  requests = [encoder.split(row.prompt, row.options) for row in rows]
  return source, groups, requests, [row.label for row in rows]


def jax_side(args):
  import jax

  from lmops_jax.decoding import prefixes
  from lmops_jax.decoding.scoring import OptionScorer

  source, groups, requests, labels = inputs(args)
  scorer = OptionScorer(source.model, source.params())

  def read():
    return jax.block_until_ready(
      prefixes.read_groups(source.model, scorer.params, groups.ids, groups.mask))

  def score(prefix):
    found = scorer.score(requests, prefix=prefix)
    return [max(range(len(of_row)), key=lambda i: float(of_row[i].mean())) for of_row in found]

  def peak():
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

  return groups, read, score, labels, peak


def torch_side(args):
  import torch
  import transformers

  torch.set_num_threads(args.threads)
  torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU, as in JAX
  torch.set_default_device("cuda" if args.gpu else "cpu")
  _, groups, requests, labels = inputs(args)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    args.folder, dtype=torch.float32, attn_implementation="sdpa").eval().to(
      torch.get_default_device())
  num_groups, window = groups.ids.shape
  mask = torch.tensor(groups.mask)

  @torch.no_grad()
  def read():
    caches = []
    for ids, seen in zip(groups.ids, groups.mask):
      start = int(seen.argmax())
      out = model.model(
        input_ids=torch.tensor(ids[None, start:], dtype=torch.long),
        position_ids=torch.arange(start, window)[None], use_cache=True)
      caches.append(out.past_key_values)
    layers = [
      tuple(torch.cat([getattr(cache.layers[i], name) for cache in caches], dim=2)
            for name in ("keys", "values"))
      for i in range(model.config.num_hidden_layers)]
    if args.gpu:
      torch.cuda.synchronize()
    return layers

  def logits(layers, ids, count):
    """`[count, V]` at the last positions of a text behind the groups."""
    cache, length = transformers.DynamicCache(), len(ids)
    for i, (keys, values) in enumerate(layers):
      cache.update(keys, values, i)
    own = torch.full((length, length), -1e30).triu(1)
    own += torch.where(own == 0, math.log(num_groups), 0.0)
    bias = torch.cat([torch.zeros(length, int(mask.sum())), own], dim=1)[None, None]
    hidden = model.model(
      input_ids=torch.tensor([ids]), attention_mask=bias,
      position_ids=window + torch.arange(length)[None], past_key_values=cache,
    ).last_hidden_state
    return model.lm_head(hidden[0, -count:])

  def mean_of(layers, context, option):
    last = logits(layers, [*context, *option], len(option) + 1)[:-1].log_softmax(-1)
    return float(last[torch.arange(len(option)), torch.tensor(option)].mean())

  @torch.no_grad()
  def score(layers):
    chosen = []
    for request in requests:
      if all(len(option) == 1 for option in request.options):
        values = logits(layers, request.context, 1)[0, [i for i, in request.options]].tolist()
      else:
        values = [mean_of(layers, request.context, option) for option in request.options]
      chosen.append(values.index(max(values)))
    return chosen

  return groups, read, score, labels, torch.cuda.max_memory_allocated


def worker(args) -> None:
  keep_freed_memory()
  make = torch_side if args.side == SIDES[2] else jax_side
  groups, read, score, labels, device_peak = make(args)
  before = process_memory.settled_bytes()
  process_memory.restart_peak()
  start = time.perf_counter()
  chosen = score(read())
  first = time.perf_counter() - start
  memory = device_peak() if args.gpu else process_memory.peak_bytes() - before
  start = time.perf_counter()
  prefix = read()
  between = time.perf_counter()
  chosen = score(prefix)
  end = time.perf_counter()
  print(json.dumps({
    "read_s": between - start, "rows_s": end - between, "first_s": first, "memory": memory,
    "tokens": groups.num_tokens, "groups": groups.num_groups, "chosen": chosen,
    "accuracy": sum(a == b for a, b in zip(chosen, labels)) / len(labels),
  }))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True)
  parser.add_argument("--task", required=True)
  parser.add_argument("--train", required=True)
  parser.add_argument("--words", nargs="+", default=["negative", "positive"])
  parser.add_argument("--counts", type=int, nargs="+", default=[32, 128, 512, 1024])
  parser.add_argument("--window", type=int, default=1984, help="most tokens of a group")
  parser.add_argument("--rows", type=int, default=100)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--largest-text", type=int, default=512,
                      help="most demonstrations as one text, whose time grows with the square")
  parser.add_argument("--output", type=Path)
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument("--folder", help=argparse.SUPPRESS)
  parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--gpu", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.side is not None:
    worker(args)
    return
  # In a process of its own, so that this one holds no memory of the GPU.
  device = subprocess.run(
    [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"], check=True,
    stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  os.environ["JAX_PLATFORMS"] = "cpu"
  from lmops_jax import pretrained
  from lmops_jax.pretrained import exporting

  lines = [
    "| demonstrations | side | groups | tokens | read s | 100 rows s | together s | JAX's "
    "groups are faster by | peak MiB | accuracy | choices as JAX's |",
    "|---|---|---|---|---|---|---|---|---|---|---|"]
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / "model"
    exporting.export(str(folder), pretrained.load(args.model), dtype="float32")
    for count in args.counts:
      found = {}
      for side in SIDES:
        if side == SIDES[1] and count > args.largest_text:
          continue
        command = [
          sys.executable, __file__, "--model", args.model, "--task", args.task, "--train",
          args.train, "--window", str(args.window), "--rows", str(args.rows), "--threads",
          str(args.threads), "--side", side, "--count", str(count), "--folder", str(folder),
          *(["--gpu"] if device != "cpu" else []), "--words", *args.words]
        env = environment | ({"JAX_PLATFORMS": "cpu"} if side == SIDES[2] else {})
        out = subprocess.run(
          command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
        found[side] = json.loads(out.splitlines()[-1])
        print(count, side, {k: v for k, v in found[side].items() if k != "chosen"},
              file=sys.stderr, flush=True)
      ours = found[SIDES[0]]
      for side, r in found.items():
        together, of_ours = (x["read_s"] + x["rows_s"] * 100 / args.rows for x in (r, ours))
        same = sum(a == b for a, b in zip(r["chosen"], ours["chosen"]))
        lines.append(
          f"| {count:,} | {side} | {r['groups']} | {r['tokens']:,} | {r['read_s']:.1f} | "
          f"{r['rows_s'] * 100 / args.rows:.1f} | {together:.1f} | {together / of_ours:.2f} | "
          f"{r['memory'] / 2**20:,.0f} | {r['accuracy']:.2f} | {same} of {args.rows} |")
  import jax
  import torch
  import transformers

  text = (
    "# Many demonstrations: groups against one text, and against PyTorch\n\n"
    "Written by `tests/benchmarks/structured_prompting_vs_torch.py`, whose docstring says what is "
    f"timed.\n\n{platform.machine()}, {args.threads} cores, device {device}, "
    f"Python {platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, "
    f"transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f} at the end. "
    f"{Path(args.model).name}, float32; groups of at most {args.window:,} tokens; {args.rows} rows "
    f"of {Path(args.task).parent.name}, answers {', '.join(args.words)}.\n\n"
    + "\n".join(lines) + "\n")
  print(text)
  if args.output is not None:
    args.output.write_text(text)


if __name__ == "__main__":
  main()
