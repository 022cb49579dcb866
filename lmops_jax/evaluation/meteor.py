"""METEOR with three of its four stages, equal words, equal stems and synonyms, without Java.

It is that of Lavie and Agarwal 2007 (alpha 0.9, beta 3, gamma 0.5) on the words of
`caption_tokens.tokenised`, with Porter's stemmer (1980). Synonyms are words that share a set of
WordNet, of which the files are given; without them there are two stages. A pair of synonyms counts
0.8 of a pair, the weight of METEOR 1.5 for English (Denkowski and Lavie 2014; its task "rank").

Papers on captions print METEOR 1.5, a Java program with other parameters: it punishes broken order
far more, weights stems (0.6) and function words, and has paraphrases as a fourth stage, from a
table of its own. So figures of this module compare models with each other, not with printed ones,
which are mostly lower.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from lmops_jax.evaluation.caption_tokens import tokenised
from lmops_jax.evaluation.wordnet import WordNet

_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5
_SYNONYM = 0.8

# Porter's tables: an ending, and what stands for it behind a stem that is long enough.
_STEP_2 = {
  "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "abli": "able",
  "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
  "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous",
  "aliti": "al", "iviti": "ive", "biliti": "ble",
}
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "",
           "ness": ""}
_STEP_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()
_DOUBLE = re.compile(r"([^aeiouylsz])\1$")  # "hopp", but not "fall", "hiss", "fizz"


def meteor(answer: str, golds: Sequence[str], wordnet: WordNet | None = None) -> float:
  """The best score of a caption against its references, 0 to 1.

  Args:
    answer: as it was generated; without words it scores 0.
    golds: references, as people wrote them.
    wordnet: tells synonyms; None for no such stage.
  """
  found = tokenised(answer).split()
  return max((of_words(found, tokenised(gold).split(), wordnet) for gold in golds), default=0.0)


def of_words(
  found: Sequence[str], gold: Sequence[str], wordnet: WordNet | None = None
) -> float:
  """The score of a caption's words against those of one reference.

  Args:
    found, gold: words in lower case.
    wordnet: tells synonyms; None for no such stage.
  """
  pairs = aligned(found, gold, wordnet)
  if not pairs:
    return 0.0
  # Equal words have equal stems, so that other pairs are those of the last stage.
  num = sum(1 if stem(found[i]) == stem(gold[j]) else _SYNONYM for i, j in pairs)
  precision, recall = num / len(found), num / len(gold)
  mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
  breaks = sum((i + 1, j + 1) != after for (i, j), after in zip(pairs, pairs[1:]))
  return mean * (1 - _GAMMA * ((breaks + 1) / len(pairs)) ** _BETA)


def aligned(
  found: Sequence[str], gold: Sequence[str], wordnet: WordNet | None = None
) -> list[tuple[int, int]]:
  """Pairs of places of equal words, then, among the rest, of equal stems, then of synonyms.

  From the end on, each word takes the last place that is left, as nltk does; the program of
  METEOR 1.5 searches for the fewest crossings instead, which differs where words repeat.

  Args:
    found, gold: words in lower case.
    wordnet: tells synonyms; None for no such stage.

  Returns:
    Places in both, ordered by the first.
  """
  pairs: list[tuple[int, int]] = []
  for as_compared in (str, stem):
    pairs += _matched(found, gold, as_compared, pairs)
  if wordnet is not None:
    pairs += _synonyms(found, gold, wordnet, pairs)
  return sorted(pairs)


def _matched(
  found: Sequence[str], gold: Sequence[str], as_compared: Callable[[str], str],
  before: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
  """Pairs of places that are not paired before."""
  taken = {i for i, _ in before}
  taken_gold = {j for _, j in before}
  places: dict[str, list[int]] = {}
  for j, word in enumerate(gold):
    if j not in taken_gold:
      places.setdefault(as_compared(word), []).append(j)
  pairs = []
  for i in reversed(range(len(found))):
    left = places.get(as_compared(found[i])) if i not in taken else None
    if left:
      pairs.append((i, left.pop()))
  return pairs


def _synonyms(
  found: Sequence[str], gold: Sequence[str], wordnet: WordNet, before: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
  """Pairs of places of words that share a set and are not paired before."""
  taken = {i for i, _ in before}
  taken_gold = {j for _, j in before}
  left = {j: wordnet.synonyms(word) for j, word in enumerate(gold) if j not in taken_gold}
  pairs = []
  for i in reversed(range(len(found))):
    own = wordnet.synonyms(found[i]) if i not in taken else frozenset()
    last = max((j for j, of_gold in left.items() if own & of_gold), default=None)
    if last is not None:
      pairs.append((i, last))
      del left[last]
  return pairs


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
  """The stem of an English word in lower case, by the rules of Porter's paper (1980).

  Words of one or two letters stay as they are, as in his own program.
  """
  if len(word) <= 2:
    return word
  word = _without_past(_without_plural(word))
  if word.endswith("y") and _has_vowel(word[:-1]):
    word = word[:-1] + "i"
  word = _replaced(_replaced(word, _STEP_2), _STEP_3)
  word = _without_suffix(word)
  if word.endswith("e"):
    front = word[:-1]
    if _measure(front) > 1 or (_measure(front) == 1 and not _is_short(front)):
      word = front
  if word.endswith("ll") and _measure(word[:-1]) > 1:
    word = word[:-1]
  return word


def _without_plural(word: str) -> str:
  for ending, instead in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
    if word.endswith(ending):
      return word.removesuffix(ending) + instead
  return word


def _without_past(word: str) -> str:
  if word.endswith("eed"):
    return word[:-1] if _measure(word[:-3]) > 0 else word
  for ending in ("ed", "ing"):
    front = word.removesuffix(ending)
    if front == word:
      continue
    if not _has_vowel(front):
      return word
    if front.endswith(("at", "bl", "iz")):
      return front + "e"
    if _DOUBLE.search(front):
      return front[:-1]
    return front + "e" if _measure(front) == 1 and _is_short(front) else front
  return word


def _replaced(word: str, table: dict[str, str]) -> str:
  """The word with its longest ending of a table replaced, if a stem is left."""
  for ending in sorted(table, key=len, reverse=True):
    if word.endswith(ending):
      front = word.removesuffix(ending)
      return front + table[ending] if _measure(front) > 0 else word
  return word


def _without_suffix(word: str) -> str:
  for ending in sorted(_STEP_4, key=len, reverse=True):
    if word.endswith(ending):
      front = word.removesuffix(ending)
      may_go = _measure(front) > 1 and (ending != "ion" or front.endswith(("s", "t")))
      return front if may_go else word
  return word


def _kinds(word: str) -> str:
  """"v" for each vowel, "c" for each consonant; y is a vowel behind a consonant."""
  kinds = ""
  for letter in word:
    is_vowel = letter in "aeiou" or (letter == "y" and kinds.endswith("c"))
    kinds += "v" if is_vowel else "c"
  return kinds


def _measure(front: str) -> int:
  """How many times consonants follow vowels."""
  return len(re.findall("v+c+", _kinds(front)))


def _has_vowel(front: str) -> bool:
  return "v" in _kinds(front)


def _is_short(front: str) -> bool:
  """Whether it ends consonant, vowel, consonant, the last one not w, x or y."""
  return _kinds(front).endswith("cvc") and front[-1] not in "wxy"
