import json
import os
import pickle
import random

import pytest

from lmops_jax.data import (
  HuggingFaceTokenizer,
  SentencePieceFile,
  TrainSentencePiece,
  as_seqio,
  load_vocabulary,
)
from lmops_jax.text import vocabulary_sources

SAMPLES = [
  "The quick brown fox.",
  "  two  spaces,\ttabs\nand\n\n\nline breaks  \n",
  "def f(x):\n    return x + 1\n",
  "naïve café, 漢字 and 🙂",
  "</s> <s> <unk> <0x0A> are plain text here",
  "1234567890",
  "",
]


def texts():
  generator = random.Random(0)
  words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 8))) for _ in range(300)]
  yield "def f(x):\n    return x\n" * 3
  for _ in range(60):
    yield "\n".join(" ".join(generator.choices(words, k=12)) for _ in range(10))
  yield "x" * 20_000  # longer than a line that the trainer takes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return TrainSentencePiece(vocab_size=400).build(texts(), tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
  import tokenizers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<|endoftext|>", "[X]"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(texts(), trainer)
  tokenizer.enable_truncation(4)  # both must be undone when the file is loaded
  tokenizer.enable_padding(length=9)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[X] $A", special_tokens=[("[X]", 1)])
  path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
  tokenizer.save(str(path))
  return path


@pytest.fixture(scope="module")
def hugging_face(tokenizer_file, tmp_path_factory):
  return HuggingFaceTokenizer(str(tokenizer_file)).build([], tmp_path_factory.mktemp("hf_built"))


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("kind", ["trained", "hugging_face"])
def test_decoding_gives_the_text_back(kind, text, request):
  vocabulary = request.getfixturevalue(kind)
  ids = vocabulary.encode(text)
  assert vocabulary.decode(ids) == text
  assert not {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id} & set(ids)
  surrounded = [vocabulary.bos_id, *ids, vocabulary.eos_id, vocabulary.pad_id]
  assert vocabulary.decode(surrounded) == text


def test_batches_equal_single_texts(trained, hugging_face):
  for vocabulary in (trained, hugging_face):
    many = SAMPLES * 20
    assert vocabulary.encode_batch(many) == [vocabulary.encode(text) for text in many]
    assert vocabulary.decode_batch(vocabulary.encode_batch(SAMPLES)) == SAMPLES


def test_token_texts(trained, hugging_face):
  for vocabulary in (trained, hugging_face):
    pieces = vocabulary.token_texts()
    assert len(pieces) == vocabulary.vocab_size
    assert pieces[vocabulary.eos_id] == pieces[vocabulary.bos_id] == ""
    for text in ("  return x + 1\n", "The end. And on"):
      assert "".join(pieces[i] for i in vocabulary.encode(text)) == text


def test_special_ids_of_a_trained_model(trained):
  ids = (trained.pad_id, trained.eos_id, trained.unk_id, trained.bos_id)
  assert ids == (0, 1, 2, 3) and trained.vocab_size == 400


def test_training_twice_gives_the_same_bytes(tmp_path, trained):
  for model_type in ("bpe", "unigram"):
    spec = TrainSentencePiece(vocab_size=330, model_type=model_type)
    one, two = (spec.build(texts(), tmp_path / f"{model_type}{i}") for i in range(2))
    for name in ("sentencepiece.model", "vocabulary.json"):
      assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes()
    assert one.fingerprint == two.fingerprint != trained.fingerprint


def test_sample_is_limited_and_depends_on_the_seed():
  offered = [f"{i:04d}" * 25 for i in range(1000)]
  first = TrainSentencePiece(sample_bytes=1000)._sample(iter(offered))
  assert len(first) == 10
  assert set(first) <= set(offered[:161])  # no more is read than 16 times the sample
  assert TrainSentencePiece(sample_bytes=1000)._sample(iter(offered)) == first
  assert TrainSentencePiece(sample_bytes=1000, seed=1)._sample(iter(offered)) != first


def test_long_lines_of_any_script_reach_the_trainer():
  lines = ["x" * 9000, "\u597d" * 3000, "\U0001f600" * 2001, "\u597d" * 2000]
  pieces = list(vocabulary_sources._training_lines(lines))
  assert "".join(pieces) == "".join(lines) and pieces[-1] == lines[-1]
  assert max(len(piece.encode()) for piece in pieces) <= 8000  # what the trainer is told


def test_existing_model(trained, tmp_path):
  path = str(trained.directory / "sentencepiece.model")
  copy = SentencePieceFile(path).build(iter(["never read"]), tmp_path / "copy")
  assert copy.fingerprint == trained.fingerprint
  assert copy.encode(SAMPLES[0]) == trained.encode(SAMPLES[0])
  assert SentencePieceFile(path).fingerprint() == SentencePieceFile(path).fingerprint()


def test_missing_bos_and_pad_become_eos(tmp_path):
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["some text to learn from"] * 5), model_prefix=str(tmp_path / "m"),
    vocab_size=30, hard_vocab_limit=False, bos_id=-1, pad_id=-1, unk_id=0, eos_id=1,
    minloglevel=2)
  vocabulary = SentencePieceFile(str(tmp_path / "m.model")).build([], tmp_path / "v")
  assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id) == (1, 1, 1)


