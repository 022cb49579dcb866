"""A published folder of Kosmos-2 trained further: ids, the masks shown, and the way back."""

import json

import jax
import numpy as np
import pytest
import sentencepiece
from PIL import Image

from lmops_jax import pretrained
from lmops_jax.data.boxes import GRID, grounding_words
from lmops_jax.data.image_tokens import KOSMOS_WORDS
from lmops_jax.pretrained import exporting
from lmops_jax.text.tokenizer import load_tokenizer
from lmops_jax.text.vocabularies import load_vocabulary
from lmops_jax.text.vocabulary_sources import SentencePieceFile
from tests import model_folders

CAPTION = "An image of a snowman by a fire."
WORDS = (*KOSMOS_WORDS, *grounding_words())


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pieces")
  (folder / "texts.txt").write_text(f"{CAPTION}\nQuestion: what is it? Answer: a campfire\n" * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(folder / "texts.txt"), model_prefix=str(folder / "sentencepiece.bpe"), vocab_size=60,
    minloglevel=2, hard_vocab_limit=False, normalization_rule_name="identity")
  return folder / "sentencepiece.bpe.model"


@pytest.fixture(scope="module")
def vocabulary(model_file, tmp_path_factory):
  source = SentencePieceFile(str(model_file), fairseq=True)
  return source.build([], tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def workdir(run_stages, model_file, vocabulary, tmp_path_factory):
  folder = tmp_path_factory.mktemp("finetune")
  model_folders.write_docked(
    folder / "published", vocab_size=vocabulary.vocab_size + len(WORDS), max_length=96)
  draws = np.random.default_rng(0)
  rows = []
  for i in range(6):
    Image.fromarray(draws.integers(0, 256, (40, 30, 3), np.uint8)).save(folder / f"{i}.png")
    rows.append({"image": f"{i}.png", "caption": CAPTION, "id": i,
                 "ref_exps": [[12, 31, 0.25, 0.125, 0.75, 0.875, 0.9]]})
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  sizes = {"num_layers": 2, "width": 16, "num_heads": 4, "mlp_width": 24, "dtype": "'float32'"}
  run_stages("kosmos/finetune.gin", folder / "run", *[
    f"START = '{folder}/published'", f"VOCABULARY_PATH = '{model_file}'",
    f"PAIRS_PATH = '{folder}/pairs.jsonl'", "STEPS = 2", "GROUPS = 2", "HELD_OUT = 0.0",
    "GROUNDED_SHARE = 1.0", "optim.warmup_linear.warmup_steps = 1",
    f"text/models.TransformerConfig.vocab_size = {vocabulary.vocab_size + len(WORDS)}",
    *(f"text/models.TransformerConfig.{name} = {value}" for name, value in sizes.items()),
    "text/models.TransformerConfig.embedding_scale = 4.0",
    "text/models.TransformerConfig.max_length = 96",
    *(f"vision/models.TransformerConfig.{name} = {value}" for name, value in {
      **sizes, "num_heads": 2}.items()),
    "models.VisionConfig.image_size = 8", "models.VisionConfig.patch_size = 4",
    "models.ResamplerConfig.num_latents = 4", "data.ImageSettings.height = 8",
    "data.ImageSettings.width = 8", "pairs/kosmos.RowShape.length = 48",
    "pairs/kosmos.RowShape.rows = 1", "text/kosmos.RowShape.length = 48",
    "interleaved/kosmos.RowShape.length = 48",
  ])
  return folder


def test_ids_are_those_of_fairseqs_dictionary(model_file, vocabulary):
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
  assert vocabulary.vocab_size == pieces.get_piece_size() + 1
  of = vocabulary
  assert (of.bos_id, of.pad_id, of.eos_id, of.unk_id) == (0, 1, 2, 3)
  assert vocabulary.encode(CAPTION) == [i + 1 for i in pieces.encode(CAPTION)]
  assert vocabulary.decode(vocabulary.encode(CAPTION)) == CAPTION
  plain = SentencePieceFile(str(model_file))
  assert plain.fingerprint() != SentencePieceFile(str(model_file), fairseq=True).fingerprint()


def test_the_report_shows_what_is_learned(workdir):
  first = json.loads((workdir / "run/rows/manifest.json").read_text())["extra"]["first_rows"]
  ul, lr = 4 * GRID + 8, 27 * GRID + 23
  assert first == {"pairs/pairs": (
    "<s> <image> [picture] </image> ⟦<grounding> An image of <phrase> a snowman by a fire "
    f"</phrase> <object> <patch_index_{ul:04d}> <patch_index_{lr:04d}> </object> . </s>⟧")}
  assert "a snowman by a fire" in (workdir / "run/report/index.html").read_text()


def test_what_was_trained_is_a_folder_with_the_published_tokenizer(workdir, vocabulary, tmp_path):
  opened = load_vocabulary(workdir / "run/rows/vocabulary")
  assert opened.encode(CAPTION) == vocabulary.encode(CAPTION)
  trained = pretrained.load(workdir / "run/train")
  tokenizer = trained.tokenizer()
  assert tokenizer.encode(CAPTION, False) == vocabulary.encode(CAPTION)
  for i in (0, 2, len(KOSMOS_WORDS), len(WORDS) - 1):
    assert tokenizer.token_id(WORDS[i]) == vocabulary.vocab_size + i
  exporting.export(tmp_path / "export", trained)
  again = pretrained.load(tmp_path / "export")
  jax.tree.map(np.testing.assert_array_equal, again.params(), trained.params())
  assert load_tokenizer(tmp_path / "export").encode(CAPTION, False) == vocabulary.encode(CAPTION)
  begun = pretrained.load(workdir / "published").params()
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), begun, trained.params())
  assert moved["vision"]["trunk"] and any(jax.tree.leaves(moved["text"]))


def test_a_model_of_another_order_has_no_fairseq_ids(tmp_path):
  (tmp_path / "texts.txt").write_text(f"{CAPTION}\n" * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "m"), vocab_size=40,
    minloglevel=2, hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3)
  source = SentencePieceFile(str(tmp_path / "m.model"), fairseq=True)
  with pytest.raises(ValueError, match=r"at \(1, 2, 3\), and fairseq's dictionary"):
    source.build([], tmp_path / "v")
