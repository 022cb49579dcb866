"""The tokenizer that a GGUF file embeds, as a `tokenizers.Tokenizer`.

Two kinds are read: "gpt2", byte-level BPE with merges, whose way of splitting text into words the
file names (`tokenizer.ggml.pre`); and "llama", a SentencePiece vocabulary whose scores order the
merges. What a file leaves open is decided as in llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from lmops_jax.host.foreign_files import checked
from lmops_jax.text import tokenizer_errors
from lmops_jax.text.tokenizer_backends import surround

_BLANK = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_IDS = {
  "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id",
  "sep": "seperator_token_id", "pad": "padding_token_id", "cls": "cls_token_id",
  "mask": "mask_token_id",
}
_PREFIX = "tokenizer.ggml."
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_MAX_TOKEN_CHARACTERS = 1024  # of a token; making its merges takes their square

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_WORDS = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
  + _PUNCTUATION.replace(r"[\r\n]*", r"[\r\n/]*", 1)
)
_GPT2, _DIGITS = "gpt2", "digits"  # GPT-2's own words; the same after every digit stands alone
_WORDS = {
  **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "mellum", "exaone4"), _GPT2),
  **dict.fromkeys(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
  **dict.fromkeys(
    ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral"), _LLAMA3),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), QWEN2_WORDS),
  "tekken": _TEKKEN,
}
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
_KINDS = ("gpt2", "llama")


class _Keys(BaseModel):
  """The keys below `tokenizer.ggml.` that are read."""

  model: str | None = None
  pre: str | None = None
  tokens: Annotated[list[str], Field(fail_fast=True)] | None = None
  token_type: Annotated[list[int], Field(fail_fast=True)] | None = None
  scores: Annotated[list[float], Field(fail_fast=True)] | None = None
  merges: Annotated[list[str], Field(fail_fast=True)] | None = None
  bos_token_id: int | None = None
  eos_token_id: int | None = None
  eot_token_id: int | None = None
  eom_token_id: int | None = None
  unknown_token_id: int | None = None
  seperator_token_id: int | None = None
  padding_token_id: int | None = None
  cls_token_id: int | None = None
  mask_token_id: int | None = None
  add_bos_token: bool | None = None
  add_eos_token: bool | None = None
  add_space_prefix: bool | None = None


def build(metadata: Mapping[str, Any], where: str):
  """The tokenizer of a GGUF file.

  Args:
    metadata: decoded keys and values.
    where: the file, for errors.

  Returns:
    A `tokenizers.Tokenizer`; the texts of its special tokens by name ("bos", "eos", ...); the ids
    that end a text; and the chat template, or None.

  Raises:
    ValueError: no vocabulary, one of an unknown kind, or a damaged one.
  """
  fields = _Fields(metadata, where)
  kind = fields.get("model")
  if kind is None:
    raise ValueError(f"{where} embeds no tokenizer (it has no key tokenizer.ggml.model).")
  if kind not in _KINDS:
    raise ValueError(
      f"{where} has tokenizer.ggml.model={kind!r}; the kinds that lmops_jax reads are "
      f"{', '.join(_KINDS)}."
    )
  tokens = fields.tokens()
  types = fields.per_token("token_type", tokens, [_NORMAL] * len(tokens))
  with tokenizer_errors.named(where, "embeds a damaged vocabulary"):
    if kind == "gpt2":
      tokenizer = _byte_level(fields, tokens)
    else:
      tokenizer = _sentencepiece(fields, tokens, types)
  special = {name: tokens[i] for name, key in _IDS.items()
             if (i := fields.token_id(key, tokens)) is not None}
  _add_tokens(tokenizer, tokens, types, special.values())
  _surround(tokenizer, fields, kind, special)
  stops = [fields.token_id(key, tokens) for key in _STOPS]
  stops = tuple(dict.fromkeys(i for i in stops if i is not None))
  template = checked(str | None, metadata.get("tokenizer.chat_template"),
                     f"{where}: tokenizer.chat_template")
  return tokenizer, special, stops, template


class _Fields:
  """The keys below `tokenizer.ggml.`."""

  def __init__(self, metadata: Mapping[str, Any], where: str):
    self.where = where
    self._keys = checked(
      _Keys, {key.removeprefix(_PREFIX): value for key, value in metadata.items()
              if key.startswith(_PREFIX)}, f"{where}: {_PREFIX.rstrip('.')}",
    )

  def get(self, key: str, default=None):
    value = getattr(self._keys, key)
    return default if value is None else value

  def tokens(self) -> list[str]:
    texts = self.get("tokens")
    if not texts:
      raise ValueError(f"{self.where} embeds no tokens (tokenizer.ggml.tokens is missing).")
    # An empty text, or bytes that are no UTF-8, can stand for nothing; the id has to stay taken.
    tokens = [t if t and _is_utf8(t) else f"[INVALID_{i}]" for i, t in enumerate(texts)]
    if len(set(tokens)) < len(tokens):
      seen: set[str] = set()
      twice = next(t for t in tokens if t in seen or seen.add(t))
      raise ValueError(f"{self.where} has the token {twice!r} twice; fetch the file again.")
    return tokens

  def per_token(self, key: str, tokens: Sequence[str], default=None) -> list:
    values = self.get(key, default)
    if values is None:
      raise ValueError(f"{self.where} has no tokenizer.ggml.{key}, which its vocabulary needs.")
    if len(values) != len(tokens):
      raise ValueError(
        f"{self.where} has {len(values)} numbers in tokenizer.ggml.{key} for {len(tokens)} tokens; "
        "fetch the file again."
      )
    return values

  def token_id(self, key: str, tokens: Sequence[str]) -> int | None:
    identifier = self.get(key)
    if identifier is not None and not 0 <= identifier < len(tokens):
      raise ValueError(
        f"{self.where} has tokenizer.ggml.{key}={identifier}, beyond its {len(tokens)} tokens."
      )
    return identifier


def _is_utf8(text: str) -> bool:
  return not any("\udc80" <= c <= "\udcff" for c in text)


def _byte_level(fields: _Fields, tokens: list[str]):
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  pre = fields.get("pre")
  if pre not in _WORDS:
    raise ValueError(
      f"{fields.where} has tokenizer.ggml.pre={pre!r}, and unless it is known how the model split "
      f"text into words, ids would be wrong; lmops_jax knows {', '.join(_WORDS)}."
    )
  merges = fields.get("merges")
  if merges is None:
    raise ValueError(f"{fields.where} has no tokenizer.ggml.merges, which its vocabulary needs.")
  tokenizer = Tokenizer(models.BPE(
    vocab={token: i for i, token in enumerate(tokens)},
    merges=[_pair(merge, fields.where) for merge in merges],
    ignore_merges=pre in _WHOLE_FIRST,
  ))
  words = _WORDS[pre]
  if words == _GPT2:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  elif words == _DIGITS:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(words), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
  if pre == "qwen2":
    tokenizer.normalizer = normalizers.NFC()  # as the published tokenizer has it
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _pair(merge: str, where: str) -> tuple[str, str]:
  at = merge.find(" ", 1)
  if at < 0:
    raise ValueError(
      f"{where} has the merge {merge!r}, which is not two tokens with a blank between them; fetch "
      "the file again."
    )
  return merge[:at], merge[at + 1 :]


def _sentencepiece(fields: _Fields, tokens: list[str], types: list[int]):
  from tokenizers import Tokenizer, decoders, models, normalizers

  scores = fields.per_token("scores", tokens)
  if any(map(math.isnan, scores)):
    raise ValueError(f"{fields.where} has a score that is no number; fetch the file again.")
  longest = max(tokens, key=len)
  if len(longest) > _MAX_TOKEN_CHARACTERS:
    raise ValueError(
      f"{fields.where} has a token of {len(longest)} characters, more than "
      f"{_MAX_TOKEN_CHARACTERS}; fetch the file again."
    )
  unknown = fields.token_id("unknown_token_id", tokens)
  if unknown is None:
    unknown = next((i for i, t in enumerate(types) if t == _UNKNOWN), None)
  tokenizer = Tokenizer(models.BPE(
    vocab={token: i for i, token in enumerate(tokens)},
    merges=_merges({t: s for t, s, kind in zip(tokens, scores, types) if kind == _NORMAL}),
    unk_token=None if unknown is None else tokens[unknown], fuse_unk=True, byte_fallback=True,
  ))
  prefix = fields.get("add_space_prefix", True)
  steps = [normalizers.Prepend(_BLANK)] if prefix else []
  tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _BLANK)])
  steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
  return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
  """Every way to put a token together from two others; merges of better tokens come first."""
  merges = []
  for order, (token, score) in enumerate(scores.items()):
    for at in range(1, len(token)):
      left, right = token[:at], token[at:]
      if left in scores and right in scores:
        merges.append((-score, order, left, right))
  return [(left, right) for *_, left, right in sorted(merges)]


def _add_tokens(
  tokenizer, tokens: Sequence[str], types: Sequence[int], named: Iterable[str]
) -> None:
  """Tokens that are taken from the raw text: control tokens and those that a user defined."""
  from tokenizers import AddedToken

  named = set(named)
  special = [
    token for token, kind in zip(tokens, types) if kind in (_CONTROL, _UNKNOWN) or token in named
  ]
  plain = [
    token for token, kind in zip(tokens, types) if kind == _USER_DEFINED and token not in named
  ]
  tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
  tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])


def _surround(tokenizer, fields: _Fields, kind: str, special: Mapping[str, str]) -> None:
  default = kind == "llama" or fields.get("pre") in _WHOLE_FIRST
  wanted = {"bos": fields.get("add_bos_token", default), "eos": fields.get("add_eos_token", False)}
  for name, add in wanted.items():
    if add and name not in special:
      raise ValueError(
        f"{fields.where} wants {name.upper()} added to every text and has no "
        f"tokenizer.ggml.{name}_token_id; fetch the file again."
      )
  surround(
    tokenizer, [special["bos"]] if wanted["bos"] else [], [special["eos"]] if wanted["eos"] else []
  )
