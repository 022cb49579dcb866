"""Kosmos-2 as a run: rows with boxes and their twins, what is asked, how answers are judged."""

import itertools
import json

import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.data import boxes
from lmops_jax.data.grounded_text import GroundedText, Located, appended_box_words
from lmops_jax.data.image_tokens import encode_records
from lmops_jax.data.synthetic_pictures.scene_texts import captions
from lmops_jax.systems.kosmos import prepare
from lmops_jax.systems.kosmos.grounding import evaluate, world
from lmops_jax.training.sources import part_of

FILE = "kosmos/grounding_smoke.gin"
BINDINGS = ["ARMS = ('blind', 'grounded')", "ITEMS = 2", "kosmos.Evaluate.max_new_tokens = 6"]


def _loaded(*bindings):
  return resolve.load([FILE], [*BINDINGS, *bindings])


@pytest.fixture(scope="module")
def system():
  return _loaded().build()


@pytest.fixture(scope="module")
def workdir(run_stages, tmp_path_factory):
  path = tmp_path_factory.mktemp("grounding")
  run_stages(FILE, path, *BINDINGS)
  return path


@pytest.fixture(scope="module")
def prepared(workdir):
  return prepare.Prepared(workdir / "scenes")


@pytest.fixture(scope="module")
def words(prepared, system):
  return appended_box_words(prepared.vocabulary, system.words)


def _records(system, source):
  return list(itertools.islice(world.sources(system.world)["pairs"][source](False), 12))


def _encoded(system, prepared, words, source):
  return list(encode_records(
    _records(system, source), prepared.vocabulary, prepared.ids, words=words))


def test_a_run_ends_in_a_report(workdir, system):
  summary = json.loads((workdir / "report/summary.json").read_text())
  said = json.loads((workdir / "evaluate/grounded/seed0/results.json").read_text())["said"]
  asked = list(world.items(system.world))
  assert {how: len(texts) for how, texts in said.items()} == {"free": 16, "grammar": 16}
  for item, text in zip(asked, said["grammar"], strict=True):
    if item.kind in ("expression", "phrase"):  # 6 tokens hold the box that the grammar begins with
      grounded = boxes.extract(text, system.grid)
      assert not grounded.num_malformed and evaluate.found_box(item, grounded)
  table = system.table(summary)
  assert "best constant box, held-out pairs" in table and "box to words, seen pairs" in table
  page = (workdir / "report/index.html").read_text()
  assert "Captions of the arm grounded" in page  # which comes second here
  for name in ("gallery", "expressions"):
    assert (workdir / "report" / f"{name}.png").is_file()


def test_twins_differ_in_boxes_alone(system, prepared, words):
  for kind in world.KINDS:
    located, told = (_records(system, f"{of}_{kind}") for of in ("located", "told"))
    assert [r.parts for r in located] == [r.parts for r in told]  # texts and pictures
    assert all(isinstance(r.parts[1], GroundedText) and r.parts[1].spans for r in located)
    assert not any(isinstance(part, GroundedText) for r in told for part in r.parts)
    first = words.grounding - len(boxes.TAGS) + 1
    for with_boxes, without in zip(
      _encoded(system, prepared, words, f"located_{kind}"),
      _encoded(system, prepared, words, f"told_{kind}"), strict=True):
      assert (with_boxes.tokens >= first).any() and not (without.tokens >= first).any()
      np.testing.assert_array_equal(with_boxes.tokens[with_boxes.tokens < first], without.tokens)


def test_arms_read_their_own_sources(system, prepared, words):
  for located in (True, False):
    batch = prepared.groups(
      system.training.shapes, world.weights(located), 48, 4, 0).batch(0)
    assert (part_of(batch, "pairs")["tokens"] >= words.tags.first_location).any() == located


def test_boxes_of_rows_are_those_of_the_scene(system, prepared, words):
  row = _encoded(system, prepared, words, "located_expressions")[0]
  scene = system.world.scenes.scene(system.world.train_seed, 0)
  cells = row.tokens[row.tokens >= words.tags.first_location] - words.tags.first_location
  found, = boxes.decode(cells.reshape(-1, 2), system.grid)
  assert max(_overlap(found, one.box) for one in scene.pictographs) > 0.5


