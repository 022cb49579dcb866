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

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
RNG = np.random.default_rng(0)
TEXTS = ["", *(" ".join(RNG.choice(list("abcdefgh"), size=n)) for n in RNG.integers(1, 20, 31))]
OTHERS = [*(" ".join(RNG.choice(list("efghij"), size=n)) for n in RNG.integers(1, 9, 31)), ""]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
  """A random BERT of transformers, its tokenizer, and their folder."""
  vocabulary = {word: i for i, word in enumerate([*SPECIAL, *"abcdefghij"])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(SPECIAL)
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
    unk_token="[UNK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
  torch.manual_seed(0)
  model = randomise(transformers.BertModel(transformers.BertConfig(
    vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=40, pad_token_id=0))).eval()
  folder = tmp_path_factory.mktemp("peer")
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  return model, tokenizer, folder


@pytest.mark.parametrize("others", [None, OTHERS], ids=["texts", "pairs"])
@pytest.mark.parametrize("pooling, tuned", [("mean", 0), ("first", 2)])
def test_vectors_are_those_of_transformers(peer, others, pooling, tuned):
  model, tokenizer, folder = peer
  given = tokenizer(TEXTS, others, padding=True, return_tensors="pt")
  assert given["token_type_ids"].any() == (others is not None)
  with torch.no_grad():
    hidden = model(**given).last_hidden_state.numpy()
  real = given["attention_mask"].numpy()[:, :, None]
  want = {"mean": (hidden * real).sum(axis=1) / real.sum(axis=1), "first": hidden[:, 0]}[pooling]
  reader = TextReader(model_lib.load(folder), Encoding(pooling, tuned, max_tokens=40))
  encoded = reader.read(TEXTS, others)
  assert encoded.num_cut == 0
  np.testing.assert_allclose(reader.encoder.all_vectors(reader.top, encoded), want, atol=1e-5)
