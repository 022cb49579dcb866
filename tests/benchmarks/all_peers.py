# ruff: noqa: E402  malloc is set before jax is imported
"""Times what users would otherwise do with another tool, beside it, in one run.

    python tests/benchmarks/all_peers.py --model SmolLM2.gguf --output results/all_peers.md
    python tests/benchmarks/all_peers.py --rows train-1m train-10m

Both sides of a row do the same work on the same numbers in one process, take turns, and the table
gives medians: wall time, and processor time, which a busy machine disturbs least. Rows, and peers:

* train-1m, train-10m: a training step of a Llama-type decoder, float32, AdamW, against
  transformers' LlamaForCausalLM with `torch.optim.AdamW(fused=True)`, from the same weights,
* decode-1, decode-16: 64 new tokens after prompts of 64, greedily, against `generate` there,
* options: log-likelihoods of two answers to each of 40 questions behind 8 demonstrations, through
  lm-evaluation-harness: our adapter against its own backend `hf` in batches of 16,
* dsir: weights of texts from hashed n-grams, one process, against the package data-selection,
* tokens: texts into packed rows of 128 tokens, against Hugging Face tokenizers alone, without any
  packing,
* annotate: scores of rows of 128 tokens, against transformers' LlamaModel with a linear head.

data-selection is installed by hand (`pip install data-selection`); its row is left out without it,
as are the three rows that need a model where none is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import pydoc_data.topics
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import flax.linen as nn
import generation_vs_torch  # beside this script
import jax
import jax.numpy as jnp
import numpy as np
import torch
import train_step  # beside this script
import transformers

from lmops_jax.data import packing
from lmops_jax.data.documents import Document
from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.models.heads import SequenceRegressor
from lmops_jax.models.transformer import Transformer, TransformerConfig, num_params
from lmops_jax.pretrained import exporting
from lmops_jax.pretrained import model as model_lib
from lmops_jax.systems.pds import dsir
from lmops_jax.text.vocabularies import write_vocabulary
from lmops_jax.training import losses, optimizers
from lmops_jax.training.learner import supervised

VOCAB, LENGTH, BATCH = 4096, 128, 16
SIZES = {  # layers, width, heads, width of the MLP
  "train-1m": (2, 128, 2, 320), "train-10m": (5, 384, 6, 1024)}
RATE, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
PROMPT, NEW = 64, 64
SHOTS, QUESTIONS = 8, 40
ANSWERS = (" yes", " no")


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    peer: its name.
    unit: what is counted, and how many of it a call does.
    ours, theirs: do it once, and give what is compared.
    alike: tells how alike the two results are.
  """

  peer: str
  unit: tuple[str, float]
  ours: Callable[[], object]
  theirs: Callable[[], object]
  alike: Callable[[object, object], str]


# ----------------------------------------------------------------------------------------- models


def decoder(name: str) -> TransformerConfig:
  """A small decoder of Llama's kind."""
  layers, width, heads, mlp_width = SIZES[name]
  return TransformerConfig(
    vocab_size=VOCAB, num_layers=layers, width=width, num_heads=heads, mlp_width=mlp_width,
    max_length=LENGTH, tied_embeddings=True, scan_layers=False)


def exported(config: TransformerConfig, params, kind):
  """transformers' model with our weights."""
  with tempfile.TemporaryDirectory() as folder:
    source = model_lib.PretrainedModel(Path(folder), "llama", config)
    exporting.export(Path(folder) / "model", source, params)
    return kind.from_pretrained(Path(folder) / "model", dtype=torch.float32)


def gap(ours, theirs) -> str:
  """The largest difference of numbers."""
  return f"differ by {np.max(np.abs(np.asarray(ours) - np.asarray(theirs))):.0e}"


