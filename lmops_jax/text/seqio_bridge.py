"""Vocabularies for seqio tasks; only a call imports seqio, and with it TensorFlow."""

from lmops_jax.text.vocabularies import SentencePieceVocabulary, Vocabulary


def as_seqio(vocabulary: Vocabulary):
  """The same vocabulary as a `seqio.Vocabulary`: seqio's own class for a SentencePiece model."""
  import seqio

  plain = type(vocabulary) is SentencePieceVocabulary
  if plain and vocabulary.vocab_size == vocabulary.num_pieces:
    return seqio.SentencePieceVocabulary(str(vocabulary.file))
  from lmops_jax.text import seqio_vocabulary

  return seqio_vocabulary.TokenizerVocabulary(vocabulary)
