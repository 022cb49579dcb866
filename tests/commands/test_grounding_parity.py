"""`lmops generate` of a Kosmos-2 folder says what transformers' processor and model say."""

import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax import cli  # noqa: E402
from tests.pretrained.test_kosmos2_processor import (  # noqa: E402
  SLOTS,
  model_file,  # noqa: F401
  processor,  # noqa: F401
)
from tests.pretrained.tiny_models import randomise  # noqa: E402

NUM_NEW = 6
PROMPTS = (  # text, boxes, whether there is a picture
  ("<grounding> An image of", None, True),
  ("<grounding><phrase> a snowman</phrase> by<phrase> a fire</phrase>",
   [(44, 863), [(0.1, 0.2, 0.5, 0.75), (5, 911)]], True),
  ("<phrase> It</phrase> is", [(0.25, 0.5, 0.75, 1.0)], True),
  ("Question: what is it? Answer:", None, True),
  ("<grounding> a<phrase> campfire</phrase>", [(7, 1023)], False),
)


@pytest.fixture(scope="module")
def peer(processor):  # noqa: F811
  torch.manual_seed(0)
  return randomise(transformers.Kosmos2ForConditionalGeneration(transformers.Kosmos2Config(
    text_config=dict(
      vocab_size=len(processor.tokenizer), embed_dim=16, layers=2, ffn_dim=24, attention_heads=2,
      max_position_embeddings=64, eos_token_id=2),
    vision_config=dict(
      hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
      image_size=8, patch_size=4),
    latent_query_num=SLOTS, attn_implementation="eager")))


def _answer(peer, processor, picture, text, boxes):  # noqa: F811
  """Ids, caption and entities."""
  inputs = processor(
    images=picture, text=text, bboxes=boxes, num_image_tokens=SLOTS, return_tensors="pt")
  out = peer.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=1)
  made = out[0, inputs["input_ids"].shape[1] :].tolist()
  whole = processor.batch_decode(out, skip_special_tokens=True)[0]
  return made, *processor.post_process_generation(whole)


def test_ids_captions_and_entities_are_equal(peer, processor, tmp_path, capsys):  # noqa: F811
  peer.save_pretrained(tmp_path / "model")
  processor.save_pretrained(tmp_path / "model")
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
  picture.save(tmp_path / "a.png")
  rows = []
  for text, boxes, has_picture in PROMPTS:
    row = {"prompt": text, "images": ["a.png"] if has_picture else []}
    rows.append(row | ({"boxes": boxes, "box_unit": "fractions"} if boxes else {}))
  # A unit holds for a row: cells are given as the fractions that they decode to.
  rows[1]["boxes"] = [[0.390625, 0.046875, 0.984375, 0.828125], [
    [0.1, 0.2, 0.5, 0.75], [0.171875, 0.015625, 0.484375, 0.890625]]]
  rows[4]["box_unit"] = "cells"
  (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  code = cli.main([
    "generate", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "rows.jsonl"),
    "--max-new-tokens", str(NUM_NEW), "--json"])
  out, err = capsys.readouterr()
  assert code == 0, err
  assert "prompt 2 has no <grounding>" in err and err.count("has no <grounding>") == 1
  num_boxes = 0
  for line, (text, boxes, has_picture) in zip(out.splitlines(), PROMPTS, strict=True):
    got = json.loads(line)
    ids, caption, entities = _answer(
      peer, processor, picture if has_picture else None, text, boxes)
    assert got["ids"] == ids, text
    if "<" not in text:
      assert "caption" not in got  # but the answer alone
      continue
    assert got["caption"] == caption, text
    assert [
      (e["name"], (e["start"], e["end"]), [*map(tuple, e["boxes"])]) for e in got["entities"]
    ] == entities
    num_boxes += sum(len(found) for *_, found in entities)
  assert num_boxes >= 5