def training(name: str, _) -> Row:
  config = decoder(name)
  model = Transformer(config)
  data = train_step.batches(BATCH, LENGTH, VOCAB)
  params = nn.unbox(model.init(jax.random.key(0), data[0]["tokens"][:1, :1])["params"])
  peer = exported(config, params, transformers.LlamaForCausalLM)
  optimizer = torch.optim.AdamW(
    peer.parameters(), RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
  rows = [{k: torch.tensor(np.asarray(x[k])).long() for k in ("tokens", "targets")}
          for x in data]
  learner = supervised(None, losses.lm_example_losses(model), optimizers.adamw(
    RATE, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=DECAY, clip_norm=None))
  key = jax.random.key(0)
  state = learner.init(key, jax.tree.map(jnp.copy, params))
  step = jax.jit(learner.step, donate_argnums=0).lower(state, data[0], key).compile()
  done = {"ours": 0, "theirs": 0}

  def turn(side):
    done[side] += 1
    return (done[side] - 1) % len(data)

  def ours():
    nonlocal state
    state, metrics = step(state, data[turn("ours")], key)
    return float(metrics["loss_sum"] / metrics["num_examples"])

  def theirs():
    batch = rows[turn("theirs")]
    optimizer.zero_grad(set_to_none=True)
    logits = peer(batch["tokens"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    optimizer.step()
    return float(loss.detach())

  what = f"transformers, {num_params(config) / 1e6:.1f}M parameters"
  return Row(what, ("tokens", BATCH * LENGTH), ours, theirs, gap)


def annotating(_, __) -> Row:
  config = decoder("train-1m")
  model = SequenceRegressor(config)
  tokens = np.concatenate([
    np.asarray(x["tokens"]) for x in train_step.batches(BATCH, LENGTH, VOCAB, count=32)])
  params = nn.unbox(model.init(jax.random.key(0), tokens[:1], tokens[:1])["params"])
  trunk, head = params["trunk"], params["head"]
  peer = exported(config, trunk, transformers.LlamaForCausalLM).model.eval()
  kernel = torch.tensor(np.asarray(head["kernel"]))
  bias = torch.tensor(np.asarray(head["bias"]))
  mask = np.ones((BATCH, LENGTH), np.float32)
  apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, mask))

  def ours():
    return np.concatenate([
      np.asarray(apply(params, tokens[i : i + BATCH])) for i in range(0, len(tokens), BATCH)])

  def theirs():
    with torch.inference_mode():
      return np.concatenate([
        (peer(torch.from_numpy(tokens[i : i + BATCH]).long()).last_hidden_state.mean(1) @ kernel
         + bias).flatten().numpy() for i in range(0, len(tokens), BATCH)])

  return Row("transformers", ("rows", len(tokens)), ours, theirs, gap)


class Model(NamedTuple):
  """A real decoder on either side."""

  source: model_lib.PretrainedModel
  params: object
  folder: Path


def decoding(name: str, model: Model) -> Row:
  batch = int(name.split("-")[1])
  tokenizer = model.source.tokenizer()
  ids = tokenizer.encode("\n".join(pydoc_data.topics.topics.values())[:40_000], add_special=False)
  prompts = [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(batch)]
  generator = Generator(model.source.model, model.params, tokenizer)
  options = GenerationOptions(max_new_tokens=NEW, min_new_tokens=NEW, eos_ids=(0,))
  peer = generation_vs_torch.Peer(model.folder)

  def alike(ours, theirs):
    return "same tokens" if ours == theirs else "other tokens"

  return Row(
    "transformers", ("tokens", batch * NEW),
    lambda: [g.ids for g in generator.generate_ids(prompts, options)],
    lambda: peer.generate(prompts, NEW), alike)


def scoring(_, model: Model) -> Row:
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  from lmops_jax.evaluation.lm_eval_adapter import LmopsLM
  lines = [x for x in "\n".join(pydoc_data.topics.topics.values()).split("\n") if len(x) > 60]
  ask = "Is this about classes? {}\nAnswer:".format
  shots = "".join(f"{ask(line)}{ANSWERS['class' not in line]}\n\n" for line in lines[:SHOTS])
  asked = [shots + ask(line) for line in lines[SHOTS : SHOTS + QUESTIONS]]
  requests = [
    Instance("loglikelihood", {}, (question, answer), i)
    for i, question in enumerate(asked) for answer in ANSWERS]
  ours, theirs = LmopsLM(str(model.folder)), HFLM(
    str(model.folder), device="cpu", dtype="float32", batch_size=16)

  def found(side):
    return lambda: [x[0] for x in side.loglikelihood(requests, disable_tqdm=True)]

  return Row("lm-evaluation-harness, hf", ("answers", len(requests)), found(ours), found(theirs),
             gap)


# ------------------------------------------------------------------------------------------- text


def texts() -> list[str]:
  """Paragraphs of the documentation in Python's library."""
  return [x for text in pydoc_data.topics.topics.values() for x in text.split("\n\n") if x.strip()]


def selecting(_, __) -> Row:
  from data_selection.hashed_ngram_dsir import get_ngram_counts
  raw, target = texts(), texts()[::20]

  def ours():
    return dsir.scores(raw, dsir.fit(target, raw))

  def theirs():  # what `HashedNgramDSIR` does in one process, without its files
    counts = []
    for group in (target, raw):
      total = np.zeros(dsir.NUM_BUCKETS, int)
      for text in group:
        get_ngram_counts(text, counts=total)
      counts.append(total / total.sum())
    difference = np.log(counts[0] + 1e-8) - np.log(counts[1] + 1e-8)
    return np.array([np.dot(difference, get_ngram_counts(text)) for text in raw])

  size = sum(len(x.encode()) for x in raw) / 1e6
  return Row("data-selection", ("MB", size), ours, theirs, gap)


def tokenizing(_, __) -> Row:
  import tokenizers
  documents = [Document(i, x, "", "") for i, x in enumerate(texts() * 4)]
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.train_from_iterator(texts(), tokenizers.trainers.BpeTrainer(
    vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  with tempfile.TemporaryDirectory() as folder:
    ids = {"vocab_size": VOCAB, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": None}
    vocabulary = write_vocabulary(
      folder, "hugging_face", trained.to_str().encode(), ids)

  def ours():
    rows = packing.pack(
      packing.encoded(documents, vocabulary), length=LENGTH, bos_id=1, eos_id=2)
    return sum(len(row.tokens) for row in rows)

  def theirs():
    return sum(len(x.ids) for x in trained.encode_batch([d.text for d in documents]))

  def alike(ours, theirs):
    return f"{ours / theirs:.2f} of the tokens, with each text's end and each row's start"

  size = sum(len(d.text.encode()) for d in documents) / 1e6
  return Row("tokenizers alone", ("MB", size), ours, theirs, alike)


ROWS: Mapping[str, Callable[[str, Model | None], Row]] = {
  "train-1m": training, "train-10m": training, "decode-1": decoding, "decode-16": decoding,
  "options": scoring, "dsir": selecting, "tokens": tokenizing, "annotate": annotating}
OF_MODEL = ("decode-1", "decode-16", "options")


def rate(number: float) -> str:
  """Three digits, or all of a larger number."""
  return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def opened(path: str, folder: Path) -> Model:
  source = model_lib.load(path, scan_layers=False)
  params = source.params()
  exporting.export(folder / "model", source, params)
  return Model(source, params, folder / "model")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", help="GGUF file or folder of a decoder")
  parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
  parser.add_argument("--repeats", type=int, default=5, help="of a row; steps are taken 4 times so")
  parser.add_argument("--output")
  args = parser.parse_args()
  load, shown, left_out = os.getloadavg()[0], [], []
  with tempfile.TemporaryDirectory() as folder:
    wanted = any(name in OF_MODEL for name in args.rows)
    model = opened(args.model, Path(folder)) if args.model and wanted else None
    for name in args.rows:
      if name in OF_MODEL and model is None:
        left_out.append(f"{name} (no --model)")
        continue
      if name == "dsir" and importlib.util.find_spec("data_selection") is None:
        left_out.append("dsir (data-selection is not installed)")
        continue
      row = ROWS[name](name, model)
      found = {}
      functions = {
        side: lambda side=side, row=row, found=found: found.update({side: getattr(row, side)()})
        for side in ("ours", "theirs")}
      times = generation_vs_torch.take_turns(
        functions, args.repeats * (4 if name.startswith("train") else 1))
      unit, number = row.unit
      (wall, cpu, _), (peer, peer_cpu, _) = times["ours"], times["theirs"]
      shown.append(
        f"| {name} | {row.peer} | {unit}/s | {rate(number / wall)} | {rate(number / peer)} | "
        f"{peer / wall:.2f} | {peer_cpu / cpu:.2f} | {row.alike(found['ours'], found['theirs'])} |")
      print(shown[-1], file=sys.stderr, flush=True)
  ratio = statistics.median(float(x.split("|")[6]) for x in shown)
  lines = [
    f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python "
    f"{platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, transformers "
    f"{transformers.__version__}, load {load:.1f} at the start; medians of {args.repeats}, "
    "float32.",
    "",
    "| row | peer | unit | ours | peer's | ours over peer's | in processor time | results |",
    "|---|---|---|---|---|---|---|---|", *shown,
    "", f"Median over rows: {ratio:.2f}."]
  if left_out:
    lines.append(f"Left out: {', '.join(left_out)}.")
  table = "\n".join(lines) + "\n"
  print(table)
  if args.output:
    Path(args.output).write_text(
      "# What users would otherwise do with another tool\n\nWritten by "
      "`tests/benchmarks/all_peers.py`, whose docstring says what is timed.\n\n" + table)


if __name__ == "__main__":
  main()
