"""Text tasks: short texts of a corpus, half of them spoilt, against clean ones.

The setting of arXiv 2402.17759, section 4.1 (TinyStories, sentences of at most 64 tokens, half of
the training sentences perturbed), for any corpus and vocabulary. Texts are read and tokenised once
for all seeds (`texts`); a seed then draws its examples and perturbs them (`make`).
"""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np

from lmops_jax.config.setting_types import (
  Name,
  PositiveInt,
  Probability,
  at_least,
  component,
)
from lmops_jax.data import OverlapIndex, packing
from lmops_jax.data.documents import Corpus
from lmops_jax.host.whole_files import write_json
from lmops_jax.models.config import TransformerConfig
from lmops_jax.shared_stages import corpora
from lmops_jax.stages import pipeline
from lmops_jax.systems.learning_law.tasks import Task
from lmops_jax.text.vocabulary_sources import VocabularySource

UNKNOWN, PAD, BOS, EOS = range(4)  # ids of a reduced vocabulary
_TEXTS_FILE = "texts.npz"
_BLOCK = 256


@component(module="learning_law")
def paper_transformer(
  width: PositiveInt = 128, num_heads: PositiveInt = 8, num_layers: PositiveInt = 2,
  max_length: PositiveInt = 64,
) -> TransformerConfig:
  """The transformer of the paper's code, with its odd parts, at any size.

  Attention scores are divided by sqrt(width) instead of sqrt(head_dim), norms have a bias and
  their epsilon outside the root, positions are learned, the MLP is 4 times as wide with ReLU, and
  the output matrix is untied. With a vocabulary of 5,000 the defaults have 1,682,688 parameters.
  """
  return TransformerConfig(
    num_layers=num_layers, width=width, num_heads=num_heads, mlp_width=4 * width,
    max_length=max_length, norm="rms_outside", norm_eps=1e-8, positions="learned",
    activation="relu", gated_mlp=False, attention_scale=width**-0.5, initialization="fan_in",
  )


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Language:
  """Next-token prediction on short texts.

  Attributes:
    corpus: what training examples come from.
    vocabulary: a vocabulary of gin module `data`.
    model: a `models.TransformerConfig`; its `vocab_size` is set here.
    name: the task's name in stages and reports.
    desired: the corpus of dev, select and test; None takes them from documents of `corpus` without
      training examples.
    length: S, tokens that the model reads; an example has at most S + 1, BOS and EOS included.
    num_train, num_desired, num_select: examples of train, of dev and test (each), of select.
    min_tokens: shorter texts are left out, and counted.
    pieces_per_document: a longer document gives up to so many examples; None: all it holds.
    num_frequent: reduce the vocabulary to so many ids: unknown, pad, BOS, EOS and the most frequent
      tokens of the corpus (the paper: 5,000); None keeps it whole.
    noise_fraction: share of the training examples that are perturbed.
    noise_iterations: perturbations of each one, see `perturb_tokens`.

  Raises:
    ValueError: for values out of range.
  """

  corpus: Corpus
  vocabulary: VocabularySource
  model: TransformerConfig
  name: Name = "language"
  desired: Corpus | None = None
  length: at_least(2) = 64
  num_train: PositiveInt = 16384
  num_desired: PositiveInt = 512
  num_select: PositiveInt = 512
  min_tokens: PositiveInt = 8
  pieces_per_document: PositiveInt | None = 1
  num_frequent: at_least(EOS + 2) | None = None
  noise_fraction: Probability = 0.5
  noise_iterations: PositiveInt = 20

  def __post_init__(self):
    if self.length > self.model.max_length:
      raise ValueError(
        f"learning_law.Language.length={self.length} is beyond models.TransformerConfig.max_length="
        f"{self.model.max_length}; raise the latter."
      )

  @property
  def config(self) -> TransformerConfig:
    """The model's configuration, before the texts tell its vocabulary."""
    return dataclasses.replace(self.model, vocab_size=self.num_frequent or EOS + 2)

  def texts(self, context: pipeline.StageContext) -> None:
    """Stage: reads and tokenises; writes rows of at most S + 1 ids and the vocabulary."""
    dropped: collections.Counter[str] = collections.Counter()
    corpora.log_left_out(context, corpus=self.corpus, desired=self.desired)
    documents = list(self.corpus.documents(dropped))
    desired, desired_dropped = [], collections.Counter()
    if self.desired is not None:
      desired = list(self.desired.documents(desired_dropped))
      index = OverlapIndex(desired)
      kept = [d for d in documents if index.find(d) is None]
      dropped["shared_with_desired"] += len(documents) - len(kept)
      documents = kept
    vocabulary = corpora.build_vocabulary(context, self.vocabulary, (d.text for d in documents))
    rows = {"train": self._pieces(documents, vocabulary, dropped)}
    if self.desired is not None:
      rows["desired"] = self._pieces(desired, vocabulary, desired_dropped)
    context.extra["dropped"] = {"train": _nonzero(dropped), "desired": _nonzero(desired_dropped)}
    ids = (vocabulary.vocab_size, vocabulary.pad_id, _specials(vocabulary))
    if self.num_frequent is not None:
      tokens, lengths, _ = rows["train"]
      table = frequent_table(
        tokens[_is_real(tokens, lengths)], vocabulary.vocab_size, self.num_frequent,
        bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
      )
      rows = {
        part: (np.where(_is_real(tokens, lengths), table[tokens], PAD), lengths, owners)
        for part, (tokens, lengths, owners) in rows.items()
      }
      ids = (self.num_frequent, PAD, [UNKNOWN, PAD, BOS, EOS])
    for part, (tokens, _, documents_of) in rows.items():
      context.log(
        f"{part}: {len(tokens)} texts from {len(set(documents_of.tolist()))} documents; left out: "
        + (", ".join(f"{n} {why}" for why, n in context.extra["dropped"][part].items()) or "none")
      )
    arrays = {f"{part}/{name}": value for part, values in rows.items()
              for name, value in zip(("tokens", "lengths", "documents"), values)}
    with (context.directory / _TEXTS_FILE).open("wb") as file:
      np.savez_compressed(file, **arrays)
    write_json(context.directory / "ids.json",
               {"vocab_size": ids[0], "pad_id": ids[1], "special": ids[2]})

  def _pieces(self, documents, vocabulary, dropped):
    """`([M,S+1] tokens, [M] lengths, [M] document ids)`, in the documents' order."""
    found, owners = [], []
    for start in range(0, len(documents), _BLOCK):
      block = documents[start:start + _BLOCK]
      for document, ids in zip(block, vocabulary.encode_batch([d.text for d in block])):
        pieces = list(packing.pack(
          [(document.id, ids)], length=self.length, bos_id=vocabulary.bos_id,
          eos_id=vocabulary.eos_id,
        ))
        kept = [p.tokens for p in pieces if len(p.tokens) >= self.min_tokens]
        dropped["too_short_texts"] += len(pieces) - len(kept)
        dropped["surplus_texts"] += max(0, len(kept) - (self.pieces_per_document or len(kept)))
        kept = kept[:self.pieces_per_document]
        found += kept
        owners += [document.id] * len(kept)
    if not found:
      raise ValueError(
        f"no text has learning_law.Language.min_tokens={self.min_tokens} tokens; lower it or give "
        "longer texts."
      )
    lengths = np.array([len(tokens) for tokens in found], np.int32)
    tokens = np.full((len(found), self.length + 1), vocabulary.pad_id, np.int32)
    for row, values in zip(tokens, found):
      row[:len(values)] = values
    return tokens, lengths, np.array(owners, np.int64)

  def make(self, seed: int, folder: Path) -> Task:
    """The task of a seed from what `texts` wrote into `folder`."""
    with np.load(folder / _TEXTS_FILE, allow_pickle=False) as arrays:
      rows = {part: tuple(arrays[f"{part}/{name}"] for name in ("tokens", "lengths", "documents"))
              for part in ("train", "desired") if f"{part}/tokens" in arrays.files}
    ids = json.loads((folder / "ids.json").read_text())
    rng = np.random.default_rng(seed)
    sizes = {"dev": self.num_desired, "select": self.num_select, "test": self.num_desired}
    if "desired" in rows:
      desired = self._drawn(rows["desired"], sizes, rng, "desired text")
      train = self._drawn(rows["train"], {"train": self.num_train}, rng, "corpus")["train"]
    else:
      desired = self._drawn(rows["train"], sizes | {"train": self.num_train}, rng, "corpus")
      train = desired.pop("train")
    tokens, lengths, is_noise = perturb_tokens(
      seed, *train, fraction=self.noise_fraction, iterations=self.noise_iterations,
      vocab_size=ids["vocab_size"], special=ids["special"], pad_id=ids["pad_id"],
    )
    parts = {"train": as_batch(tokens, lengths)}
    parts |= {part: as_batch(*desired[part]) for part in ("dev", "select", "test")}
    config = dataclasses.replace(self.model, vocab_size=ids["vocab_size"])
    return Task(self.name, seed, parts, is_noise, lengths.astype(np.float64), config).check()

  def _drawn(self, rows, sizes, rng, source):
    """Part to its (tokens, lengths): random texts, no document in two parts."""
    tokens, lengths, owners = rows
    documents = rng.permutation(np.unique(owners))
    rank = np.empty(len(documents), np.int64)
    rank[np.argsort(documents)] = np.arange(len(documents))
    order = np.argsort(rank[np.searchsorted(np.sort(documents), owners)], kind="stable")
    owners = owners[order]
    starts = np.append(np.flatnonzero(np.append(True, owners[1:] != owners[:-1])), len(owners))
    parts, start = {}, 0
    for part, size in sizes.items():
      if start + size > len(order):
        raise ValueError(
          f"the {source} of task {self.name!r} gives {len(tokens)} texts of {len(documents)} "
          f"documents, too few for {', '.join(f'{n} {p}' for p, n in sizes.items())} without a "
          "document in two parts; give more text, raise pieces_per_document, or lower num_train, "
          "num_desired or num_select of learning_law.Language."
        )
      chosen = rng.permutation(order[start:start + size])
      parts[part] = tokens[chosen], lengths[chosen]
      start = int(starts[np.searchsorted(starts, start + size)])
    return parts


