"""Token conversion between vocabularies (spec section 9, check 16)."""

import pytest

from lmops_jax.systems.pds import convert


class CharacterVocabulary:
  """One token a character; ids shifted so that two vocabularies disagree on every token."""

  def __init__(self, shift):
    self.shift, self.bos_id, self.eos_id, self.pad_id = shift, shift, shift + 1, shift + 2

  def encode(self, text):
    return [ord(c) + self.shift + 3 for c in text]

  def decode(self, ids):
    return "".join(chr(i - self.shift - 3) for i in ids)


OURS, THEIRS = CharacterVocabulary(0), CharacterVocabulary(1000)


def _instance(*documents, open_end=False):
  tokens = [OURS.bos_id]
  for text in documents:
    tokens += OURS.encode(text) + [OURS.eos_id]
  return tokens[:-1] if open_end else tokens


@pytest.mark.parametrize("open_end", [False, True])
def test_documents_and_separators_survive(open_end):
  instance = _instance("one", "two", "three", open_end=open_end)
  got = convert.convert_tokens(instance, OURS, THEIRS, 64)
  assert got[0] == THEIRS.bos_id
  pieces, piece = [], []
  for token in [*got[1:].tolist(), THEIRS.eos_id]:
    if token == THEIRS.eos_id:
      pieces.append(THEIRS.decode(piece))
      piece = []
    else:
      piece.append(token)
  assert pieces == ["one", "two", "three"]


def test_length_is_a_limit_and_bos_comes_first():
  got = convert.convert_tokens(_instance("a" * 50), OURS, THEIRS, 8)
  assert len(got) == 8 and got[0] == THEIRS.bos_id


def test_mixed_up_vocabulary_is_found():
  same = ["the same text " * 9, "another"]
  assert convert.check_same_text(same, list(same)) == 1
  with pytest.raises(ValueError, match="another vocabulary"):
    convert.check_same_text(same, ["qqqq zzzz 1234", "another"])
