"""Prompts with pictures are those of Kosmos-2's processor, for each form of its tokenizer's files.

The published vocabulary is not at hand: a small one of the same kind stands in, SentencePiece's
unigram model with fairseq's ids and the processor's own words behind them.
"""

import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
import sentencepiece
from PIL import Image

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")

from lmops_jax.commands import grounding  # noqa: E402
from lmops_jax.commands.prompts import PromptRow  # noqa: E402
from lmops_jax.data.boxes import box_tokens, insert  # noqa: E402
from lmops_jax.data.images import ImageSettings  # noqa: E402
from lmops_jax.data.multimodal import drawn, parts_of  # noqa: E402
from lmops_jax.decoding.image_prompts import image_tokens, laid_out  # noqa: E402
from lmops_jax.decoding.text import Generation  # noqa: E402
from lmops_jax.models.pixels import normalise  # noqa: E402
from lmops_jax.pretrained import exporting, families, importing  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402
from lmops_jax.text.tokenizer import load_tokenizer  # noqa: E402

SLOTS = 5
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
TEXTS = (
  "An image of", "  An image of ", "<grounding> An image of", "<grounding>An image of",
  "<phrase> a snowman</phrase>", "<grounding><phrase> a snowman</phrase> warming",
  "Question: what is it? Answer:", "a <unk> b", "a</phrase><object><patch_index_0044></object>.",
  "<patch_index_44> fire.", "",
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pieces")
  texts = folder / "texts.txt"
  texts.write_text(
    "An image of a snowman warming himself by a fire.\nQuestion: what is it? Answer: a campfire\n"
    "<patch_index_44>\n" * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(texts), model_prefix=str(folder / "model"), vocab_size=70, minloglevel=2,
    hard_vocab_limit=False, normalization_rule_name="identity")
  return folder / "model.model"


@pytest.fixture(scope="module")
def processor(model_file):
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
  first = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
  rest = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, pieces.get_piece_size())]
  # As the published files do, the vocabulary itself ends with the mask.
  tokenizer = transformers.XLMRobertaTokenizer(vocab=[*first, *rest, ("<mask>", 0.0)])
  return transformers.Kosmos2Processor(
    transformers.CLIPImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False),
    tokenizer, num_patch_index_tokens=1024)


@pytest.fixture(scope="module")
def folders(processor, model_file, tmp_path_factory):
  """Of each form of the files: tokenizer.json, or a SentencePiece model with the added words."""
  fast, slow = tmp_path_factory.mktemp("fast"), tmp_path_factory.mktemp("slow")
  processor.save_pretrained(fast)
  (slow / "sentencepiece.bpe.model").write_bytes(model_file.read_bytes())
  added = {
    str(i): {"content": token.content, "lstrip": token.lstrip, "rstrip": token.rstrip,
             "normalized": token.normalized, "special": token.special}
    for i, token in processor.tokenizer.added_tokens_decoder.items()}
  (slow / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "XLMRobertaTokenizer", "added_tokens_decoder": added}))
  return {"fast": fast, "slow": slow}


@pytest.mark.parametrize("form", ["fast", "slow"])
def test_ids_and_places_are_those_of_the_processor(processor, folders, form):
  tokenizer = load_tokenizer(folders[form])
  assert tokenizer.vocab_size == len(processor.tokenizer)
  ids = image_tokens(tokenizer, SLOTS)
  size = tokenizer.token_id("<mask>")
  # As in the published vocabulary: the mask, the tags, the words of places.
  assert (ids.image_id, ids.image_end_id, ids.line_end_id) == (size + 2, size + 3, size + 5)
  assert tokenizer.token_id("<patch_index_1023>") == size + 11 + 1024
  assert (ids.bos_id, ids.pad_id, ids.eos_id) == (0, 1, 2)
  for text in TEXTS:
    want = processor(
      images=Image.fromarray(PIXELS), text=text, num_image_tokens=SLOTS, return_tensors="np")
    parts, _ = parts_of(text, [drawn(PIXELS, "noise")], "prompt")
    got = laid_out(parts, tokenizer, ids)
    places = want["image_embeds_position_mask"][0].astype(bool)
    np.testing.assert_array_equal(got.vectors >= 0, places, err_msg=text)
    np.testing.assert_array_equal(
      got.tokens[~places], want["input_ids"][0][~places], err_msg=text)
    if text.strip():
      alone = processor(text=text)["input_ids"]
      assert [tokenizer.bos_id, *tokenizer.encode(text.strip(), False)] == alone, text


