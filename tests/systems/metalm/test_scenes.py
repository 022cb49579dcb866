"""Questions about scenes: what is asked, what arms read, and that seeing tells."""

import json

import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.data.images import decode
from lmops_jax.data.synthetic_pictures.pictographs import COLORS
from lmops_jax.mesh import meshes
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan

SMALL = ["SCENES = 60", "ITEMS = 20", "SEEDS = [0]", "STEPS = 41", "BATCH_SIZE = 4",
         "models.TransformerConfig.width = 16", "models.TransformerConfig.mlp_width = 32"]


def stages_of(*more):
  resolved = resolve.load(["metalm/pictures.gin"], list(more))
  job = resolved.run()
  return job.system, skeleton.resolve_stages(
    job.system, job.system.stages(meshes.single_device()), resolved.tree.child("system"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """The folder of a finished stage `rows`, and the system."""
  path = tmp_path_factory.mktemp("scenes")
  system, stages = stages_of(*SMALL)
  pipeline.run_stages(stages, path, system=system.name, only=["rows"])
  return path / "rows", system


def test_questions_have_one_answer_that_the_scene_shows():
  questions = stages_of("ITEMS = 48")[0].questions
  for held_out in (False, True):
    items = questions.items(held_out)
    assert len({row.id for row in items}) == len(items) == 48
    for row in items[:40]:
      scene = questions.scenes.scene(1, row.id, held_out)
      answer, (kind,) = row.options[row.label].strip(), row.categories
      if kind == "count":
        assert answer == ("one", "two")[len(scene.pictographs) - 1]
      else:
        named, = (one for one in scene.pictographs if one.shape in row.prompt)
        assert answer == named.color and len(row.options) == len(COLORS)
        assert (named.pair in questions.scenes.held_out_pairs) == held_out
      picture, = row.images
      np.testing.assert_array_equal(
        np.asarray(decode(picture.data, "")), scene.picture)
  shown = {questions.scenes.scene(0, i).picture.tobytes() for i in range(questions.num_items)}
  assert not shown & {
    questions.scenes.scene(1, row.id).picture.tobytes() for row in questions.items(False)}


def test_arms_differ_in_their_pictures_alone(rows):
  folder, system = rows
  seeing, blind = (system.rows(folder, arm).batch(np.arange(60)) for arm in ("seeing", "blind"))
  assert not blind.pop("images").any() and seeing.pop("images").any(axis=(1, 2, 3, 4)).all()
  for name, value in seeing.items():
    np.testing.assert_array_equal(value, blind[name])
  # The answer and the end are learned, and nothing else; the question is read with the picture.
  assert (seeing["loss_mask"].sum(axis=1) == 2).all()
  assert (seeing["image_segments"].sum(axis=2) > 5).all()


def test_a_plan_has_the_batches_that_training_reads(rows):
  folder, system = rows
  batch = dict(system.rows(folder, "seeing").batch(np.arange(4)))
  del batch["example_id"]  # it stays on the host
  planned = plan.abstract_batch(system.planned(), meshes.single_device())
  assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
    name: (x.shape, x.dtype) for name, x in batch.items()}


@pytest.mark.parametrize("more, sentence", [
  (["data.Scenes.side = 64", "models.FusedEncoderConfig.any_size = False"],
   "pictures of 64 x 64 are given"),
  (["metalm.Pictures.length = 100"], "length=100 are longer than"),
])
def test_settings_that_do_not_fit_are_refused(more, sentence):
  with pytest.raises(ValueError, match=sentence):
    stages_of(*more)


def test_questions_beyond_a_row_are_refused(tmp_path):
  system, stages = stages_of(*SMALL, "models.FusedEncoderConfig.max_words = 8")
  with pytest.raises(ValueError, match="60 questions are longer than the encoder's or the decod"):
    pipeline.run_stages(stages, tmp_path, system=system.name)


@pytest.mark.slow
def test_who_sees_tells_colours_and_numbers_better_than_the_most_frequent_answer(tmp_path):
  system, stages = stages_of(
    "SEEDS = [0]", "STEPS = 250", "SCENES = 4_000", "ITEMS = 128", "ARMS = ('seeing',)")
  pipeline.run_stages(stages, tmp_path, system=system.name)
  summary = json.loads((tmp_path / "report" / "summary.json").read_text())
  for name in ("count/seen", "color/seen"):
    low, _ = summary["figures"]["seeing"][name]["interval"]
    assert low > summary["chance"][name]
  assert "color, seen" in system.table(summary)
