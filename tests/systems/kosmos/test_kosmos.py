"""Kosmos-1 as a run: its stages, what they leave, what arms are given, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from lmops_jax import cli
from lmops_jax.config import resolve
from lmops_jax.data.image_tokens import encode_records
from lmops_jax.data.synthetic_pictures import RenderedTexts, Scenes
from lmops_jax.data.synthetic_pictures.pictographs import COLORS, SHAPES
from lmops_jax.data.synthetic_pictures.rendered_text import WORDS
from lmops_jax.mesh import meshes
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.systems.kosmos import evaluate, prepare, tower, training
from lmops_jax.systems.kosmos.items import Item, items
from lmops_jax.systems.kosmos.world import records, weights
from lmops_jax.training import loop
from lmops_jax.training.sources import Batches, part_of

FILE = "kosmos/smoke.gin"
BINDINGS = ["ARMS = ('full', 'text')"]


def _loaded(*bindings):
  return resolve.load([FILE], [*BINDINGS, *bindings])


@pytest.fixture(scope="module")
def workdir(run_stages, tmp_path_factory):
  path = tmp_path_factory.mktemp("kosmos")
  assert set(run_stages(FILE, path, *BINDINGS).statuses.values()) == {"ran"}
  return path


@pytest.fixture(scope="module")
def system():
  return _loaded().build()


def test_a_run_ends_in_a_report(workdir, system):
  summary = json.loads((workdir / "report" / "summary.json").read_text())
  for arm in ("full", "text"):
    said = json.loads((workdir / f"evaluate/{arm}/seed0/results.json").read_text())["said"]
    asked = list(items(system.world))
    assert len(said) == len(asked)
    assert all((found is None) == (bool(item.candidates) and arm == "text")
               for item, found in zip(asked, said))
    for kind in ("color", "shape", "count"):
      rows = [i for i, item in enumerate(asked) if item.kind == kind and item.group == "seen"]
      right = np.mean([said[i] == asked[i].label for i in rows])
      assert summary["figures"][arm][f"{kind}/seen"]["mean"] == pytest.approx(right)
  assert set(summary["losses"]["full"]) == {"text", "pairs", "interleaved"}
  assert set(summary["losses"]["text"]) == {"text"}
  assert "colour, held-out pairs" in system.table(summary)
  for name in ("gallery", "answers", "shots", "losses", "matrices"):
    assert (workdir / "report" / f"{name}.png").is_file()


def test_only_what_reads_a_changed_setting_runs_again(run_stages, workdir):
  found = run_stages(FILE, workdir, *BINDINGS, "kosmos.Evaluate.max_new_tokens = 5")
  assert {name for name, status in found.statuses.items() if status == "ran"} == {
    "evaluate/full/seed0", "evaluate/text/seed0", "report"}


def test_training_leaves_the_tower_as_it_was_taught(workdir, system):
  taught = load_params(workdir / "vision/params" / str(system.tower.num_steps))["vision"]
  trained = load_params(workdir / "train/full/seed0/params" / str(system.training.num_steps))
  jax.tree.map(np.testing.assert_array_equal, trained["vision"], taught)
  other = load_params(workdir / "train/text/seed0/params" / str(system.training.num_steps))
  assert not np.array_equal(trained["text"]["embedding"], other["text"]["embedding"])
  assert not np.array_equal(trained["connector"]["latents"], other["connector"]["latents"])


def test_choices_are_those_of_full_passes(workdir, system):
  """What `evaluate` chose, from the docked model's own logits without cache or shared prefix."""
  prepared = prepare.Prepared(workdir / "scenes")
  model = training.docked_model(system.model, prepared.ids.vocab_size)
  params = load_params(workdir / "train/full/seed0/params" / str(system.training.num_steps))
  results = json.loads((workdir / "evaluate/full/seed0/results.json").read_text())
  said, rationales = results["said"], results["rationales"]
  asked, pictures = prepared.items()
  vectors = evaluate.image_vectors(model, params, pictures)
  length = 128

  @jax.jit
  def log_probs(tokens, index, images):
    vectors = model.apply({"params": params}, images, method="row_vectors")
    logits = model.apply(
      {"params": params}, tokens, vectors=vectors, vector_index=index, method="logits")
    return jax.nn.log_softmax(logits)

  def total(item, option):
    prompt, = evaluate.prompts_of([item], vectors, prepared)
    ids = [*prompt.ids, *option]
    tokens, index = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
    tokens[0, : len(ids)], index[0, : len(prompt.ids)] = ids, prompt.index
    shown = np.zeros((1, 4, *pictures.shape[1:]), np.uint8)
    shown[0, : len(item.pictures)] = pictures[np.asarray(item.pictures)]
    found = np.asarray(log_probs(tokens, index, shown)[0])
    start = len(prompt.ids) - 1
    return sum(found[start + i, token] for i, token in enumerate(option))

  kinds = {item.kind: i for i, item in enumerate(asked) if item.group != "typical"}
  for kind in ("color", "count", "sentiment, thought"):
    i = kinds[kind]
    item = evaluate.behind(asked[i], rationales.get(str(i), ""))
    options = prepared.vocabulary.encode_batch(item.options)
    assert said[i] == int(np.argmax([total(item, of) for of in options]))
  i = kinds["matrix 3"]
  yes, = prepared.vocabulary.encode_batch([" Yes"])
  np.testing.assert_allclose(said[i], [
    np.exp(total(asked[i]._replace(pictures=(*asked[i].pictures, one)), yes))
    for one in asked[i].candidates], rtol=1e-4)


