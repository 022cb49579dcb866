"""The tokenizer of a model folder, from whichever files it was published with.

`tokenizer.json` says everything about itself, so it is preferred and its own post-processor
decides what stands around a text (`add_bos_token` beside it changes nothing, as in transformers).
The older forms leave that to the class that the folder names (`tokenizer_class`, or the kind of
model); the table `_FAMILIES` holds those rules. Special tokens come from tokenizer_config.json,
special_tokens_map.json and added_tokens.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmops_jax.host.foreign_files import checked, is_there, read_bytes, read_json, read_text
from lmops_jax.text import chat_template, tokenizer_errors
from lmops_jax.text import tokenizer_schemas as schemas
from lmops_jax.text.gguf_tokenizer import QWEN2_WORDS
from lmops_jax.text.tokenizer_backends import Added, FastBackend, SentencePieceBackend, surround

FAST, VOCAB, MERGES, WORDS = "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
VOCABULARIES = (FAST, VOCAB, MERGES, WORDS, *SENTENCEPIECE)
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION = "generation_config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "chat_template.json"
FILES = (
  *VOCABULARIES, CONFIG, SPECIAL, ADDED, TEMPLATE, TEMPLATES, GENERATION, "config.json",
)
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_END = "<|endoftext|>"
_FAIRSEQ = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>",
            "cls": "<s>"}


class _Family(NamedTuple):
  """What a tokenizer class takes for granted.

  Attributes:
    form: what its vocabulary is: "bytes" (vocab.json, merges.txt), "words" (vocab.txt), "pieces" or
      "fairseq" (SentencePiece).
    special: its special tokens if the folder names none.
    before, after: names of the tokens that surround every text; None leaves them to `add_bos_token`
      and `add_eos_token`.
    between: names of those between the texts of a pair; None is `after` and then `before`.
    second_type: token type of a pair's second text.
    add_bos: `add_bos_token` if the folder does not say.
    word_end: what the last piece of a word ends in, in the vocabulary.
  """

  form: str
  special: Mapping[str, str]
  before: tuple[str, ...] | None = None
  after: tuple[str, ...] = ()
  between: tuple[str, ...] | None = None
  second_type: int = 0
  add_bos: bool = False
  word_end: str = ""


_FAMILIES = {
  "GPT2Tokenizer": _Family("bytes", {"bos": _END, "eos": _END, "unk": _END}),
  "OPT": _Family(  # no class of its own: GPT-2's, with this in tokenizer_config.json
    "bytes", {"bos": "</s>", "eos": "</s>", "unk": "</s>", "pad": "<pad>"}, add_bos=True),
  "Qwen2Tokenizer": _Family("bytes", {"eos": _END, "unk": _END, "pad": _END}),
  "CLIPTokenizer": _Family(
    "bytes", {"bos": "<|startoftext|>", "eos": _END, "unk": _END, "pad": _END}, ("bos",), ("eos",),
    ("eos", "eos"), word_end="</w>"),
  "RobertaTokenizer": _Family(
    "bytes", {**_FAIRSEQ, "mask": "<mask>"}, ("cls",), ("sep",), ("sep", "sep")),
  "BertTokenizer": _Family(
    "words", {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"},
    ("cls",), ("sep",), ("sep",), second_type=1),
  "LlamaTokenizer": _Family(
    "pieces", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, add_bos=True),
  "XGLMTokenizer": _Family("fairseq", _FAIRSEQ, ("eos",), between=("eos", "eos")),
  "XLMRobertaTokenizer": _Family(
    "fairseq", {**_FAIRSEQ, "mask": "<mask>"}, ("cls",), ("sep",), ("sep", "sep")),
}
_BY_MODEL = {
  "gpt2": "GPT2Tokenizer", "gptj": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer", "opt": "OPT",
  "qwen2": "Qwen2Tokenizer", "roberta": "RobertaTokenizer", "bert": "BertTokenizer",
  "llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "xglm": "XGLMTokenizer",
  "xlm-roberta": "XLMRobertaTokenizer",
}
_CLIP_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
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
    template_file: where it stands.
  """

  backend: FastBackend | SentencePieceBackend
  special: dict[str, str]
  stop_ids: tuple[int, ...]
  template: str | None
  template_file: Path


