"""The layout of records with pictures, against the rule told position by position."""

import dataclasses
import io

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from lmops_jax.data import ImageSettings, image_tokens
from lmops_jax.data.image_tokens import ImageTokens, appended, cut, encode_records, lay_out
from lmops_jax.data.multimodal import Picture, Record, drawn, parts_of
from lmops_jax.models.pixels import normalise
from lmops_jax.text.vocabularies import write_vocabulary

IDS = ImageTokens(
  vocab_size=100, bos_id=0, pad_id=1, eos_id=2, image_id=90, image_end_id=91, line_end_id=92,
  num_slots=3)
COUNTED = dataclasses.replace(IDS, first_slot_id=4)
A, B, C = (Picture(name, name) for name in "abc")


def _record(*parts, num_given=0, identifier=7):
  return Record(identifier, parts, num_given, "f:1")


class _Letters:
  """A token a letter."""

  def encode_batch(self, texts):
    return [[ord(letter) - ord("a") + 10 for letter in text] for text in texts]


def _encoded(*parts, num_given=0, ids=IDS):
  example, = encode_records([_record(*parts, num_given=num_given)], _Letters(), ids)
  return example


def _mask_by_rule(example, ids=IDS):
  """kosmos2 section 10, by input position: 0 on `<s>`, `<image>` and slots, else 1."""
  return [
    0 if token in (ids.bos_id, ids.image_id) or vector >= 0 else 1
    for token, vector in zip(example.tokens[:-1].tolist(), example.vectors[:-1].tolist())
  ]


def test_a_caption_row():
  example = _encoded(A, "hi")
  assert example.tokens.tolist() == [0, 90, 90, 90, 90, 91, 17, 18, 2]
  assert example.vectors.tolist() == [-1, -1, 0, 1, 2, -1, -1, -1, -1]
  assert example.learned.tolist() == [False] * 6 + [True] * 3
  assert example.pictures == (A,) and example.id == 7


@pytest.mark.parametrize("parts", [
  (A, "abc"), ("ab", A, "c"), (A, B, "ab"), ("a", A, "b", B, C, "cde", A), ("abc",), (A,),
])
def test_the_loss_mask_is_that_of_the_spec(parts):
  for ids in (IDS, COUNTED):
    example = _encoded(*parts, ids=ids)
    assert example.learned[1:].astype(int).tolist() == _mask_by_rule(example, ids)
    targets = example.tokens[example.learned]
    assert 91 not in targets and not (example.vectors[example.learned] >= 0).any()
    assert ids.eos_id in targets
    assert example.pictures == tuple(part for part in parts if part in (A, B, C))
    held = example.vectors[example.vectors >= 0]
    np.testing.assert_array_equal(held, np.arange(3 * len(example.pictures)))


def test_an_image_behind_a_text_is_a_target():
  example = _encoded("ab", A, "c")
  assert example.tokens[example.learned].tolist() == [11, 90, 12, 2]


def test_of_a_prompt_nothing_is_learned():
  example = _encoded(A, "ab", "cd", num_given=2)
  assert example.tokens[example.learned].tolist() == [12, 13, 2]
  whole = _encoded(A, "ab", "cd")
  np.testing.assert_array_equal(example.tokens, whole.tokens)
  assert whole.tokens[whole.learned].tolist() == [10, 11, 12, 13, 2]
  behind_a_picture = _encoded("ab", A, "cd", num_given=2)
  assert behind_a_picture.tokens[behind_a_picture.learned].tolist() == [12, 13, 2]


def test_ids_in_slots_change_nothing_else():
  repeated = _encoded(A, "a", B)
  counted = _encoded(A, "a", B, ids=COUNTED)
  words = repeated.vectors < 0
  np.testing.assert_array_equal(repeated.tokens[words], counted.tokens[words])
  assert counted.tokens[~words].tolist() == [4, 5, 6] * 2
  for field in ("learned", "vectors"):
    np.testing.assert_array_equal(getattr(repeated, field), getattr(counted, field))


def test_the_published_prompt():
  """kosmos2 section 15, "An image of" behind a picture: slots at 2 to 65, text from 67."""
  ids = ImageTokens(first_slot_id=4)
  example = lay_out(0, (A, "An image of"), [[712, 1648, 9]], 2, ids, end=False)
  assert example.tokens.tolist() == [0, 64003, *range(4, 68), 64004, 712, 1648, 9]
  np.testing.assert_array_equal(np.flatnonzero(example.vectors >= 0), np.arange(2, 66))
  assert not example.learned.any()


@pytest.mark.parametrize("fields, message", [
  ({"first_slot_id": 0}, "pad_id=1 is the id of a slot"),
  ({"first_slot_id": 98}, r"first_slot_id \+ num_slots - 1=100 is not below vocab_size=100"),
  ({"image_id": 100}, "image_id=100 is not below vocab_size=100"),
  ({"pad_id": 90}, "pad_id=90 is the id of a slot"),
  ({"num_slots": 0}, "num_slots=0 must be"),
])
def test_ids_are_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(IDS, **fields)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pieces")
  texts = folder / "texts.txt"
  texts.write_text("a dog and a cat\nthe cat sat on a mat\n<image> is a tag\n" * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(texts), model_prefix=str(folder / "model"), vocab_size=48, minloglevel=2,
    hard_vocab_limit=False)
  ids = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
  data = (folder / "model.model").read_bytes()
  size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
  return write_vocabulary(
    folder / "written", "fairseq_sentencepiece", data, {"vocab_size": size + 1, **ids})


