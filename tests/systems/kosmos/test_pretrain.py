"""Kosmos-1 trained on files: rows, groups, a tower of which the top is trained, and its plan."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from lmops_jax.config import resolve
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.docked import DockedLM
from lmops_jax.sizing.budget import Memory
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.kosmos import plan, training
from lmops_jax.training import loop

TINY = [
  "VOCABULARY = @data.TrainSentencePiece()", "data.TrainSentencePiece.vocab_size = 300",
  "STEPS = 3", "kosmos.Training.num_groups = 2",
  "optim.warmup_linear.warmup_steps = 1", "models.ResamplerConfig.num_latents = 4",
  "text/models.TransformerConfig.vocab_size = None",
  *(f"text/models.TransformerConfig.{name} = {value}" for name, value in {
    "num_layers": 2, "width": 16, "num_heads": 2, "mlp_width": 32, "max_length": 64,
    "dtype": "'float32'", "embedding_scale": 4.0}.items()),
  *(f"vision/models.TransformerConfig.{name} = {value}" for name, value in {
    "num_layers": 2, "width": 16, "num_heads": 2, "mlp_width": 32, "dtype": "'float32'"}.items()),
  "models.VisionConfig.image_size = 28", "data.ImageSettings.height = 28",
  "data.ImageSettings.width = 28", "text/kosmos.RowShape.length = 32",
  "pairs/kosmos.RowShape.length = 32", "pairs/kosmos.RowShape.rows = 2",
  "interleaved/kosmos.RowShape.length = 48", "interleaved/kosmos.RowShape.pictures = 2",
  "kosmos.Pretrain.images = @data.ImageSettings()", "kosmos.Pretrain.pictures_per_document = 2",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Text, pairs and documents on disk, one picture of which cannot be read."""
  folder = tmp_path_factory.mktemp("data")
  draws = np.random.default_rng(0)
  for i in range(8):
    Image.fromarray(draws.integers(0, 256, (70, 80, 3), np.uint8)).save(folder / f"{i}.png")
  (folder / "broken.png").write_bytes(b"no picture")
  words = ("a red star", "two blue moons", "the green bird sings", "an orange cloud")
  (folder / "text.jsonl").write_text("\n".join(
    json.dumps({"text": f"{words[i % 4]} and {words[(i + 1) % 4]} number {i}\nmore of it"})
    for i in range(40)))
  pairs = [{"images": [f"{i % 8}.png"], "text": words[i % 4]} for i in range(12)]
  pairs.append({"images": ["broken.png"], "text": "lost"})
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
  (folder / "pages.jsonl").write_text("\n".join(
    json.dumps({"images": [f"{i}.png", f"{i + 1}.png"],
                "text": f"<image> {words[i % 4]} <image> {words[(i + 1) % 4]}"})
    for i in range(6)))
  own = folder / "tiny.gin"
  own.write_text("\n".join(["include 'kosmos/kosmos1_paper.gin'", *TINY, *[
    f"TEXT_PATH = '{folder}/text.jsonl'", f"DOCUMENTS_PATH = '{folder}/pages.jsonl'",
    "pairs/kosmos.Pictures.corpus = @p/data.ImageJsonl()",
    f"p/data.ImageJsonl.path = '{folder}/pairs.jsonl'",
  ]]))
  return str(own)


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  resolved = resolve.load([tiny], [])
  job = resolved.run()
  stages = skeleton.resolve_stages(
    job.system, job.system.stages(None), resolved.tree.child("system"))
  pipeline.run_stages(stages, path, system=job.system.name)
  return path


def test_a_run_counts_what_it_left_out_and_trains_the_top_of_the_tower(workdir, tiny):
  summary = json.loads((workdir / "report/summary.json").read_text())
  counts = summary["counts"]
  assert counts["pairs/pairs"]["examples"] == 12 and counts["pairs/pairs"]["unreadable"] == 1
  assert counts["interleaved/documents"]["pictures"] == 12
  system = resolve.load([tiny], []).build()
  assert "pairs/pairs" in system.table(summary)
  ids = ImageTokens(**json.loads((workdir / "rows/ids.json").read_text()))
  docked = training.docked_model(system.model, ids.vocab_size)
  start = nn.unbox(jax.jit(loop.initializer(docked))(jax.random.key(0)))
  after = load_params(workdir / "train/params/3")
  frozen = {"class_embedding", "patch_embedding", "position_embedding", "pre_norm", "trunk"}
  assert frozen | {"top", "post_norm"} == set(after["vision"])
  for name in frozen:
    jax.tree.map(np.testing.assert_array_equal, after["vision"][name], start["vision"][name])
  moved = lambda a, b: not np.array_equal(a, b)  # noqa: E731
  assert any(jax.tree.leaves(jax.tree.map(moved, after["vision"]["top"], start["vision"]["top"])))
  assert moved(after["connector"]["latents"], start["connector"]["latents"])


def test_a_step_is_planned_and_compiled_from_shapes(tiny):
  system = resolve.load([tiny], ["text/models.TransformerConfig.vocab_size = 306"]).build()
  partitioner = MeshConfig(data=2, fsdp=1, tensor=1).plan(2)
  phase, = system.phases(partitioner, Memory(), platform="cpu", num_target=1, num_corpus=1)
  params = jax.eval_shape(loop.initializer(DockedLM(system.model)), jax.random.key(0))
  assert phase.num_params == sum(x.size for x in jax.tree.leaves(params))
  assert phase.parts["opt_state"] < 2 * phase.parts["params"]  # none of the frozen layers
  batch = plan.abstract_batch(system.training, system.shapes, 28, partitioner)
  assert batch["pairs/images"].shape == (2, 2, 1, 28, 28, 3)
  with pytest.raises(Exception, match="2 groups do not split over the mesh's 4 data shards"):
    system.phases(MeshConfig(data=4).plan(4), Memory(), platform="cpu")
  real = MeshConfig(data=2, fsdp=1, tensor=4).build()
  program, = system.programs(real, Memory(), num_target=1)
  assert program.flops == pytest.approx(phase.flops / 3)
  with real.activate():
    state, sums = program.lower().out_info
  sizes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]  # noqa: E731
  assert sizes(state.params) == sizes(nn.unbox(params)) and sums["loss_sum"].shape == ()


def test_the_published_model_has_its_size():
  system = resolve.load(["kosmos/kosmos1_paper.gin"], [
    f"{name} = '/data/none'" for name in (
      "TEXT_PATH", "PAIRS_PATH", "DOCUMENTS_PATH", "VOCABULARY_PATH")]).build()
  phase, = system.phases(MeshConfig(fsdp=8).plan(8), Memory(), platform="tpu")
  assert 1.6e9 < phase.num_params < 1.7e9  # "1.6B"
  assert 1.0e16 < phase.flops / phase.steps < 1.4e16
  shapes = system.training.shapes
  per_step = 128 * sum(shape.rows * shape.length for shape in shapes.values())
  assert 1.2e6 < per_step < 1.6e6  # 1.2M tokens, and what rows of pairs have to spare


@pytest.mark.parametrize("binding, message", [
  ("data.ImageSettings.height = 56", "28 x 28|56 x 28 and models.VisionConfig.image_size is 28"),
  ("text/kosmos.RowShape.length = 99", "length=99 and .*max_length is 64"),
  ("kosmos.Pretrain.texts = [@kosmos.Texts(), @kosmos.Texts()]", "2 sources of the part 'text'"),
])
def test_settings_that_do_not_fit_are_refused(tiny, binding, message):
  with pytest.raises(ValueError, match=message):
    resolve.load([tiny], [binding]).build()