def test_a_trained_arm_is_a_model_that_generates(workdir, system, tmp_path, capsys):
  """`lmops generate` says of a picture what `evaluate` noted."""
  said = json.loads((workdir / "evaluate/full/seed0/results.json").read_text())["said"]
  i, item = next((i, item) for i, item in enumerate(items(system.world)) if not item.options)
  Image.fromarray(item.pictures[0]).save(tmp_path / "scene.png")
  code = cli.main([
    "generate", "--model", str(workdir / "train/full/seed0"), "--image",
    str(tmp_path / "scene.png"), "--prompt", item.prompt.removeprefix("<image>").strip(),
    "--max-new-tokens", "5", "--json"])
  assert code == 0
  found = json.loads(capsys.readouterr().out)["text"].strip()
  assert found and said[i].startswith(found)  # which may have more tokens


def test_prompts_begin_as_the_records_do(system, workdir):
  """An item is asked in the tokens that a record of the same scene is learned from."""
  prepared = prepare.Prepared(workdir / "scenes")
  record = next(iter(records(system.world, "pairs", "questions")))
  row, = encode_records([record], prepared.vocabulary, prepared.ids)
  prompt_text = "<image> " + record.parts[1]
  item = Item("color", "seen", prompt_text, (0,), (record.parts[-1],), 0)
  vectors = np.zeros((1, prepared.ids.num_slots, 96), np.float32)
  prompt, = evaluate.prompts_of([item], vectors, prepared)
  option, = prepared.vocabulary.encode_batch(item.options)
  assert [*prompt.ids, *option, prepared.ids.eos_id] == row.tokens.tolist()
  np.testing.assert_array_equal(prompt.index, row.vectors[: len(prompt.ids)])
  without, = evaluate.prompts_of([item], None, prepared)
  assert prepared.vocabulary.decode(without.ids) == record.parts[1]


def test_every_source_is_a_function_of_its_index(system):
  world = dataclasses.replace(system.world, num_validation=6)
  for part, source in ((part, source) for part, of in weights(world).items() for source in of):
    twice = [list(records(world, part, source, validation=True)) for _ in range(2)]
    assert twice[0] == twice[1] and len(twice[0]) == 6
    trained = next(iter(records(world, part, source)))
    assert trained.parts != twice[0][0].parts
    assert bool(trained.pictures) == (part != "text")


def test_held_out_items_show_held_out_pairs_and_records_none(system):
  pairs = [f"{color} {shape}" for shape, color in system.world.scenes.held_out_pairs]
  asked = [item for item in items(system.world) if item.kind == "caption"]
  assert any(item.group == "held_out" for item in asked)
  for item in asked:
    held = any(pair in item.references[0] for pair in pairs)
    assert held == (item.group == "held_out")
  for record in records(system.world, "pairs", "captions"):
    assert not any(pair in record.parts[-1] for pair in pairs)