def test_words_follow_a_vocabulary_as_in_the_published_one(vocabulary):
  ids = appended(vocabulary, 2)
  size = vocabulary.vocab_size
  assert (ids.image_id, ids.image_end_id, ids.vocab_size) == (size + 2, size + 3, size + 6)
  assert (ids.bos_id, ids.pad_id, ids.eos_id, ids.line_end_id) == (0, 1, 2, size + 5)

  for words in (("<image>", "</image>"), ("<image>", "</image>", "</line>", "</line>")):
    with pytest.raises(ValueError, match="the special words <image>, </image>.* must be different"):
      appended(vocabulary, 2, words)

  class Published:
    vocab_size, bos_id, pad_id, eos_id = 64001, 0, 1, 2  # 64,000 pieces, one further

  assert appended(Published, 64) == ImageTokens()


def test_texts_are_encoded_one_by_one_and_a_tag_in_them_is_text(vocabulary, monkeypatch):
  ids = appended(vocabulary, 2)
  records = [
    _record(A, "a dog", B, "and a cat", identifier=1),
    _record("<image> is a tag", identifier=2),
    _record(C, "the cat", "sat on a mat", num_given=2, identifier=3),
  ]
  want = list(encode_records(records, vocabulary, ids))
  assert [example.id for example in want] == [1, 2, 3]
  encode = vocabulary.encode
  block = ids.block
  assert want[0].tokens.tolist() == [
    0, *block, *encode("a dog"), *block, *encode("and a cat"), 2]
  assert want[1].tokens.tolist() == [0, *encode("<image> is a tag"), 2]
  assert not set(want[1].tokens.tolist()) & {ids.image_id, ids.image_end_id}
  assert want[2].tokens[want[2].learned].tolist() == [*encode("sat on a mat"), 2]
  monkeypatch.setattr(image_tokens, "_BLOCK", 2)
  for one, other in zip(want, encode_records(records, vocabulary, ids), strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)


def _brute_force_cut(parts, num_tokens, num_pictures):
  """The longest beginning of whole pictures and single letters that may stand."""
  tokens, best, pictures = [0], None, 0
  for part in parts:
    if isinstance(part, str):
      for letter in part:
        tokens = [*tokens, ord(letter) - ord("a") + 10]
        if len(tokens) <= num_tokens:
          best = list(tokens)
    else:
      pictures += 1
      if pictures > num_pictures:
        return best
      tokens = [*tokens, *IDS.block]
  if len(tokens) < num_tokens:
    best = [*tokens, 2]
  return best


@pytest.mark.parametrize("parts", [
  ("abcd",), (A, "abc"), ("ab", A, "c"), (A, B, "ab", C, "d"), ("a", A, B, "c"), ("ab", A),
])
def test_no_picture_is_cut_and_none_is_last(parts):
  example = _encoded(*parts)
  for num_tokens in range(1, len(example.tokens) + 3):
    for num_pictures in range(4):
      got = cut(example, num_tokens, num_pictures, IDS)
      want = _brute_force_cut(parts, num_tokens, num_pictures)
      if want is None or not example.learned[: len(want)].any():
        assert got is None
        continue
      assert got.tokens.tolist() == want, (num_tokens, num_pictures)
      num_kept = (got.vectors >= 0).sum() // 3
      assert got.pictures == example.pictures[:num_kept]
      np.testing.assert_array_equal(got.learned, example.learned[: len(want)])


def test_a_prompt_alone_is_not_kept():
  example = _encoded(A, "abc", "de", num_given=2)
  assert cut(example, 9, 1, IDS) is None
  assert cut(example, 10, 1, IDS).tokens.tolist()[-1] == 13


@pytest.mark.parity
def test_a_prompt_is_that_of_the_processor_of_kosmos_2(vocabulary):
  """Tokens, places of the slots and pixels, for a tokenizer with the same pieces."""
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary.file))
  first = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
  rest = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, pieces.get_piece_size())]
  tokenizer = transformers.XLMRobertaTokenizer(vocab=first + rest)
  processor = transformers.Kosmos2Processor(
    transformers.CLIPImageProcessor(size={"height": 224, "width": 224}, do_center_crop=False),
    tokenizer)
  ids = ImageTokens(
    vocab_size=len(tokenizer), first_slot_id=4,
    **{name: tokenizer.convert_tokens_to_ids(word) for name, word in (
      ("image_id", "<image>"), ("image_end_id", "</image>"), ("line_end_id", "</line>"))})
  picture = drawn(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8), "noise")
  for text in ("a dog and a cat", "  the cat sat on a mat "):
    want = processor(images=Image.open(io.BytesIO(picture.data)), text=text)
    parts, num_given = parts_of(text, [picture], "the prompt", "")
    texts, = image_tokens.encode_texts([parts], vocabulary)
    got = lay_out(0, parts, texts, num_given, ids, end=False)
    assert got.tokens.tolist() == want["input_ids"]
    assert (got.vectors >= 0).astype(int).tolist() == want["image_embeds_position_mask"]
  pixels = normalise(ImageSettings().pixels(picture.read(), picture.where))
  np.testing.assert_allclose(
    np.asarray(pixels).transpose(2, 0, 1), want["pixel_values"][0], atol=3e-7, rtol=0)
