# ruff: noqa: E402  malloc is set before jax is imported
"""Accuracy of prototypical fine-tuning and its peers on public sets, by rows to learn from.

    python tests/benchmarks/prototypes_accuracy.py --data textcls --model all-MiniLM-L6-v2 \\
        --workdir RUNS --output tests/benchmarks/results/prototypes_accuracy.md

Every set is a run of `lmops prototypes` in a folder of its own below `--workdir`, where it goes on
after an interruption: vectors once, subsets that hold each other, paired seeds. `--data` has
`SET/train.jsonl` and `SET/test.jsonl`, or `SET/all.jsonl`, of which a fifth is held out by a hash;
rows {"text", "label"}. At most `--num-test` rows are tested on, chosen by a hash.

Sets called `NAME-modes` are NAME with classes merged, so that a class has several modes, which is
what growth is for. `--tuned` trains the encoder's last two layers (`gin/prototypes/tuned.gin`).

The table shows the mean over seeds with half the width of its 95 % interval (t distribution);
differences are of pairs, with a bootstrap interval: over the sets' seeds together, and for each set
over its rows and seeds. The figures of each seed are kept beside the table as JSON, from which the
table is made; a set that is there already with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import jax
import numpy as np

from lmops_jax import cli
from lmops_jax.evaluation.intervals import of_difference
from lmops_jax.evaluation.over_seeds import LEVEL, spread
from lmops_jax.reporting.summary import read_summary

SETS = ("sst2", "trec", "subj", "cr", "mr", "sst5")
MODES = {  # set, and the labels of the first class
  "trec-modes": ("trec", (0, 3, 4)),  # description, human, location against the others
  "sst5-modes": ("sst5", (0, 4)),  # strong feelings against mild ones
}
METHODS = ("PFIT", "PROTO", "FIXED", "PROTONET", "IMP", "RAW", "LOGISTIC", "DISCRIMINANT",
           "NEIGHBOURS")
AGAINST = ("raw", "proto", "logistic")
GIN = Path(__file__).with_suffix(".gin")


def rows_of(name: str, data: Path, workdir: Path) -> list[str]:
  """The bindings that name a set's files, which are written first if classes are merged."""
  source, first = MODES.get(name, (name, None))
  found = []
  for macro, part in (("TRAIN", "train"), ("TEST", "test"), ("TRAIN", "all")):
    path = data / source / f"{part}.jsonl"
    if not path.is_file():
      continue
    if first is not None:
      rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
      path = workdir / name / f"{part}.jsonl"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text("".join(
        json.dumps({"text": row["text"], "label": int(row["label"] not in first)}) + "\n"
        for row in rows), encoding="utf-8")
    found.append(f"--gin.{macro}='{path}'")
  if not found:
    raise SystemExit(f"{data / source} holds neither train.jsonl nor all.jsonl.")
  return found


def run(name: str, given: Sequence[str], arguments) -> dict:
  """Runs, or finishes, the study of a set, and gives what the table needs of its summary."""
  began, workdir = time.process_time(), arguments.workdir / name / "study"
  code = cli.main([
    "prototypes", *(["tuned"] if arguments.tuned else []),
    *(["--gin_file", str(GIN)] if "HALF" in arguments.methods else []), "--workdir", str(workdir),
    f"--gin.MODEL='{arguments.model}'",
    *rows_of(name, arguments.data, arguments.workdir), *given])
  if code:
    raise SystemExit(code)
  summary = read_summary(workdir / "report" / "summary.json")
  kept = ("num_test", "num_classes", "encoder", "figures", "prototypes", "seconds", "differences")
  return {"settings": list(given), "gin": list(arguments.gin),
          **{key: summary[key] for key in kept},
          "processor_seconds": time.process_time() - began}


def accuracy_table(results: dict) -> list[str]:
  """A section for each set: methods by sizes."""
  lines = []
  for name, of in results.items():
    by_size = next(iter(of["figures"].values()))
    sizes, seeds = list(by_size), len(next(iter(by_size.values()))["values"])
    lines += ["", f"## {name}", "",
              f"{of['num_classes']} classes, {of['num_test']:,} rows to test on, {seeds} seeds"
              f"{''.join(', ' + one for one in of['gin'])}.", "",
              "| | " + " | ".join(f"{int(size):,} rows" for size in sizes) + " |",
              "|---" * (1 + len(sizes)) + "|"]
    for method, by_size in of["figures"].items():
      cells = [spread(percent(by_size[size]), ".1f") for size in sizes]
      lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for method, by_size in of["prototypes"].items():
      if any(by_size[size]["created"]["mean"] for size in sizes):
        cells = [spread(by_size[size]["prototypes"], ".0f") for size in sizes]
        lines.append(f"| prototypes of {method} | " + " | ".join(cells) + " |")
  return lines