BOXED = {
  "<phrase> a snowman</phrase>": [(44, 863)],
  "<grounding>  <phrase>a fire</phrase>and<phrase> a snowman</phrase>.": [
    [(0.25, 0.5, 0.75, 1.0), (5, 911)], None],
  "<phrase> It </phrase> is": [(0.1, 0.2, 0.30001, 0.4)],
}


@pytest.mark.parametrize("form", ["fast", "slow"])
def test_boxes_in_texts_are_those_of_the_processor(processor, folders, form):
  """Theirs have blanks between tags, which the tags swallow; an empty slot would show here."""
  tokenizer = load_tokenizer(folders[form])
  ids = image_tokens(tokenizer, SLOTS)
  tokens, grid = box_tokens(tokenizer.token_id)
  assert grid == 32 and tokens.first_location == tokenizer.token_id("<grounding>") + 1
  picture = Image.fromarray(PIXELS)
  for text, boxes in BOXED.items():
    want = processor(images=picture, text=text, bboxes=boxes, num_image_tokens=SLOTS)
    parts, _ = parts_of(insert(text, boxes), [drawn(PIXELS, "noise")], "prompt")
    got = laid_out(parts, tokenizer, ids)
    places = np.array(want["image_embeds_position_mask"], bool)
    np.testing.assert_array_equal(got.tokens[~places], np.array(want["input_ids"])[~places])
  # The published check vectors: after <phrase>, "▁a" and so on, </phrase>, four tokens of the box;
  # and the layout of a prompt with 64 slots.
  (box,) = BOXED["<phrase> a snowman</phrase>"]
  written = tokenizer.encode(insert("<phrase> a snowman</phrase>", [box]), False)
  assert written[0] == tokens.phrase and written[-5:] == [
    tokens.phrase_end, tokens.object, *(tokens.first_location + np.array(box)), tokens.object_end]
  parts, _ = parts_of("<grounding> An image of", [drawn(PIXELS, "noise")], "prompt")
  row = laid_out(parts, tokenizer, image_tokens(tokenizer, 64))
  assert np.flatnonzero(row.vectors >= 0).tolist() == list(range(2, 66))
  assert row.tokens[[0, 1, 66, 67]].tolist() == [
    0, *map(tokenizer.token_id, ("<image>", "</image>", "<grounding>"))]


def test_what_a_model_wrote_is_read_as_the_processor_does(processor, folders):
  tokenizer = load_tokenizer(folders["fast"])
  tokens, grid = box_tokens(tokenizer.token_id)
  words = [*tokenizer.encode("a fire.</line> it", False), tokenizer.unk_id, tokenizer.eos_id]
  rng, num_entities = np.random.default_rng(0), 0
  arguments = SimpleNamespace(stop=(), boxes=None, draw=None, grammar=False)
  parts, _ = parts_of("<grounding> An image of", [drawn(PIXELS, "noise")], "prompt")
  prompt = laid_out(parts, tokenizer, image_tokens(tokenizer, SLOTS)).tokens.tolist()
  for _ in range(200):
    ids, pairs = [], tokens.first_location + rng.integers(0, 1024, (4, 2))
    for pair in pairs:
      ids += rng.choice(words, 2).tolist()
      ids += [tokens.phrase, words[0], tokens.phrase_end] if rng.random() < 0.6 else []
      ids += [tokens.object, *pair.tolist(), tokens.object_end]
      if rng.random() < 0.3:
        del ids[rng.integers(len(ids))]
    (answer,) = grounding.read(
      grounding.BoxWords(tokenizer, tokens, grid), [PromptRow("<grounding>")], [prompt],
      [Generation("", ids, [], "eos")], arguments, {})
    text = processor.batch_decode([prompt + ids], skip_special_tokens=True)[0]
    caption, entities = processor.post_process_generation(text)
    assert answer.grounded.text == caption
    assert [(e.name, (e.start, e.end), [*e.boxes]) for e in answer.grounded.entities] == entities
    num_entities += len(entities)
  assert num_entities > 400


