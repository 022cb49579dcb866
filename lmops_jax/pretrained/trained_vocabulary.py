"""The vocabulary that a corpus was prepared with, as a tokenizer of a published model.

It makes a model trained here complete: `lmops generate` runs it, and an export holds a tokenizer
that transformers opens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers

from lmops_jax.host.whole_files import write_text
from lmops_jax.pretrained import families
from lmops_jax.pretrained import model as model_lib
from lmops_jax.text import gguf_tokenizer, tokenizer_folder, vocabularies
from lmops_jax.text.tokenizer import Tokenizer
from lmops_jax.text.tokenizer_backends import FastBackend, surround

_NAMES = ("bos", "eos", "pad", "unk")
_FAIRSEQ_FILE = "sentencepiece.bpe.model"
_BPE = 2  # sentencepiece's trainer_spec.model_type


def tokenizer_of(
  vocabulary: vocabularies.Vocabulary, words: Sequence[str] = ()
) -> Tokenizer:
  """The tokenizer with the same ids, which puts BOS before a text because instances begin with it.

  Args:
    words: tokens whose ids follow those of the vocabulary (`data.image_tokens.appended`). As in
      Kosmos-2 they take the blanks in front of them and stay in decoded text.

  Raises:
    ValueError: a word that is in the vocabulary; or for a kind of vocabulary that no
      `tokenizer.json` can hold: SentencePiece models other than BPE, or with fairseq's ids.
  """
  if isinstance(vocabulary, vocabularies.HuggingFaceVocabulary):
    backend = _backend(
      tokenizers.Tokenizer.from_file(str(vocabulary.file)), vocabulary, words)
    special = _special(vocabulary, backend.id_to_token)
    surround(backend.tokenizer, [special["bos"]])
    return Tokenizer(vocabulary.file, backend, special)
  if type(vocabulary) is not vocabularies.SentencePieceVocabulary:
    raise ValueError(
      f"{vocabulary.directory} is a {type(vocabulary).__name__}, which has no tokenizer.json."
    )
  metadata = _metadata(vocabulary)
  tokenizer, special, stop_ids, _ = gguf_tokenizer.build(metadata, str(vocabulary.file))
  return Tokenizer(vocabulary.file, _backend(tokenizer, vocabulary, words), special, stop_ids)


def _backend(tokenizer, vocabulary, words) -> FastBackend:
  tokenizer.add_tokens([
    tokenizers.AddedToken(word, lstrip=True, normalized=False) for word in words])
  for i, word in enumerate(words):
    found, wanted = tokenizer.token_to_id(word), vocabulary.vocab_size + i
    if found != wanted:
      raise ValueError(
        f"the word {word} has the id {found} in the tokenizer of {vocabulary.directory} and should "
        f"have {wanted}, behind the vocabulary; take words that the vocabulary does not hold."
      )
  return FastBackend(tokenizer, where=vocabulary.file)


def save(
  vocabulary: vocabularies.Vocabulary, directory: Path, words: Sequence[str] = ()
) -> None:
  """Writes `tokenizer_of(vocabulary, words)` with its configuration into a folder.

  A SentencePiece model with fairseq's ids is written as it is, as XLM-R's and Kosmos-2's folders
  have it.
  """
  if isinstance(vocabulary, vocabularies.FairseqVocabulary):
    _save_fairseq(vocabulary, directory, words)
  else:
    tokenizer_of(vocabulary, words).save(directory)


def _save_fairseq(vocabulary, directory: Path, words: Sequence[str]) -> None:
  added = {
    str(vocabulary.vocab_size + i): {
      "content": word, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
    for i, word in enumerate(words)}
  directory.mkdir(parents=True, exist_ok=True)
  write_text(directory / tokenizer_folder.CONFIG, json.dumps(
    {"tokenizer_class": "XLMRobertaTokenizer", "added_tokens_decoder": added}, indent=2) + "\n")
  (directory / _FAIRSEQ_FILE).write_bytes(vocabulary.file.read_bytes())


def describe_trained(
  directory: Path, config, vocabulary: vocabularies.Vocabulary, *, params: str,
  log: Callable[[str], None], words: Sequence[str] = (),
) -> None:
  """Makes a folder with parameters a model folder, which `pretrained.load` and `lmops export` open.

  Args:
    config: a `TransformerConfig`, or that of a docked language model.
    params: where they lie, relative to `directory`.
    log: told what cannot be written: the description, for parts that no published family has, or
      the tokenizer, for a vocabulary that has no `tokenizer.json`.
    words: see `tokenizer_of`.
  """
  family = families.matching(config)
  if family is None:
    log("no published family has these parts, so the model stays without model.json")
    return
  try:
    save(vocabulary, directory / model_lib.TOKENIZER_FOLDER, words)
  except ValueError as error:
    log(f"the model's folder has no tokenizer: {error}")
  model_lib.describe(directory, config, family=family.name, params=params)


def _special(vocabulary, text_of) -> dict[str, str]:
  ids = {name: getattr(vocabulary, f"{name}_id") for name in _NAMES}
  return {name: text_of(i) for name, i in ids.items() if i is not None}


def _metadata(vocabulary: vocabularies.SentencePieceVocabulary) -> dict:
  """A SentencePiece model under the keys of GGUF; both number the kinds of tokens alike."""
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.file.read_bytes())
  if model.trainer_spec.model_type != _BPE:
    raise ValueError(
      f"{vocabulary.file} is no BPE model, and tokenizer.json is written for BPE only."
    )
  pieces, spec = model.pieces, model.normalizer_spec
  if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
    raise ValueError(
      f"{vocabulary.file} normalises text ({spec.name}), which tokenizer.json would not repeat."
    )
  values = {
    "model": "llama", "tokens": [p.piece for p in pieces], "scores": [p.score for p in pieces],
    "token_type": [p.type for p in pieces], "add_space_prefix": spec.add_dummy_prefix,
    "bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id,
    "padding_token_id": vocabulary.pad_id, "unknown_token_id": vocabulary.unk_id,
  }
  return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}