def test_arms_change_the_pictures_that_are_used(workdir, system):
  prepared = prepare.Prepared(workdir / "scenes")
  num_slots = prepared.ids.num_slots
  source = prepared.groups(system.training.shapes, weights(system.world), 48, 2, seed=0)
  batch = source.batch(1)
  for name, arm in training.ARMS.items():
    found = training.changed(batch, arm, num_slots)
    for part in ("pairs", "interleaved"):
      was, now = (part_of(of, part)["images"] for of in (batch, found))
      used = part_of(batch, part)["images"].reshape(*was.shape[:3], -1).any(axis=-1)
      if name in ("full", "text"):
        np.testing.assert_array_equal(now, was)
      elif name == "blind":
        assert not now.any()
      else:
        np.testing.assert_array_equal(now[used], np.roll(was[used], 1, axis=0))
        assert not now[~used].any()
        assert (now[used] != was[used]).reshape(used.sum(), -1).any(axis=1).all()
    assert all(np.array_equal(found[key], batch[key]) for key in batch if "images" not in key)


def test_the_loss_is_that_of_single_rows(workdir, system):
  prepared = prepare.Prepared(workdir / "scenes")
  model = training.docked_model(system.model, prepared.ids.vocab_size)
  params = load_params(workdir / "train/full/seed0/params" / str(system.training.num_steps))
  parts = ("text", "pairs", "interleaved")
  batch = prepared.groups(system.training.shapes, weights(system.world), 48, 2, seed=0).batch(0)
  got = jax.jit(training.group_losses(model, parts))(
    params, {name: x for name, x in batch.items() if name != "example_id"})
  nats, learned = np.zeros(2), np.zeros(2)

  @jax.jit
  def logits_of(one):
    extra = {}
    if "images" in one:
      extra = {"vector_index": one["vector_index"], "vectors": model.apply(
        {"params": params}, one["images"], method="row_vectors")}
    return jax.nn.log_softmax(model.apply(
      {"params": params}, one["tokens"], one["positions"], one["segment_ids"], method="logits",
      **extra))

  for part in parts:
    rows = part_of(batch, part)
    for group, row in np.ndindex(*rows["tokens"].shape[:2]):
      one = {name: x[group, row][None] for name, x in rows.items()}
      of_tokens = -np.take_along_axis(
        np.asarray(logits_of(one)), one["targets"][..., None], axis=-1)[..., 0]
      nats[group] += (of_tokens * one["loss_mask"]).sum()
      learned[group] += one["loss_mask"].sum()
  np.testing.assert_allclose(got, nats / learned * batch["weight"], rtol=1e-4)
  assert np.mean(got) == pytest.approx(nats.sum() / learned.sum(), rel=1e-4)


@pytest.mark.slow
def test_a_cut_run_goes_on_with_the_same_bits(workdir, system, tmp_path):
  """With dropout, whose keys are those of the step and the example."""
  prepared = prepare.Prepared(workdir / "scenes")
  text = dataclasses.replace(system.model.text, residual_dropout=0.2, embedding_dropout=0.1)
  model = training.docked_model(
    dataclasses.replace(system.model, text=text), prepared.ids.vocab_size)
  learner = training.learner(
    model, system.training, training.ARMS["full"], meshes.single_device())
  source = prepared.groups(system.training.shapes, weights(system.world), 48, 2, seed=0)

  def run(folder, cut_at=None):
    def batch(step):
      if step == cut_at:
        raise InterruptedError
      return source.batch(step)

    return loop.train(
      learner, Batches(batch), 3, 0, tmp_path / folder,
      records=loop.Records(tensorboard=False, checkpoint_every=1)).state.params

  want = run("whole")
  with pytest.raises(InterruptedError):
    run("cut", cut_at=2)
  jax.tree.map(np.testing.assert_array_equal, run("cut"), want)


