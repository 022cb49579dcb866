"""Finetuning of a trained model on tasks, at the smallest size."""

import json

import jax
import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.data import task_sets
from lmops_jax.data.tasks import Example, Task
from lmops_jax.data.tasks.choice import TaskChoice
from lmops_jax.mesh import meshes
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan

SIZES = """
include 'mesh/data.gin'
include 'metalm/small_model.gin'
text/models.TransformerConfig:
  num_layers = 1
  width = 32
  mlp_width = 64
  embedding_scale = 5.656854249
reader/models.TransformerConfig:
  num_layers = 1
  width = 32
  mlp_width = 64
"""
PRETRAIN = """
import lmops_jax.systems.metalm
import lmops_jax.data
import lmops_jax.training.optimizers
run.system = @metalm.Pretrain()
run.mesh = %MESH
metalm.Pretrain:
  texts = @metalm.Texts()
  model = %MODEL
  spans = @data.RandomSpans()
  training = @metalm.Training()
metalm.Texts:
  corpus = @data.InstalledText()
  vocabulary = @data.TrainSentencePiece()
  length = 64
data.InstalledText.max_bytes = 1_000_000
data.TrainSentencePiece:
  vocab_size = 400
  sample_bytes = 100_000
data.RandomSpans.window = 16
metalm.Training:
  optimizer = @optim.adamw()
  num_steps = 4
  batch_size = 8
  num_validation = 8
optim.adamw.learning_rate = 5e-3
"""
TUNE = "include 'metalm/finetune_pipeline.gin'\n"
STEPS = 100


def run(resolved, workdir):
  """What became of each stage."""
  job = resolved.run()
  stages = skeleton.resolve_stages(
    job.system, job.system.stages(meshes.single_device()), resolved.tree.child("system"))
  return {record.name: record.status
          for record in pipeline.run_stages(stages, workdir, system=job.system.name)}


@pytest.fixture(scope="module")
def start(bindings, tmp_path_factory):
  """The folder of a finished run."""
  path = tmp_path_factory.mktemp("pretrain")
  own = path / "own.gin"
  own.write_text(PRETRAIN + SIZES)
  resolved = resolve.load([str(own)], [one for one in bindings if not one.startswith("ARMS")])
  run(resolved, path / "run")
  return path / "run"


@pytest.fixture(scope="module")
def tuning(start, tmp_path_factory):
  """Makes settings of a tuning run: which of two words a text has tells the label."""
  folder = tmp_path_factory.mktemp("task")
  draws = np.random.default_rng(0)
  words = ("river", "tree", "cloud", "stone")
  rows = []
  for number in range(160):
    text = list(draws.choice(words, 3))
    text.insert(draws.integers(4), ("north", "south")[number % 2])
    rows.append({"text": " ".join(text), "label": number % 2})
  (folder / "side.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "own.jsonl").write_text("".join(
    json.dumps({"prompt": f"The text {row['text']} ends.", "completion": " up"}) + "\n"
    for row in rows[:20]))
  own = folder / "tune.gin"
  own.write_text(TUNE + SIZES)

  def made(*more):
    """Settings with bindings."""
    return resolve.load([str(own)], [
      f"START = {str(start)!r}", f"TASK = {str(folder / 'side.jsonl')!r}",
      "tasks.choose.template = 'Text: {text} Side: {label}'",
      "tasks.choose.labels = ('red', 'blue')", "ROWS = 40", f"STEPS = {STEPS}",
      "BATCH_SIZE = 16", "LENGTH = 48", "RATE = 5e-3", "WARMUP = 5", *more])

  made.folder = folder
  return made


def params_of(start, workdir):
  """Before and after."""
  before, = (start / "train/params").iterdir()
  return [jax.tree.map(np.asarray, load_params(path))
          for path in (before, workdir / f"train/params/{STEPS}")]


@pytest.fixture(scope="module")
def tuned(tuning, tmp_path_factory):
  """A finished run whose decoder is frozen."""
  path = tmp_path_factory.mktemp("tuned")
  assert set(run(tuning(), path).values()) == {"ran"}
  return path


def test_the_encoder_learns_for_a_decoder_that_stays_as_it_is(start, tuned, tuning):
  summary = json.loads((tuned / "report" / "summary.json").read_text())
  of = summary["accuracy"]["side"]
  assert of["before"]["num"] == of["after"]["num"] == 40
  assert of["after"]["mean"] >= of["before"]["mean"] + 0.25
  assert summary["rows"]["task"]["rows"] == 120
  before, after = params_of(start, tuned)
  assert all(map(np.array_equal, jax.tree.leaves(before["text"]), jax.tree.leaves(after["text"])))
  for part in ("reader", "reader_connector"):
    assert not all(map(np.array_equal, jax.tree.leaves(before[part]),
                       jax.tree.leaves(after[part])))
  page = (tuned / "report" / "index.html").read_text()
  assert "<mark>Text:" in page.replace("<mark> ", "<mark>")
  assert "side" in tuning().build().table(summary)


def test_a_finished_run_is_not_run_again(tuned, tuning):
  assert not {"ran", "resumed"} & set(run(tuning(), tuned).values())


