"""Structured prompting as stages: the model where none is at hand, task, prompt by seed, report."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import jax

from lmops_jax import pipeline
from lmops_jax.data.tasks import (
  Example,
  Task,
  TaskChoice,
  demonstrations,
  read_task,
  write_task,
)
from lmops_jax.manifests import write_json
from lmops_jax.models import flops
from lmops_jax.systems.structured_prompting import report
from lmops_jax.systems.structured_prompting.prompting import Prompter, Prompting
from lmops_jax.training import mesh
from lmops_jax.training.small_model import ModelChoice

WINDOW = "window"
TASK_FILE, RECORDS_FILE = "task.json", "records.json"


@gin.register(module="structured_prompting")
@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Accuracy and cost of a model on a task, against the number of demonstrations.

  Attributes:
    model: `@pretrained.choose()`, what is prompted.
    tasks: `[@tasks.choose()]`, each with a name of its own.
    prompting: how.
    report: settings of that stage.
    counts: numbers of demonstrations; "window" is as many as fit into the model's positions, which
      is ordinary prompting's limit. As many as fit are prompted as ordinarily, more in groups.
    seeds: of the demonstrations and their order.

  Raises:
    ValueError: for values out of range, or a model that is no decoder.
  """

  model: ModelChoice
  tasks: Sequence[TaskChoice]
  prompting: Prompting
  report: report.Report
  counts: Sequence[int | str] = (0, WINDOW, 1000)
  seeds: Sequence[int] = (0, 1, 2, 3, 4)

  name = "structured_prompting"

  def __post_init__(self):
    owner = "structured_prompting.Pipeline"
    for count in self.counts:
      if count != WINDOW and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise ValueError(
          f'{owner}.counts holds {count!r}; expected numbers of demonstrations, or "{WINDOW}".')
    if not self.counts or len(set(self.counts)) != len(self.counts):
      raise ValueError(f"{owner}.counts={list(self.counts)}; name one or more different numbers.")
    if not self.seeds or len(set(self.seeds)) != len(self.seeds):
      raise ValueError(f"{owner}.seeds={list(self.seeds)}; name one or more different seeds.")
    names = [task.name for task in self.tasks]
    if not names or len(set(names)) != len(names):
      raise ValueError(
        f"{owner}.tasks are called {', '.join(names) or 'nothing'}; name one or more, each with a "
        "tasks.choose.label of its own."
      )
    config = self.model.config
    if not getattr(config, "causal", False):
      raise ValueError(
        f"{self.model.label} is a {self.model.family} model, whose tokens see later ones; take a "
        "decoder."
      )

  def stages(self, settings, partitioner) -> list[pipeline.Stage]:
    """The run as stages; arguments as for every system."""
    if jax.process_count() > 1:
      raise ValueError(
        f"this job has {jax.process_count()} processes, and demonstrations are read in one; start "
        "it once, on a machine that holds all the devices."
      )
    partitioner = partitioner or mesh.single_device()
    stages = self.model.stages(settings.child("model"), partitioner)
    before = tuple(stage.name for stage in stages)
    model = self.model.settings(settings.child("model"))
    prompting = {f"prompting.{k}": v for k, v in settings.child("prompting").flatten().items()}
    evaluated = []
    for i, task in enumerate(self.tasks):
      read = f"task/{task.name}"
      bound = {f"task.{k}": v for k, v in settings.child("tasks")[i].flatten().items()}
      stages.append(pipeline.Stage(
        read, functools.partial(_read_task, task=task), settings=bound | task.fingerprints()))
      for seed in self.seeds:
        name = f"prompt/{task.name}/seed{seed}"
        evaluated.append((task.name, seed, name))
        stages.append(pipeline.Stage(
          name,
          functools.partial(
            self._prompt, task=read, model=before, seed=seed, partitioner=partitioner),
          inputs=(read, *before),
          settings=model | prompting | {"counts": repr(list(self.counts)), "seed": str(seed)},
        ))
    inputs = tuple(stage.name for stage in stages)
    stages.append(pipeline.Stage(
      "report",
      functools.partial(
        report.run, config=self.report, evaluated=evaluated, stages=inputs,
        model=self.model.label),
      inputs=inputs,
      settings={f"report.{k}": v for k, v in settings.child("report").flatten().items()},
    ))
    return stages

  def _prompt(self, context: pipeline.StageContext, task, model, seed, partitioner) -> None:
    found = read_task(context.input(task) / TASK_FILE)
    source = self.model.opened(*(context.input(name) for name in model))
    tokenizer = source.tokenizer()
    prompter = Prompter(
      source.model, source.params(partitioner), tokenizer, self.prompting, partitioner)
    records = _unfinished(context.directory / RECORDS_FILE)
    pool, rows = _parts(found, self.counts, seed, self.prompting.balanced)
    draw = functools.partial(demonstrations, pool, seed=seed, balanced=self.prompting.balanced)
    budget, limit = None, 0
    if any(self.counts):
      budget = prompter.budget(rows)
    if WINDOW in self.counts:
      limit = prompter.in_one_window(prompter.demonstrations(draw(len(pool))), budget)
      # Fewer are the first of all, or, balanced, in an order of their own.
      while self.prompting.balanced and limit and prompter.in_one_window(
          prompter.demonstrations(draw(limit)), budget) < limit:
        limit -= 1
    wanted = [(limit if key == WINDOW else key, key) for key in self.counts]
    for count, key in sorted(wanted, key=lambda pair: pair[0]):
      if any(record["key"] == key for record in records):
        continue
      same = next((record for record in records if record["count"] == count), None)
      record = same or self._measure(
        context, prompter, found, rows, prompter.demonstrations(draw(count)), budget)
      records.append({**record, "key": key, "window_count": limit})
      write_json(context.directory / RECORDS_FILE, records)

  def _measure(self, context, prompter, task, rows, demos, budget) -> dict[str, Any]:
    label = f"{context.name}, {len(demos)} demonstrations"
    with context.progress(len(rows), "rows", label) as bar:
      measured = prompter.evaluate(task, rows, demos, budget, bar.update)
    read, of_rows = _operations(prompter.config, measured, rows, prompter)
    context.flops += read + of_rows
    skipped = f", {measured.skipped} too long" if measured.skipped else ""
    context.log(
      f"{len(demos)} demonstrations in {measured.num_groups} groups ({measured.num_tokens} tokens"
      f"{skipped}): {task.metric} {measured.metric:.3f} on {len(rows)} rows; read in "
      f"{measured.read_seconds:.1f} s, rows {measured.rows_seconds:.1f} s")
    return {"count": len(demos), "num_rows": len(rows), **measured._asdict(), "read_flops": read,
            "row_flops": of_rows}

  def summary(self, workdir: Path) -> str:
    """A short table of the finished run, for the terminal."""
    folder = Path(workdir) / "report"
    found = json.loads((folder / "summary.json").read_text())
    return f"{report.terminal_table(found)}\n\nreport: {folder / 'index.html'}"


