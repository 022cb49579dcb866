"""Published encoders read packed spans as PyTorch reads each alone; others are refused."""

import dataclasses

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.models.encoders import TextEncoderConfig  # noqa: E402
from lmops_jax.models.partitioning import unboxed  # noqa: E402
from lmops_jax.pretrained import text_encoder  # noqa: E402
from lmops_jax.pretrained.text_encoders import (  # noqa: E402
  check_text_encoder,
  text_encoder_params,
)
from tests.pretrained.tiny_models import make, randomise  # noqa: E402

_SIZES = dict(
  vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
  max_position_embeddings=30, pad_token_id=1,
)
PEERS = {  # class, what its configuration has beside the sizes, and layers apart
  "bert": ("BertForMaskedLM", {}, 0),
  "minilm": ("BertModel", {}, 2),  # with a pooler
  "roberta": ("RobertaForMaskedLM", {"type_vocab_size": 1}, 1),
  "electra": ("ElectraForPreTraining", {"embedding_size": 10}, 2),
}
SPANS = (7, 4, 1)  # lengths of the spans of a row, behind which two positions are padding


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
  """`name -> (model of transformers, its folder)`."""
  made = {}

  def peer(name):
    if name not in made:
      made_of = getattr(transformers, PEERS[name][0])
      torch.manual_seed(0)
      model = randomise(made_of(made_of.config_class(**_SIZES, **PEERS[name][1])))
      folder = tmp_path_factory.mktemp("peer")
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return peer


@pytest.mark.parametrize("name", PEERS)
def test_packed_spans_equal_torch_alone(peers, name):
  peer, folder = peers(name)
  config = text_encoder(folder, top_layers=PEERS[name][2])
  params = text_encoder_params(folder, config)
  length = sum(SPANS) + 2
  tokens = np.random.default_rng(0).integers(3, 61, (1, length)).astype(np.int32)
  positions, segments = np.zeros((2, 1, length), np.int32)
  starts = np.cumsum((0, *SPANS))
  for i, (start, end) in enumerate(zip(starts, starts[1:]), 1):
    positions[0, start:end], segments[0, start:end] = np.arange(end - start), i
  module = config.module()
  shapes = unboxed(jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"]))
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
  got = jax.jit(lambda p: module.apply(
    {"params": p}, tokens, positions, segments, method="features"))(params)
  for start, end in zip(starts, starts[1:]):
    with torch.no_grad():
      want = peer(torch.tensor(tokens[:, start:end].astype(np.int64)), output_hidden_states=True)
    np.testing.assert_allclose(got[0, start:end], want.hidden_states[-1][0], rtol=0, atol=1e-5)


def test_settings_of_training_are_the_users(peers):
  config = text_encoder(peers("bert")[1], top_layers=1, dropout=0.1, dtype="bfloat16", remat="full")
  trunk = config.trunk
  assert config.top_layers == 1 and trunk.dtype == "bfloat16" and trunk.remat == "full"
  assert (trunk.embedding_dropout, trunk.residual_dropout, trunk.attention_dropout) == (0.1,) * 3
  check_text_encoder(peers("bert")[1], config)


@pytest.mark.parametrize("change,sentence", [
  ({"width": 32}, "has width=24 and models.TextEncoderConfig.trunk has 32; give both the same"),
  ({"activation": "relu"}, "activation='gelu' and models.TextEncoderConfig.trunk has 'relu'"),
  ({"num_layers": 2}, "num_layers=3 and"),
  ({"vocab_size": 62}, "vocab_size=61 and"),
])
def test_another_encoder_is_told_by_the_field_that_differs(peers, change, sentence):
  folder = peers("bert")[1]
  other = TextEncoderConfig(dataclasses.replace(text_encoder(folder).trunk, **change))
  with pytest.raises(ValueError) as error:
    check_text_encoder(folder, other)
  assert sentence in str(error.value) and repr(str(folder)) in str(error.value)
  with pytest.raises(ValueError):
    text_encoder_params(folder, other)


def test_a_decoder_is_no_encoder(tmp_path):
  make("gpt2").save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="the family 'gpt2', which is no encoder of text; give a BE"):
    text_encoder(tmp_path)
