"""Kosmos-1 trained from CLIP's tower as transformers writes it: features, what stays frozen."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lmops_jax.config import resolve
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.models.vision import VisionTransformer
from lmops_jax.systems.kosmos import starts

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")

SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
FILE = "kosmos/kosmos1_paper.gin"
BINDINGS = [
  "VOCABULARY = @data.TrainSentencePiece()", "data.TrainSentencePiece.vocab_size = 300",
  "STEPS = 2", "HELD_OUT = 0.0", "kosmos.Training.num_groups = 1",
  "optim.warmup_linear.warmup_steps = 1", "models.ResamplerConfig.num_latents = 2",
  *(f"text/models.TransformerConfig.{name} = {value}" for name, value in {
    "vocab_size": None, "num_layers": 1, "width": 16, "num_heads": 2, "mlp_width": 32,
    "max_length": 24, "dtype": "'float32'"}.items()),
  *(f"vision/models.TransformerConfig.{name} = {value}" for name, value in {
    "num_layers": 3, "width": 16, "num_heads": 2, "mlp_width": 32, "dtype": "'float32'"}.items()),
  "models.VisionConfig.image_size = 28", "data.ImageSettings.height = 28",
  "data.ImageSettings.width = 28", "kosmos.Pretrain.images = @data.ImageSettings()",
  "kosmos.Pretrain.documents = []", "text/kosmos.RowShape.length = 24",
  "pairs/kosmos.RowShape.length = 24", "pairs/kosmos.RowShape.rows = 2",
  "pairs/kosmos.Pictures.corpus = @data.ImageJsonl()",
]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
  torch.manual_seed(0)
  config = transformers.CLIPConfig(
    text_config={**SIZES, "vocab_size": 61, "max_position_embeddings": 16},
    vision_config={**SIZES, "image_size": 28, "patch_size": 14}, projection_dim=8)
  model = transformers.CLIPModel(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.3 * torch.randn_like(parameter))
  path = tmp_path_factory.mktemp("clip")
  model.save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def bindings(peer, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pairs")
  draws = np.random.default_rng(0)
  for i in range(4):
    Image.fromarray(draws.integers(0, 256, (28, 28, 3), np.uint8)).save(folder / f"{i}.png")
  (folder / "pairs.jsonl").write_text("\n".join(
    json.dumps({"images": [f"{i}.png"], "text": f"number {i}"}) for i in range(4)))
  (folder / "text.jsonl").write_text("\n".join(
    json.dumps({"text": f"the number {i} is one more than the number {i - 1} and is nice"})
    for i in range(30)))
  return [
    *BINDINGS, f"CLIP_PATH = '{peer}'", f"data.ImageJsonl.path = '{folder}/pairs.jsonl'",
    f"TEXT_PATH = '{folder}/text.jsonl'",
  ]


def test_the_tower_has_clips_features(peer, bindings):
  vision = resolve.load([FILE], bindings).build().model.vision
  params = starts.clip_tower(peer, vision)
  assert jax.tree.leaves(params["top"])[0].shape[0] == 1
  pixels = np.random.default_rng(1).normal(size=(2, 28, 28, 3)).astype(np.float32)
  theirs = transformers.CLIPVisionModel.from_pretrained(peer).eval()
  with torch.no_grad():
    last = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
    norm = next(m for name, m in theirs.named_modules() if name.endswith("post_layernorm"))
    want = norm(last).numpy()
  got = VisionTransformer(vision).apply({"params": params}, jnp.asarray(pixels), method="features")
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_what_is_frozen_keeps_clips_bits(run_stages, peer, bindings, tmp_path):
  system = run_stages(FILE, tmp_path, *bindings).system
  start = nn.unbox(starts.clip_tower(peer, system.model.vision))
  after = load_params(tmp_path / "train/params/2")["vision"]
  for name, value in start.items():
    if name in ("top", "post_norm"):
      moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), value, after[name])
      assert all(jax.tree.leaves(moved)), name
    else:
      jax.tree.map(np.testing.assert_array_equal, value, after[name])


@pytest.mark.parametrize("binding, message", [
  ("vision/models.TransformerConfig.width = 32", "has width=16 and models.VisionConfig.trunk has"),
  ("vision/models.TransformerConfig.num_layers = 2", "has num_layers=3 and .* has 2"),
  ("models.VisionConfig.patch_size = 7", "has patch_size=14 and models.VisionConfig has 7"),
])
def test_a_tower_of_another_size_is_refused(peer, binding, message):
  other = resolve.load(
    [FILE], [
      *BINDINGS, f"CLIP_PATH = '{peer}'", "data.ImageJsonl.path = '/data/none'",
      "TEXT_PATH = '/data/none'", binding]).build()
  with pytest.raises(ValueError, match=message):
    other.stages(None)
