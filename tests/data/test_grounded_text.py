"""Texts with boxes to tokens, against the tags of Kosmos-2 written out by hand."""

import io
import pickle

import pytest
import sentencepiece

from lmops_jax.data import boxes, image_tokens
from lmops_jax.data.grounded_text import GroundedText, Located, box_words, trimmed
from lmops_jax.data.image_tokens import KOSMOS_WORDS, appended, encode_records
from lmops_jax.data.multimodal import LeftOut, Picture, Record
from lmops_jax.text.vocabularies import write_vocabulary

CORNER = (0.0, 0.0, 0.5, 0.5)  # cells 0 and 5 of a 4 x 4 grid
LOWER = (0.5, 0.5, 1.0, 1.0)  # cells 10 and 15
CAPTION = "A snowman warms himself by a campfire."
WORDS = (*KOSMOS_WORDS, *boxes.grounding_words(4))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  """Unigram pieces with a blank in front, as the published model's."""
  model = io.BytesIO()
  texts = [CAPTION, "What is it? It is a dog.", "a big dog and (a cat) by fire, camp fires"]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts * 20), model_writer=model, vocab_size=64, model_type="unigram",
    bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2, num_threads=1,
    normalization_rule_name="nmt_nfkc", hard_vocab_limit=False,
    user_defined_symbols=["▁campfire", "▁A", "▁snow", "▁snowman"])
  size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
  return write_vocabulary(
    tmp_path_factory.mktemp("vocabulary"), "sentencepiece", model.getvalue(),
    {"vocab_size": size, "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3})


@pytest.fixture(scope="module")
def id_of(vocabulary):
  return {word: vocabulary.vocab_size + i for i, word in enumerate(WORDS)}


def _encoded(vocabulary, id_of, *parts, num_given=0):
  ids = appended(vocabulary, 2, WORDS)
  left_out = LeftOut()
  record = Record(7, (Picture("p", "p"), *parts), num_given, "f:1")
  found = list(encode_records(
    [record], vocabulary, ids, words=box_words(id_of.get), left_out=left_out))
  return (found[0] if found else None), left_out, ids


def _by_hand(vocabulary, id_of, ids, pieces):
  """`<s> <image> .. </image>`, the ids of texts and words one after another, `</s>`."""
  body = []
  for piece in pieces:
    body += [id_of[piece]] if piece in id_of else [
      vocabulary._processor.piece_to_id(p) for p in piece.split()]
  return [ids.bos_id, *ids.block, *body, ids.eos_id]


def test_a_caption_has_tags_around_its_phrases(vocabulary, id_of):
  end = len("A snowman")
  fire = CAPTION.index("a campfire")
  text = GroundedText(CAPTION, [
    Located(0, end, (CORNER, LOWER)), Located(fire, fire + len("a campfire"), (LOWER,))])
  example, left_out, ids = _encoded(vocabulary, id_of, text)
  whole = [vocabulary._processor.id_to_piece(i) for i in vocabulary.encode(CAPTION)]
  assert whole[:2] == ["▁A", "▁snowman"] and whole[-2:] == ["▁campfire", "."]
  cell = boxes.location_word
  want = _by_hand(vocabulary, id_of, ids, [
    "<grounding>", "<phrase>", "▁A ▁snowman", "</phrase>", "<object>", cell(0), cell(5),
    boxes.DELIMITER, cell(10), cell(15), "</object>", " ".join(whole[2:-3]),
    "<phrase>", " ".join(whole[-3:-1]), "</phrase>", "<object>", cell(10), cell(15), "</object>",
    "."])
  assert example.tokens.tolist() == want and not left_out.counts
  first = 1 + len(ids.block)
  assert want[first] == id_of["<grounding>"]  # the first target
  assert example.learned.tolist() == [False] * first + [True] * (len(want) - first)


def test_without_boxes_the_ids_are_those_of_the_text(vocabulary, id_of):
  text = GroundedText(CAPTION, [Located(2, 9, (CORNER,))])
  grounded, _, ids = _encoded(vocabulary, id_of, text)
  plain, _, _ = _encoded(vocabulary, id_of, CAPTION)
  own = [token for token in grounded.tokens.tolist() if token not in id_of.values()]
  assert own == [token for token in plain.tokens.tolist() if token not in id_of.values()]


def test_a_phrase_is_asked_for_and_boxes_alone_answer(vocabulary, id_of):
  asked = GroundedText("A snowman", [Located(0, 9, ())])
  answer = GroundedText("", [Located(0, 0, (CORNER,))], asks=False)
  example, _, ids = _encoded(vocabulary, id_of, asked, answer, num_given=2)
  want = _by_hand(vocabulary, id_of, ids, [
    "<grounding>", "<phrase>", "▁A ▁snowman", "</phrase>", "<object>", "<patch_index_0000>",
    "<patch_index_0005>", "</object>"])
  assert example.tokens.tolist() == want
  assert example.learned.tolist() == [False] * (len(want) - 5) + [True] * 5


def test_a_phrase_that_ends_inside_of_a_token_is_left_out(vocabulary, id_of):
  text = GroundedText(CAPTION, [Located(2, len("A snow"), (CORNER,))])
  example, left_out, _ = _encoded(vocabulary, id_of, text)
  assert example is None and left_out.counts == {"split_token": 1}
  assert left_out.named["split_token"] == ["f:1"]


def test_a_phrase_that_begins_inside_of_a_token_takes_it_in(vocabulary, id_of):
  tokens = [
    _encoded(vocabulary, id_of, GroundedText(CAPTION, [Located(start, 9, (CORNER,))]))[0].tokens
    for start in (len("A snow"), 2)]
  assert tokens[0].tolist() == tokens[1].tolist()


def test_phrases_do_not_share_a_token(vocabulary, id_of):
  text = GroundedText(CAPTION, [Located(0, 9, (CORNER,)), Located(9, 12, (CORNER,))])
  assert _encoded(vocabulary, id_of, text)[0] is not None
  text = GroundedText("A snowman", [Located(0, 9, ()), Located(len("A snow"), 9, (CORNER,))])
  assert _encoded(vocabulary, id_of, text)[1].counts == {"split_token": 1}


def test_blanks_at_the_ends_of_a_phrase_change_nothing(vocabulary, id_of):
  tokens = [
    _encoded(vocabulary, id_of, GroundedText(CAPTION, [Located(*ends, (CORNER,))]))[0].tokens
    for ends in ((2, 9), (1, 9), (2, 10))]
  assert tokens[0].tolist() == tokens[1].tolist() == tokens[2].tolist()


def test_tags_in_a_caption_are_ordinary_text(vocabulary, id_of):
  example, _, ids = _encoded(vocabulary, id_of, GroundedText(
    "<phrase> a dog", [Located(9, 14, (CORNER,))]))
  assert example.tokens.tolist().count(id_of["<phrase>"]) == 1


def test_boxes_need_words(vocabulary, id_of):
  ids = appended(vocabulary, 2)
  record = Record(7, (GroundedText("a dog", [Located(0, 5, (CORNER,))]),), 0, "f:1")
  with pytest.raises(ValueError, match="vocabulary has no words for them; add boxes.grounding"):
    list(encode_records([record], vocabulary, ids))


def test_the_published_ids():
  words = (*KOSMOS_WORDS, *boxes.grounding_words())
  found = box_words({word: 64_001 + i for i, word in enumerate(words)}.get)
  assert found.tags == (64007, 64008, 64009, 64010, 64011, 64013)
  assert (found.grounding, found.grid) == (64012, 32) and 64_001 + len(words) == 65_037


def test_a_text_is_trimmed_with_its_stretches():
  text = trimmed("  a dog \n", [Located(0, 7, ()), Located(4, 9, (CORNER,))])
  assert text == "a dog"
  assert text.spans == (Located(0, 5, ()), Located(2, 5, (CORNER,)))
  again = pickle.loads(pickle.dumps(text))
  assert (again, again.spans, again.asks) == (text, text.spans, True)
  assert isinstance(again, GroundedText) and isinstance(again, str)


def test_texts_alone_are_encoded_as_before(vocabulary):
  ids = appended(vocabulary, 2)
  record = Record(7, (Picture("p", "p"), CAPTION), 0, "f:1")
  example, = encode_records([record], vocabulary, ids)
  texts, = image_tokens.encode_texts([record.parts], vocabulary)
  assert example.tokens.tolist() == [ids.bos_id, *ids.block, *texts[0], ids.eos_id]
