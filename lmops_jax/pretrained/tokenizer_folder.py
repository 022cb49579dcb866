"""The tokenizer of a model folder, from whichever files it was published with.

`tokenizer.json` says everything about itself, so it is preferred and its own post-processor
decides what stands around a text (`add_bos_token` beside it changes nothing, as in transformers).
The older forms leave that to the class that the folder names (`tokenizer_class`, or the kind of
model); the table `_FAMILIES` holds those rules. Special tokens come from tokenizer_config.json,
special_tokens_map.json and added_tokens.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmops_jax.pretrained import chat_template
from lmops_jax.pretrained.tokenizer_backends import (
  Added,
  FastBackend,
  SentencePieceBackend,
  surround,
)

FAST, VOCAB, MERGES, WORDS = "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
VOCABULARIES = (FAST, VOCAB, MERGES, WORDS, *SENTENCEPIECE)
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (
  *VOCABULARIES, CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE,
  "chat_template.json", GENERATION, "config.json",
)
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_END = "<|endoftext|>"
_FAIRSEQ = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>",
            "cls": "<s>"}


class _Family(NamedTuple):
  """What a tokenizer class takes for granted.

  Attributes:
    form: of its vocabulary: "bytes" (vocab.json, merges.txt), "words" (vocab.txt), "pieces" or
      "fairseq" (SentencePiece).
    special: its special tokens where the folder names none.
    before, after: names of those that surround every text; None leaves it to `add_bos_token` and
      `add_eos_token`.
    add_bos: `add_bos_token` where the folder does not say.
  """

  form: str
  special: Mapping[str, str]
  before: tuple[str, ...] | None = None
  after: tuple[str, ...] = ()
  add_bos: bool = False


_FAMILIES = {
  "GPT2Tokenizer": _Family("bytes", {"bos": _END, "eos": _END, "unk": _END}),
  "OPT": _Family(  # no class of its own: GPT-2's, with this in tokenizer_config.json
    "bytes", {"bos": "</s>", "eos": "</s>", "unk": "</s>", "pad": "<pad>"}, add_bos=True),
  "Qwen2Tokenizer": _Family("bytes", {"eos": _END, "unk": _END, "pad": _END}),
  "RobertaTokenizer": _Family("bytes", {**_FAIRSEQ, "mask": "<mask>"}, ("cls",), ("sep",)),
  "BertTokenizer": _Family(
    "words", {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"},
    ("cls",), ("sep",)),
  "LlamaTokenizer": _Family(
    "pieces", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, add_bos=True),
  "XGLMTokenizer": _Family("fairseq", _FAIRSEQ, ("eos",)),
  "XLMRobertaTokenizer": _Family("fairseq", {**_FAIRSEQ, "mask": "<mask>"}, ("cls",), ("sep",)),
}
_BY_MODEL = {
  "gpt2": "GPT2Tokenizer", "gptj": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer", "opt": "OPT",
  "qwen2": "Qwen2Tokenizer", "roberta": "RobertaTokenizer", "bert": "BertTokenizer",
  "llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "xglm": "XGLMTokenizer",
  "xlm-roberta": "XLMRobertaTokenizer",
}
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
_XGLM_UNUSED = 7  # <madeupword0> and on fill its vocabulary up


@dataclasses.dataclass
class Contents:
  """What a folder says.

  Attributes:
    backend: the engine.
    special: texts of the special tokens by name ("bos", "eos", ...).
    stop_ids: ids that end a text, by the model's configurations.
    template: chat template, or None.
  """

  backend: FastBackend | SentencePieceBackend
  special: dict[str, str]
  stop_ids: tuple[int, ...]
  template: str | None


def read(folder: Path) -> Contents:
  """Opens the tokenizer of a folder.

  Raises:
    ValueError: no tokenizer, a broken file, or a class whose rules are not known.
  """
  settings = _Settings(folder)
  if (folder / FAST).is_file():
    backend = _fast(settings)
  elif (folder / VOCAB).is_file() and (folder / MERGES).is_file():
    backend = _byte_level(settings)
  elif (folder / WORDS).is_file():
    backend = _word_pieces(settings)
  elif found := next((name for name in SENTENCEPIECE if (folder / name).is_file()), None):
    backend = _sentencepiece(settings, folder / found)
  else:
    raise ValueError(
      f"{folder} holds no tokenizer: none of {FAST}, {VOCAB} with {MERGES}, {WORDS}, "
      f"{', '.join(SENTENCEPIECE)}; copy those of the published model into it."
    )
  return Contents(backend, settings.special(backend), settings.stop_ids(), settings.template())


class _Settings:
  """The configuration files around a vocabulary."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.own = _read_json(folder / CONFIG)
    self.model = _read_json(folder / "config.json")
    self._generation = _read_json(folder / GENERATION)
    map_ = _read_json(folder / "special_tokens_map.json")
    if "added_tokens_decoder" not in self.own:  # an older folder, whose map decides
      self.own = {**self.own, **map_}
    name = self.own.get("tokenizer_class") or self.model.get("tokenizer_class") or ""
    name = str(name).removesuffix("Fast")
    kind = self.model.get("model_type") or ""
    by_model = _BY_MODEL.get(kind, kind)
    of_kind = by_model == "OPT" and name == "GPT2Tokenizer"
    self.class_name = by_model if of_kind or not name or name in _GENERIC else name
    # A class without rules of its own, for a vocabulary that says everything itself.
    plain = name in _GENERIC and (folder / FAST).is_file()
    self.defaults = None if plain else _FAMILIES.get(self.class_name)

  def family(self, forms: tuple[str, ...], default: str) -> _Family:
    """The rules of the folder's class, which must have a vocabulary of this form."""
    family = _FAMILIES.get(self.class_name or default)
    if family is None or family.form not in forms:
      known = [name for name, f in _FAMILIES.items() if f.form in forms and name != "OPT"]
      raise ValueError(
        f"{self.folder} has a tokenizer of {self.class_name!r}, whose rules for such files "
        f"lmops_jax does not know (it knows {', '.join(known)}); save it with transformers, which "
        f"writes {FAST}."
      )
    return family

  def tokens(self, family: _Family | None) -> dict[str, dict[str, Any]]:
    """Special tokens by name, as arguments of `tokenizers.AddedToken`."""
    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
      default = family.special.get(name) if family else None
      value = self.own.get(f"{name}_token", default)
      if value is not None:
        found[name] = _token(value, self.folder / CONFIG)
    return found

  def added(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tokens outside of the vocabulary, `(id, arguments)` in the order of ids."""
    path, decoder = self.folder / CONFIG, self.own.get("added_tokens_decoder")
    older = {} if decoder else _read_json(self.folder / "added_tokens.json")
    try:
      if not decoder:
        path = self.folder / "added_tokens.json"
        decoder = {i: {"content": text, "special": False} for text, i in older.items()}
      listed = [(int(i), _token(token, path)) for i, token in decoder.items()]
    except (TypeError, AttributeError) as error:
      raise ValueError(f"{path} does not list added tokens with their ids ({error}).") from error
    yield from sorted(listed, key=lambda pair: pair[0])

  def extra(self) -> Iterator[dict[str, Any]]:
    """Special tokens that have no name."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
      value = self.own.get(key) or ()
      for token in value.values() if isinstance(value, dict) else value:
        yield _token(token, self.folder / CONFIG)

  def special(self, backend) -> dict[str, str]:
    """Special tokens by name, as far as the vocabulary has them."""
    tokens = self.tokens(self.defaults)
    return {
      name: token["content"] for name, token in tokens.items()
      if backend.token_to_id(token["content"]) is not None
    }

  def stop_ids(self) -> tuple[int, ...]:
    ids: list[int] = []
    for config in (self._generation, self.model, self.model.get("text_config")):
      value = config.get("eos_token_id") if isinstance(config, dict) else None
      ids += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and i >= 0))

  def template(self) -> str | None:
    if (self.folder / TEMPLATE).is_file():
      return _read_text(self.folder / TEMPLATE)
    value = self.own.get("chat_template")
    if value is None:
      value = _read_json(self.folder / "chat_template.json").get("chat_template")
    return chat_template.choose(value, str(self.folder / CONFIG))


