"""Texts and pairs as transformers reads them: its own tokenizer, token types, and pooled states."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
tokenizers = pytest.importorskip("tokenizers")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.pretrained import model as model_lib  # noqa: E402
from lmops_jax.systems.prototypes.encoding import Encoding  # noqa: E402
from lmops_jax.systems.prototypes.texts import TextReader  # noqa: E402
from tests.pretrained.tiny_models import randomise  # noqa: E402

SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
RNG = np.random.default_rng(0)
TEXTS = ["", *(" ".join(RNG.choice(list("abcdefgh"), size=n)) for n in RNG.integers(1, 20, 31))]
OTHERS = [*(" ".join(RNG.choice(list("efghij"), size=n)) for n in RNG.integers(1, 9, 31)), ""]
PEERS = {  # classes, what reads the special tokens, and the names of a tokenizer's outputs
  "bert": (
    transformers.BertModel, transformers.BertConfig, tokenizers.processors.BertProcessing,
    ["input_ids", "token_type_ids", "attention_mask"]),
  "roberta": (  # with two separators between the texts of a pair, and one type
    transformers.RobertaModel, transformers.RobertaConfig, tokenizers.processors.RobertaProcessing,
    ["input_ids", "attention_mask"]),
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
  """By name a random encoder of transformers, its tokenizer, and their folder."""
  made = {}

  def peer(name):
    if name not in made:
      made[name] = _made(*PEERS[name], tmp_path_factory.mktemp(name))
    return made[name]

  return peer


def _made(model_of, config_of, processor_of, inputs, folder):
  vocabulary = {word: i for i, word in enumerate([*SPECIAL, *"abcdefghij"])}
  engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
  engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  engine.add_special_tokens(SPECIAL)
  engine.post_processor = processor_of(("[SEP]", 2), ("[CLS]", 0))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=engine, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
    unk_token="[UNK]", model_input_names=inputs)
  torch.manual_seed(0)
  model = randomise(model_of(config_of(
    vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=42, pad_token_id=1,
    type_vocab_size=2 if "token_type_ids" in inputs else 1))).eval()
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model, tokenizer, folder


@pytest.mark.parametrize("name, others, pooling, tuned, most", [
  ("bert", None, "mean", 0, 40), ("bert", None, "mean", 0, 8), ("bert", OTHERS, "first", 2, 40),
  ("roberta", OTHERS, "mean", 0, 40), ("roberta", OTHERS, "first", 2, 13)])
def test_vectors_are_those_of_transformers(peers, name, others, pooling, tuned, most):
  model, tokenizer, folder = peers(name)
  given = tokenizer(
    TEXTS, others, padding=True, truncation=True, max_length=most, return_tensors="pt")
  separators = (given["input_ids"] == 2).sum(dim=1)
  assert np.all(separators.numpy() == (1 if others is None else 2 if name == "bert" else 3))
  with torch.no_grad():
    hidden = model(**given).last_hidden_state.numpy()
  real = given["attention_mask"].numpy()[:, :, None]
  want = {"mean": (hidden * real).sum(axis=1) / real.sum(axis=1), "first": hidden[:, 0]}[pooling]
  reader = TextReader(model_lib.load(folder), Encoding(pooling, tuned, max_tokens=most))
  encoded = reader.read(TEXTS if others is None else list(zip(TEXTS, others)))
  whole = tokenizer(TEXTS, others)["input_ids"]
  assert encoded.num_cut == sum(len(row) > most for row in whole) and (encoded.num_cut == 0) == (
    most == 40)
  np.testing.assert_allclose(reader.encoder.all_vectors(reader.top, encoded), want, atol=1e-5)
