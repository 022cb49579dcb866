"""Semi-causal training alone: a run, and what the published one takes."""

import json

import jax
import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.mesh import meshes
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.stages import pipeline, skeleton

OWN = """
include 'metalm/smoke.gin'
run.system = @metalm.Pretrain()
metalm.Pretrain:
  texts = @metalm.Texts()
  model = %MODEL
  spans = @data.RandomSpans()
  training = @metalm.Training()
"""
PAPER = ["CORPUS_PATH = '<CORPUS_PATH>'", "VOCABULARY_PATH = '<VOCABULARY_PATH>'"]


@pytest.fixture(scope="module")
def own(bindings, tmp_path_factory):
  path = tmp_path_factory.mktemp("gin") / "own.gin"
  path.write_text(OWN)
  return path, [one for one in bindings if not one.startswith("ARMS")]


def test_a_run_leaves_a_model_and_a_report(own, tmp_path):
  resolved = resolve.load([str(own[0])], own[1])
  job = resolved.run()
  stages = skeleton.resolve_stages(
    job.system, job.system.stages(None), resolved.tree.child("system"))
  pipeline.run_stages(stages, tmp_path, system=job.system.name)
  summary = json.loads((tmp_path / "report" / "summary.json").read_text())
  params = load_params(tmp_path / "train/params" / str(job.system.training.num_steps))
  assert set(params) == {"text", "reader", "reader_connector"}
  assert summary["num_params"] == sum(np.size(x) for x in jax.tree.leaves(params))
  assert summary["spans"]["encoded_tokens"] > 0
  # One word more than the decoder's: the mask of replaced-token detection.
  assert len(params["reader"]["trunk"]["embedding"]) == 1 + len(params["text"]["embedding"])
  page = (tmp_path / "report" / "index.html").read_text()
  assert "<mark>" in page and "nats a learned token" in job.system.table(summary)


def test_the_published_run_is_planned_from_shapes_alone():
  system = resolve.load(["metalm/language_paper.gin"], PAPER).build()
  partitioner = meshes.single_device()
  phase, = system.phases(partitioner, None, platform="tpu")
  assert phase.num_params == pytest.approx(1.3e9 + 366e6, rel=0.035)
  assert phase.steps == 300_000
  # Every position of the decoder takes six operations a parameter at least.
  assert phase.flops / phase.steps > 6 * 1.3e9 * 1024 * 2048
  program, = system.programs(partitioner, None)
  assert program.name == "train"


@pytest.mark.parametrize("more, sentence", [
  (["models.UniversalConfig.reader = None"], "metalm.Pretrain.model has no reader"),
  (["LENGTH = 4096"], "length=4096 are longer than"),
  (["metalm.Pretrain.reader = @metalm.ReaderTraining()",
    "metalm.ReaderTraining.generator = @text/models.TransformerConfig()",
    "metalm.ReaderTraining.optimizer = %OPTIMIZER", "metalm.ReaderTraining.num_steps = 1"],
   "trunk has vocab_size=64000"),
])
def test_settings_that_do_not_fit_are_refused(more, sentence):
  with pytest.raises(ValueError, match=sentence):
    resolve.load(["metalm/language_paper.gin"], [*PAPER, *more]).build()


def test_a_vocabulary_beyond_the_models_is_refused(own):
  system = resolve.load(
    [str(own[0])], [*own[1], "text/models.TransformerConfig.vocab_size = 300"]).build()
  with pytest.raises(ValueError, match="the vocabulary has 400 ids and .*vocab_size is 300"):
    system.arm(400)
