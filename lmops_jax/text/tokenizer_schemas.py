"""What may stand in the files around a vocabulary: each file is checked once, against its schema.

Only fields that are read have a place here; others may hold anything. Ids stay below 2^24, of which
no vocabulary has a tenth: code that counts to the largest id would else count to any number.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator

from lmops_jax.host.foreign_files import checked, shown

_MAX_ID = (1 << 24) - 1
Id = Annotated[int, Field(ge=0, le=_MAX_ID)]
EndId = Annotated[int, Field(ge=-1, le=_MAX_ID)]  # -1 stands for none
Vocabulary = dict[str, Id]


class AddedToken(BaseModel):
  """Arguments of `tokenizers.AddedToken`."""

  content: str
  single_word: bool = False
  lstrip: bool = False
  rstrip: bool = False
  normalized: bool = True
  special: bool = True

  def arguments(self) -> dict[str, Any]:
    return {"special": True, **self.model_dump(exclude_unset=True)}


Token = str | AddedToken


def _list(kind: Any) -> Any:
  """A list that is read up to its first wrong entry: pydantic keeps a kilobyte of each."""
  return Annotated[list[kind], Field(fail_fast=True)]


def _mapping(kind: Any) -> Any:
  """A mapping from texts that is read up to its first wrong entry, too."""

  def entries(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    return {name: checked(kind, v, f"{info.field_name}.{name}") for name, v in value.items()}

  return Annotated[dict[str, Any], AfterValidator(entries)]


class NamedTemplate(BaseModel):
  """One of several chat templates."""

  name: str
  template: str


Templates = str | _list(NamedTemplate) | _mapping(str)


class Special(BaseModel):
  """special_tokens_map.json: the special tokens by what they are for."""

  bos_token: Token | None = None
  eos_token: Token | None = None
  unk_token: Token | None = None
  sep_token: Token | None = None
  pad_token: Token | None = None
  cls_token: Token | None = None
  mask_token: Token | None = None
  additional_special_tokens: _list(Token) | None = None
  extra_special_tokens: _list(Token) | _mapping(Token) | None = None


class Configuration(Special):
  """tokenizer_config.json."""

  tokenizer_class: str | None = None
  added_tokens_decoder: _mapping(AddedToken) | None = None
  chat_template: Templates | None = None
  add_bos_token: bool | None = None
  add_eos_token: bool | None = None
  add_prefix_space: bool | None = None
  split_special_tokens: bool | None = None
  legacy: bool | None = None
  do_lower_case: bool | None = None
  strip_accents: bool | None = None
  tokenize_chinese_chars: bool | None = None

  @field_validator("added_tokens_decoder")
  @classmethod
  def _ids(cls, tokens):
    for i in tokens or ():
      if not (i.isascii() and i.isdigit() and len(i) < 10 and int(i) <= _MAX_ID):
        raise ValueError(
          f"added_tokens_decoder has the id {shown(i)}, which should be a whole number from 0 to "
          f"{_MAX_ID}."
        )
    return tokens


class TemplateFile(BaseModel):
  """chat_template.json."""

  chat_template: Templates | None = None


class Ends(BaseModel):
  """generation_config.json, and the text model in config.json: ids that end a text."""

  eos_token_id: EndId | _list(EndId) | None = None


class ModelKind(Ends):
  """config.json, as far as a tokenizer depends on it."""

  model_type: str | None = None
  tokenizer_class: str | None = None
  text_config: Ends | None = None
