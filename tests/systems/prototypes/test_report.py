"""What the report draws of runs that end at different epochs."""

from lmops_jax.systems.prototypes import report


def test_courses_go_as_far_as_the_shortest_run():
  def stopped(*numbers):
    return {"history": [{"step": 7 * (i + 1), "prototypes": k} for i, k in enumerate(numbers)]}

  found = report._courses([stopped(2, 5, 4), stopped(2, 3)])
  assert [(list(run.x), list(run.y)) for run in found] == [([1, 2], [2, 5]), ([1, 2], [2, 3])]
