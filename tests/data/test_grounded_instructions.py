"""Questions about boxes, against the rows of the paper written out by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from lmops_jax.data import GritJsonl, GroundedInstructions, ImageSettings
from lmops_jax.data.boxes import grounding_words
from lmops_jax.data.grounded_crops import fitted
from lmops_jax.data.grounded_instructions import TEMPLATES, describe, locate
from lmops_jax.data.grounded_text import box_words
from lmops_jax.data.image_tokens import KOSMOS_WORDS, ImageTokens, encode_records
from lmops_jax.data.multimodal import LeftOut, Picture, Record

A, B = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
WORDS = {word: 200 + i for i, word in enumerate((*KOSMOS_WORDS, *grounding_words(4)))}
NAMES = {i: word for word, i in WORDS.items()}
IDS = ImageTokens(
  vocab_size=200 + len(WORDS), bos_id=0, pad_id=1, eos_id=2, image_id=WORDS["<image>"],
  image_end_id=WORDS["</image>"], line_end_id=WORDS["</line>"], num_slots=1)
CELLS = "<object><patch_index_0000><patch_index_0005></object>"


class _Letters:
  """A token a letter."""

  def encode_batch(self, texts):
    return [[ord(letter) for letter in text] for text in texts]


def _shown(tokens):
  return "".join(NAMES.get(token, chr(token)) for token in tokens)


def _row(texts):
  """What is given and what is learned, without `<s>` and picture, as text."""
  record = Record(7, (Picture("p", "p"), *texts), 2, "f:1")
  example, = encode_records([record], _Letters(), IDS, words=box_words(WORDS.get))
  learned = example.learned
  start = 1 + len(IDS.block)
  assert not learned[:start].any() and example.tokens[-1] == IDS.eos_id and learned[-1]
  given = start + int((~learned[start:]).sum())
  assert learned[given:].all()
  return _shown(example.tokens[start:given].tolist()), _shown(example.tokens[given:-1].tolist())


def test_locate():
  assert _row(locate("a dog", (A,))) == ("<grounding><phrase>a dog</phrase>", CELLS)
  two = CELLS.replace("</object>", "</delimiter_of_multi_objects/><patch_index_0010>"
                      "<patch_index_0015></object>")
  assert _row(locate("a dog", (A, B))) == ("<grounding><phrase>a dog</phrase>", two)


@pytest.mark.parametrize("number, given, learned", [
  (0, "What is<phrase> it</phrase>{}?", " It is a dog."),
  (1, "What is<phrase> this</phrase>{}?", " This is a dog."),
  (2, "Describe<phrase> this object</phrase>{}.", " This object is a dog."),
  (3, "<phrase>It</phrase>{} is", " a dog."),
  (4, "<phrase>This</phrase>{} is", " a dog."),
  (5, "<phrase>The object</phrase>{} is", " a dog."),
])
def test_describe(number, given, learned):
  assert len(TEMPLATES) == 6
  found = _row(describe("a dog", A, TEMPLATES[number]))
  assert found == (given.format(CELLS), learned)


@pytest.fixture
def corpus(tmp_path):
  Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "p.png")

  def made(*expressions, num=1):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(
      {"id": i, "image": "p.png", "caption": "a dog and a cat", "ref_exps": expressions}) + "\n"
      for i in range(num)))
    return GritJsonl(str(path))
  return made


def _kind(record):
  return "locate" if record.parts[1].asks else str(record.parts[1])


def test_each_expression_is_a_question(corpus):
  rows = corpus([0, 5, *A, 0.9], [10, 15, *B, 0.9], [10, 15, *A, 0.9], [0, 15, *A, 0.1], num=300)
  left_out = LeftOut()
  records = list(GroundedInstructions(rows).records(left_out))
  assert len(records) == 600 == len({record.id for record in records})
  assert left_out.counts == {"low_score": 300}
  dogs, cats = records[::2], records[1::2]
  assert {_kind(record) for record in cats} == {"locate"}  # which has two boxes
  assert cats[0].parts[1] == "a cat" and cats[0].parts[2].spans[0].boxes == (B, A)
  kinds = [_kind(record) for record in dogs]
  assert 120 < kinds.count("locate") < 180
  assert set(kinds) == {"locate", *(template.prompt for template in TEMPLATES)}
  assert min(kinds.count(template.prompt) for template in TEMPLATES) > 10
  again = GroundedInstructions(corpus([0, 5, *A, 0.9], num=20)).records(LeftOut())
  assert [(record.id, _kind(record)) for record in again] == [
    (record.id, kind) for record, kind in zip(dogs[:20], kinds)]  # whatever stands beside
  only = GroundedInstructions(corpus([0, 5, *A, 0.9], num=20), locate_share=0.0)
  assert "locate" not in {_kind(record) for record in only.records(LeftOut())}


def test_questions_whose_boxes_are_cropped_away_are_left_out(corpus):
  """60 x 40 pixels: of the left sixth nothing is left."""
  rows = corpus([0, 5, 0, 0, 1 / 6, 1, 0.9], [10, 15, *A, 0.9], num=20)
  left_out = LeftOut()
  found = list(fitted(
    GroundedInstructions(rows).records(left_out), ImageSettings(16, 16, fit="crop"), left_out))
  assert len(found) == 20 and left_out.counts == {"lost_box": 20, "box_outside": 20}


def test_rows_without_a_sure_expression_are_counted(corpus):
  left_out = LeftOut()
  with pytest.raises(ValueError, match="is empty: it has no usable record .*2 without_region"):
    list(GroundedInstructions(corpus([0, 5, *A, 0.5], num=2)).records(left_out))
