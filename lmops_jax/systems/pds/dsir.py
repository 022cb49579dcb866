"""DSIR scores: how much likelier a text's hashed n-grams are under the target than in the corpus.

Data Selection with Importance Resampling (Xie et al., arXiv 2302.03169, section 3) as the baseline
of PDS, with the defaults of its authors' package: lower-cased word and punctuation runs, unigrams
and bigrams, 10,000 hash buckets, no length normalisation. Gumbel noise on the log weights and top-K
are importance resampling without replacement; the selection step does that part.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

NUM_BUCKETS = 10_000
_RUNS = re.compile(r"\w+|[^\w\s]+")
_CACHE_LIMIT = 1 << 20  # n-grams remembered with their bucket, some 150 MB


def ngrams(text: str) -> Iterator[str]:
  """Unigrams, then bigrams (joined by a space) of the lower-cased word and punctuation runs."""
  runs = _RUNS.findall(text.lower())
  yield from runs
  for first, second in zip(runs, runs[1:]):
    yield f"{first} {second}"


def bucket(ngram: str, num_buckets: int = NUM_BUCKETS) -> int:
  """SHA-256 of the UTF-8 text, as a big-endian number, modulo `num_buckets`."""
  digest = hashlib.sha256(ngram.encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest, "big") % num_buckets


def fit(
  target_texts: Iterable[str],
  raw_texts: Iterable[str],
  *,
  num_buckets: int = NUM_BUCKETS,
  smoothing: float = 1e-8,
) -> np.ndarray:
  """Log ratio of the target's to the corpus's bucket frequencies.

  Args:
    target_texts: the trusted texts.
    raw_texts: a sample of the corpus.
    num_buckets: hash buckets, >= 1.
    smoothing: added to every frequency, > 0, so that an empty bucket has a finite logarithm.

  Returns:
    `[num_buckets] float64`, exactly 0 if both frequencies are equal.

  Raises:
    ValueError: if the target or the sample has no n-gram, or a setting is out of range.
  """
  if num_buckets < 1:
    raise ValueError(f"num_buckets={num_buckets} is not positive.")
  if not 0 < smoothing < float("inf"):
    raise ValueError(f"smoothing={smoothing} is not positive and finite.")
  counter = _Counter(num_buckets)
  frequencies = []
  for name, texts in (("target", target_texts), ("corpus sample", raw_texts)):
    counts = np.zeros(num_buckets, np.int64)
    for text in texts:
      np.add.at(counts, counter.buckets(text), 1)
    if not counts.any():
      raise ValueError(f"The DSIR {name} holds no words; give it at least one non-empty text.")
    frequencies.append(counts / counts.sum())
  target, raw = frequencies
  return np.log(target + smoothing) - np.log(raw + smoothing)


def scores(texts: Iterable[str], log_ratio: np.ndarray) -> np.ndarray:
  """Log importance weight of each text: the sum of `log_ratio` over its n-grams (0 without any).

  Args:
    texts: N texts.
    log_ratio: `[num_buckets]` from `fit`.

  Returns:
    `[N] float64`; larger looks more like the target.
  """
  log_ratio = np.asarray(log_ratio, np.float64)
  if log_ratio.ndim != 1 or not len(log_ratio) or not np.isfinite(log_ratio).all():
    raise ValueError(
      f"log_ratio must be a finite vector from fit(), but its shape is {log_ratio.shape}."
    )
  counter = _Counter(len(log_ratio))
  return np.array([log_ratio[counter.buckets(text)].sum() for text in texts], np.float64)


class _Counter:
  """Buckets of n-grams with a bounded memory of those already hashed."""

  def __init__(self, num_buckets: int):
    self._num_buckets = num_buckets
    self._known: dict[str, int] = {}

  def buckets(self, text: str) -> np.ndarray:
    known = self._known
    found = []
    for ngram in ngrams(text):
      index = known.get(ngram)
      if index is None:
        index = bucket(ngram, self._num_buckets)
        if len(known) < _CACHE_LIMIT:
          known[ngram] = index
      found.append(index)
    return np.array(found, np.int64)