def _read_task(context: pipeline.StageContext, task: TaskChoice) -> None:
  found = task.load()
  write_task(context.directory / TASK_FILE, found)
  skipped = f", {found.skipped} rows left out" if found.skipped else ""
  context.log(f"{len(found.rows)} rows, {len(found.train)} to draw from{skipped}")


def _parts(task: Task, counts, seed: int, balanced: bool):
  """Rows to draw from, and rows to evaluate on, the same for all counts.

  Without rows of their own, demonstrations come from those of the task: as many as the largest
  count, and for a window half of them.
  """
  most = max((count for count in counts if count != WINDOW), default=0)
  if not task.train and WINDOW in counts:
    most = max(most, (_balanced_count(task.rows) if balanced else len(task.rows)) // 2)
  pool = list(task.train or task.rows)
  if most > len(pool):
    raise ValueError(
      f"{most} demonstrations are asked for and the task {task.name} has {len(pool)} rows to draw "
      "from; ask for fewer.")
  if task.train:
    if balanced and WINDOW in counts:
      pool = demonstrations(pool, _balanced_count(pool), seed, True)
    return pool, list(task.rows)
  pool = demonstrations(pool, most, seed, balanced)
  used = {row.id for row in pool}
  rows = [row for row in task.rows if row.id not in used]
  if not rows:
    raise ValueError(
      f"the task {task.name} has {len(task.rows)} rows, all of them demonstrations; ask for fewer "
      "of them, or give rows to draw from.")
  return pool, rows


def _balanced_count(rows: Sequence[Example]) -> int:
  """As many as the rarest label allows."""
  labels = collections.Counter(row.label for row in rows)
  return min(labels.values()) * len(labels)


def _unfinished(path: Path) -> list[dict[str, Any]]:
  return json.loads(path.read_text()) if path.is_file() else []


def _operations(config, measured, rows, prompter) -> tuple[float, float]:
  """Of reading the groups, and of all rows: products and attention, `2 N` and `4 L D` a pair."""
  groups = max(measured.num_groups, 1)
  each = measured.num_tokens / groups
  read = measured.num_tokens * flops.forward_flops_per_token(config, max(int(each), 1))
  tokens = sum(prompter.num_row_tokens(row) for row in rows)
  of_rows = tokens * flops.forward_flops_per_token(config, 1) + (
    4 * config.num_layers * config.num_heads * config.head_width * tokens * measured.num_tokens)
  return float(read), float(of_rows)
