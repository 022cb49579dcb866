"""What a small Kosmos-2 learns to place, against the same without boxes."""

import dataclasses
import json

import pytest

from lmops_jax.systems.kosmos import study
from lmops_jax.systems.kosmos.grounding import Grounding
from lmops_jax.systems.kosmos.grounding.system import ARMS
from lmops_jax.systems.kosmos.grounding.world import LOCATED, TOLD
from lmops_jax.systems.kosmos.world import PAIRS

MARGIN = 0.1

# Scenes of one shape each, and expressions alone, with their boxes or without.
SIZES = [
  "ARMS = ('grounded', 'plain')", "SEEDS = [0]", "TOWER_STEPS = 600", "STEPS = 300",
  "SCENES = 1500", "kosmos.TowerTraining.recolored_share = 0.0",  # so few steps do not teach both
  "DOCUMENTS = 16", "ITEMS = 64", "GROUPS = 1", "pairs/kosmos.RowShape.rows = 32",
  "data.Scenes.two_share = 0.0", "data.Scenes.least_side = 16", "data.Scenes.largest_side = 22",
  "kosmos.World.num_validation = 32", "kosmos.Training.eval_every = 300",
  "kosmos.Evaluate.max_new_tokens = 6",
]


@dataclasses.dataclass(frozen=True)
class Expressions(Grounding):
  """Arms that read expressions alone."""

  def given(self, arm):
    of_kind = LOCATED if ARMS[arm].located else TOLD
    return study.Given(
      ARMS[arm].arm._replace(parts=(PAIRS,)), {PAIRS: {f"{of_kind}_expressions": 1.0}})


def expressions(system):
  return Expressions(**{f.name: getattr(system, f.name) for f in dataclasses.fields(system)})


@pytest.mark.slow
def test_a_model_taught_boxes_places_what_it_is_asked_for(run_stages, tmp_path, full_compile):
  with full_compile():  # a run this long is slower by half without
    run_stages("kosmos/grounding.gin", tmp_path, *SIZES, change=expressions)
  summary = json.loads((tmp_path / "report" / "summary.json").read_text())
  grounded, plain = (
    {kind: summary["figures"][arm][f"{kind}/seen"]["values"] for kind in ("expression", "bound")}
    for arm in ("grounded", "plain"))
  constant = summary["baselines"]["constant"]["seen"]
  for kind in ("expression", "bound"):  # without the grammar, and with it, which gives any box
    assert len(grounded[kind]) == 1
    for of_grounded, of_plain in zip(grounded[kind], plain[kind], strict=True):
      assert of_grounded > max(of_plain, constant) + MARGIN, kind
