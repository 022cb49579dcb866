"""Tables of finished in-context studies, as committed in results/.

    lmops run tests/benchmarks/structured_prompting.gin --workdir A --gin.MODEL=... (its macros)
    lmops run tests/benchmarks/meta_optimizer.gin --workdir B --gin.MODEL=...
    python tests/benchmarks/study_tables.py --structured A --output FILE
    python tests/benchmarks/study_tables.py --compare "structured prompting=A" "APE=C" --output FILE
    python tests/benchmarks/study_tables.py --meta B --output FILE
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path

from lmops_jax.reporting.summary import read_summary

MEASURES = {
  "Rec2FTP (%)": ("rec2ftp", ".1f"), "SimAOU": ("sim_aou", ".3f"),
  "SimAOU, random update": ("sim_aou_random", ".3f"), "SimAOU, raw": ("sim_aou_raw", ".3f"),
  "SimAM before": ("sim_am_before", ".3f"), "SimAM after": ("sim_am", ".3f"),
  "SimAM, change": ("sim_am_delta", ".3f"), "Kendall": ("kendall", ".3f"),
  "Kendall, random": ("kendall_random", ".3f"),
}


def structured(workdir: Path) -> tuple[str, str]:
  """Accuracy by task and number of demonstrations."""
  summary = read_summary(workdir / "report" / "summary.json")
  first = next(iter(summary["tasks"].values()))
  lines = [
    f"{summary['model']}, float32; {first['num_rows']} rows a set, "
    f"{len(first['seeds'])} seeds of demonstrations; accuracy in percent, mean and standard "
    "deviation over seeds. A window is 2,048 tokens: up to it prompting is ordinary, beyond in "
    "groups.", "",
    "| set | labels | most frequent label | demonstrations | groups | tokens | accuracy | by seed "
    "|",
    "|---|---|---|---|---|---|---|---|"]
  for task, of in summary["tasks"].items():
    for row in of["counts"]:
      low, high = min(row["counts"]), max(row["counts"])
      count = f"{low:,}" if low == high else f"{low:,} to {high:,}"
      lines.append(
        f"| {task} | {len(of['words'])} | {100 * of['most_frequent_label']:.1f} | {count}"
        f"{' (window)' if row['is_window'] else ''} | {row['num_groups']:.1f} | "
        f"{row['num_tokens']:,.0f} | {_accuracy(row)} | {_by_seed(row)} |")
  return "# Accuracy by number of demonstrations", "\n".join(lines)


def compared(workdirs: dict[str, Path]) -> tuple[str, str]:
  """Accuracy by task and number of demonstrations, of runs that weigh groups in several ways."""
  runs = {name: _rows(workdir) for name, workdir in workdirs.items()}
  lines = [
    "Accuracy in percent, mean and standard deviation over seeds of demonstrations, and by seed.",
    "", f"| set | demonstrations | {' | '.join(runs)} |", "|---" * (2 + len(runs)) + "|"]
  for task, count in next(iter(runs.values())):
    found = [rows[task, count] for rows in runs.values()]
    cells = (f"{_accuracy(row)} ({_by_seed(row)})" for row in found)
    lines.append(f"| {task} | {count} | {' | '.join(cells)} |")
  means = (100 * statistics.fmean(row["mean"] for row in rows.values()) for rows in runs.values())
  lines.append(f"| mean | | {' | '.join(f'{mean:.1f}' for mean in means)} |")
  return "# Ways to weigh groups of demonstrations", "\n".join(lines)


def _rows(workdir: Path) -> dict[tuple, dict]:
  summary = read_summary(workdir / "report" / "summary.json")
  return {(task, row["key"]): row for task, of in summary["tasks"].items() for row in of["counts"]}


def _by_seed(row: dict) -> str:
  return ", ".join(f"{100 * x:.0f}" for x in row["metric"])


def _accuracy(row: dict) -> str:
  spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
  return f"{100 * row['mean']:.1f}{spread}"


def meta(workdir: Path) -> tuple[str, str]:
  """The study's measures by task and network."""
  summary = read_summary(workdir / "report" / "summary.json")
  first = next(iter(summary["tasks"].values()))
  lines = [
    f"{first['num_rows']} rows a set, {len(first['seeds'])} seeds, {first['num_demonstrations']} "
    f"demonstrations; readout {first['readout']}, rates chosen on {first['tune_on']} rows. Mean "
    "over layers, rows and seeds. \"Untrained\" is the same network with random weights, all of "
    "them or all but embeddings and norms.", "",
    "| set | network | zero-shot | finetuned | in context | " + " | ".join(MEASURES) + " |",
    "|---" * (5 + len(MEASURES)) + "|"]
  for task, of in summary["tasks"].items():
    for network, found in of["networks"].items():
      measured = [(found[f"accuracy_{name}"], ".1f", 100) for name in ("zsl", "ft", "icl")]
      measured += [(found[key], spec, 1) for key, spec in MEASURES.values()]
      cells = [_mean_and_deviation(*of_measure) for of_measure in measured]
      lines.append(f"| {task} | {network.replace('_', ' ')} | " + " | ".join(cells) + " |")
  return "# Learning in context beside finetuning", "\n".join(lines)


def _mean_and_deviation(found: dict, spec: str, scale: float) -> str:
  if found["mean"] is None:
    return "-"
  numbers = [found["mean"]]
  if sum(value is not None for value in found["values"]) > 1:
    numbers.append(found["deviation"])
  return " ± ".join(format(scale * number, spec) for number in numbers)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--structured", type=Path, metavar="WORKDIR")
  which.add_argument("--meta", type=Path, metavar="WORKDIR")
  which.add_argument("--compare", nargs="+", metavar="NAME=WORKDIR")
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  if args.compare:
    named = (one.rpartition("=") for one in args.compare)
    title, table = compared({name: Path(workdir) for name, _, workdir in named})
  else:
    title, table = structured(args.structured) if args.structured else meta(args.meta)
  text = (
    f"{title}\n\nWritten by `tests/benchmarks/study_tables.py`, whose docstring has the commands; "
    f"{platform.machine()}, {os.cpu_count()} cores.\n\n{table}\n")
  print(text)
  if args.output:
    args.output.write_text(text)


if __name__ == "__main__":
  main()