def read(folder: Path) -> Contents:
  """Opens the tokenizer of a folder.

  Raises:
    ValueError: no tokenizer, a broken file, or a class whose rules are not known.
  """
  settings = _Settings(folder)
  if is_there(folder / FAST):
    backend = _fast(settings)
  elif is_there(folder / VOCAB) and is_there(folder / MERGES):
    backend = _byte_level(settings)
  elif is_there(folder / WORDS):
    backend = _word_pieces(settings)
  elif found := next((name for name in SENTENCEPIECE if is_there(folder / name)), None):
    backend = _sentencepiece(settings, folder / found)
  else:
    raise ValueError(
      f"{folder} holds no tokenizer: none of {FAST}, {VOCAB} with {MERGES}, {WORDS}, "
      f"{', '.join(SENTENCEPIECE)}; copy those of the published model into it."
    )
  template, template_file = settings.template()
  return Contents(
    backend, settings.special(backend), settings.stop_ids(), template, template_file)


class _Settings:
  """The configuration files around a vocabulary."""

  def __init__(self, folder: Path):
    self.folder = folder
    own = _checked(schemas.Configuration, folder / CONFIG)
    self.model = _checked(schemas.ModelKind, folder / "config.json")
    self._generation = _checked(schemas.Ends, folder / GENERATION)
    special = _checked(schemas.Special, folder / SPECIAL)
    if "added_tokens_decoder" not in own.model_fields_set:  # an older folder, whose map decides
      own = own.model_copy(update={n: getattr(special, n) for n in special.model_fields_set})
    self.own = own
    name = own.tokenizer_class or self.model.tokenizer_class or ""
    name = name.removesuffix("Fast")
    kind = self.model.model_type or ""
    by_model = _BY_MODEL.get(kind, kind)
    of_kind = by_model == "OPT" and name == "GPT2Tokenizer"
    self.class_name = by_model if of_kind or not name or name in _GENERIC else name
    # A class without rules of its own, for a vocabulary that says everything itself.
    plain = name in _GENERIC and is_there(folder / FAST)
    self.defaults = None if plain else _FAMILIES.get(self.class_name)

  def flag(self, name: str, default: bool | None) -> bool | None:
    """What the folder says, null included, or the default if it says nothing."""
    return getattr(self.own, name) if name in self.own.model_fields_set else default

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
      value = getattr(self.own, f"{name}_token")
      if not self.names(name):
        value = family.special.get(name) if family else None
      for token in _tokens([value]):
        found[name] = token
    return found

  def names(self, name: str) -> bool:
    """Whether the folder says what a special token is, or that there is none."""
    return f"{name}_token" in self.own.model_fields_set

  def added(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tokens outside of the vocabulary, `(id, arguments)` in the order of ids."""
    if self.own.added_tokens_decoder:
      listed = [
        (int(i), token) for i, value in self.own.added_tokens_decoder.items()
        for token in _tokens([value])
      ]
    else:
      older = _checked(schemas.Vocabulary, self.folder / ADDED)
      listed = [(i, {"content": text, "special": False}) for text, i in older.items() if text]
    yield from sorted(listed, key=lambda pair: pair[0])

  def extra(self) -> Iterator[dict[str, Any]]:
    """Special tokens that have no name."""
    for value in (self.own.additional_special_tokens, self.own.extra_special_tokens):
      yield from _tokens(value.values() if isinstance(value, dict) else value or ())

  def special(self, backend) -> dict[str, str]:
    """Special tokens by name, as far as the vocabulary has them."""
    tokens = self.tokens(self.defaults)
    return {
      name: token["content"] for name, token in tokens.items()
      if backend.token_to_id(token["content"]) is not None
    }

  def stop_ids(self) -> tuple[int, ...]:
    ids: list[int] = []
    for config in (self._generation, self.model, self.model.text_config):
      value = config.eos_token_id if config else None
      ids += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in ids if i is not None and i >= 0))

  def template(self) -> tuple[str | None, Path]:
    """The chat template, or None, and the file that it stands in."""
    if is_there(self.folder / TEMPLATE):
      return read_text(self.folder / TEMPLATE), self.folder / TEMPLATE
    path, value = self.folder / CONFIG, self.own.chat_template
    if value is None:
      path = self.folder / TEMPLATES
      value = _checked(schemas.TemplateFile, path).chat_template
    if isinstance(value, list):
      value = {entry.name: entry.template for entry in value}
    return chat_template.choose(value, str(path)), path


def _tokens(values: Iterable[schemas.Token | None]) -> Iterator[dict[str, Any]]:
  """Arguments of `tokenizers.AddedToken`; an empty text is no token."""
  for value in values:
    text = value.content if isinstance(value, schemas.AddedToken) else value
    if text:
      yield value.arguments() if text is not value else {"content": text, "special": True}


def _checked(schema, path: Path):
  """What a file holds, read by its schema; a missing file holds nothing."""
  return checked(schema, read_json(path) if is_there(path) else {}, path)


def _fast(settings: _Settings) -> FastBackend:
  from tokenizers import Tokenizer

  path = settings.folder / FAST
  text = read_text(path)
  with tokenizer_errors.named(path, "is not a tokenizer that the tokenizers package reads"):
    tokenizer = Tokenizer.from_str(text)
    _add_tokens(tokenizer, settings, settings.defaults)
  tokenizer.encode_special_tokens = bool(settings.flag("split_special_tokens", False))
  clip = settings.class_name == "CLIPTokenizer" or settings.model.model_type == "clip"
  suffix = getattr(tokenizer.model, "end_of_word_suffix", None) if clip else None
  return FastBackend(tokenizer, where=path, word_end=suffix)


def _byte_level(settings: _Settings) -> FastBackend:
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  folder = settings.folder
  family = settings.family(("bytes",), "GPT2Tokenizer")
  vocab = _checked(schemas.Vocabulary, folder / VOCAB)
  merges = _merges(folder / MERGES)
  with tokenizer_errors.named(folder / VOCAB, f"and {MERGES} do not fit together"):
    model = models.BPE(
      vocab, merges, continuing_subword_prefix="", end_of_word_suffix=family.word_end,
      fuse_unk=False, unk_token=_unknown(settings, family) if family.word_end else None,
    )
  tokenizer = Tokenizer(model)
  prefix = bool(settings.flag("add_prefix_space", False))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  if settings.class_name == "Qwen2Tokenizer":
    from tokenizers import Regex

    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
    ])
  elif settings.class_name == "CLIPTokenizer":
    tokenizer.normalizer, tokenizer.pre_tokenizer = _clip_words()
  tokenizer.decoder = decoders.ByteLevel()
  _add_tokens(tokenizer, settings, family)
  _surround(tokenizer, settings, family)
  return FastBackend(tokenizer, where=folder / VOCAB, word_end=family.word_end or None)


def _clip_words():
  """What CLIP makes of a text, and how it splits that into words."""
  from tokenizers import Regex, normalizers, pre_tokenizers

  blanks = normalizers.Replace(Regex(r"\s+"), " ")
  normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
  words = pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True)
  return normalizer, pre_tokenizers.Sequence(
    [words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _merges(path: Path) -> list[tuple[str, str]]:
  lines = [line.rstrip("\r") for line in read_text(path).removesuffix("\n").split("\n")]
  pairs = [
    (number, line.split(" ")) for number, line in enumerate(lines, 1)
    if line and not line.startswith("#version")
  ]
  for number, pair in pairs:
    if len(pair) != 2:
      raise ValueError(
        f"{path}:{number} should be two tokens with a blank between them; fetch it again.")
  return [(left, right) for _, (left, right) in pairs]


def _word_pieces(settings: _Settings) -> FastBackend:
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  family = settings.family(("words",), "BertTokenizer")
  unknown = _unknown(settings, family)
  path = settings.folder / WORDS
  words = read_text(path).split("\n")
  vocab = {word.rstrip("\r"): i for i, word in enumerate(words) if word or i + 1 < len(words)}
  if unknown not in vocab:
    raise ValueError(f"{path} has no line {unknown}, the unknown token; fetch it again.")
  tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
  tokenizer.normalizer = normalizers.BertNormalizer(
    clean_text=True, handle_chinese_chars=bool(settings.flag("tokenize_chinese_chars", True)),
    strip_accents=settings.flag("strip_accents", None),
    lowercase=bool(settings.flag("do_lower_case", True)),
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece(prefix="##")
  _add_tokens(tokenizer, settings, family)
  _surround(tokenizer, settings, family)
  return FastBackend(tokenizer, where=path)


def _unknown(settings: _Settings, family: _Family) -> str:
  """The token for what the vocabulary has not."""
  return settings.tokens(family).get("unk", {"content": family.special["unk"]})["content"]


def _surround(tokenizer, settings: _Settings, family: _Family) -> None:
  before, after, between = _around(settings, family)
  for text in (*before, *after, *between):
    if tokenizer.token_to_id(text) is None:
      raise ValueError(
        f"{settings.folder} holds no token {text!r} in its vocabulary, which stands around every "
        "text; fetch its files again."
      )
  surround(tokenizer, before, after, between, family.second_type)


def _around(settings: _Settings, family: _Family) -> tuple[list[str], list[str], list[str]]:
  """Texts of the tokens before and after every text, and between those of a pair."""
  tokens = settings.tokens(family)
  if family.before is not None:
    before, after = family.before, family.after
  else:
    add_bos = settings.flag("add_bos_token", family.add_bos)
    add_eos = settings.flag("add_eos_token", False)
    before, after = ("bos",) if add_bos else (), ("eos",) if add_eos else ()
  between = (*after, *before) if family.between is None else family.between
  for name in (*before, *after, *between):
    if name not in tokens:
      raise ValueError(
        f"{settings.folder / CONFIG} wants {name.upper()} around every text and names no "
        f"{name}_token; add it there."
      )
  return tuple([tokens[name]["content"] for name in names] for names in (before, after, between))


def _add_tokens(tokenizer, settings: _Settings, family: _Family | None) -> None:
  """Adds tokens that the configuration has and the vocabulary does not treat as such."""
  from tokenizers import AddedToken

  known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  wanted = [token for _, token in settings.added()]
  for name, token in settings.tokens(family).items():
    # What a class takes for granted is no reason to make the vocabulary larger.
    if settings.names(name) or tokenizer.token_to_id(token["content"]) is not None:
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
  model = read_bytes(path)
  with tokenizer_errors.named(path, "is not a SentencePiece model"):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    num_pieces = processor.get_piece_size()
    texts = [processor.id_to_piece(i) for i in range(num_pieces)]  # each must be UTF-8
  if not texts:
    raise ValueError(f"{path} is not a SentencePiece model with pieces; fetch it again.")
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
      text: i for i, text in enumerate(texts)
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
  before, after, between = (
    [added[text].id for text in texts] for texts in _around(settings, family))
  every_part = fairseq or bool(settings.flag("legacy", False))
  with tokenizer_errors.named(path, "is not a SentencePiece model that encodes a text"):
    return SentencePieceBackend(
      model, added=added, before=before, after=after, between=between, fairseq=fairseq,
      prefix_every_part=every_part,
    )
