"""Demonstrations in front of a question: layout, draw, and what is left out when room is short."""

import numpy as np
import pytest

from lmops_jax.data.few_shot import few_shot
from lmops_jax.data.image_tokens import ImageTokens, lay_out
from lmops_jax.data.multimodal import Picture, Record
from lmops_jax.data.tasks import demonstrations

IDS = ImageTokens(
  vocab_size=300, bos_id=0, pad_id=1, eos_id=2, image_id=290, image_end_id=291, line_end_id=292,
  num_slots=3)
BLOCK = [290, 290, 290, 290, 291]


class _Letters:
  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


def _row(number, question="q", answer="a"):
  return Record(number, (Picture(f"{number}.png", f"{number}.png"), question, answer), 2,
                f"f:{number}")


def _prompt(query, shots=(), length=100, num_pictures=9, **options):
  return few_shot(query, shots, _Letters(), IDS, length=length, num_pictures=num_pictures,
                  **options)


def _letters(text):
  return [ord(letter) for letter in text]


def test_whole_examples_stand_in_front_of_the_question():
  got = _prompt(_row(0, "new?"), [_row(1, "old?", "yes"), _row(2, "and?", "no")])
  assert got.encoded.tokens.tolist() == [
    0, *BLOCK, *_letters("old?yes"), *BLOCK, *_letters("and?no"), *BLOCK, *_letters("new?")]
  assert [picture.path for picture in got.encoded.pictures] == ["1.png", "2.png", "0.png"]
  held = got.encoded.vectors[got.encoded.vectors >= 0]
  np.testing.assert_array_equal(held, np.arange(9))
  assert not got.encoded.learned.any() and (got.num_shots, got.num_dropped) == (2, 0)
  parted = _prompt(_row(0, "new?"), [_row(1, "old?", "yes")], separator="|").encoded
  assert parted.tokens.tolist() == [
    0, *BLOCK, *_letters("old?yes|"), *BLOCK, *_letters("new?")]


def test_no_demonstration_is_the_zero_shot_prompt():
  query = _row(0, "new?")
  want = lay_out(0, query.parts[:2], [_letters("new?")], 2, IDS, end=False)
  for shots in ((), demonstrations([_row(1), _row(2)], 0, seed=3)):
    got = _prompt(query, shots, separator="|")
    for field in ("tokens", "learned", "vectors"):
      np.testing.assert_array_equal(getattr(got.encoded, field), getattr(want, field))
    assert got.encoded.pictures == want.pictures and (got.num_shots, got.num_dropped) == (0, 0)


def test_a_question_without_an_answer_is_taken_whole():
  query = Record(0, ("what", Picture("p", "p")), 0, "f:0")
  assert _prompt(query).encoded.tokens.tolist() == [0, *_letters("what"), *BLOCK]


def test_the_oldest_demonstrations_go_first_and_never_the_question():
  query = _row(0, "a question")
  shots = [_row(i, "q" * i, "a") for i in range(1, 6)]
  whole = _prompt(query, shots, length=1000)
  assert whole.num_shots == 5
  bare = len(_prompt(query).encoded.tokens)
  for length in range(bare, len(whole.encoded.tokens) + 1):
    got = _prompt(query, shots, length=length)
    assert got.num_shots + got.num_dropped == 5
    want = _prompt(query, shots[got.num_dropped :], length=1000)
    np.testing.assert_array_equal(got.encoded.tokens, want.encoded.tokens)
    assert len(got.encoded.tokens) <= length
    if got.num_dropped:  # one more would not have fitted
      more = _prompt(query, shots[got.num_dropped - 1 :], length=1000)
      assert len(more.encoded.tokens) > length
  assert got.num_dropped == 0
  few = _prompt(query, shots, num_pictures=3)
  assert (few.num_shots, few.num_dropped) == (2, 3)
  assert [picture.path for picture in few.encoded.pictures] == ["4.png", "5.png", "0.png"]


def test_what_cannot_be_asked_is_named():
  with pytest.raises(ValueError, match="f:0 has a question of 10 tokens and 1 pictures, and a pro"):
    _prompt(_row(0, "long"), length=9)
  with pytest.raises(ValueError, match="takes 100 and 0; shorten it, or raise the limits"):
    _prompt(_row(0), num_pictures=0)
  with pytest.raises(ValueError, match="f:0 has neither a text nor a picture"):
    _prompt(Record(0, (), 0, "f:0"))
  with pytest.raises(ValueError, match="3 demonstrations are asked for and there are 2 rows"):
    demonstrations([_row(1), _row(2)], 3, seed=0)


def test_the_draw_depends_on_seed_and_rows_alone():
  pool = [_row(i) for i in range(40)]
  want = [row.id for row in demonstrations(pool, 4, seed=1)]
  assert [row.id for row in demonstrations(pool[::-1], 4, seed=1)] == want
  assert [row.id for row in demonstrations(pool, 2, seed=1)] == want[:2]
  assert [row.id for row in demonstrations(pool, 4, seed=2)] != want
