"""The averaging rule of zero-shot downstream tables.

PDS (arXiv 2410.07064) reports the unweighted mean over nine tasks of lm-evaluation-harness, each by
its length-normalised accuracy if the task has one and by its plain accuracy otherwise.
"""

import math
from collections.abc import Mapping, Sequence

PDS_TASKS = (
  "hellaswag",
  "lambada_openai",
  "winogrande",
  "openbookqa",
  "arc_easy",
  "arc_challenge",
  "piqa",
  "sciq",
  "boolq",
)


def task_accuracy(metrics: Mapping[str, float], task: str = "task") -> float:
  """`acc_norm` if the task reports it, else `acc`.

  Args:
    metrics: one entry of the harness's `results`; its keys may carry a filter (`acc_norm,none`).
    task: named in the error.

  Raises:
    ValueError: neither metric is there, or the accuracy is outside [0, 1].
  """
  plain = {}
  for key, value in metrics.items():
    plain.setdefault(key.split(",")[0], value)
  for name in ("acc_norm", "acc"):
    if name in plain:
      value = float(plain[name])
      if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"{task}: {name} is {value}, but an accuracy lies between 0 and 1.")
      return value
  raise ValueError(f"{task} has neither acc_norm nor acc; it reports {sorted(plain) or 'nothing'}.")


def average_accuracy(
  results: Mapping[str, Mapping[str, float]], tasks: Sequence[str] = PDS_TASKS
) -> float:
  """Unweighted mean of `task_accuracy` over `tasks`; every task must be present.

  Args:
    results: the harness's `results`, task name to metrics.
    tasks: which tasks enter the mean; others in `results` are ignored.

  Raises:
    ValueError: a task is missing, `tasks` is empty, or a task reports no accuracy.
  """
  if not tasks:
    raise ValueError("An average needs at least one task.")
  missing = [task for task in tasks if task not in results]
  if missing:
    raise ValueError(
      f"The results lack {', '.join(missing)}; they hold {', '.join(sorted(results)) or 'nothing'}."
    )
  return math.fsum(task_accuracy(results[task], task) for task in tasks) / len(tasks)
