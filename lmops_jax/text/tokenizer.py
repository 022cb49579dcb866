"""Tokenizers of published models: a folder's files or a GGUF's vocabulary, behind one class.

`load_tokenizer` finds out what a model brings. Encoding puts BOS, EOS or their like around a text
as the model's own files say, and takes special tokens that stand in a text as such; decoding is
that of transformers without cleaning up spaces. For training data `Tokenizer.vocabulary` writes the
same segmentation as a vocabulary of `lmops_jax.data`, where special tokens in a document are text.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.host.foreign_files import is_there, mapped
from lmops_jax.host.gguf_files import map_gguf
from lmops_jax.host.hashing import digest
from lmops_jax.text import chat_template, gguf_tokenizer, tokenizer_folder
from lmops_jax.text.tokenizer_backends import FastBackend, SentencePieceBackend
from lmops_jax.text.vocabularies import Vocabulary

NESTED = "tokenizer"  # where a model that was written here has its tokenizer's files


class Tokenizer:
  """Text to ids and back, as one published model does it.

  Attributes:
    path: the model's folder or `.gguf` file.
    special: texts of its special tokens by name, such as {"bos": "<s>", "eos": "</s>"}.
    bos_id, eos_id, pad_id, unk_id: None if the model has no such token.
    stop_ids: ids that end a generated text: EOS, and what the model's configurations name.
    vocab_size: the largest id plus one.
    chat_template: Jinja source, or None.
  """

  def __init__(
    self,
    path: Path,
    backend: FastBackend | SentencePieceBackend,
    special: Mapping[str, str],
    stop_ids: Sequence[int] = (),
    template: str | None = None,
    template_file: Path | None = None,
  ):
    self.path = path
    self.special = dict(special)
    self._backend = backend
    self.vocab_size: int = backend.vocab_size
    self.bos_id = self._special_id("bos")
    self.eos_id = self._special_id("eos")
    self.pad_id = self._special_id("pad")
    self.unk_id = self._special_id("unk")
    own = () if self.eos_id is None else (self.eos_id,)
    self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *stop_ids)))
    self.chat_template = template
    self._template_file = path if template_file is None else template_file

  def _special_id(self, name: str) -> int | None:
    return self._backend.token_to_id(self.special[name]) if name in self.special else None

  def encode(self, text: str, add_special: bool = True) -> list[int]:
    """Ids of a text; with `add_special` also those that the model wants around every text."""
    return self.encode_batch([text], add_special)[0]

  def encode_batch(self, texts: Sequence[str], add_special: bool = True) -> list[list[int]]:
    """Ids of many texts, made by several threads, which do not change the result."""
    return self._backend.encode_batch(texts, add_special)

  def encode_typed(
    self, firsts: Sequence[str], seconds: Sequence[str] | None = None, most: int | None = None
  ) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of texts, or of pairs of them, with the tokens that the model wants around and between.

    Args:
      firsts: texts.
      seconds: the second text of each pair, or None.
      most: tokens that are kept of each row, those around and between counted; what is too much is
        left out at the end of the text, or of the longer one until both are equally long.

    Returns:
      The ids of each row, and the type of each of them: 1 in what some models (BERT) take for the
      second text, else 0.

    Raises:
      ValueError: if the tokens around and between alone are `most` or more.
    """
    if most is not None:
      pair = None if seconds is None else [""]
      least = len(self._backend.encode_typed([""], pair, None)[0][0]) + 1
      if most < least:
        raise ValueError(
          f"{most} tokens have no room for a text: the tokenizer of {self.path} puts {least - 1} "
          f"around it; give {least} or more."
        )
    return self._backend.encode_typed(firsts, seconds, most)

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of ids; ids beyond the vocabulary, which a padded output matrix has, are left out."""
    return self._backend.decode([int(i) for i in ids], skip_special)

  def behind(self, text: str, num_tokens: int) -> str:
    """What stands in a text behind its first tokens, those around every text not counted."""
    return self._backend.behind(text, num_tokens)

  def token(self, identifier: int) -> str | None:
    """The vocabulary's own spelling of an id, or None."""
    return self._backend.id_to_token(identifier)

  def token_id(self, token: str) -> int | None:
    """The id of a token in the vocabulary's own spelling, or None."""
    return self._backend.token_to_id(token)

  def check_fits(self, model_vocab_size: int) -> None:
    """Checks that a model with that many ids has all that the tokenizer gives.

    A larger model is right: embeddings are often padded.

    Raises:
      ValueError: if the tokenizer has more ids.
    """
    if self.vocab_size > model_vocab_size:
      raise ValueError(
        f"the tokenizer of {self.path} has ids up to {self.vocab_size - 1}, the model a vocabulary "
        f"of {model_vocab_size}; take the tokenizer that the model was published with."
      )

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
  ) -> str:
    """A conversation as the text that the model was trained on.

    The template writes special tokens itself: encode the text with `add_special=False`.

    Args:
      messages: each with `role` ("system", "user", "assistant") and `content`.
      add_generation_prompt: end with the beginning of the assistant's next turn.
      continue_final_message: end with the last message's content, without what closes its turn.
      variables: what else this template may ask for.

    Raises:
      ValueError: if the model has no chat template, its template refuses the messages, or both ends
        are asked for.
    """
    if self.chat_template is None:
      raise ValueError(
        f"{self.path} has no chat template; give the prompt as plain text, or take a model that "
        "was trained on conversations."
      )
    if add_generation_prompt and continue_final_message:
      raise ValueError(
        "add_generation_prompt begins a turn and continue_final_message goes on with one; set one "
        "of them to False."
      )
    names = {f"{name}_token": text for name, text in self.special.items()}
    variables = {**names, **variables}
    if continue_final_message:
      return chat_template.render_open(
        self.chat_template, messages, where=str(self._template_file), **variables)
    return chat_template.render(
      self.chat_template, messages, where=str(self._template_file),
      add_generation_prompt=add_generation_prompt, **variables,
    )

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of all that decides the ids of a text and which of them are special."""
    ids = [self.special, self.stop_ids, self.vocab_size]
    return digest([json.dumps(ids, sort_keys=True), self._backend.fingerprint()])

  def vocabulary(self, directory: Path | str) -> Vocabulary:
    """Writes the vocabulary into a folder, for data pipelines and (`data.as_seqio`) for seqio.

    EOS serves if there is no BOS or pad token; an encoder's classification and separator tokens
    begin and end its texts.

    Raises:
      ValueError: if no token could end a document.
    """
    first = self.stop_ids[0] if self.stop_ids else None
    eos = _first(self.eos_id, self._special_id("sep"), first)
    if eos is None:
      raise ValueError(
        f"the tokenizer of {self.path} has no end token, which separates documents; name its "
        f"eos_token in {tokenizer_folder.CONFIG}."
      )
    return self._backend.vocabulary(Path(directory), {
      "vocab_size": max(self.vocab_size, eos + 1),
      "pad_id": self.pad_id,
      "bos_id": _first(self.bos_id, self._special_id("cls")),
      "eos_id": eos,
      "unk_id": self.unk_id,
    })

  def save(self, directory: Path | str) -> None:
    """Writes files that `load_tokenizer` and transformers open to the same tokenizer.

    A folder's files are copied; a GGUF's vocabulary becomes `tokenizer.json`, with
    `tokenizer_config.json` and `generation_config.json` beside it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if self.path.is_dir():
      for name in tokenizer_folder.FILES:
        if (self.path / name).is_file() and not (directory / name).exists():
          shutil.copyfile(self.path / name, directory / name)
      return
    config = {f"{name}_token": text for name, text in self.special.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if self.chat_template is not None:
      config["chat_template"] = self.chat_template
    ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.stop_ids) or None,
           "pad_token_id": self.pad_id}
    generation = {name: value for name, value in ids.items() if value is not None}
    self._backend.tokenizer.save(str(directory / tokenizer_folder.FAST))
    for name, fields in ((tokenizer_folder.CONFIG, config),
                         (tokenizer_folder.GENERATION, generation)):
      text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
      (directory / name).write_text(text, encoding="utf-8")


