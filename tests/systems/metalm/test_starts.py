"""A published encoder in place of one that the run trains."""

import json

import jax
import numpy as np
import pytest

from lmops_jax.mesh import meshes
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained import exporting, families
from lmops_jax.pretrained.families import ConfigReader
from lmops_jax.pretrained.sources import write_safetensors
from lmops_jax.systems.metalm import texts
from lmops_jax.systems.metalm.arms import SEMI
from tests import model_folders
from tests.systems.metalm.conftest import load, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """An ELECTRA discriminator of random weights, with a token for each byte."""
  path, family = tmp_path_factory.mktemp("electra"), families.by_name("electra")
  tokenizer = model_folders.byte_tokenizer()
  fields = {
    "model_type": "electra", "architectures": ["ElectraForPreTraining"], "hidden_size": 16,
    "embedding_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 320,
    "vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 1}
  config = family.read_config(ConfigReader(fields, "config.json"))
  params = jax.jit(lambda key: unboxed(Transformer(config).init(
    key, np.zeros((1, 1), np.int32))["params"]))(jax.random.key(0))
  (path / "config.json").write_text(json.dumps(fields))
  write_safetensors(
    path / "model.safetensors", exporting.tensors(family, config, params, np.dtype("float32")))
  tokenizer.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}))
  return path


FILES = ("metalm/encoder_model.gin",)


def _bound(bindings, folder, *more):
  return [*bindings, f"ENCODER_PATH = {str(folder)!r}", *more]


@pytest.mark.slow
def test_the_decoder_is_trained_on_a_published_encoder(bindings, folder, tmp_path):
  bound = _bound(bindings, folder, "ARMS = ('semi_causal',)")
  system = load(bound, files=FILES).build()
  assert set(run(tmp_path, bound, files=FILES).values()) == {"ran"}
  prepared = texts.Prepared(tmp_path / "texts")
  made = system.models.arm(SEMI, prepared.vocabulary.vocab_size)
  start = system.reader.load(
    tmp_path / "encoder", made.config.reader.encoder, prepared.vocabulary,
    meshes.single_device())
  trained = load_params(tmp_path / f"train/semi_causal/seed0/params/{system.training.num_steps}")
  jax.tree.map(np.testing.assert_array_equal, trained["reader"]["trunk"], start["trunk"])
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained["reader"]["top"], start["top"])
  assert all(jax.tree.leaves(changed)) and "detector" not in trained["reader"]["trunk"]
  assert set(start) == {"trunk", "top"}


def test_another_vocabulary_than_the_encoders_is_refused(bindings, folder, tmp_path):
  bound = _bound(bindings, folder, "VOCABULARY = @data.TrainSentencePiece()")
  with pytest.raises(ValueError, match="have another vocabulary than the encoder in metalm.Publis"):
    run(tmp_path, bound, files=FILES, only=["texts", "encoder"])


@pytest.mark.parametrize("more,sentence", [
  (["models.Docking.encoder = @models.TextEncoderConfig()"],
   "has vocab_size=258 and models.TextEncoderConfig.trunk has None; give both the same"),
  (["metalm.MetaLM.reader = @metalm.ReaderTraining()"],
   "words are the vocabulary's, and models.TextEncoderConfig.trunk has vocab_size=258; leave it"),
  (["ENCODER_PATH = 'nowhere'"], "pretrained.load.path='nowhere' is neither a folder nor a .gguf"),
])
def test_what_does_not_fit_is_told_before_any_work(bindings, folder, more, sentence):
  with pytest.raises(Exception) as error:
    load(_bound(bindings, folder, *more), files=FILES).build()
  assert sentence in str(error.value)