def test_hugging_face_special_tokens(tokenizer_file, hugging_face, tmp_path):
  assert hugging_face.bos_id == hugging_face.eos_id == hugging_face.pad_id == 0
  spec = HuggingFaceTokenizer(str(tokenizer_file.parent), bos="[X]")
  named = spec.build([], tmp_path / "named")
  assert named.bos_id == 1 and named.eos_id == 0
  assert named.fingerprint != hugging_face.fingerprint
  assert named.encode(SAMPLES[0]) == hugging_face.encode(SAMPLES[0])
  assert spec.fingerprint() != HuggingFaceTokenizer(str(tokenizer_file.parent)).fingerprint()
  with pytest.raises(ValueError, match=r"data\.HuggingFaceTokenizer\.pad='<none>' is no token"):
    HuggingFaceTokenizer(str(tokenizer_file), pad="<none>").build([], tmp_path / "x")


def test_end_tokens_inside_a_document_are_text(trained, hugging_face):
  for vocabulary, text in ((trained, "a</s>b"), (hugging_face, "a<|endoftext|>b")):
    assert vocabulary.eos_id not in vocabulary.encode(text)


def test_ids_out_of_range_are_refused(trained):
  with pytest.raises(ValueError, match="token id 400 is not in the vocabulary of 400"):
    trained.decode([5, 400])
  with pytest.raises(ValueError, match="token id -1"):
    trained.decode([-1])


def test_damaged_or_missing_vocabulary(trained, tmp_path):
  with pytest.raises(ValueError, match="holds no vocabulary"):
    load_vocabulary(tmp_path)
  for name in ("sentencepiece.model", "vocabulary.json"):
    (tmp_path / name).write_bytes((trained.directory / name).read_bytes())
  load_vocabulary(tmp_path)
  data = bytearray((tmp_path / "sentencepiece.model").read_bytes())
  data[100] ^= 1
  (tmp_path / "sentencepiece.model").write_bytes(data)
  with pytest.raises(ValueError, match=r"sentencepiece\.model is missing or is not the model"):
    load_vocabulary(tmp_path)


@pytest.mark.parametrize("make,message", [
  (lambda path: TrainSentencePiece(vocab_size=200), "vocab_size=200"),
  (lambda path: TrainSentencePiece(model_type="word"), "must be 'bpe' or 'unigram'"),
  (lambda path: TrainSentencePiece(sample_bytes=0), "sample_bytes=0"),
  (lambda path: TrainSentencePiece(4096).build(["too little"], path), "=4096 from 10 bytes"),
  (lambda path: TrainSentencePiece(4096).build([], path), "=4096 from 0 bytes"),
  (lambda path: SentencePieceFile("/no/such").fingerprint(), "SentencePieceFile.path='/no/such'"),
  (lambda path: SentencePieceFile(__file__).build([], path), "is not a SentencePiece model"),
  (lambda path: HuggingFaceTokenizer(__file__).build([], path), "is not a tokenizer.json"),
  (lambda path: HuggingFaceTokenizer("/no/such").fingerprint(), "HuggingFaceTokenizer.path"),
])
def test_errors(make, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    make(tmp_path / "v")


def test_a_tokenizer_that_panics_is_named(hugging_face, tmp_path, capfd):
  state = json.loads((hugging_face.directory / "tokenizer.json").read_text())
  state["post_processor"] = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
    "pair": [], "special_tokens": {}}
  (tmp_path / "tokenizer.json").write_text(json.dumps(state))
  spec = HuggingFaceTokenizer(str(tmp_path))
  with pytest.raises(ValueError, match="HuggingFaceTokenizer.path=.* makes the tokenizers package"):
    spec.build([], tmp_path / "v")
  assert capfd.readouterr().err == "" and not (tmp_path / "v").exists()


def test_metadata_is_plain(trained):
  metadata = json.loads((trained.directory / "vocabulary.json").read_text())
  assert metadata["kind"] == "sentencepiece" and metadata["vocab_size"] == 400


@pytest.mark.slow
def test_seqio_gives_the_same_ids(trained, hugging_face):
  import tensorflow as tf

  for vocabulary in (trained, hugging_face):
    other = as_seqio(vocabulary)
    assert other.vocab_size == vocabulary.vocab_size
    assert (other.eos_id, other.bos_id) == (vocabulary.eos_id, vocabulary.bos_id)
    for text in SAMPLES[:-1]:
      ids = vocabulary.encode(text)
      assert list(other.encode(text)) == ids
      assert other.encode_tf(tf.constant(text)).numpy().tolist() == ids
      assert other.decode(ids) == text
      assert other.decode_tf(tf.constant(ids)).numpy().decode() == text
    assert pickle.loads(pickle.dumps(other)) == other


def test_special_files_are_refused(tmp_path):
  os.mkfifo(tmp_path / "tokenizer.json")
  for spec in (
    SentencePieceFile(str(tmp_path / "tokenizer.json")), HuggingFaceTokenizer(str(tmp_path)),
  ):
    with pytest.raises(ValueError, match="tokenizer.json is a FIFO"):
      spec.fingerprint()
