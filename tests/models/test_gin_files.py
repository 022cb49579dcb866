"""The gin files of models, optimizers and meshes build what their headers say."""

import dataclasses
import math
from pathlib import Path

import gin
import jax
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.transformer import TransformerConfig, num_params
from lmops_jax.models.universal import UniversalLM
from lmops_jax.models.vision import VisionConfig
from lmops_jax.training import loop

GIN = Path(__file__).parents[2] / "gin"


@gin.register(module="test_gin_files")
def _identity(value):
  return value


@pytest.fixture(autouse=True)
def _clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def _build(path, reference, *bindings):
  gin.parse_config_files_and_bindings(
    [str(GIN / path)], [*bindings, f"test_gin_files._identity.value = {reference}"]
  )
  return gin.get_configurable(_identity)()


@pytest.mark.parametrize(
  "name,count",
  [
    ("pds_160m", 162_417_408),
    ("pds_470m", 468_239_360),
    ("pds_1b", 1_004_348_928),
    ("pds_1.7b", 1_741_785_088),
  ],
)
def test_paper_models_have_the_published_parameters(name, count):
  config = _build(f"models/{name}.gin", "%MODEL")
  assert config.vocab_size is None and config.max_length == 1024
  assert num_params(dataclasses.replace(config, vocab_size=32_000)) == count
  assert f"{count:,}" in (GIN / f"models/{name}.gin").read_text()


def _counts(path, *bindings, vocab_size=None):
  """Parameters of each part of a model, which is never built."""
  config = _build(path, "%MODEL", *bindings)
  if vocab_size is not None:
    config = config.with_vocab_size(vocab_size)
  parts = jax.eval_shape(loop.initializer(UniversalLM(config)), jax.random.key(0))
  return config, {
    name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in parts.items()}


def test_metalms_text_model_has_the_published_sizes():
  """About 1.3B and 366M (arXiv:2206.06336, section 3.1)."""
  config, counts = _counts("metalm/language_model.gin")
  assert counts == {
    "text": 24 * (12 * 2048**2 + 13 * 2048) + 64_000 * 2048,
    "reader": 24 * (12 * 1024**2 + 13 * 1024) + (64_000 + 512 + 2) * 1024 + 32 * 16,
    "reader_connector": 1024 * 2048 + 2048}
  assert counts["text"] == pytest.approx(1.3e9, rel=0.035)
  assert counts["reader"] == pytest.approx(366e6, rel=0.01)
  trunk = config.reader.encoder.trunk
  assert config.text.residual_factor == trunk.residual_factor == pytest.approx(2.632, abs=1e-3)
  assert config.text.branch_factor == trunk.branch_factor == pytest.approx(0.2686, abs=1e-4)
  assert config.reader.encoder.top_layers == 2 and config.reader.encoder.longest_span() == 512


def test_metalms_vision_language_model_has_the_published_sizes():
  """353M and 192M (arXiv:2206.06336, section 4.1)."""
  config, counts = _counts("metalm/vision_language_model.gin")
  mlp = 2 * 768 * 3072 + 3072 + 768
  assert counts == {
    "text": 24 * (12 * 1024**2 + 13 * 1024) + 50_257 * 1024 + 2 * 1024,
    "vision": (
      12 * (4 * 768**2 + 8 * 768 + 2 * mlp) + 2 * mlp
      + (50_257 + 128 + 2 + 197 + 1 + 16 * 16 * 3 + 4) * 768),
    "vision_connector": 768 * 1024 + 2 * 1024**2 + 3 * 1024}
  assert counts["text"] == pytest.approx(353e6, rel=0.005)
  assert counts["vision"] == pytest.approx(192e6, rel=0.01)
  assert config.vectors_per_image == 1 + 196
  finetuned = dataclasses.replace(config.vision.encoder, image_size=384)
  assert finetuned.num_features() == 1 + 576


def test_a_tower_of_images_may_stand_in_place_of_the_fused_encoder():
  config, counts = _counts(
    "metalm/vision_language_model.gin", "models.ImageDocking.encoder = @models.VisionConfig()",
    "models.VisionConfig.trunk = @vision/models.TransformerConfig()")
  assert isinstance(config.vision.encoder, VisionConfig) and config.vectors_per_image == 1 + 196
  assert counts["vision"] == 12 * (12 * 768**2 + 13 * 768) + (197 + 1 + 16 * 16 * 3 + 4) * 768


def test_metalms_small_model_has_the_parts_of_the_published_one():
  small, counts = _counts("metalm/small_model.gin", vocab_size=2048)
  assert counts["text"] == 2 * (12 * 128**2 + 13 * 128) + 2048 * 128
  gin.clear_config()
  whole = _build("metalm/language_model.gin", "%MODEL")
  sizes = ("vocab_size", "num_layers", "width", "num_heads", "mlp_width", "max_length",
           "embedding_scale", "attention", "attention_chunk", "remat", "dtype",
           "embedding_dropout", "residual_dropout", "attention_dropout")
  for ours, theirs in ((small.text, whole.text), (
      small.reader.encoder.trunk, whole.reader.encoder.trunk)):
    same = {name: getattr(theirs, name) for name in sizes}
    assert dataclasses.replace(ours, **same) == theirs
  assert small.text.embedding_scale == pytest.approx(math.sqrt(128))


@pytest.mark.parametrize("name,low,high", [("tiny", 5e4, 2e5), ("small_cpu", 8.5e5, 9.5e5)])
def test_small_models_have_about_the_named_parameters(name, low, high):
  config = _build(f"models/{name}.gin", "%MODEL")
  assert isinstance(config, TransformerConfig)
  assert low < num_params(dataclasses.replace(config, vocab_size=4096)) < high


@pytest.mark.parametrize(
  "name,peak,end",
  [
    ("pds_160m", 6e-4, 6e-5),
    ("pds_470m", 3e-4, 3e-5),
    ("pds_1b", 2.5e-4, 2.5e-5),
    ("pds_1.7b", 2e-4, 2e-5),
  ],
)
def test_paper_schedules_at_published_steps(name, peak, end):
  schedule = _build(f"optim/{name}.gin", "@optim.warmup_cosine()", "TRAIN_STEPS = 100_000")
  want = {0: 0, 1: peak / 2000, 2000: peak, 51_000: (peak + end) / 2, 100_000: end}
  for step, rate in want.items():
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("path", sorted((GIN / "optim").glob("*.gin")), ids=lambda p: p.stem)
def test_every_optimizer_file_builds_with_the_macros_it_asks_for(path):
  header = path.read_text().split("import ")[0]
  values = {"LEARNING_RATE": "0.1", "WARMUP_STEPS": "2", "TRAIN_STEPS": "9_000"}
  bindings = [f"{name} = {value}" for name, value in values.items() if name in header]
  optimizer = _build(path.relative_to(GIN), "%OPTIMIZER", *bindings)
  assert callable(optimizer.init) and callable(optimizer.update)


@pytest.mark.parametrize("path", sorted((GIN / "mesh").glob("*.gin")), ids=lambda p: p.stem)
def test_every_mesh_file_fits_eight_devices(path):
  mesh = _build(path.relative_to(GIN), "%MESH")
  assert isinstance(mesh, MeshConfig)
  assert mesh.build().mesh.size == 8
