"""The figures that the terminal and the report show."""

from lmops_jax.systems.pds import report


def _evaluations(*methods):
  losses = {"pds": (6.0, 5.0, 4.0), "random": (6.5, 5.5, 4.5), "length": (7.0, 6.0, 5.0)}
  return [
    {"method": name, "seed": seed,
     "curve": [{"step": 10 * i, "target_test_loss": loss} for i, loss in enumerate(losses[name])]}
    for name in methods for seed in (0, 1)
  ]


def _rows(*methods):
  results = report.method_results(_evaluations(*methods))
  return {
    line.split("  ")[0]: [cell.strip() for cell in line.split("  ") if cell.strip()]
    for line in report.table({"methods": results}).splitlines()[1:]
  }


def test_steps_to_the_baseline():
  rows = _rows("pds", "random", "length")
  assert rows["pds"] == ["pds", "4.000", "4.000 4.000", "15 15"]
  assert rows["length"] == ["length", "5.000", "5.000 5.000", "never never"]
  assert rows["random"] == ["random", "4.500", "4.500 4.500"]


def test_without_a_baseline_there_is_nothing_to_reach():
  rows = _rows("pds", "length")
  assert rows["pds"] == ["pds", "4.000", "4.000 4.000"]
  assert rows["length"] == ["length", "5.000", "5.000 5.000"]
