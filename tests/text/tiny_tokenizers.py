"""Small tokenizers of each kind, trained on a few sentences; folders as models are published."""

import io
import json
import random

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
  "", " ", "a", " a", "Hello world!", "  two  spaces\n\n\tand tabs \n", "don't, I'LL; it's",
  "naïve café ÀÉ 漢字かな", "🙂👨‍👩‍👧 e\u0301", "x = 12345  678\n 9", "1.5e-7 2024-01-01 ２３ ²³",
  "def f(x):\r\n    return x + 1\n", "a\u00a0b\u200bc", "the quick brown fox " * 5, "trailing  ",
]


def sentences():
  generator = random.Random(0)
  letters = "etaoinshrdlu"
  words = ["".join(generator.choices(letters, k=generator.randint(1, 7))) for _ in range(150)]
  fixed = ["Hello world! don't, I'll; it's 12345", "def f(x):\n    return x + 1", "naïve café 漢字"]
  return fixed * 5 + [" ".join(generator.choices(words, k=12)) for _ in range(80)] + [
    "the quick brown fox jumps over the lazy dog and returns " * 3] * 5


def _train(tokenizer, trainer):
  tokenizer.train_from_iterator(sentences(), trainer)
  return tokenizer


def byte_level(special, words=None):
  """GPT-2's kind; `words` is another pre-tokenizer than its own."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return _train(tokenizer, trainers.BpeTrainer(
    vocab_size=420, special_tokens=special, show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  ))


def llama():
  """Llama's kind in the tokenizers package: BPE, blanks written as U+2581, bytes for the rest."""
  bytes_ = [f"<0x{i:02X}>" for i in range(256)]
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  tokenizer.decoder = decoders.Sequence([
    decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    decoders.Strip(" ", 1, 0)])
  _train(tokenizer, trainers.BpeTrainer(
    vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False,
    limit_alphabet=60, max_token_length=8))
  state = json.loads(tokenizer.to_str())
  state["added_tokens"] = state["added_tokens"][:3]
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)])
  return tokenizer


def word_pieces():
  tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  _train(tokenizer, trainers.WordPieceTrainer(
    vocab_size=300, show_progress=False,
    special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
  tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  return tokenizer


def unigram():
  """XGLM's kind, with fairseq's first four tokens."""
  tokenizer = tokenizers.Tokenizer(models.Unigram())
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  _train(tokenizer, trainers.UnigramTrainer(
    vocab_size=250, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>",
    show_progress=False))
  tokenizer.post_processor = processors.TemplateProcessing(
    single="</s> $A", special_tokens=[("</s>", 2)])
  return tokenizer


def sentencepiece_model(model_type="bpe", **options):
  """Contents of a `.model` file with <unk>, <s>, </s> in front."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(line for text in sentences() for line in text.split("\n")),
    model_writer=model, model_type=model_type, vocab_size=460 if model_type == "bpe" else 200,
    hard_vocab_limit=False, num_threads=1, minloglevel=2, **options)
  return model.getvalue()


def llama_sentencepiece():
  return sentencepiece_model(
    byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)


def write(folder, files):
  """Writes texts, bytes, and the rest as JSON."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    if isinstance(content, bytes):
      (folder / name).write_bytes(content)
    else:
      text = content if isinstance(content, str) else json.dumps(content)
      (folder / name).write_text(text, encoding="utf-8")
  return folder


def clip(folder):
  """A folder `tokenizer` as Stable Diffusion is published with; every byte has a token."""
  end, words = "<|endoftext|>", "</w>"
  tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=words, unk_token=end))
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  _train(tokenizer, trainers.BpeTrainer(
    vocab_size=600, end_of_word_suffix=words, initial_alphabet=alphabet, show_progress=False))
  state = json.loads(tokenizer.to_str())["model"]
  tokens = dict.fromkeys(
    [*state["vocab"], *(letter + words for letter in alphabet), "<|startoftext|>", end])
  merges = [" ".join(pair) for pair in state["merges"]]
  return write(folder, {
    "vocab.json": {token: i for i, token in enumerate(tokens)},
    "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    "tokenizer_config.json": {
      "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": end,
      "do_lower_case": True}})


def vocab_and_merges(tokenizer):
  """GPT-2's two files."""
  model = json.loads(tokenizer.to_str())["model"]
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  return {"vocab.json": model["vocab"], "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}
