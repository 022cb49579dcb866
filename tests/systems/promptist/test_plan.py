"""What stages take: operations against those of lowered programs, bytes against the arrays."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.mesh.meshes import MeshConfig, single_device
from lmops_jax.sizing import activations, diffusion, hlo
from lmops_jax.systems.promptist import generator, plan
from lmops_jax.training import loop
from tests.systems.promptist import tiny_gpt2

FILE = "promptist/smoke.gin"


@pytest.fixture(scope="module")
def system():
  return resolve.load([FILE]).build()


def _products(losses, learner, batch):
  """Operations of the products of a gradient, as XLA is given it."""
  params = nn.unbox(loop.abstract_state(learner)).params
  lowered = jax.jit(jax.grad(lambda params, batch: losses(params, batch).mean())).lower(
    params, batch)
  return hlo.count(lowered.as_text("hlo")).product_flops


def test_operations_of_the_towers_are_those_of_their_program(system):
  config = system.generator
  clip, size = config.clip(300, 0), 6
  batch = {"images": np.zeros((1, size, 16, 16, 3), np.uint8),
           "tokens": np.zeros((1, size, clip.config.text.max_length), np.int32)}
  want = _products(
    generator.ContrastiveLosses(clip), generator.towers_learner(config, clip), batch)
  # Masked scores are counted in the program, gradients of pixels are not computed.
  assert plan.towers_flops(clip.config, size) == pytest.approx(want, rel=0.05)


def test_operations_of_the_unet_are_those_of_its_program(system):
  config = system.generator
  text = config.towers.text
  losses = generator.unet_losses(config, np.zeros((text.max_length, text.width), np.float32))
  size, side = config.unet_fit.batch_size, config.unet.sample_size
  batch = {"clean": np.zeros((size, side, side, 3), np.float32),
           "condition": np.zeros((size, text.max_length, text.width), np.float32),
           "key": jax.random.split(jax.random.key(0), size)}
  want = _products(
    losses, generator.unet_learner(config, losses, text.max_length, single_device()), batch)
  # Zeros around pictures are left out by XLA, and gradients of pictures and texts.
  assert plan.unet_flops(config) == pytest.approx(want, rel=0.25)


def test_phases_tell_of_each_training(system):
  phases = system.phases(single_device(), None, platform="cpu")
  assert [phase.name for phase in phases] == ["towers", "unet", "sft", "rl"]
  towers, unet, sft, rl = phases
  assert towers.steps == 2 and rl.steps == 2
  assert towers.flops == 2 * plan.towers_flops(
    system.generator.clip(768, 0).config, system.generator.towers_fit.batch_size)
  params = jax.eval_shape(
    generator.unet_init(generator.UNet(system.generator.unet), 28), jax.random.key(0))
  assert unet.num_params == sum(x.size for x in jax.tree.leaves(params))
  assert unet.parts["params"] == 4 * unet.num_params and unet.parts["opt_state"] > 2 * (
    unet.parts["params"])
  assert rl.num_params > 2 * sft.num_params  # the value model and its head
  assert rl.parts["reference"] == sft.parts["params"]


def test_more_devices_share_pictures_and_a_batch_that_does_not_split_is_refused(system):
  one, four = (system.phases(MeshConfig(data=n).plan(n), None, platform="cpu") for n in (1, 4))
  ratio = four[1].parts["activations"] / one[1].parts["activations"]
  assert 1 / 4 < ratio < 1 / 3  # what is kept of parameters is not shared
  assert four[0].parts == one[0].parts, "towers contrast one group on one device"
  with pytest.raises(ValueError, match="8 pictures do not split over the mesh's 16 data shards"):
    system.phases(MeshConfig(data=16).plan(16), None, platform="cpu")


def test_the_published_fine_tuning_is_planned_without_reading_pairs(tmp_path):
  folder = tiny_gpt2.write(tmp_path / "gpt2")
  one, four = (resolve.load(["promptist/sft.gin"], [
    f"MODEL = '{folder}'", f"PAIRS = '{tmp_path / 'none.jsonl'}'", "LENGTH = 32", "BATCH_SIZE = 8",
    f"promptist.SFT.accumulate = {accumulate}"]).build().phases(
      single_device(), None, platform="cpu")[0] for accumulate in (1, 4))
  assert (one.name, one.steps, one.flops) == ("train", 15_000, four.flops)
  # 2 blocks of 4 * 16^2 + 2 * 16 * 64, an output matrix for 257 tokens, and half of the scores.
  a_token = 2 * (2 * (4 * 16**2 + 2 * 16 * 64) + 16 * 257) + 2 * 2 * 32 * 16
  assert one.flops == 15_000 * 3 * 8 * 32 * a_token
  assert one.parts["params"] == 4 * one.num_params == one.parts["accumulators"]
  assert four.parts["accumulators"] == 2 * one.parts["accumulators"]
  assert four.parts["activations"] < one.parts["activations"] / 2


def test_more_pictures_take_more_in_reinforcement_learning(system):
  model = dataclasses.replace(system.policy.model, vocab_size=300)
  twice = dataclasses.replace(system.judging, num_images=2)
  one, two = (plan.rl_flops(system.policy, model, system.generator, judging)
              for judging in (system.judging, twice))
  drawn, more = (plan.judged_flops(system.generator, judging) for judging in (
    system.judging, twice))
  assert two - one == pytest.approx(system.policy.batch_size * (more - drawn), rel=1e-6)
  unet, length = system.generator.unet, system.generator.towers.text.max_length
  steps = system.generator.sampler.num_steps
  assert more - drawn > 2 * steps * diffusion.unet_flops(unet, 16, 16, length)


def test_keeping_is_what_the_backward_pass_reads():
  """`sin(a @ b)` keeps both factors, and the cosine's angle or itself."""
  a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 4), (4, 5)))
  both = activations.kept_bytes(lambda a, b: jnp.sin(a @ b), (a, b))
  one = activations.kept_bytes(lambda a, b: jnp.sin(a @ b), (a,), b)
  assert both == 4 * (12 + 20 + 15) and one == 4 * (20 + 15)
