"""The averaging rule against a published row."""

import pytest

from lmops_jax.evaluation import harness

# The PDS row for 160M parameters: nine accuracies in per cent, average 45.0.
ROW = dict(zip(harness.PDS_TASKS, [33.5, 38.2, 51.4, 28.4, 42.3, 24.1, 59.2, 68.8, 58.7]))
HAS_NORM = {"hellaswag", "openbookqa", "arc_easy", "arc_challenge", "piqa", "sciq"}


def _results(suffix=""):
  results = {}
  for task, accuracy in ROW.items():
    key = "acc_norm" if task in HAS_NORM else "acc"
    results[task] = {f"{key}{suffix}": accuracy / 100, f"{key}_stderr{suffix}": 0.01}
    if task in HAS_NORM:
      results[task][f"acc{suffix}"] = 0.0  # must not be used
  return results


@pytest.mark.parametrize("suffix", ["", ",none"])
def test_average_reproduces_the_published_mean(suffix):
  results = _results(suffix) | {"mmlu": {"acc": 1.0}}
  assert round(100 * harness.average_accuracy(results), 1) == 45.0


def test_missing_task_and_missing_metric_are_named():
  results = _results()
  del results["piqa"]
  with pytest.raises(ValueError, match="lack piqa"):
    harness.average_accuracy(results)
  with pytest.raises(ValueError, match="boolq has neither acc_norm nor acc"):
    harness.average_accuracy(_results() | {"boolq": {"f1": 0.5}})


def test_accuracy_in_per_cent_is_refused():
  with pytest.raises(ValueError, match="sciq: acc_norm is 68.8"):
    harness.average_accuracy(_results() | {"sciq": {"acc_norm": 68.8}})
