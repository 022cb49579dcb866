"""Any vocabulary of this package as a seqio vocabulary. Importing this module imports seqio."""

import numpy as np
import seqio
import tensorflow as tf

from lmops_jax.text.vocabularies import Vocabulary, load_vocabulary


class TokenizerVocabulary(seqio.Vocabulary):
  """Gives a vocabulary of this package to seqio tasks; picklable, as gin and seqio need.

  Inside a TensorFlow graph the tokenizer runs through `tf.numpy_function`, so such a task cannot be
  exported, but it gives the same ids as in Python.
  """

  def __init__(self, vocabulary: Vocabulary):
    super().__init__(extra_ids=0)
    self._vocabulary = vocabulary

  def __reduce__(self):
    return _reload, (str(self._vocabulary.directory),)

  @property
  def bos_id(self) -> int:
    return self._vocabulary.bos_id

  @property
  def eos_id(self) -> int:
    return self._vocabulary.eos_id

  @property
  def pad_id(self) -> int:
    return self._vocabulary.pad_id

  @property
  def unk_id(self) -> int | None:
    return self._vocabulary.unk_id

  @property
  def _base_vocab_size(self) -> int:
    return self._vocabulary.vocab_size

  def _encode(self, s: str):
    return self._vocabulary.encode(s)

  def _decode(self, ids) -> str:
    return self._vocabulary.decode(ids)

  def _encode_tf(self, s):
    def encode(data) -> np.ndarray:
      text = np.asarray(data).item().decode("utf-8", "replace")  # bytes, or an array when eager
      return np.array(self._vocabulary.encode(text), np.int32)

    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    return tf.ensure_shape(ids, [None])

  def _decode_tf(self, ids):
    def decode(rows: np.ndarray):
      rows = rows.astype(np.int64)
      if rows.ndim == 1:
        return np.array(self._vocabulary.decode(rows).encode(), object)
      return np.array([self._vocabulary.decode(row).encode() for row in rows], object)

    texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(texts, ids.shape[:-1])

  def __eq__(self, other) -> bool:
    return (
      isinstance(other, TokenizerVocabulary)
      and self._vocabulary.fingerprint == other._vocabulary.fingerprint
    )


def _reload(directory: str) -> TokenizerVocabulary:
  return TokenizerVocabulary(load_vocabulary(directory))
