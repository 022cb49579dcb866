"""Texts in and out: stop strings, pieces as they come, special prompts."""

import pytest

from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.text import TextStream

TEXT = "Question: où? Answer: là-bas, 日本.\nQuestion: who? Answer: me."
OPTIONS = GenerationOptions(max_new_tokens=80)


@pytest.fixture(scope="module")
def generator(recite, byte_tokenizer):
  return Generator(*recite(TEXT), byte_tokenizer)


def _pieces(generator, prompts, options=OPTIONS, **kwargs):
  pieces = {i: [] for i in range(len(prompts))}
  got = generator.generate(prompts, options, callback=lambda i, p: pieces[i].append(p), **kwargs)
  return pieces, got


def test_texts_continue_to_the_end_token(generator):
  results = generator.generate(["Question:", "Question: o"], OPTIONS)
  assert [r.text for r in results] == [TEXT[9:], TEXT[11:]]
  assert [r.finish_reason for r in results] == ["eos", "eos"]
  assert results[0].ids[-1] == 2 and len(results[0].ids) == len(results[0].logprobs)


@pytest.mark.parametrize(("stop", "text"), [
  ("\n", " où? Answer: là-bas, 日本."),
  (("Answer:", "?"), " où"),
  (("Answer", "\nQ"), " où? "),
  ("日", " où? Answer: là-bas, "),
  (("nowhere", "me"), TEXT[9 : TEXT.index("me")]),
  ("Q", TEXT[9 : TEXT.rindex("Q")]),
])
def test_a_stop_string_cuts_the_text(generator, byte_tokenizer, stop, text):
  pieces, (got,) = _pieces(generator, ["Question:"], stop=stop)
  assert (got.text, got.finish_reason) == (text, "stop")
  assert "".join(pieces[0]) == text
  assert generator.generate(["Question:"], OPTIONS, stop=stop) == [got]
  # The ids end with the token that completed the stop string.
  whole = byte_tokenizer.decode(got.ids)
  stops = (stop,) if isinstance(stop, str) else stop
  assert any(s in whole for s in stops)
  assert not any(s in byte_tokenizer.decode(got.ids[:-1]) for s in stops)
  assert len(got.ids) == len(got.logprobs)


def test_rows_stop_each_on_their_own(generator):
  prompts = ["Question:", TEXT[:40]]
  pieces, got = _pieces(generator, prompts, stop="Answer")
  assert [g.text for g in got] == [" où? ", TEXT[40 : TEXT.rindex("Answer")]]
  assert ["".join(pieces[i]) for i in range(2)] == [g.text for g in got]


def test_pieces_make_the_text_and_never_split_a_character(generator):
  pieces, (got,) = _pieces(generator, ["Question:"])
  assert "".join(pieces[0]) == got.text == TEXT[9:]
  assert len(pieces[0]) > 5 and not any("\ufffd" in p for p in pieces[0])


def test_a_text_that_ends_within_a_character_keeps_the_rest(generator):
  options = GenerationOptions(max_new_tokens=3)
  pieces, (got,) = _pieces(generator, ["Question: o"], options)
  assert got.text == "".join(pieces[0]) == "ù?"
  pieces, (got,) = _pieces(generator, ["Question: o"], GenerationOptions(max_new_tokens=1))
  assert got.text == "".join(pieces[0]) == "\ufffd" and got.finish_reason == "length"


def test_a_callback_may_end_a_text(generator):
  (got,) = generator.generate(["Question:"], OPTIONS, callback=lambda i, p: True)
  assert got.finish_reason == "stop" and got.text == " "


def test_beams_are_cut_at_the_end(recite, byte_tokenizer):
  generator = Generator(*recite("a b c d"), byte_tokenizer)
  options = GenerationOptions(max_new_tokens=5, num_beams=2, num_return_sequences=2)
  pieces = {}
  got = generator.generate(["a"], options, stop="c", callback=pieces.__setitem__)
  assert got[0].text == pieces[0] == " b " and got[0].finish_reason == "stop"
  assert got[0].score >= got[1].score


def test_an_empty_prompt_begins_with_bos(recite, byte_tokenizer):
  model, params = recite("-begin")
  (got,) = Generator(model, params, byte_tokenizer).generate([""], OPTIONS)
  assert got.text == "begin"

  class WithoutBos(type(byte_tokenizer)):
    bos_id = None

  with pytest.raises(ValueError, match="prompt 0 is empty"):
    Generator(model, params, WithoutBos()).generate([""], OPTIONS)


def test_a_space_that_the_decoder_drops_in_front_is_kept(recite, byte_tokenizer):
  class Dropping(type(byte_tokenizer)):

    def decode(self, ids, skip_special=True):
      return super().decode(ids).removeprefix(" ")

  generator = Generator(*recite("to be or"), Dropping())
  pieces, (got,) = _pieces(generator, ["to"])
  assert got.text == "".join(pieces[0]) == " be or"


def test_special_tokens_are_added_when_asked(recite, byte_tokenizer):
  class Adding(type(byte_tokenizer)):

    def encode(self, text, add_special=True):
      written = [1] if text.startswith("^") else []  # as a special token that stands in a text
      return [1] * add_special + written + super().encode(text[len(written) :])

  generator = Generator(*recite("abcdef"), Adding())
  assert [
    generator.generate(["ab"], OPTIONS, add_special=special)[0].text for special in (True, False)
  ] == ["def", "cdef"]
  assert [  # a text that begins with it gets no second one
    generator.generate(["^ab"], OPTIONS, add_special=special)[0].text for special in (True, False)
  ] == ["def", "def"]


def test_an_empty_stop_string_is_refused(generator):
  with pytest.raises(ValueError, match="stop string '' must be"):
    generator.generate(["Question"], OPTIONS, stop=["a", ""])


def test_a_stream_holds_what_may_become_a_stop_string(byte_tokenizer):
  stream = TextStream(byte_tokenizer, ("END", "\n\n"))
  pieces = [stream.add(byte_tokenizer.encode(c)) for c in "an ENd\n. E"]
  assert pieces == ["a", "n", " ", "", "", "ENd", "", "\n.", " ", ""]
  assert stream.finish() == "E" and stream.text == "an ENd\n. E"
