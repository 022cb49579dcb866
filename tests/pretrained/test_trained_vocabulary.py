"""A corpus's vocabulary as a tokenizer: the same ids, here and in transformers."""

import numpy as np
import pytest

from lmops_jax.data import HuggingFaceTokenizer, TrainSentencePiece
from lmops_jax.data.image_tokens import KOSMOS_WORDS, appended, encode_records
from lmops_jax.data.multimodal import Record, drawn
from lmops_jax.decoding.image_prompts import image_tokens, laid_out
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import ResamplerConfig
from lmops_jax.models.docked import DockedConfig
from lmops_jax.models.vision import VisionConfig
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained import trained_vocabulary
from lmops_jax.text.tokenizer import load_tokenizer

TEXTS = [
  "The quick brown fox.",
  "  two  spaces,\ttabs\nand\n\n\nline breaks  \n",
  "def f(x):\n    return x + 1\n",
  "naïve café, 漢字 and 🙂",
  "1234567890" * 7,
  "",
]


@pytest.fixture(scope="module")
def lines():
  return ["def fall(x):\n    return x + hello\n", *(f"word{i % 7} and {i} others.\n" * 3
                                                   for i in range(200))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lines):
  return TrainSentencePiece(vocab_size=400).build(lines, tmp_path_factory.mktemp("spm"))


def test_the_saved_tokenizer_gives_the_ids_of_the_vocabulary(trained, lines, tmp_path):
  trained_vocabulary.save(trained, tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  for text in [*TEXTS, *lines[:20]]:
    ids = trained.encode(text)
    assert tokenizer.encode(text, add_special=False) == ids
    assert tokenizer.encode(text) == [trained.bos_id, *ids]
    assert tokenizer.decode(tokenizer.encode(text)) == text
  for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
    assert getattr(tokenizer, name) == getattr(trained, name)
  assert tokenizer.stop_ids == (trained.eos_id,)


@pytest.mark.parity
def test_transformers_opens_it_to_the_same_ids(trained, lines, tmp_path):
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  trained_vocabulary.save(trained, tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in [*TEXTS, *lines[:20]]:
    assert theirs(text)["input_ids"] == [trained.bos_id, *trained.encode(text)]
  assert (theirs.bos_token_id, theirs.eos_token_id) == (trained.bos_id, trained.eos_id)


def test_a_hugging_face_vocabulary_keeps_its_ids(lines, tmp_path):
  import tokenizers

  raw = tokenizers.Tokenizer(tokenizers.models.BPE())
  raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  raw.decoder = tokenizers.decoders.ByteLevel()
  raw.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  raw.save(str(tmp_path / "given.json"))
  vocabulary = HuggingFaceTokenizer(str(tmp_path / "given.json")).build([], tmp_path / "own")
  trained_vocabulary.save(vocabulary, tmp_path / "saved")
  tokenizer = load_tokenizer(tmp_path / "saved")
  for text in TEXTS:
    assert tokenizer.encode(text) == [vocabulary.bos_id, *vocabulary.encode(text)]


def test_a_model_that_no_tokenizer_json_says_is_refused(lines, tmp_path):
  spec = TrainSentencePiece(vocab_size=300, model_type="unigram")
  with pytest.raises(ValueError, match="is no BPE model, and tokenizer.json is written for BPE"):
    trained_vocabulary.save(spec.build(lines, tmp_path / "spm"), tmp_path / "saved")


def test_a_docked_model_trained_here_is_a_folder_whose_prompts_are_its_rows(
  trained, tmp_path
):
  """The words behind the vocabulary have the ids that its rows were made with."""
  ids = appended(trained, 3)
  config = DockedConfig(
    TransformerConfig(vocab_size=ids.vocab_size),
    VisionConfig(
      TransformerConfig(positions="none", causal=False, final_norm=False), 8, 4),
    ResamplerConfig(3))
  trained_vocabulary.describe_trained(
    tmp_path, config, trained, params="params", log=pytest.fail, words=KOSMOS_WORDS)
  source = model_lib.load(str(tmp_path))
  assert source.config == config and source.family == "kosmos-2"
  tokenizer = source.tokenizer()
  assert image_tokens(tokenizer, 3) == ids
  parts = ("The quick", drawn(np.zeros((8, 8, 3), np.uint8), "black"), "brown fox.", "x")
  row, = encode_records([Record(0, parts, len(parts), "row")], trained, ids)
  prompt = laid_out(parts, tokenizer, ids)
  assert prompt.tokens.tolist() == row.tokens.tolist()[:-1]
  assert prompt.vectors.tolist() == row.vectors.tolist()[:-1]
  assert tokenizer.decode(prompt.tokens).count("<image>") == 4


def test_a_word_that_the_vocabulary_holds_is_refused(trained):
  with pytest.raises(ValueError, match="the word e has the id .* and should have 40[01], behind"):
    trained_vocabulary.tokenizer_of(trained, ("<image>", "e"))