def _first(*ids: int | None) -> int | None:
  return next((i for i in ids if i is not None), None)


def load_tokenizer(path: Path | str) -> Tokenizer:
  """Opens the tokenizer of a published model.

  Args:
    path: a `.gguf` file, or a folder with `tokenizer.json`, `vocab.json` and `merges.txt`,
      `vocab.txt` or a SentencePiece model; in a model that was written here the files lie in
      its folder `tokenizer`.

  Raises:
    ValueError: if there is none of these, a file is broken, or its kind is not known.
  """
  path = Path(path).expanduser()
  if path.suffix == ".gguf" and not path.is_dir():
    metadata, _ = mapped(path, map_gguf)
    tokenizer, special, stop_ids, template = gguf_tokenizer.build(metadata, str(path))
    return Tokenizer(path, FastBackend(tokenizer, where=path), special, stop_ids, template)
  if not path.is_dir():
    raise ValueError(
      f"{path} is neither a folder nor a .gguf file; give the folder of a published model, or its "
      "GGUF file."
    )
  nested = path / NESTED
  if nested.is_dir() and not any(is_there(path / name) for name in tokenizer_folder.VOCABULARIES):
    path = nested
  contents = tokenizer_folder.read(path)
  return Tokenizer(
    path, contents.backend, contents.special, contents.stop_ids, contents.template,
    contents.template_file,
  )