def test_pixels_are_those_of_the_processor(processor):
  want = processor(images=Image.fromarray(PIXELS), text="a", return_tensors="np")["pixel_values"]
  pixels = ImageSettings(8, 8).pixels(drawn(PIXELS, "noise").read(), "noise")
  config = transformers.CLIPImageProcessor()
  got = (pixels / 255 - np.array(config.image_mean)) / np.array(config.image_std)
  np.testing.assert_allclose(got.transpose(2, 0, 1), want[0], atol=1e-6)


def test_an_exported_model_brings_its_processor(processor, folders, tmp_path):
  """Of a model whose folder has no `preprocessor_config.json`, as those trained here."""
  source = model_lib.PretrainedModel(folders["fast"], "kosmos-2", families.by_name(
    "kosmos-2").read_config(families.ConfigReader({
      "text_config": dict(
        vocab_size=len(processor.tokenizer), embed_dim=8, layers=1, ffn_dim=8, attention_heads=2),
      "vision_config": dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=18, patch_size=6),
    }, "config.json")))
  params = jax.tree.map(
    lambda x: np.zeros(x.shape, np.float32),
    nn.unbox(importing.abstract_params(families.by_name("kosmos-2"), source.config)))
  exporting.export(tmp_path / "out", source, params)
  again = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
  assert type(again) is transformers.Kosmos2Processor
  picture = Image.fromarray(PIXELS)
  want = again(images=picture, text="<grounding> An image of", return_tensors="np")
  loaded = model_lib.load(str(tmp_path / "out"))
  pixels = loaded.image_settings().pixels(drawn(PIXELS, "noise").read(), "noise")
  assert pixels.shape == (18, 18, 3)
  np.testing.assert_allclose(
    np.asarray(normalise(pixels)).transpose(2, 0, 1), want["pixel_values"][0], atol=3e-7, rtol=0)
  assert len(again.tokenizer) == loaded.vocab_size
  asked = processor(images=picture, text="<grounding> An image of", return_tensors="np")
  np.testing.assert_array_equal(want["input_ids"], asked["input_ids"])


def test_another_normalisation_is_found_where_transformers_5_keeps_it(folders, tmp_path):
  fields = json.loads((folders["fast"] / "processor_config.json").read_text())
  fields["image_processor"]["image_std"] = [0.5, 0.5, 0.5]
  (tmp_path / "processor_config.json").write_text(json.dumps(fields))
  config = families.by_name("kosmos-2").read_config(families.ConfigReader({}, "config.json"))
  source = model_lib.PretrainedModel(tmp_path, "kosmos-2", config)
  with pytest.raises(ValueError, match=r"processor_config.json: image_std=\[0.5, 0.5, 0.5\] diff"):
    source.image_settings()


@pytest.mark.parametrize("form", ["fast", "slow"])
def test_answers_are_decoded_as_the_processor_does(processor, folders, form):
  tokenizer = load_tokenizer(folders[form])
  text = "<grounding> An image of<phrase> a fire</phrase><object><patch_index_0005></object>."
  ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
  want = processor.tokenizer.decode(ids, skip_special_tokens=True)
  assert tokenizer.decode(ids) == want
