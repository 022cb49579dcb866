"""Kosmos-2's published run on tiny files: rows with boxes beside plain ones, and its plan."""

import json

import numpy as np
import pytest
from PIL import Image

from lmops_jax.config import resolve
from lmops_jax.data.boxes import DELIMITER, location_word
from lmops_jax.data.grit.files import GritExample, write_shard
from lmops_jax.data.grit.records import GritRow, Region
from lmops_jax.data.image_tokens import ImageTokens, special_words
from lmops_jax.data.multimodal import Picture
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.shared_stages import corpora
from lmops_jax.sizing.budget import Memory

CAPTION = "a red star and two blue moons"
LEFT, RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
TINY = [
  "VOCABULARY = @data.TrainSentencePiece()", "data.TrainSentencePiece.vocab_size = 300",
  "GROUPS = 4", "HELD_OUT = 0.0", "models.ResamplerConfig.num_latents = 4",
  "kosmos.Pretrain.grid = 4",
  "text/models.TransformerConfig.vocab_size = None",
  "models.VisionConfig.image_size = 28", "data.ImageSettings.height = 28",
  "data.ImageSettings.width = 28", "text/kosmos.RowShape.length = 32",
  "pairs/kosmos.RowShape.length = 64", "pairs/kosmos.RowShape.rows = 4",
  "interleaved/kosmos.RowShape.length = 48", "interleaved/kosmos.RowShape.pictures = 2",
  "kosmos.Pretrain.images = @data.ImageSettings()", "kosmos.Pretrain.pictures_per_document = 2",
  "data.ImageSettings.fit = 'crop'", "plain/kosmos.Pictures.corpus = @plain/data.ImageJsonl()",
]


def _regions(*boxes):
  moons = CAPTION.index("two")
  return (Region(0, 10, boxes[0], 0.9), *(
    Region(moons, len(CAPTION), box, 0.8) for box in boxes[1:]))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  draws = np.random.default_rng(0)
  for i in range(4):
    Image.fromarray(draws.integers(0, 256, (70, 70, 3), np.uint8)).save(folder / f"{i}.png")
  (folder / "text.jsonl").write_text("\n".join(
    json.dumps({"text": f"{CAPTION} number {i}\nand more of it"}) for i in range(40)))
  (folder / "plain.jsonl").write_text("\n".join(
    json.dumps({"images": [f"{i}.png"], "text": CAPTION}) for i in range(4)))
  (folder / "pages.jsonl").write_text("\n".join(
    json.dumps({"images": ["0.png", "1.png"], "text": f"<image> {CAPTION[:10]} <image> {i}"})
    for i in range(2)))
  rows = [
    GritRow(i, CAPTION, (), _regions(LEFT, RIGHT, LEFT) if i else ()) for i in range(4)]
  write_shard(folder / "grit.tar", [
    GritExample(row.id, row, Picture("p", str(folder / f"{row.id}.png")), "s") for row in rows])
  own = folder / "tiny.gin"
  own.write_text("\n".join(["include 'kosmos/kosmos2_paper.gin'", *TINY, *[
    f"TEXT_PATH = '{folder}/text.jsonl'", f"DOCUMENTS_PATH = '{folder}/pages.jsonl'",
    f"GRIT_PATH = '{folder}/grit.tar'", f"plain/data.ImageJsonl.path = '{folder}/plain.jsonl'",
  ]]))
  return str(own)


@pytest.fixture(scope="module")
def found(run_stages, file, tmp_path_factory):
  """A run up to the rows: its system, and their folder."""
  path = tmp_path_factory.mktemp("run")
  return run_stages(file, path, only=["rows"]).system, path / "rows"


def test_a_group_has_as_many_grounded_pairs_as_plain_ones(found):
  system, rows = found
  ids = ImageTokens(**json.loads((rows / "ids.json").read_text()))
  words = {word: 300 + i for i, word in enumerate(special_words(4))}
  assert ids.vocab_size == 300 + len(words) == 300 + 6 + 6 + 16
  assert ids.image_id == words["<image>"]
  batch = system._groups(rows).batch(0)
  assert batch["pairs/tokens"].shape == (4, 4, 64)
  assert batch["pairs/images"].shape == (4, 4, 1, 28, 28, 3)
  is_grounded = (batch["pairs/tokens"] == words["<grounding>"]).any(-1)
  # A half of the rows are of the source of grounded pairs, of which one in four has no region.
  assert is_grounded.sum() == 6

  tokens = batch["pairs/targets"][is_grounded][0].tolist()
  cell = lambda i: words[location_word(i)]  # noqa: E731
  star = [words["<object>"], cell(0), cell(5), words["</object>"]]
  moons = [words["<object>"], cell(10), cell(15), words[DELIMITER], cell(0), cell(5),
           words["</object>"]]
  ends = [i for i, token in enumerate(tokens) if token == words["</phrase>"]]
  assert [tokens[ends[0] + 1 : ends[0] + 5], tokens[ends[1] + 1 : ends[1] + 8]] == [star, moons]
  vocabulary = corpora.open_vocabulary(rows)
  assert vocabulary.decode([t for t in tokens if t < 300]).strip() == CAPTION


def test_what_became_of_the_rows_is_counted(found):
  _, rows = found
  counts = json.loads((rows / "manifest.json").read_text())["extra"]["counts"]
  assert counts["pairs/grounded"]["examples"] == 4
  assert counts["pairs/grounded"]["without_region"] == 1
  assert counts["pairs/plain"]["examples"] == 4


def _published(*bindings):
  owed = [f"{name} = '/data/none'" for name in (
    "TEXT_PATH", "PAIRS_PATH", "GRIT_PATH", "DOCUMENTS_PATH", "VOCABULARY_PATH")]
  return resolve.load(["kosmos/kosmos2_paper.gin"], [*owed, *bindings]).build()


def _phase(system):
  return system.phases(MeshConfig(tensor=8, fsdp=1).plan(8), Memory(), platform="tpu")[0]


def test_the_published_run_has_its_size():
  system = _published()
  assert len(system.words) + 64_001 == system.model.text.vocab_size == 65_037
  assert _phase(system).num_params == 1_664_485_376
  groups = system.training.num_groups
  per_step = {part: groups * shape.rows for part, shape in system.training.shapes.items()}
  assert per_step["text"] == pytest.approx(93, rel=0.011)
  assert per_step["pairs"] == pytest.approx(2 * 1117, rel=0.011)
  assert per_step["interleaved"] == 47


@pytest.mark.slow
def test_a_trained_tower_costs_three_passes():
  phase, frozen = _phase(_published()), _phase(_published(
    "kosmos.Training.optimizer = @optim.partition()",
    "optim.partition.rules = {'vision/.*': None, '.*': @optim.adamw()}"))
  tower = 2 * (24 * 12 * 1024**2 + 2 * 24 * 1024 * 257) * 257
  more = (phase.flops - frozen.flops) / phase.steps / (2 * 47 * (48 + 5) * tower)
  assert 1 <= more < 1.01  # the connector's gradient goes on to the tower
  assert frozen.parts["opt_state"] < phase.parts["opt_state"]
  assert frozen.parts["activations"] < phase.parts["activations"]