def test_prompts_begin_as_rows_do(system, prepared, words):
  asking = evaluate.Words(prepared, system.grid)
  vectors = np.zeros((1, prepared.ids.num_slots, 96), np.float32)
  record = _records(system, "located_expressions")[0]
  text = str(record.parts[1])
  scene = system.world.scenes.scene(system.world.train_seed, 0)
  item = world.Item("expression", "seen", scene, GroundedText(text, [Located(0, len(text), ())]))
  prompt, = asking.prompts([item], vectors)
  row = _encoded(system, prepared, words, "located_expressions")[0].tokens
  assert row.tolist()[: len(prompt.ids)] == list(prompt.ids)
  assert row[len(prompt.ids)] == words.tags.object

  record = _records(system, "located_answers")[0]
  answer = world.Item("answer", "seen", scene, record.parts[1])
  prompt, = asking.prompts([answer], vectors)
  row = _encoded(system, prepared, words, "located_answers")[0]
  assert row.tokens.tolist()[: len(prompt.ids)] == list(prompt.ids)
  assert row.learned[len(prompt.ids) :].all() and not row.learned[: len(prompt.ids)].any()


def _overlap(one, other, side=960):
  """By counting points."""
  x, y = np.meshgrid(*[(np.arange(side) + 0.5) / side] * 2)
  a, b = ((x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3]) for box in (one, other))
  return (a & b).sum() / (a | b).sum()


def _true_text(item, grid):
  """What a perfect model says."""
  if item.kind == "caption":
    one = captions(item.scene)[0]
    entries = [p.box for p in one.phrases]
    return boxes.insert(item.prompt + " " + _tagged(one.text, one.phrases), entries, grid)
  if item.kind == "answer":
    return boxes.insert("<phrase>It</phrase> is", [item.box], grid) + f" {item.words}"
  span = item.prompt.spans[-1]
  name = item.prompt[span.start : span.end]
  return item.prompt[: span.start] + boxes.insert(f"<phrase>{name}</phrase>", [item.box], grid)


def _tagged(text, phrases):
  for phrase in reversed(phrases):
    name = text[phrase.start : phrase.end]
    text = f"{text[: phrase.start]}<phrase>{name}</phrase>{text[phrase.end :]}"
  return text


def test_the_truth_is_right_and_anything_else_is_not(system):
  asked, grid = list(world.items(system.world)), 32
  perfect = [_true_text(item, grid) for item in asked]
  for name, of in evaluate.figures(asked, perfect, grid).items():
    assert of["right"] == of["num"] > 0, name
    if name.startswith("caption"):
      assert of["located"] == of["shapes"] and of["malformed"] == 0 < of["groups"]
  elsewhere = [text.replace("the ", "no ").replace("a ", "no ") for text in perfect]
  assert not any(
    of["right"] for name, of in evaluate.figures(asked, elsewhere, grid).items()
    if not name.startswith("phrase"))
  broken = [text.replace("<object>", "<object><object>") for text in perfect]
  for name, of in evaluate.figures(asked, broken, grid).items():
    if name.startswith("caption"):
      assert of["located"] == 0 < of["malformed"] <= of["groups"]


def test_a_box_counts_from_half_an_overlap_on(system):
  item = next(item for item in world.items(system.world) if item.kind == "expression")
  item = item._replace(box=(0.25, 0.25, 0.75, 0.75))
  for cells, right in (((264, 759), 1), ((264, 567), 1), ((264, 535), 0)):  # 0.88, 0.53, 0.47
    text = f"<phrase>{item.prompt}</phrase>{boxes.words([cells])}"
    found = evaluate.figures([item], [text], 32)[f"expression/{item.group}"]
    want = _overlap(boxes.decode([cells])[0], item.box)
    assert found["right"] == right == (want >= 0.5)
    assert found["overlap"] == pytest.approx(want, abs=5e-3)


def test_baselines_by_brute_force(system):
  found = evaluate.baselines(system.world, system.grid)
  for group in ("seen", "held_out"):
    truth = [item.box for item in world.items(system.world)
             if item.kind == "expression" and item.group == group]
    middle = np.mean([_overlap((0.25, 0.25, 0.75, 0.75), box) >= 0.5 for box in truth])
    assert found["centre"][group] == pytest.approx(middle)
    assert 0.5 <= found["ceiling"][group] <= 1


def test_settings_that_make_no_run_are_refused():
  for binding, message in (
    ("ARMS = ('plain',)", "must hold 'grounded'"),
    ("data.Scenes.side = 64", "side=64 and models.VisionConfig.image_size"),
    ("pairs/kosmos.RowShape.length = 300", "length=300"),
  ):
    with pytest.raises(ValueError, match=message):
      _loaded(binding).build()
