"""Structured prompting as stages: the model where none is at hand, task, prompt by seed, report."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np

from lmops_jax.config.setting_types import Count, Distinct, NonEmpty, Seeds, component
from lmops_jax.data.tasks import Example, Task, TaskSource, checked, demonstrations, read_task
from lmops_jax.host import seals
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.shared_stages.small_model import ModelSource
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.structured_prompting import report
from lmops_jax.systems.structured_prompting.prompting import Prompter, Prompting
from lmops_jax.systems.structured_prompting.retrieval import Retrieval, dealt

WINDOW = "window"
_WINDOW_POOL = 4096  # demonstrations that no window holds
RECORDS_FILE = "records.json"


@component(module="structured_prompting")
@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Accuracy and cost of a model on a task, against the number of demonstrations.

  Attributes:
    model: `@pretrained.choose()`, what is prompted.
    tasks: `[@tasks.choose()]`, each with a name of its own.
    prompting: how.
    report: settings of that stage.
    retrieval: `@structured_prompting.Retrieval()` for the most alike demonstrations; None takes
      random ones.
    counts: numbers of demonstrations; "window" is as many as fit into the model's positions, which
      is ordinary prompting's limit. As many as fit are prompted as ordinarily, more in groups.
    seeds: of the demonstrations and their order.

  Raises:
    ValueError: for values out of range, or a model that is no decoder.
  """

  model: ModelSource
  tasks: Annotated[Sequence[TaskSource], NonEmpty]
  prompting: Prompting
  report: report.Report
  retrieval: Retrieval | None = None
  counts: Annotated[Sequence[Count | Literal[WINDOW]], NonEmpty, Distinct] = (0, WINDOW, 1000)
  seeds: Seeds = (0, 1, 2, 3, 4)

  name = "structured_prompting"

  def __post_init__(self):
    owner = "structured_prompting.Pipeline"
    names = [task.name for task in self.tasks]
    if len(set(names)) != len(names):
      raise ValueError(
        f"{owner}.tasks are called {', '.join(names)}; give each a tasks.choose.label of its own."
      )
    config = self.model.config
    if not getattr(config, "causal", False):
      raise ValueError(
        f"{self.model.label} is a {self.model.family} model, whose tokens see later ones; take a "
        "decoder."
      )

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    if jax.process_count() > 1:
      raise ValueError(
        f"this job has {jax.process_count()} processes, and demonstrations are read in one; start "
        "it once, on a machine that holds all the devices."
      )
    partitioner = partitioner or meshes.single_device()
    check = functools.partial(
      _parts, counts=self.counts, seed=self.seeds[0], balanced=self.prompting.balanced)
    readings = [checked(task.stage(f"tasks[{i}]"), check) for i, task in enumerate(self.tasks)]
    of_model = self.model.stages("model", partitioner)
    before = tuple(stage.name for stage in of_model)
    stages = [*readings, *of_model]  # what the tasks are too small for is told first
    evaluated = []
    for task, read in zip(self.tasks, [stage.name for stage in readings], strict=True):
      for seed in self.seeds:
        name = f"prompt/{task.name}/seed{seed}"
        evaluated.append((task.name, seed, name))
        stages.append(skeleton.Stage(
          name,
          functools.partial(
            self._prompt, task=read, model=before, seed=seed, partitioner=partitioner),
          inputs=(read, *before),
          reads=(*self.model.reads("model"), "prompting", "counts", "retrieval"), seed=seed,
        ))
    inputs = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report",
      functools.partial(
        report.run, config=self.report, evaluated=evaluated, stages=inputs,
        model=self.model.label),
      inputs=inputs, reads=("report",),
    ))
    return stages

  def _prompt(self, context: pipeline.StageContext, task, model, seed, partitioner) -> None:
    found = read_task(context.input(task))
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
      some = prompter.demonstrations(draw(min(len(pool), _WINDOW_POOL)))
      limit = prompter.in_one_window(some, budget)
      # Fewer are the first of these, or, balanced, in an order of their own.
      while self.prompting.balanced and limit and prompter.in_one_window(
          prompter.demonstrations(draw(limit)), budget) < limit:
        limit -= 1
    wanted = [(limit if key == WINDOW else key, key) for key in self.counts]
    for count, key in sorted(wanted, key=lambda pair: pair[0]):
      if any(record["key"] == key for record in records):
        continue
      same = next((record for record in records if record["count"] == count), None)
      record = same or self._measure(context, prompter, found, rows, pool, draw, count, budget)
      records.append({**record, "key": key, "window_count": limit})
      with seals.replacing(context.directory / RECORDS_FILE) as partial:
        write_json(partial, records)

  def _measure(
    self, context, prompter, task, rows, pool, draw, count, budget
  ) -> dict[str, Any]:
    """What one number of demonstrations gives."""
    if self.retrieval is None or not count:
      parts = [(rows, prompter.demonstrations(draw(count)))]
    else:
      parts = []
      every = prompter.demonstrations(pool)
      for share in self.retrieval.shares(rows, pool, count):
        total = sum(len(every[i]) for i in share.demonstrations)
        order = dealt(list(share.demonstrations), -(-total // budget))
        parts.append(([rows[i] for i in share.rows], [every[i] for i in order]))
    found = []
    for i, (some, demos) in enumerate(parts, 1):
      which = f", prefix {i} of {len(parts)}" if len(parts) > 1 else ""
      progress = functools.partial(
        context.progress, description=f"{context.name}, {count} demonstrations{which}")
      found.append(prompter.evaluate(task, some, demos, budget, progress))
    shares = np.array([len(some) for some, _ in parts]) / len(rows)
    record = {"count": count, "num_rows": len(rows), "num_prefixes": len(parts)}
    for name in ("metric", "num_groups", "window", "num_tokens", "used", "skipped", "cache_bytes"):
      record[name] = float(shares @ [getattr(measured, name) for measured in found])
    for name in ("read_seconds", "rows_seconds"):
      record[name] = sum(getattr(measured, name) for measured in found)
    record["read_flops"], record["one_text_flops"], record["row_flops"] = (
      sum(column) for column in zip(*(
        _operations(prompter, measured, some) for measured, (some, _) in zip(found, parts))))
    context.flops += record["read_flops"] + record["row_flops"]
    record["predictions"] = [
      {"id": row.id, "prediction": prediction} for measured, (some, _) in zip(found, parts)
      for row, prediction in zip(some, measured.predictions)]
    skipped = f", {record['skipped']:.0f} too long" if record["skipped"] else ""
    several = f", {len(parts)} prefixes" if len(parts) > 1 else ""
    context.log(
      f"{count} demonstrations in {record['num_groups']:g} groups ({record['num_tokens']:.0f} "
      f"tokens{skipped}{several}): {task.metric} {record['metric']:.3f} on {len(rows)} rows; read "
      f"in {record['read_seconds']:.1f} s, rows {record['rows_seconds']:.1f} s")
    return record

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)


def _parts(task: Task, counts, seed: int, balanced: bool):
  """Rows to draw from, and rows to evaluate on, the same for all counts.

  Without rows of their own, demonstrations come from those of the task: as many as the largest
  count, and for a window half of them.
  """
  task.require_text()
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
  return json.loads(path.read_text()) if seals.is_whole(path) else []


def _operations(prompter, measured, rows) -> tuple[float, float, float]:
  """Of reading the groups, of reading them as one text, and of all rows: products and attention."""
  config = prompter.config
  groups = max(measured.num_groups, 1)
  each = measured.num_tokens / groups
  read = measured.num_tokens * flops.forward_flops_per_token(config, max(int(each), 1))
  one_text = measured.num_tokens * flops.forward_flops_per_token(config, measured.num_tokens)
  tokens = sum(prompter.num_row_tokens(row) for row in rows)
  of_rows = tokens * flops.forward_flops_per_token(config, 1) + (
    4 * config.num_layers * config.num_heads * config.head_width * tokens * measured.num_tokens)
  return float(read), float(one_text), float(of_rows)
