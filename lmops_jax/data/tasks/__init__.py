"""Tasks for in-context learning: formatted rows, and where they come from.

A `Task` holds rows that are already text: a prompt, the options that may follow it, the right one.
`named_task` makes the tasks of structured prompting (arXiv:2212.06713), of the meta-optimizer paper
(arXiv:2212.10559) and of MetaLM (arXiv:2206.06336) from tfds or from a folder of JSON lines,
`jsonl_task` any task from a file and a template, `kind_task` one from an embedded corpus, without
any download. `picture_task` makes tasks with pictures, Kosmos-1's (arXiv:2302.14045) among them,
from their data sets' folders, `picture_rows_task` any from a file. Nothing here imports TensorFlow
or jax on import.
"""

from lmops_jax.data.tasks.asked import CLUSTERS, IN_CONTEXT
from lmops_jax.data.tasks.choice import TaskChoice, TaskSource, checked, read_task, write_task
from lmops_jax.data.tasks.installed_kind import kind_task
from lmops_jax.data.tasks.named import named_task
from lmops_jax.data.tasks.pictures import (
  PICTURE_ENTRIES,
  PictureTaskChoice,
  picture_rows_task,
  picture_task,
)
from lmops_jax.data.tasks.registry import ENTRIES, FLAVOURS
from lmops_jax.data.tasks.seqio_tasks import register_jsonl_seqio_task, register_seqio_tasks
from lmops_jax.data.tasks.task import Example, Task, demonstrations
from lmops_jax.data.tasks.templates import Template, jsonl_task

__all__ = [
  "CLUSTERS",
  "ENTRIES",
  "FLAVOURS",
  "IN_CONTEXT",
  "PICTURE_ENTRIES",
  "Example",
  "PictureTaskChoice",
  "Task",
  "TaskChoice",
  "TaskSource",
  "Template",
  "checked",
  "demonstrations",
  "jsonl_task",
  "kind_task",
  "named_task",
  "picture_rows_task",
  "picture_task",
  "read_task",
  "register_jsonl_seqio_task",
  "register_seqio_tasks",
  "write_task",
]