def test_labels_of_patches_are_what_stands_over_their_middles():
  scenes = Scenes()
  for index in range(20):
    scene = scenes.scene(0, index)
    labels = tower.patch_labels(scene, 6)
    for patch in range(36):
      y, x = (patch // 6 + 0.5) / 6, (patch % 6 + 0.5) / 6
      over = [one for one in scene.pictographs
              if one.box[0] <= x < one.box[2] and one.box[1] <= y < one.box[3]]
      if over:
        assert labels["shapes"][patch] == SHAPES.index(over[0].shape)
        assert labels["colors"][patch] == COLORS.index(over[0].color)
        np.testing.assert_allclose(labels["boxes"][patch], over[0].box, rtol=1e-6)
      else:
        assert labels["shapes"][patch] == len(SHAPES)
  seen = tower.Seen(*(np.eye(n)[labels[name]][None] for n, name in ((9, "shapes"), (8, "colors"))),
                    labels["boxes"][None], np.zeros((1, 36, 48)))
  told = tower.figures(
    seen, {name: x[None] for name, x in labels.items()} | {
      "words": np.array([-1]), "ink": np.zeros((1, 36), bool)})
  assert set(told.values()) == {1.0}


def test_words_and_scenes_have_their_own_losses():
  """Each row's loss is that of its kind: other heads' outputs change nothing."""
  rendered = RenderedTexts()
  batch = tower.batch_of([Scenes().scene(0, 0)], [rendered.item(0, 1)], 6)
  assert batch["words"][0] < 0 and WORDS[batch["words"][1]] in rendered.item(0, 1).text.split()
  draws = np.random.default_rng(0)
  shapes, colors, boxes = (draws.normal(size=(2, 36, n)).astype(np.float32) for n in (9, 8, 4))
  words = draws.normal(size=(2, 36, len(WORDS))).astype(np.float32)

  class Model:
    def apply(self, variables, images):
      return tower.Seen(*variables["params"])

  got = tower.TowerLosses(Model())((shapes, colors, boxes, words), batch)
  ink = [p for p in range(36) if rendered.item(0, 1).picture[
    p // 6 * 8 : p // 6 * 8 + 8, p % 6 * 8 : p % 6 * 8 + 8].min() < 128]
  by_hand = [-jax.nn.log_softmax(words[1, p])[batch["words"][1]] for p in ink]
  assert 0 < len(ink) < 36 and got[1] == pytest.approx(np.mean(by_hand), rel=1e-5)
  again = tower.TowerLosses(Model())((shapes, colors, boxes, words + draws.normal()), batch)
  assert again[0] == got[0]


def test_recolored_scenes_teach_shapes_and_boxes_but_no_colors():
  scenes = [Scenes().scene(0, i) for i in range(7)]
  plain, batch = (tower.batch_of(scenes, [], 6, num_recolored=num) for num in (0, 6))
  kept = [i for i in range(7) if (batch["images"][i] == plain["images"][i]).all()]
  assert kept == [6] == np.flatnonzero(batch["colored"]).tolist()
  np.testing.assert_array_equal(np.sort(batch["images"]), np.sort(plain["images"]))

  draws = np.random.default_rng(0)
  outputs = [draws.normal(size=(7, 36, n)).astype(np.float32) for n in (9, 8, 4, len(WORDS))]

  class Model:
    def apply(self, variables, images):
      return tower.Seen(*variables["params"])

  def changed(which):
    others = [x + draws.normal(size=x.shape).astype(np.float32) * (i == which)
              for i, x in enumerate(outputs)]
    return losses(others, batch) != losses(outputs, batch)

  losses = tower.TowerLosses(Model())
  assert changed(0).all() and changed(2).all()
  assert changed(1).tolist() == [False] * 6 + [True]


def test_figures_count_what_is_right():
  asked = [
    Item("caption", "seen", "", (), (), -1, ("a red star", "a star")),
    Item("caption", "seen", "", (), (), -1, ("a blue moon",)),
    *(Item("color", group, "", (), (" red", " blue"), 1) for group in ("seen", "seen", "held_out")),
  ]
  found = evaluate.figures(asked, ["a star", "a red moon", 1, 0, 1], {})
  assert found["caption/seen"]["right"] == 1 and found["caption/seen"]["num"] == 2
  assert found["color/seen"] == {"right": 1, "num": 2}
  assert found["color/held_out"] == {"right": 1, "num": 1}


@pytest.mark.parametrize("binding, message", [
  ("data.Scenes.side = 56", "scenes draws pictures of side=56 .*image_size is 48"),
  ("ARMS = ('blind',)", "must hold 'full'"),
  ("pairs/kosmos.RowShape.length = 999", "length=999 and .*max_length is 256"),
  ("data.Scenes.typical_share = 0.5", "typical_share=0.5 would let colours be guessed"),
  ("data.Matrices.side = 56", "matrices draws pictures of side=56"),
  ("kosmos.Training.accumulate = 3", "num_groups=2 is not a multiple of accumulate=3"),
])
def test_settings_that_do_not_fit_are_refused(binding, message):
  with pytest.raises(ValueError, match=message):
    _loaded(binding).build()


def test_an_example_that_does_not_fit_its_row_ends_the_stage(run_stages, tmp_path):
  with pytest.raises(Exception, match="pictures, and a row takes"):
    run_stages(FILE, tmp_path, *BINDINGS, "interleaved/kosmos.RowShape.length = 60",
               "kosmos.World.num_train = 4")
