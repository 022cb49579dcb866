"""Training on pictures and texts at the smallest size, and what the published one takes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from lmops_jax.config import resolve
from lmops_jax.mesh import meshes
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan

OWN = """
include 'metalm/vision_language.gin'
include 'metalm/vision_language_sizes.gin'
include 'mesh/data.gin'
metalm.Pairs.corpus = @data.ImageJsonl()
data.ImageJsonl.path = %PAIRS_PATH
"""
APART = [
  "models.UniversalConfig.reader = @models.Docking()",
  "models.Docking.encoder = @models.TextEncoderConfig()",
  "models.Docking.connector = @models.LinearConnectorConfig()",
  "models.TextEncoderConfig.trunk = @reader/models.TransformerConfig()",
  *(f"reader/models.TransformerConfig.{name} = {value}" for name, value in {
    "num_layers": 1, "width": 16, "num_heads": 2, "mlp_width": 32, "max_length": 24,
    "positions": "'learned'", "causal": False}.items()),
  "models.ImageDocking.encoder = @models.VisionConfig()",
  "models.VisionConfig.trunk = @vision/models.TransformerConfig()",
  "models.VisionConfig.image_size = 16", "models.VisionConfig.patch_size = 4",
  "vision/models.TransformerConfig.vocab_size = 1"]
PAPER = ["PAIRS_PATH = '<P>'", "TEXT_PATH = '<T>'", "VOCABULARY_PATH = '<V>'"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 210)}


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
  """Files of 60 pictures of one colour with their names, and of 40 texts."""
  folder = tmp_path_factory.mktemp("pairs")
  own, rows, texts = folder / "own.gin", [], []
  own.write_text(OWN)
  draws = np.random.default_rng(0)
  for number in range(60):
    name = (*COLOURS,)[number % 3]
    Image.new("RGB", (20, 16), COLOURS[name]).save(folder / f"{number}.png")
    rows.append({"images": [f"{number}.png"], "text": f"a picture that is {name} all over"})
    words = " ".join(draws.choice([*COLOURS, "stone", "river", "tree"], 30))
    texts.append({"text": f"{number} {words}"})
  for name, of in (("pairs", rows), ("texts", texts)):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of)) + "\n")
  return str(own), [f"PAIRS_PATH = {str(folder / 'pairs.jsonl')!r}",
                    f"TEXT_PATH = {str(folder / 'texts.jsonl')!r}"]


def load(bindings, *more):
  return resolve.load([bindings[0]], [*bindings[1], *more])


def run(bindings, path, *more):
  resolved = load(bindings, *more)
  job = resolved.run()
  stages = skeleton.resolve_stages(
    job.system, job.system.stages(None), resolved.tree.child("system"))
  pipeline.run_stages(stages, path, system=job.system.name)
  return job.system, json.loads((path / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(bindings, tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  return path, *run(bindings, path)


def test_a_run_leaves_a_model_and_a_report(finished):
  path, system, summary = finished
  params = load_params(path / "train/params/4")
  assert set(params) == {"text", "vision", "vision_connector"}
  assert len(params["text"]["embedding"]) == len(params["vision"]["word_embedding"]) == 306
  counts = summary["counts"]
  assert counts["pairs/pairs"]["examples"] + counts["pairs/pairs"]["held_out"] == 60
  assert counts["pairs/pairs"]["pictures"] == counts["pairs/pairs"]["examples"]
  assert counts["texts/texts"]["rows"] > counts["texts/texts"]["held_out"] > 0
  assert set(summary["validation_loss"]) == {"pairs/pairs", "texts/texts"}
  page = (path / "report" / "index.html").read_text()
  assert "[picture]" in page and "training loss" in system.table(summary)


@pytest.mark.parametrize("more", [(), APART], ids=["fused", "apart"])
def test_a_plan_has_the_batches_that_training_reads(finished, bindings, more, tmp_path):
  path, system, _ = finished
  if more:
    system = load(bindings, *more).build()
  batch = dict(system.groups(path / "rows").batch(0))
  assert batch["pairs/images"].shape == (2, 2, 1, 16, 16, 3)
  del batch["example_id"]  # it stays on the host
  planned = plan.abstract_batch(system.planned(), meshes.single_device())
  assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
    name: (x.shape, x.dtype) for name, x in batch.items()}


@pytest.mark.slow
def test_each_part_is_read_by_the_encoders_alone_when_they_are_apart(bindings, tmp_path):
  run(bindings, tmp_path, *APART, "STEPS = 2", "HELD_OUT = 0.0")
  params = load_params(tmp_path / "train/params/2")
  assert set(params) == {"text", "reader", "reader_connector", "vision", "vision_connector"}


@pytest.mark.slow
def test_dropout_and_prefixes_are_the_same_after_an_interruption(bindings, tmp_path):
  more = ("HELD_OUT = 0.0", "metalm.GroupTraining.checkpoint_every = 2")
  run(bindings, tmp_path / "whole", *more)
  resolved = load(bindings, *more)
  job = resolved.run()

  class Cut(Exception):
    pass

  groups = type(job.system).groups

  def failing(self, folder):
    made = groups(self, folder)

    class Source:
      reads_params = False

      def batch(self, step, params=None):
        if step > 2:
          raise Cut
        return made.batch(step)

    return Source()

  stages = skeleton.resolve_stages(
    job.system, job.system.stages(None), resolved.tree.child("system"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(job.system), "groups", failing)
    with pytest.raises(Cut):
      pipeline.run_stages(stages, tmp_path / "cut", system=job.system.name)
  run(bindings, tmp_path / "cut", *more)
  one, other = (load_params(tmp_path / name / "train/params/4") for name in ("whole", "cut"))
  assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_the_published_run_is_planned_from_shapes_alone():
  system = resolve.load(["metalm/vision_language.gin"], PAPER).build()
  phase, = system.phases(meshes.single_device(), None, platform="tpu")
  assert phase.num_params == pytest.approx(353e6 + 192e6, rel=0.01)
  assert phase.steps == 350_000
  rows = 64 * (3 * 256 + 512)
  assert phase.flops / phase.steps > 6 * 353e6 * rows
  program, = system.programs(meshes.single_device(), None)
  assert program.flops * phase.steps == pytest.approx(phase.flops)


@pytest.mark.parametrize("more, sentence", [
  ("models.UniversalConfig.vision = None", "model has no encoder of pictures"),
  ("models.ImageDocking.encoder = @models.VisionConfig()\n"
   "models.VisionConfig.trunk = @vision/models.TransformerConfig()",
   "model has no encoder of words"),
  ("models.ImageDocking.connector = @models.ResamplerConfig()",
   "vision.connector must give a vector for each vector"),
  ("data.ImageSettings.height = 384\ndata.ImageSettings.width = 384",
   "pictures of 384 x 384 and the encoder's image_size is 224"),
  ("pairs/metalm.RowShape.length = 4096", "length=4096 are longer than"),
  ("metalm.VisionLanguage.pairs = [@metalm.Pairs(), @metalm.Pairs()]", "2 sources of the part"),
  ("texts/metalm.RowShape.pictures = 1", "texts of 1; give the former at least one"),
  ("ACCUMULATE = 3", "num_groups=64 is not a multiple of accumulate=3"),
])
def test_settings_that_do_not_fit_are_refused(more, sentence):
  with pytest.raises(ValueError, match=sentence):
    resolve.load(["metalm/vision_language.gin"], [*PAPER, *more.split("\n")]).build()


def test_a_vocabulary_beyond_the_models_is_refused(bindings, tmp_path):
  with pytest.raises(ValueError, match="the vocabulary has 306 ids and .*vocab_size is 303"):
    run(bindings, tmp_path, "text/models.TransformerConfig.vocab_size = 303")
