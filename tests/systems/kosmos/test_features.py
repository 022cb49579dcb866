"""Features of a frozen tower: the same training as from pixels, and when they are made."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.data.image_rows import ImageRows
from lmops_jax.data.images import ImageSettings
from lmops_jax.mesh import meshes
from lmops_jax.sizing.budget import Memory
from lmops_jax.systems.kosmos import features, prepare, tower, training
from lmops_jax.systems.kosmos.grounding import world
from lmops_jax.training import loop

FILE = "kosmos/grounding_smoke.gin"
BINDINGS = ["TOWER_STEPS = 2", "SCENES = 24", "DOCUMENTS = 4"]


@pytest.fixture(scope="module")
def encoded(run_stages, tmp_path_factory):
  """A run up to the features, and its system."""
  path = tmp_path_factory.mktemp("features")
  found = run_stages(FILE, path, *BINDINGS, only=["scenes", "vision", "features"])
  return path, found.system


def test_losses_and_gradients_are_those_of_pixels(encoded):
  path, system = encoded
  prepared, config = prepare.Prepared(path / "scenes"), system.training
  model = training.docked_model(system.model, prepared.ids.vocab_size)
  params = {**nn.unbox(jax.jit(loop.initializer(model))(jax.random.key(0))), "vision": tower.load(
    path / "vision", 2, system.model.vision, meshes.single_device())}
  losses = training.group_losses(model, training.ARMS["full"].parts)
  learned = {name: params[name] for name in ("text", "connector")}

  @jax.jit
  def found(learned, batch):
    return jax.value_and_grad(lambda p: losses({**params, **p}, batch).sum())(learned)

  for arm in ("full", "blind", "shuffled"):
    got = []
    for known in (features.Features(path / "features", "float32"), None):
      source = prepared.groups(
        config.shapes, world.weights(located=True), 48, config.num_groups, 0, known)
      batch = dict(training.WithPictures(
        source, training.ARMS[arm], model.config.vectors_per_image, known).batch(3))
      del batch["example_id"]
      assert ("pairs/images" in batch) == (known is None) == ("pairs/features" not in batch)
      got.append(found(learned, batch))
    (loss, grads), (want, want_grads) = got
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, want_grads)
    assert np.abs(want_grads["connector"]["dense"]["kernel"]).max() > 1e-4  # pictures are read


def test_each_different_picture_is_encoded_once(encoded):
  path, system = encoded
  pixels, total = set(), 0
  for folder in (found.parent for found in (path / "scenes").glob("*/*/*/rows.json")):
    rows = ImageRows(folder, ImageSettings(48, 48))
    for i in range(rows.num_pictures):
      picture = rows.picture(i)
      pixels.add(rows.settings.pixels(picture.read(), picture.where).tobytes())
      total += 1
  extra = json.loads((path / "features/manifest.json").read_text())["extra"]
  assert extra == {
    "pictures": total, "different": len(pixels), "bytes": (1 + len(pixels)) * 37 * 96 * 4}
  table = np.load(path / "features/features.npy")
  assert table.shape == (1 + len(pixels), 37, 96)
  np.testing.assert_allclose(np.linalg.norm(table, axis=-1), 1, rtol=1e-5)  # unit_features


def test_features_keep_the_dtype_of_the_decoder(tmp_path):
  want = np.arange(12, dtype=jnp.bfloat16).reshape(3, 2, 2)
  out = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", want.dtype, want.shape)
  out[:] = want
  out.flush()
  np.savez(tmp_path / "numbers.npz", **{"train/pairs/captions": np.array([2, 1])})
  found = features.Features(tmp_path, "bfloat16").of(np.array([[2, 0]]))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, want[[[2, 0]]])


def _system(*bindings):
  return resolve.load([FILE], [*BINDINGS, *bindings]).build()


def test_a_tower_that_is_trained_or_drops_sees_pixels():
  fixed = _system()
  assert fixed.encodes_once and "features" in [stage.name for stage in fixed.stages(None)]
  for bindings in (
    ["OPTIMIZER = @optim.adamw()"],
    ["optim.partition.rules = {'vision/(?!post_norm/).*': None, '.*': @optim.adamw()}"],
    ["vision/models.TransformerConfig.residual_dropout = 0.1"],
  ):
    system = _system(*bindings)
    assert not system.encodes_once
    stages = system.stages(None)
    assert "features" not in [name for stage in stages for name in (stage.name, *stage.inputs)]


def test_plans_take_the_batch_that_is_trained_on():
  given = meshes.single_device(), Memory()
  fixed = _system()
  other = dataclasses.replace(fixed, model=dataclasses.replace(
    fixed.model, vision=dataclasses.replace(fixed.model.vision, trunk=dataclasses.replace(
      fixed.model.vision.trunk, residual_dropout=0.1))))
  once, again = (system.phases(*given, platform="cpu")[0] for system in (fixed, other))
  assert once.flops < again.flops and once.parts["data"] > again.parts["data"]
  assert once.parts["activations"] < again.parts["activations"]
