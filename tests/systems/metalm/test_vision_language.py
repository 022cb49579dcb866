"""Training on pictures and texts at the smallest size, and what the published one takes."""

import json
from pathlib import Path

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
TUNE = """
include 'metalm/finetune_pictures.gin'
include 'metalm/vision_smoke_model.gin'
include 'mesh/data.gin'
data.ImageSettings:
  height = 24
  width = 24
STEPS = 60
BATCH_SIZE = 12
LENGTH = 64
RATE = 5e-3
WARMUP = 5
vision/models.TransformerConfig.max_length = 61
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
  return run_stages(load(bindings, *more), path)


def run_stages(resolved, path):
  job = resolved.run()
  stages = skeleton.resolve_stages(
    job.system, job.system.stages(None), resolved.tree.child("system"))
  pipeline.run_stages(stages, path, system=job.system.name)
  return job.system, json.loads((path / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(bindings, tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  return path, *run(bindings, path)


@pytest.fixture(scope="module")
def tuning(bindings, finished, tmp_path_factory):
  """Makes settings of a tuning run: the colour of a picture is asked for."""
  folder = tmp_path_factory.mktemp("task")
  own, rows = folder / "tune.gin", {"chosen": [], "open": [], "pairs": []}
  own.write_text(TUNE)
  pictures = str(Path(bindings[0]).parent)
  for number in range(60):
    name, other = ((*COLOURS,)[(number + shift) % 3] for shift in (0, number % 2))
    path = f"{pictures}/{number}.png"
    one = {"images": [path], "prompt": "which colour is it?"}
    rows["chosen"].append(one | {"options": [*COLOURS], "label": name})
    rows["open"].append(one | {"answer": name})
    rows["pairs"].append({
      "images": [path, f"{pictures}/{(number + number % 2) % 60}.png"],
      "prompt": "<image> one <image> other same?", "options": ["yes", "no"],
      "label": number % 2})
  for name, of in rows.items():
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of)) + "\n")

  def made(task, *more):
    return resolve.load([str(own)], [
      f"START = {str(finished[0])!r}", f"TASK = {str(folder / f'{task}.jsonl')!r}", "DATA = None",
      "ROWS = 24", *more])

  made.folder = folder
  return made


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


@pytest.mark.slow
def test_colours_are_learned_as_options_and_told_in_words(tuning, tmp_path):
  """Larger pictures than in training, of which the encoder's positions are interpolated."""
  resolved = tuning(
    "chosen", "metalm.TaskTuning.tasks = [@tasks.choose_pictures(), @open/tasks.choose_pictures()]",
    f"open/tasks.choose_pictures.task = {str(tuning.folder / 'open.jsonl')!r}", "BEAMS = 2",
    "LENGTH_PENALTY = 0.6", "decoding.GenerationOptions.max_new_tokens = 6")
  system, summary = run_stages(resolved, tmp_path)
  of = summary["accuracy"]["chosen"]
  assert of["after"]["num"] == 24 and of["after"]["mean"] > 0.9
  assert summary["rows"]["task"]["pictures"] == summary["rows"]["task"]["rows"] == 36
  before, after = (summary["answers"]["open"][moment]["figures"]["exact_match"]
                   for moment in ("before", "after"))
  assert before[0] < 0.5 and 0.9 < after[0] <= after[2]
  assert "open, exact_match" in system.table(summary)
  assert "first answer" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize("task, more", [
  ("pairs", ("PICTURES = 2", "LENGTH = 128", "text/models.TransformerConfig.max_length = 128"))])
def test_a_plan_of_tuning_has_the_batches_that_it_reads(tuning, tmp_path, task, more):
  resolved = tuning(task, *more)
  job = resolved.run()
  stages = skeleton.resolve_stages(
    job.system, job.system.stages(None), resolved.tree.child("system"))
  pipeline.run_stages(stages, tmp_path, system=job.system.name, only=["rows"])
  rows = job.system.sets(tmp_path / "rows")["task"]
  batch = dict(rows.batch(np.arange(12)))
  assert batch["image_segments"].any(axis=2).all()  # both pictures have words
  assert batch["vector_index"].max() < 2 * (37 + 24)
  assert len(np.unique(batch["vector_index"][0])) == 1 + 2 * 37 + batch[
    "image_segments"][0].sum() - 2  # all vectors but those of start tokens, and words
  del batch["example_id"]
  planned = plan.abstract_batch(job.system.planned(), meshes.single_device())
  assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
    name: (x.shape, x.dtype) for name, x in batch.items()}


@pytest.mark.parametrize("more, sentence", [
  (["metalm.TaskTuning.images = None"], "rows with pictures need images="),
  (["PACK = True"], "rows with pictures need images="),
  (["PICTURES = 0"], "metalm.TaskTuning.model has no reader; dock one .* or set pictures"),
  (["models.FusedEncoderConfig.any_size = False"], "pictures of 24 x 24 are given"),
])
def test_settings_of_tuning_that_do_not_fit_are_refused(tuning, more, sentence):
  with pytest.raises(ValueError, match=sentence):
    tuning("chosen", *more).build().stages(None)


def test_more_pictures_than_a_row_has_are_refused_before_training(tuning, tmp_path):
  with pytest.raises(ValueError, match="pairs has 2 pictures and metalm.TaskTuning.pictures is 1"):
    run_stages(tuning("pairs"), tmp_path)
  assert not (tmp_path / "train").exists()


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
  ("data.ImageSettings.height = 384\ndata.ImageSettings.width = 384\n"
   "models.FusedEncoderConfig.any_size = False",
   "pictures of 384 x 384 are given and models.FusedEncoderConfig.image_size is 224"),
  ("data.ImageSettings.height = 232\ndata.ImageSettings.width = 232",
   "not multiples of models.FusedEncoderConfig.patch_size=16"),
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
