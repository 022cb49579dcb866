"""A Kosmos-2 folder of transformers: bits in and out, image vectors and logits, and a finetune."""

import json

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.pretrained import exporting, sources  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402
from tests.pretrained import tiny_models  # noqa: E402

TOKENS = np.random.default_rng(0).integers(10, 71, (2, 11))
INDEX = np.array([[-1, -1, 0, 1, 2, 3, -1, -1, -1, -1, -1], [-1] * 6 + [0, 1, 2, 3, -1]])
IMAGES = np.random.default_rng(1).normal(size=(2, 20, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def peer():
  return tiny_models.kosmos2()


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
  path = tmp_path_factory.mktemp("kosmos2")
  peer.save_pretrained(path)
  return path


def _outputs(peer):
  """Image vectors and logits."""
  with torch.no_grad():
    pixels = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    vectors = peer.get_image_features(pixels, return_dict=True).pooler_output
    logits = peer(
      pixel_values=pixels, input_ids=torch.tensor(TOKENS), use_cache=False,
      image_embeds_position_mask=torch.tensor((INDEX >= 0).astype(np.int64))).logits
  return np.asarray(vectors), np.asarray(logits)


def _tensors(folder):
  with sources.open_source(folder) as source:
    return {name: np.array(source.read(name)) for name in source.names()}


def test_image_vectors_and_logits_of_a_folder_equal_torch(peer, folder):
  source = model_lib.load(str(folder))

  @jax.jit
  def run(params):
    model = source.model.bind({"params": params})
    vectors = model.image_vectors(IMAGES)
    logits = model.logits(
      TOKENS.astype(np.int32), vectors=vectors, vector_index=INDEX.astype(np.int32))
    return vectors, logits

  for got, want in zip(run(source.params()), _outputs(peer), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_in_bfloat16_logits_are_those_of_torch_within_its_precision(peer, folder):
  """8 bits a product and rounding errors of five layers: a hundredth of the logits' deviation."""
  _, want = _outputs(peer)
  source = model_lib.load(str(folder), dtype="bfloat16")

  @jax.jit
  def run(params):
    model = source.model.bind({"params": params})
    return model.logits(
      TOKENS.astype(np.int32), vectors=model.image_vectors(IMAGES),
      vector_index=INDEX.astype(np.int32))

  error = np.asarray(run(source.params())) - want
  assert 0 < np.sqrt(np.mean(error**2)) < 0.01 * want.std()


@pytest.mark.parametrize("form", ["published", "converted"])
def test_import_and_export_give_the_same_bits_and_a_model_for_transformers(
  peer, folder, form, tmp_path
):
  source = model_lib.load(str(folder))
  if form == "converted":
    model_lib.save_model(tmp_path / "ours", source, source.params())
    source = model_lib.load(str(tmp_path / "ours"))
  exporting.export(tmp_path / "out", source)
  before, after = _tensors(folder), _tensors(tmp_path / "out")
  assert after.keys() == before.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype
    np.testing.assert_array_equal(tensor, after[name], err_msg=name)
  want = json.loads((folder / "config.json").read_text())
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == want
  again = type(peer).from_pretrained(tmp_path / "out", attn_implementation="eager")
  for got, want in zip(_outputs(again), _outputs(peer), strict=True):
    np.testing.assert_array_equal(got, want)


def test_a_description_without_the_published_file_gives_transformers_the_same_model(
  peer, folder, tmp_path
):
  source = model_lib.load(str(folder))
  bare = model_lib.PretrainedModel(folder, source.family, source.config)
  exporting.export(tmp_path / "out", bare)
  again = transformers.AutoModelForImageTextToText.from_pretrained(
    tmp_path / "out", attn_implementation="eager")
  assert type(again) is type(peer)
  for got, want in zip(_outputs(again), _outputs(peer), strict=True):
    np.testing.assert_array_equal(got, want)
