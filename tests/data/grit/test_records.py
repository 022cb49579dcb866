"""Rows of GrIT: what is read, what of a bad one is left out, and what is refused."""

import json
import math

import pytest

from lmops_jax.data.grit.records import Region, as_row, parse
from lmops_jax.data.multimodal import LeftOut

BOX = [0.1, 0.2, 0.5, 0.9]
NAN = math.nan


def test_a_row_is_read_and_written_alike(row):
  fields = row(17, noun_chunks=[[0, 5, *BOX, 0.83], [9.0, 16.0, *BOX, 0.7]],
               ref_exps=[[0, 27, *BOX, 0.83]])
  left_out = LeftOut()
  found = parse(fields, "f:1", left_out)
  assert found.noun_chunks == (
    Region(0, 5, tuple(BOX), 0.83), Region(9, 16, tuple(BOX), 0.7))
  assert found.ref_exps == (Region(0, 27, tuple(BOX), 0.83),)
  assert found.others["width"] == 60 and not left_out.counts
  again = parse(json.loads(json.dumps(as_row(found))), "f:1", left_out)
  assert again == found and as_row(found) == fields


def test_a_caption_alone_is_a_row(row):
  found = parse({"caption": "a dog"}, "f:1", LeftOut())
  assert found.id is None and found.noun_chunks == found.ref_exps == ()
  assert as_row(found) == {"caption": "a dog", "noun_chunks": [], "ref_exps": []}


def test_numbers_that_json_has_no_word_for_are_written_as_null(row):
  found = parse(row(1, clip_similarity_vitb32=NAN), "f:1", LeftOut())
  assert as_row(found)["clip_similarity_vitb32"] is None
  assert as_row(found)["width"] == 60


@pytest.mark.parametrize("region, reason, named", [
  ([0, 28, *BOX, 0.8], "bad_span", "from 0 to 28 of a caption of 27 characters"),
  ([-1, 5, *BOX, 0.8], "bad_span", "from -1 to 5"),
  ([5, 5, *BOX, 0.8], "bad_span", "from 5 to 5"),
  ([5, 6, *BOX, 0.8], "bad_span", "from 5 to 6"),  # a blank
  ([0.5, 5, *BOX, 0.8], "bad_span", "from 0.5 to 5"),
  ([0, 1e400, *BOX, 0.8], "bad_span", "from 0 to inf"),
  ([0, 5, *BOX, NAN], "bad_score", "the score nan"),
  ([0, 5, *BOX, math.inf], "bad_score", "the score inf"),
  ([0, 5, 0.5, 0.2, 0.5, 0.9, 0.8], "bad_box", "the box [0.5, 0.2, 0.5, 0.9]"),
  ([0, 5, 0.1, 0.9, 0.5, 0.2, 0.8], "bad_box", "the box"),
  ([0, 5, 0.1, NAN, 0.5, 0.9, 0.8], "bad_box", "the box"),
  ([0, 5, 10, 20, 50, 90, 0.8], "bad_box", "not x1 < x2 and y1 < y2 in 0 to 1"),  # pixels
  ([0, 5, 1.001, 0.1, 1.01, 0.9, 0.8], "bad_box", "the box"),  # wholly beyond the edge
])
def test_bad_regions_are_counted_and_named(row, region, reason, named):
  left_out = LeftOut()
  found = parse(row(1, ref_exps=[[0, 5, *BOX, 0.8], region]), "f:1", left_out)
  assert len(found.ref_exps) == 1 and left_out.counts == {reason: 1}
  what, = left_out.named[reason]
  assert what.startswith("f:1 ref_exps[1]") and named in what


def test_a_box_a_little_beyond_the_picture_is_cut(row):
  left_out = LeftOut()
  found = parse(row(1, noun_chunks=[[0, 5, -0.004, 0, 1.002, 1, 0.8]]), "f:1", left_out)
  assert found.noun_chunks[0].box == (0, 0, 1, 1) and left_out.counts == {"clamped": 1}


@pytest.mark.parametrize("fields, message", [
  ({"text": "a dog"}, 'f:1 has the caption None; a row of GrIT has a text in the field "caption"'),
  ({"caption": "a dog", "id": True}, "f:1 has the id True"),
  ({"caption": "a dog", "noun_chunks": "[]"}, "f:1 noun_chunks holds a str, not a list"),
  ({"caption": "a dog", "ref_exps": [[0, 5, *BOX]]}, r"f:1 ref_exps\[0\] is \[0, 5, .* 7 numbers"),
  ({"caption": "a dog", "ref_exps": [[0, 5, *BOX, True]]}, "7 numbers"),
  ({"caption": "a dog", "ref_exps": [{"start": 0}]}, "7 numbers"),
])
def test_rows_of_another_form_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    parse(fields, "f:1", LeftOut())
