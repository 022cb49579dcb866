"""A task and a tokenizer as small as they can be."""

import dataclasses
from typing import NamedTuple

import numpy as np

WORDS = ("good", "bad", "new")


class Example(NamedTuple):
  id: int
  prompt: str
  options: tuple[str, ...]
  label: int


@dataclasses.dataclass(frozen=True)
class Task:
  name: str
  rows: tuple
  train: tuple
  words: tuple[str, ...]


class WordTokenizer:
  """A word with its blank in front is one token; `<` and `>` are BOS and EOS."""

  def __init__(self, bos=True, eos=True):
    self._ids = {}
    self._bos = [1] if bos else []
    self.eos_id = 2 if eos else None

  def encode(self, text, add_special=True):
    words, word = [], ""
    for character in text:
      if character in " \n" and word.strip(" "):
        words.append(word)
        word = ""
      word += character
      if character == "\n":
        words.append(word)
        word = ""
    if word:
      words.append(word)
    ids = [self._ids.setdefault(w, len(self._ids) + 3) for w in words]
    return (self._bos if add_special else []) + ids

  def decode(self, ids):
    names = {i: word for word, i in self._ids.items()} | {1: "<", 2: ">"}
    return "".join(names[i] for i in ids)


def example(i, rng, words=WORDS, length=3):
  text = " ".join(rng.choice(["it", "is", "so", "very", "much"], size=length))
  return Example(i, f"Say: {text} :", tuple(f" {w}" for w in words), int(rng.integers(len(words))))


def make_task(rows=9, train=14, seed=0):
  rng = np.random.default_rng(seed)
  made = [example(i, rng, length=int(rng.integers(1, 4))) for i in range(rows + train)]
  return Task("tiny", tuple(made[:rows]), tuple(made[rows:]), WORDS)
