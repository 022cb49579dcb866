"""Examples with encoded parts: layout, demonstrations, cuts and prompts, told by letters."""

import numpy as np
import pytest

from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.multimodal import Picture, Record
from lmops_jax.data.span_examples import Read, behind, encode, encoded_prompts, fitted

IDS = ImageTokens(
  vocab_size=300, bos_id=0, pad_id=1, eos_id=2, image_id=290, image_end_id=291, line_end_id=292,
  num_slots=3)
NAMES = {0: "<", 1: "~", 2: ">", 290: "(", 291: ")"}
CAT, DOG = Picture("cat", data=b"cat"), Picture("dog", data=b"dog")


class Letters:
  """A vocabulary of letters."""

  bos_id, pad_id, eos_id = 0, 1, 2

  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


def example(*parts, num_given=1, end=True, identifier=7):
  (made,) = encode([Record(identifier, parts, num_given, f"row {identifier}")], Letters(), IDS,
                   end=end)
  return made


def text_of(tokens):
  return "".join(NAMES.get(token) or chr(token) for token in np.asarray(tokens).tolist())


def read(made):
  """What the encoder reads, by span."""
  return [text_of(made.tokens[start:stop]) for start, stop in made.spans]


def learned(made):
  return text_of(made.tokens[made.learned])


def test_a_whole_input_is_read_and_its_answer_is_learned():
  made = example(Read("is it so?"), "yes")
  assert text_of(made.tokens) == "<is it so?yes>"
  assert read(made) == ["is it so?"] and learned(made) == "yes>"
  assert made.num_places == 10 and made.where == "row 7" and made.id == 7
  assert (made.vectors == -1).all() and made.picture_segments == ()


def test_other_mixtures_of_parts():
  """Of a span that is no prompt the first token is learned, as in pretraining."""
  made = example("ab", Read("cde"), "f", Read("g"), "h", num_given=0)
  assert text_of(made.tokens) == "<abcdefgh>" and read(made) == ["cde", "g"]
  assert learned(made) == "bcfgh>"  # what follows `<s>` is not, as with pictures
  prompt = example(Read("abc"), end=False)
  assert text_of(prompt.tokens) == "<abc" and not prompt.learned.any()
  with pytest.raises(ValueError, match="row 7 has a part for the encoder without any token"):
    example("a", Read(""), "b")


def test_pictures_are_read_with_the_text_behind_them():
  made = example(CAT, Read("what?"), "cat", num_given=2)
  assert text_of(made.tokens) == "<((((" + ")what?cat>" and read(made) == ["what?"]
  assert learned(made) == "cat>" and made.picture_segments == (1,)
  assert made.vectors.tolist() == [-1, -1, 0, 1, 2, *[-1] * 10]
  captioned = example(CAT, Read("a c"), "at", num_given=0)
  assert learned(captioned) == "at>"  # the first letter is in the picture's span
  several = example(Read("x"), CAT, "y", DOG, CAT, Read("z"), DOG, num_given=0)
  assert read(several) == ["x", "", "", "z", ""] and several.picture_segments == (2, 3, 4, 5)
  assert several.num_places == 2 + 5
  places = several.spans[1:, 0]
  assert text_of(several.tokens[places - 1]) == "))))"


def test_demonstrations_stand_in_front_as_they_were_learned():
  shots = [example(CAT, Read("one?"), "1", num_given=2), example(Read("two?"), "2")]
  made = behind(shots, example(DOG, Read("three?"), "3", num_given=2, identifier=9), IDS)
  assert text_of(made.tokens) == "<(((()one?1>two?2>(((()three?3>"
  assert read(made) == ["one?", "two?", "three?"] and learned(made) == "3>"
  assert made.pictures == (CAT, DOG) and made.picture_segments == (1, 3)
  assert made.vectors[made.vectors >= 0].tolist() == [0, 1, 2, 3, 4, 5]
  assert made.id == 9 and made.where == "row 9"
  alone = example(Read("a"), "b")
  for name, value in behind([], alone, IDS)._asdict().items():
    np.testing.assert_array_equal(value, getattr(alone, name))


def test_the_longest_spans_are_cut_in_front():
  shot, last = example(Read("abcdef"), "1"), example(Read("ghij"), "23")
  made = behind([shot], last, Letters())
  assert text_of(made.tokens) == "<abcdef1>ghij23>"
  assert fitted(made, 15) is made
  for length, want in ((14, ["bcdef", "ghij"]), (12, ["def", "ghij"]), (9, ["f", "hij"]),
                       (7, ["f", "j"])):
    cut = fitted(made, length)
    assert len(cut.tokens) == length + 1 and sorted(map(len, read(cut))) == sorted(map(len, want))
    assert all(whole.endswith(part) for whole, part in zip(read(made), read(cut)))
    assert learned(cut) == "23>" and (cut.vectors == -1).all()
  assert fitted(made, 6) is None  # the words alone, and a token of each span
  short = fitted(made, 15, encoder_positions=4)
  assert read(short) == ["def", "hij"] and text_of(short.tokens) == "<def1>hij23>"
  assert fitted(example("abc", num_given=0), 3) is None
  pictured = fitted(example(CAT, Read("what?"), "cat", num_given=2), 11)
  assert text_of(pictured.tokens) == "<(((()t?cat>" and pictured.vectors.tolist()[2:5] == [0, 1, 2]


def test_prompts_point_at_the_vectors_of_words_and_of_pictures():
  prompts = [
    behind([example(CAT, Read("one?"), "1", num_given=2)],
           example(DOG, Read("two?"), end=False, num_given=2), IDS),
    example("Say", Read("x"), ":", end=False, num_given=3),
  ]
  made = encoded_prompts(prompts, IDS)
  assert [text_of(row) for row in made.inputs["encoder_tokens"]] == ["<one?<two?", "<x~~~~~~~~"]
  assert made.inputs["encoder_segments"].tolist() == [[1] * 5 + [2] * 5, [1, 1] + [0] * 8]
  assert made.inputs["encoder_positions"].tolist() == [[*range(5)] * 2, [0, 1] + [0] * 8]
  e = 10
  assert made.index[0].tolist() == [
    -1, -1, e, e + 1, e + 2, -1, 1, 2, 3, 4, -1, -1, -1, e + 3, e + 4, e + 5, -1, 6, 7, 8, 9]
  assert made.index[1].tolist() == [-1, -1, -1, -1, 1, -1]
  assert list(map(text_of, made.ids)) == ["<(((()one?1>(((()two?", "<Sayx:"]
  assert made.image_segments.tolist() == [[1, 2], [0, 0]]
  longer = encoded_prompts(prompts, IDS, 16)
  assert longer.inputs["encoder_tokens"].shape == (2, 16) and longer.index[0][2] == 16
  with pytest.raises(ValueError, match="row 7 takes 10 places of the encoder, .* and it has 9"):
    encoded_prompts(prompts, IDS, 9)
