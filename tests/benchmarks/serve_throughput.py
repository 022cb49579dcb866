# ruff: noqa: E402  malloc is set before jax is imported
"""Times `lmops serve` with one client and with eight, and transformers behind the same prompts.

    python tests/benchmarks/serve_throughput.py --model SmolLM2.gguf \\
        --output results/serve_throughput.md

The server runs in this process, its clients are threads that read streams over HTTP. Every answer
is greedy and exactly `--new` tokens long, each prompt another one. The model is exported to a
folder that transformers loads, so both sides hold the same float32 numbers; transformers answers

* with `generate`, one prompt after the other, as a server without batching does,
* with `generate`, all prompts as one padded batch, which no request could join,
* with `generate_batch`, its own continuous batching, if this release runs it on a CPU.

All take turns in one run and the table gives medians; tokens are new ones. What is compared is the
ratio, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import jax
import torch
import transformers

from lmops_jax.commands.serve.server import ModelServer
from lmops_jax.decoding.serving import Batcher
from lmops_jax.pretrained import exporting
from lmops_jax.pretrained import model as model_lib

CLIENTS = 8
TOPICS = ("rivers", "a lighthouse", "the moon", "bread", "winter", "a violin", "old maps", "bees")


def prompts(tokenizer, num_tokens: int) -> list[list[int]]:
  """A prompt of about `num_tokens` ids for each client, no two of one length."""
  texts = [f"This is what one should know about {topic}. " * 40 for topic in TOPICS]
  return [tokenizer.encode(text)[: num_tokens - i] for i, text in enumerate(texts)]


def ask(server, ids, num_new: int) -> None:
  """Reads one stream to its end."""
  connection = http.client.HTTPConnection(*server.server_address)
  connection.request("POST", "/v1/completions", json.dumps({
    "model": "model", "prompt": ids, "max_tokens": num_new, "temperature": 0, "stream": True,
    "stream_options": {"include_usage": True},
  }), {"Content-Type": "application/json"})
  events = connection.getresponse().read().decode().split("\n\n")
  usage = json.loads(events[-3].removeprefix("data: "))["usage"]
  if usage["completion_tokens"] != num_new:
    raise SystemExit(f"an answer has {usage['completion_tokens']} tokens and not {num_new}; take "
                     "other prompts")
  connection.close()


def served(server, rows, num_new: int) -> float:
  """Seconds until all rows are answered, one client each."""
  threads = [threading.Thread(target=ask, args=(server, ids, num_new)) for ids in rows]
  start = time.perf_counter()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return time.perf_counter() - start


class Torch:
  """transformers with the same weights."""

  def __init__(self, folder: Path, num_new: int):
    self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    self.model.eval()
    self.num_new = num_new
    self.how = transformers.GenerationConfig(
      max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0)
    self.without_end = transformers.GenerationConfig(
      max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)

  def generate(self, rows) -> float:
    """Seconds for the rows as one batch, padded on the left."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    start = time.perf_counter()
    with torch.no_grad():
      found = self.model.generate(tokens, attention_mask=mask, generation_config=self.how)
    seconds = time.perf_counter() - start
    assert found.shape[1] == width + self.num_new
    return seconds

  def one_by_one(self, rows) -> float:
    """Seconds for one row after the other."""
    return sum(self.generate([row]) for row in rows)

  def continuous(self, rows) -> float:
    """Seconds of its own continuous batching."""
    start = time.perf_counter()
    found = self.model.generate_batch(
      inputs=rows, generation_config=self.without_end, progress_bar=False)
    seconds = time.perf_counter() - start
    lengths = [len(output.generated_tokens) for output in found.values()]
    if lengths != [self.num_new] * len(rows):
      raise RuntimeError(f"answers of {lengths} tokens")
    return seconds


def measure(arguments) -> list[str]:
  """The lines of the table."""
  source = model_lib.load(arguments.model)
  tokenizer = source.tokenizer()
  tokenizer.stop_ids = ()  # every answer has all its tokens
  rows = prompts(tokenizer, arguments.prompt)
  batcher = Batcher(source.decoder, source.of_decoder(source.params()), tokenizer,
                    num_slots=CLIENTS)
  with tempfile.TemporaryDirectory() as folder:
    exporting.export(folder, source)
    theirs = Torch(Path(folder), arguments.new)
  sides = {
    "1 client": (1, lambda server: served(server, rows[:1], arguments.new)),
    f"{CLIENTS} clients": (CLIENTS, lambda server: served(server, rows, arguments.new)),
    "transformers, one by one": (CLIENTS, lambda _: theirs.one_by_one(rows)),
    "transformers, one padded batch": (CLIENTS, lambda _: theirs.generate(rows)),
    "transformers, continuous batching": (CLIENTS, lambda _: theirs.continuous(rows)),
  }
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  failed: dict[str, str] = {}
  with ModelServer("127.0.0.1", 0) as server:
    thread = threading.Thread(target=server.serve, args=("model", tokenizer, batcher))
    thread.start()
    try:
      for turn in range(arguments.turns + 1):
        for name, (_, run) in sides.items():
          if name in failed:
            continue
          try:
            found = run(server)
          except Exception as error:  # what a release cannot do is told, not hidden
            if "continuous" not in name:
              raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
          if turn:  # the first compiles
            seconds[name].append(found)
    finally:
      server.shutdown()
      thread.join()
  speed = {
    name: sides[name][0] * arguments.new / statistics.median(found)
    for name, found in seconds.items() if found}
  base = speed["1 client"]
  lines = [
    f"{source.family}, prompts of {arguments.prompt} tokens, {arguments.new} new ones, "
    f"{arguments.turns} turns; {platform.processor() or platform.machine()}, {os.cpu_count()} "
    f"cores, load {os.getloadavg()[0]:.0f}; jax {jax.__version__}, torch {torch.__version__}, "
    f"transformers {transformers.__version__}.", "",
    "| | new tokens/s | times one client |", "| --- | --- | --- |"]
  lines += [f"| {name} | {value:.1f} | {value / base:.2f} |" for name, value in speed.items()]
  lines += [f"| {name} | did not run: {why} | |" for name, why in failed.items()]
  return lines


def main() -> None:
  """Prints the table, and writes it if asked to."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True, help="a model's folder or .gguf file")
  parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
  parser.add_argument("--new", type=int, default=64, help="new tokens of an answer")
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--output", type=Path)
  arguments = parser.parse_args()
  text = "\n".join(["# Throughput of `lmops serve`", "", *measure(arguments)]) + "\n"
  sys.stdout.write(text)
  if arguments.output:
    arguments.output.write_text(text)


if __name__ == "__main__":
  main()
