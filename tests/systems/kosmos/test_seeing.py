"""What a small Kosmos-1 learns to see, against a model of other pictures."""

import json

import pytest

# The default with fewer of everything; its tower knows colours by then and hardly any shape.
SIZES = [
  "ARMS = ('full', 'shuffled')", "SEEDS = [0]", "TOWER_STEPS = 700",
  "kosmos.TowerTraining.num_words = 1", "STEPS = 200", "SCENES = 3000", "DOCUMENTS = 600",
  "ITEMS = 64", "kosmos.World.num_matrix_items = 2", "kosmos.World.shots = (1,)",
  "interleaved/kosmos.RowShape.length = 128", "interleaved/kosmos.RowShape.pictures = 3",
  "data.Matrices.num_context = (3,)",
]


@pytest.mark.slow
def test_a_model_that_sees_tells_colors_and_counts(tmp_path, run_stages, full_compile):
  with full_compile():  # a run this long is slower by half without
    run_stages("kosmos/default.gin", tmp_path, *SIZES)
  found = json.loads((tmp_path / "report" / "summary.json").read_text())["figures"]
  full, shuffled = found["full"], found["shuffled"]
  print({arm: {name: of["values"] for name, of in found[arm].items()} for arm in found})
  for kind, margin in (("color", 0.2), ("count", 0.2), ("CIDEr", 0.3)):
    of_seeds = (arm[f"{kind}/seen"]["values"] for arm in (full, shuffled))
    assert all(seen > guessed + margin for seen, guessed in zip(*of_seeds, strict=True)), kind