def _token(value, path: Path) -> dict[str, Any]:
  if isinstance(value, str):
    return {"content": value, "special": True}
  if not isinstance(value, dict) or not isinstance(value.get("content"), str):
    raise ValueError(f"{path} names the special token {value!r}, which is no text.")
  fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
  return {"special": True, **{k: v for k, v in value.items() if k in fields}}


def _read_text(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} cannot be read ({error}); fetch it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
  """The fields of a file, {} where it is missing."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(_read_text(path))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON ({error}); fetch it again.") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds a {type(value).__name__}, not an object with fields.")
  return value


def _fast(settings: _Settings) -> FastBackend:
  from tokenizers import Tokenizer

  path = settings.folder / FAST
  text = _read_text(path)
  try:
    tokenizer = Tokenizer.from_str(text)
  except Exception as error:  # tokenizers raises plain Exceptions
    raise ValueError(
      f"{path} is not a tokenizer that the tokenizers package reads ({error}); fetch it again, or "
      "update tokenizers."
    ) from error
  _add_tokens(tokenizer, settings, settings.defaults)
  tokenizer.encode_special_tokens = bool(settings.own.get("split_special_tokens", False))
  clip = settings.class_name == "CLIPTokenizer" or settings.model.get("model_type") == "clip"
  return FastBackend(tokenizer, word_end=tokenizer.model.end_of_word_suffix if clip else None)


def _byte_level(settings: _Settings) -> FastBackend:
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  folder = settings.folder
  family = settings.family(("bytes",), "GPT2Tokenizer")
  _read_json(folder / VOCAB)
  try:
    model = models.BPE.from_file(
      str(folder / VOCAB), str(folder / MERGES), continuing_subword_prefix="",
      end_of_word_suffix="", fuse_unk=False,
    )
  except Exception as error:  # tokenizers raises plain Exceptions
    raise ValueError(
      f"{folder / VOCAB} and {MERGES} do not fit together ({error}); fetch both again."
    ) from error
  tokenizer = Tokenizer(model)
  prefix = bool(settings.own.get("add_prefix_space", False))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  if settings.class_name == "Qwen2Tokenizer":
    from tokenizers import Regex

    from lmops_jax.pretrained.gguf_tokenizer import QWEN2_WORDS

    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
    ])
  tokenizer.decoder = decoders.ByteLevel()
  _add_tokens(tokenizer, settings, family)
  surround(tokenizer, *_around(settings, family))
  return FastBackend(tokenizer)


def _word_pieces(settings: _Settings) -> FastBackend:
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  family = settings.family(("words",), "BertTokenizer")
  unknown = settings.tokens(family).get("unk", {"content": "[UNK]"})["content"]
  path = settings.folder / WORDS
  words = _read_text(path).split("\n")
  vocab = {word.rstrip("\r"): i for i, word in enumerate(words) if word or i + 1 < len(words)}
  if unknown not in vocab:
    raise ValueError(f"{path} has no line {unknown}, the unknown token; fetch it again.")
  tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
  own = settings.own
  tokenizer.normalizer = normalizers.BertNormalizer(
    clean_text=True, handle_chinese_chars=own.get("tokenize_chinese_chars", True),
    strip_accents=own.get("strip_accents"), lowercase=own.get("do_lower_case", True),
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece(prefix="##")
  _add_tokens(tokenizer, settings, family)
  surround(tokenizer, *_around(settings, family))
  return FastBackend(tokenizer)


def _around(settings: _Settings, family: _Family) -> tuple[list[str], list[str]]:
  """Texts of the tokens before and after every text."""
  tokens = settings.tokens(family)
  if family.before is not None:
    names = family.before, family.after
  else:
    add_bos = settings.own.get("add_bos_token", family.add_bos)
    add_eos = settings.own.get("add_eos_token", False)
    names = ("bos",) if add_bos else (), ("eos",) if add_eos else ()
  for name in (*names[0], *names[1]):
    if name not in tokens:
      raise ValueError(
        f"{settings.folder / CONFIG} wants {name.upper()} around every text and names no "
        f"{name}_token; add it there."
      )
  return [tokens[n]["content"] for n in names[0]], [tokens[n]["content"] for n in names[1]]


def _add_tokens(tokenizer, settings: _Settings, family: _Family | None) -> None:
  """Adds tokens that the configuration has and the vocabulary does not treat as such."""
  from tokenizers import AddedToken

  known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  wanted = [token for _, token in settings.added()]
  for name, token in settings.tokens(family).items():
    # What a class takes for granted is no reason to make the vocabulary larger.
    given = f"{name}_token" in settings.own
    if given or tokenizer.token_to_id(token["content"]) is not None:
      wanted.append(token)
  for token in [*wanted, *settings.extra()]:
    if token["content"] in known:
      continue
    known.add(token["content"])
    added = AddedToken(**token)
    (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])


def _sentencepiece(settings: _Settings, path: Path) -> SentencePieceBackend:
  import sentencepiece

  family = settings.family(("pieces", "fairseq"), "LlamaTokenizer")
  model = path.read_bytes()
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    num_pieces = processor.get_piece_size()
  except (RuntimeError, OSError) as error:
    raise ValueError(f"{path} is not a SentencePiece model; fetch it again.") from error
  fairseq = family.form == "fairseq"
  added: dict[str, Added] = {}

  def add(token: dict[str, Any], identifier: int) -> None:
    text, strips = token["content"], (token.get("lstrip", False), token.get("rstrip", False))
    added.setdefault(text, Added(text, identifier, bool(token["special"]), *strips))

  if fairseq:
    pieces = {text: i for i, text in enumerate(("<s>", "<pad>", "</s>", "<unk>"))}
    size = num_pieces + 1
  else:
    pieces = {
      processor.id_to_piece(i): i for i in range(num_pieces)
      if processor.is_control(i) or processor.is_unknown(i)
    }
    size = num_pieces
  for token in settings.tokens(family).values():
    if token["content"] in pieces:
      add(token, pieces[token["content"]])
  for text, i in pieces.items():
    add({"content": text, "special": True}, i)
  further: list[tuple[int | None, dict[str, Any]]] = list(settings.added())
  if settings.class_name == "XGLMTokenizer":
    further = [(None, {"content": f"<madeupword{i}>", "special": True})
               for i in range(_XGLM_UNUSED)] + further
  unplaced = [*settings.tokens(family).values(), *settings.extra()]
  for identifier, token in [*further, *((None, token) for token in unplaced)]:
    text = token["content"]
    if text in added:
      continue
    piece = processor.piece_to_id(text)
    if identifier is None and processor.id_to_piece(piece) == text:
      identifier = piece + fairseq
    if identifier is None:
      identifier = max([size - 1, *(t.id for t in added.values())]) + 1
    add(token, identifier)
  before, after = _around(settings, family)
  every_part = fairseq or bool(settings.own.get("legacy", False))
  return SentencePieceBackend(
    model, added=added, before=[added[t].id for t in before], after=[added[t].id for t in after],
    fairseq=fairseq, prefix_every_part=every_part,
  )