def _nonzero(counts: collections.Counter[str]) -> dict[str, int]:
  return {reason: n for reason, n in sorted(counts.items()) if n}


def _is_real(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  return np.arange(tokens.shape[1]) < lengths[:, None]


def _specials(vocabulary) -> list[int]:
  ids = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id}
  return sorted(i for i in ids if i is not None)


def as_batch(tokens: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
  """Rows `[n,S+1]` with `[n]` real tokens as `tokens`, `targets`, `loss_mask` `[n,S]`."""
  return {
    "tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32),
    "loss_mask": _is_real(tokens[:, 1:], lengths - 1).astype(np.float32),
  }


def frequent_table(
  tokens: np.ndarray, vocab_size: int, num_frequent: int, *, bos_id: int, eos_id: int
) -> np.ndarray:
  """`[vocab_size]` old id to new id: the most frequent tokens keep an id, the rest is unknown.

  New ids are unknown, pad, BOS, EOS, then tokens by falling frequency (ties by id). Pad is never
  looked up: rows are padded again by length.
  """
  counts = np.bincount(tokens, minlength=vocab_size).astype(np.int64)
  counts[[bos_id, eos_id]] = -1
  order = np.lexsort((np.arange(vocab_size), -counts))
  kept = [i for i in order[:num_frequent - EOS - 1] if counts[i] > 0]
  table = np.full(vocab_size, UNKNOWN, np.int32)
  table[kept] = np.arange(EOS + 1, EOS + 1 + len(kept))
  table[bos_id], table[eos_id] = BOS, EOS
  return table


def perturb_tokens(
  seed: int, tokens: np.ndarray, lengths: np.ndarray, *, fraction: float = 0.5,
  iterations: int = 20, vocab_size: int, special=(), pad_id: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Spoils a share of the rows: `iterations` times one of three equally likely edits.

  A token is replaced by a random one of the vocabulary (no special one), the last token is deleted
  (while two are left besides the first), or a token is repeated in place (a full row loses its last
  token). The first token, BOS, stays. (The paper names the edits but not their odds.)

  Args:
    tokens: `[N,M] int32`, padded. lengths: `[N]`, real tokens, at least 2.
    fraction: exactly `round(fraction N)` rows are chosen.

  Returns:
    New tokens and lengths, and `[N] bool`, True for the rows chosen.
  """
  rng = np.random.default_rng([seed, 1])
  tokens, lengths = np.array(tokens, np.int32), np.array(lengths, np.int32)
  num, width = tokens.shape
  chosen = np.zeros(num, bool)
  chosen[rng.permutation(num)[:round(fraction * num)]] = True
  ordinary = np.setdiff1d(np.arange(vocab_size), np.asarray(special, int))
  for row in np.flatnonzero(chosen):
    words = tokens[row, :lengths[row]].tolist()
    for edit in rng.integers(3, size=iterations):
      place = int(rng.integers(1, len(words)))
      if edit == 0:
        words[place] = int(rng.choice(ordinary))
      elif edit == 1:
        if len(words) > 3:
          words.pop()
      else:
        words.insert(place, words[place])
        del words[width:]
    tokens[row] = pad_id
    tokens[row, :len(words)] = words
    lengths[row] = len(words)
  return tokens, lengths, chosen
