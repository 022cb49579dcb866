"""Checkpoints that store one of two tied tensors, by either name; and advice what to leave out."""

import json
import shutil

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from safetensors.numpy import load_file, save_file  # noqa: E402

from lmops_jax.pretrained import exporting, families  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402
from tests.pretrained.tiny_models import DictSource, make, randomise  # noqa: E402

TIED = (
  "gpt2", "opt", "xglm", "bloom", "gptj", "llama", "mistral", "qwen2", "bert", "roberta", "electra")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """`family -> folder` of a tied model that stores both names of each tied tensor."""
  made = {}

  def folder(family):
    if family not in made:
      made[family] = tmp_path_factory.mktemp(family)
      peer = make(family)
      config = type(peer.config).from_dict({**peer.config.to_dict(), "tie_word_embeddings": True})
      torch.manual_seed(0)
      peer = randomise(type(peer)(config))
      peer.save_pretrained(made[family])
      save_file(
        {name: np.array(x) for name, x in DictSource(peer).tensors.items()},
        made[family] / "model.safetensors",
      )
    return made[family]

  return folder


def _changed(folder, to, change):
  shutil.copytree(folder, to)
  tensors = load_file(to / "model.safetensors")
  change(tensors)
  save_file(tensors, to / "model.safetensors")
  return str(to)


def _pairs(family):
  table = families.by_name(family)
  return [*table.tied.items(), *table.same.items()]


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("kept", [0, 1])
def test_either_name_alone_gives_the_same_model(folders, tmp_path, family, kept):
  want = model_lib.load(str(folders(family))).params()

  def drop(tensors):
    for pair in _pairs(family):
      np.testing.assert_array_equal(tensors[pair[0]], tensors[pair[1]])
      del tensors[pair[1 - kept]]

  source = model_lib.load(_changed(folders(family), tmp_path / "one", drop))
  assert source.config.tied_embeddings
  jax.tree.map(np.testing.assert_array_equal, source.params(), want)


@pytest.mark.parametrize("family", TIED)
def test_two_names_with_different_numbers_are_refused(folders, tmp_path, family):
  for i, pair in enumerate(_pairs(family)):

    def change(tensors, pair=pair):
      tensors[pair[0]] = tensors[pair[0]] + 1

    path = _changed(folders(family), tmp_path / str(i), change)
    with pytest.raises(ValueError, match=f"{pair[0]} differs from {pair[1]} though"):
      model_lib.load(path).params()


def test_an_untied_model_needs_both_matrices(folders, tmp_path):
  path = _changed(folders("llama"), tmp_path / "m", lambda t: t.pop("lm_head.weight"))
  config = json.loads((tmp_path / "m/config.json").read_text())
  (tmp_path / "m/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
  with pytest.raises(ValueError, match=r"it lacks lm_head.weight \[61, 24\]"):
    model_lib.load(path).params()


def test_a_body_without_prefix_may_have_the_embedding_by_the_heads_name(folders, tmp_path):
  want = model_lib.load(str(folders("gpt2"))).params()

  def bare(tensors):
    del tensors["transformer.wte.weight"]
    for name in [name for name in tensors if name.startswith("transformer.")]:
      tensors[name.removeprefix("transformer.")] = tensors.pop(name)

  source = model_lib.load(_changed(folders("gpt2"), tmp_path / "m", bare))
  jax.tree.map(np.testing.assert_array_equal, source.params(), want)


def test_a_name_with_prefix_and_the_bare_one_are_refused_together(folders, tmp_path):
  path = _changed(
    folders("gpt2"), tmp_path / "m", lambda t: t.update({"wte.weight": t["transformer.wte.weight"]})
  )
  with pytest.raises(ValueError, match="holds both .*wte.weight and .*wte.weight, which name one"):
    model_lib.load(path)


def test_an_export_of_one_stored_name_is_read_by_transformers(folders, tmp_path):
  path = _changed(
    folders("llama"), tmp_path / "in", lambda t: t.pop("model.embed_tokens.weight")
  )
  exporting.export(tmp_path / "out", model_lib.load(path))
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  want = load_file(folders("llama") / "model.safetensors")["lm_head.weight"]
  np.testing.assert_array_equal(again.model.embed_tokens.weight.detach(), want)


@pytest.mark.parametrize("name,advised", [
  ("classifier.weight", True), ("score.weight", True), ("qa_outputs.bias", True),
  ("model.layers.0.self_attn.q_norm.weight", False),
  ("model.layers.0.self_attn.q_proj.bias", False), ("rope_freqs.weight", False),
  ("model.rotary_emb.scale", False), ("lm_head.bias", False),
])
def test_only_other_tasks_heads_are_advised_to_be_left_out(folders, tmp_path, name, advised):
  path = _changed(
    folders("llama"), tmp_path / "m", lambda t: t.update({name: np.zeros((3,), np.float32)})
  )
  with pytest.raises(ValueError) as error:
    model_lib.load(path).params()
  assert f"no place for its {name} [3]" in str(error.value)
  assert ("pretrained.load.ignore" in str(error.value)) == advised


def test_layers_beyond_the_declared_ones_are_not_advised_to_be_left_out(folders, tmp_path):
  shutil.copytree(folders("llama"), tmp_path / "m")
  config = json.loads((tmp_path / "m/config.json").read_text())
  (tmp_path / "m/config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
  with pytest.raises(ValueError, match=r"no place for its model.layers.2.*saved with\.$"):
    model_lib.load(str(tmp_path / "m")).params()


def test_an_old_untied_head_has_its_bias_by_the_older_name(tmp_path):
  """Versions that tied the bias of BERT's head in any case stored it once."""
  peer = make("bert", 1)  # untied
  peer.save_pretrained(tmp_path / "in")

  def older(tensors):
    tensors["cls.predictions.bias"] = tensors.pop("cls.predictions.decoder.bias")

  source = model_lib.load(_changed(tmp_path / "in", tmp_path / "m", older))
  assert not source.config.tied_embeddings
  want = peer.state_dict()["cls.predictions.decoder.bias"]
  np.testing.assert_array_equal(source.params()["unembedding_bias"], want)
