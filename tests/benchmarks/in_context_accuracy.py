# ruff: noqa: E402  malloc is set before jax is imported
"""Zero- and 16-shot accuracy of a published model on text classification sets.

    python tests/benchmarks/in_context_accuracy.py --model SmolLM2.gguf --data textcls \\
        --output tests/benchmarks/results/in_context_accuracy.md

`--data` holds `sst2/{train,test}.jsonl`, `trec/{train,test}.jsonl`, `subj/all.jsonl` and
`mr/all.jsonl`, rows {"text", "label"}. Of each set 500 rows, drawn by their ids, are scored, after
no demonstrations and after 16 drawn by three seeds from the training rows (of sets in one file,
from the rows not scored). Options are compared by the sum of their tokens' log-probabilities, and
by that sum less the one after a prompt whose text is "N/A" ("null").
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import jax

from lmops_jax import pretrained
from lmops_jax.data.tasks import demonstrations, jsonl_task
from lmops_jax.decoding.scoring import OptionScorer
from lmops_jax.evaluation import in_context

NUM_ROWS, SHOTS, SEEDS = 500, 16, (0, 1, 2)
SETS = {  # words in the order of the label ids
  "sst2": ("test", "train", "Review: {text}\nSentiment: {label}", ("negative", "positive")),
  "mr": ("all", None, "Review: {text}\nSentiment: {label}", ("negative", "positive")),
  "subj": ("all", None, "Input: {text}\nType: {label}", ("subjective", "objective")),
  "trec": (
    "test", "train", "Question: {text}\nAnswer type: {label}",
    ("description", "entity", "abbreviation", "person", "location", "number"),
  ),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", required=True)
  parser.add_argument("--data", required=True, type=Path)
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  source = pretrained.load(args.model)
  tokenizer = source.tokenizer()
  scorer = OptionScorer(source.model, source.params())
  lines = [
    f"{Path(args.model).name}, float32; {platform.machine()}, {os.cpu_count()} cores, jax "
    f"{jax.__version__}. {NUM_ROWS} rows a set; accuracies in percent, for 16 shots each seed and "
    "their mean with the standard deviation over seeds; chance is one over the number of labels.",
    "",
    "| set | labels | zero-shot | zero-shot, null | 16 shots, seeds 0, 1, 2 | mean | 16 shots, "
    "null | mean | rows/s |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, (test, train, template, words) in SETS.items():
    task = jsonl_task(args.data / name / f"{test}.jsonl", template, words)
    rows = demonstrations(task.rows, NUM_ROWS, seed=1000)  # any rows, by their ids
    if train is None:
      scored = {row.id for row in rows}
      pool = [row for row in task.rows if row.id not in scored]
    else:
      pool = jsonl_task(args.data / name / f"{train}.jsonl", template, words).rows
    task = dataclasses.replace(task, rows=tuple(rows))
    start, done = time.perf_counter(), 0
    cells = [name, str(len(words))]
    zero = {}
    for kind in ("sum", "null"):
      zero[kind] = in_context.evaluate(scorer, tokenizer, task, normalisation=kind)
      done += len(rows)
    cells += [
      f"{100 * zero[kind].accuracy:.1f} ± {100 * zero[kind].standard_error:.1f}" for kind in zero
    ]
    for kind in ("sum", "null"):
      found = []
      for seed in SEEDS:
        result = in_context.evaluate(
          scorer, tokenizer, task, shots=SHOTS, seed=seed, train=pool, normalisation=kind
        )
        found.append(100 * result.accuracy)
        done += len(rows)
      cells.append(", ".join(f"{x:.1f}" for x in found))
      cells.append(f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}")
    cells.append(f"{done / (time.perf_counter() - start):.0f}")
    lines.append("| " + " | ".join(cells) + " |")
    print(lines[-1], flush=True)
  table = "\n".join(lines) + "\n"
  print(table)
  if args.output:
    args.output.write_text(
      "# Zero- and 16-shot accuracy\n\nWritten by `tests/benchmarks/in_context_accuracy.py`, whose "
      "docstring says what is scored. ± is the standard error over rows for zero-shot.\n\n" + table
    )


if __name__ == "__main__":
  main()