def test_several_tasks_train_the_whole_model(start, tuning, tmp_path):
  own = str(tuning.folder / "own.jsonl")
  run(tuning(
    "RECORDS = {'side': @data.TaskRecords(), 'own': @data.ImageJsonl()}",
    f"data.ImageJsonl.path = {own!r}", "optim.partition.rules = {'.*': @optim.adamw()}",
    "PACK = True", "LIST_OPTIONS = True"), tmp_path)
  summary = json.loads((tmp_path / "report" / "summary.json").read_text())
  assert {name: of["rows"] for name, of in summary["rows"].items()} == {"side": 120, "own": 20}
  assert summary["rows"]["own"]["sequences"] < 20
  of = summary["accuracy"]["side"]
  assert of["after"]["mean"] >= of["before"]["mean"] + 0.25
  before, after = params_of(start, tmp_path)
  assert not np.array_equal(before["text"]["embedding"], after["text"]["embedding"])


def test_a_plan_has_the_batches_that_training_reads(tuned, tuning):
  system, partitioner = tuning().build(), meshes.single_device()
  sets = task_sets.open_tasks(tuned / "rows", ["task"])
  batch = dict(task_sets.mixed(sets, 0).batch(np.arange(16)))
  del batch["example_id"]  # it stays on the host
  planned = plan.abstract_batch(system.planned(), partitioner)
  assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
    name: (x.shape, x.dtype) for name, x in batch.items()}
  phase, = system.phases(partitioner, None, platform="cpu")
  summary = json.loads((tuned / "report" / "summary.json").read_text())
  assert phase.num_params == summary["num_params"] and phase.steps == STEPS
  manifest = json.loads((tuned / "train" / "manifest.json").read_text())
  assert phase.flops == manifest["flops"]
  program, = system.programs(partitioner, None)
  assert program.flops == phase.flops / STEPS


def test_the_published_finetuning_is_planned_from_shapes_alone():
  def planned(*more):
    system = resolve.load(["metalm/finetune.gin"], list(more), owed="named").build()
    phase, = system.phases(meshes.single_device(), None, platform="tpu")
    return phase

  frozen = planned()
  whole = planned("optim.partition.rules = {'.*': @optim.adamw()}")
  assert frozen.num_params == whole.num_params == pytest.approx(1.3e9 + 366e6, rel=0.035)
  # Two moments of each parameter in float32, or of the encoder and its connector alone.
  assert whole.parts["opt_state"] == pytest.approx(8 * whole.num_params, rel=1e-3)
  assert frozen.parts["opt_state"] < 0.3 * whole.parts["opt_state"]
  # The decoder's weights get no gradient, a third of what training them takes.
  of_decoder = 2 * 1.21e9 * 32 * 256  # products of 24 layers of width 2048, of each position
  assert whole.flops - frozen.flops > 36_816 * of_decoder


@pytest.mark.parametrize("more, sentence", [
  ("text/models.TransformerConfig.width = 64", "holds another model than .*shape"),
  ("models.UniversalConfig.reader = None", "metalm.TaskTuning.model has no reader"),
  ("ACCUMULATE = 3", "batch_size=16 is not a multiple of accumulate=3"),
  ("LENGTH = 4096", "length=4096 are longer than"),
  ("metalm.TaskTuning.tasks = [@tasks.choose(), @tasks.choose()]", "has 'side' twice"),
])
def test_settings_that_do_not_fit_are_refused(tuning, more, sentence):
  with pytest.raises(ValueError, match=sentence):
    tuning(more).build().stages(None)


def test_a_start_without_its_stages_is_refused(tuning, tmp_path):
  with pytest.raises(ValueError, match="has no finished stage 'train'"):
    tuning(f"START = {str(tmp_path)!r}").build().stages(None)


def test_a_prompt_beyond_the_models_positions_is_refused_before_training(tuning, tmp_path):
  longer = "tasks.choose.template = 'Text: {text}" + " river" * 300 + " Side: {label}'"
  with pytest.raises(ValueError, match="has a prompt of .* tokens with its start"):
    run(tuning(longer), tmp_path)
  assert not (tmp_path / "train").exists()


def test_a_task_with_a_prompt_for_each_option_is_refused_as_it_is_read(tuning, tmp_path):
  row = Example(0, "It", (" is", " was"), 0, prompts=("Here it", "There it"))
  task = Task("each", (row,))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TaskChoice, "load", lambda self: task)
    with pytest.raises(ValueError, match="the task each has rows with a prompt or a picture for"):
      run(tuning(), tmp_path)
  assert not (tmp_path / "train").exists()


@pytest.mark.slow
def test_open_answers_are_generated(tuning, tmp_path):
  """A task without options is learned from and asked, by beams."""
  own = tuning.folder / "side.jsonl"
  rows = [json.loads(line) for line in own.read_text().splitlines()]
  examples = [
    Example(i, f"Text: {row['text']} Side:", (), -1, (("red", "blue")[row["label"]],))
    for i, row in enumerate(rows)]
  task = Task("open", tuple(examples[:40]), tuple(examples[40:]), metric="exact_match")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TaskChoice, "load", lambda self: task)
    run(tuning("BEAMS = 3", "LENGTH_PENALTY = 0.6",
               "decoding.GenerationOptions.max_new_tokens = 4"), tmp_path)
  summary = json.loads((tmp_path / "report" / "summary.json").read_text())
  of = summary["answers"]["side"]
  assert of["before"]["figures"]["exact_match"][0] < 0.3
  assert of["after"]["figures"]["exact_match"][0] > 0.7