def difference_table(results: dict) -> list[str]:
  """What the first method is ahead of the others: all sets together, then each."""
  lines = []
  first = next(iter(next(iter(results.values()))["figures"]))
  sizes = sizes_of(results)
  lines += ["", f"## {first} against its peers", "",
            "Points of accuracy, above 0 where it is better, with the interval of 95 %.", "",
            "| set | against | " + " | ".join(f"{int(size):,} rows" for size in sizes) + " |",
            "|---" * (2 + len(sizes)) + "|"]
  plain = {name: of for name, of in results.items() if name not in MODES}
  for label, chosen in (("all sets", plain), *((name, {name: of}) for name, of in results.items())):
    for other in AGAINST:
      cells = []
      for size in sizes:
        have = [of for of in chosen.values() if size in of["figures"].get(other, {})]
        if not have:
          cells.append("–")
        elif label == "all sets":
          a, b = (np.concatenate([of["figures"][method][size]["values"] for of in have])
                  for method in (other, first))
          found = of_difference(a, b, LEVEL)
          cells.append(interval(found.value, found.low, found.high))
        else:
          found = have[0]["differences"][other][size]
          cells.append(interval(found["mean"], found["low"], found["high"]))
      if any(cell != "–" for cell in cells) and (label != "all sets" or len(plain) > 1):
        lines.append(f"| {label} | {other} | " + " | ".join(cells) + " |")
  return lines


def time_table(results: dict) -> list[str]:
  """Seconds of a fit, of methods that are trained in steps."""
  lines = ["", "## Seconds of a fit", "", "Median over seeds, by the clock, which other work on "
           "the machine lengthens.", ""]
  sizes = sizes_of(results)
  lines += ["| set | method | " + " | ".join(f"{int(size):,} rows" for size in sizes) + " |",
            "|---" * (2 + len(sizes)) + "|"]
  for name, of in results.items():
    for method, by_size in of["seconds"].items():
      cells = [f"{np.median(by_size[size]['values']):.1f}" if size in by_size else "–"
               for size in sizes]
      lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
  return lines


def sizes_of(results: dict) -> list[str]:
  """All sizes of all sets."""
  found = {size for of in results.values() for by_size in of["figures"].values()
           for size in by_size}
  return sorted(found, key=int)


def percent(of: dict) -> dict:
  """Mean and half width times 100."""
  half = of["half_width"]
  return {"mean": 100 * of["mean"], "half_width": None if half is None else 100 * half}


def interval(value: float, low: float, high: float) -> str:
  """Points with their interval."""
  return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", type=Path, required=True)
  parser.add_argument("--model", required=True, help="folder of the encoder")
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--sets", nargs="+", default=SETS, choices=(*SETS, *MODES))
  parser.add_argument("--sizes", nargs="+", type=int, default=(100, 200, 500, 1000, 2000))
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--methods", nargs="+", default=METHODS, help="macros of the gin files")
  parser.add_argument("--num-test", type=int, default=1000)
  parser.add_argument("--tuned", action="store_true")
  parser.add_argument("--gin", nargs="*", default=(), metavar="NAME=VALUE", help="more bindings")
  parser.add_argument("--output", type=Path, required=True)
  arguments = parser.parse_args()
  given = [
    f"--gin.SIZES={list(arguments.sizes)}",
    f"--gin.SEEDS={list(range(arguments.seeds))}",
    f"--gin.METHODS=[{', '.join('%' + name for name in arguments.methods)}]",
    f"--gin.prototypes.choose.num_test={arguments.num_test}",
    *(f"--gin.{binding}" for binding in arguments.gin)]
  stored = arguments.output.with_suffix(".json")
  results = json.loads(stored.read_text()) if stored.is_file() else {}
  for name in arguments.sets:
    if results.get(name, {}).get("settings") == given:
      continue
    results[name] = run(name, given, arguments)
    short = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 5))
    stored.write_text(json.dumps(short, separators=(",", ":")) + "\n")
  table = [
    f"{'/'.join(Path(arguments.model).resolve().parts[-2:])}, "
    f"{'its last two layers trained' if arguments.tuned else 'frozen'}; {platform.machine()}, "
    f"{os.cpu_count()} cores, jax {jax.__version__}; "
    f"{sum(of['processor_seconds'] for of in results.values()) / 60:.0f} minutes of processor time "
    f"in all, encoding and compiling included. Accuracy in percent.",
    *accuracy_table(results), *difference_table(results), *time_table(results)]
  arguments.output.write_text(
    "# Prototypical fine-tuning on public sets\n\nWritten by "
    "`tests/benchmarks/prototypes_accuracy.py`, whose docstring says what is measured.\n\n"
    + "\n".join(table) + "\n")
  print("\n".join(table))


if __name__ == "__main__":
  main()
