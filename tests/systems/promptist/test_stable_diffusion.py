"""The published reward with all of its models, from folders as others write them, tiny."""

import numpy as np
import pytest

pytest.importorskip("diffusers")

from lmops_jax import pretrained
from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer
from lmops_jax.decoding.diffusion.samplers import DpmSolver
from lmops_jax.pretrained.aesthetic import AestheticFile
from lmops_jax.pretrained.pipelines import load_pipeline
from lmops_jax.systems.promptist.image_reward import ImageReward
from lmops_jax.systems.promptist.pictures import (
  RolloutReward,
  StableDiffusion,
  keys,
)
from lmops_jax.text.clip import clip_texts
from lmops_jax.training.reinforce.rewards import Rollout
from tests.pretrained import tiny_diffusion
from tests.systems.promptist import tiny_clip

pytestmark = pytest.mark.parity
SAMPLER = DpmSolver(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_diffusion.save(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="module")
def settings(folder):
  return StableDiffusion(
    str(folder), SAMPLER, guidance=3.0, size=32, batch_size=2, dtype="float32")


def test_pictures_are_those_of_the_folders_models(folder, settings):
  source = settings.build(None)
  prompts, seeds = ["the cat on", "on", "the cat on"], [5, 6, 7]
  found = source(prompts, 2, seeds)
  assert found.shape == (3, 2, 32, 32, 3) and found.dtype == np.uint8
  loaded = load_pipeline(str(folder), dtype="float32")
  draw = Imaginer(
    DiffusionModels.of(loaded.text, loaded.unet, loaded.autoencoder, loaded.schedule),
    loaded.params, SAMPLER, 3.0, 32)
  tokens = clip_texts(loaded.tokenizer, [*np.repeat(prompts, 2), ""]).tokens
  want = draw(tokens[:-1], keys(np.array(seeds, np.uint32), 2), tokens[-1]).images
  assert np.abs(found.reshape(want.shape).astype(int) - want).max() <= 1
  assert len({picture.tobytes() for picture in found.reshape(6, -1)}) == 6
  assert source.fingerprint() == settings.fingerprint()


@pytest.mark.slow
def test_a_reward_reads_all_models_when_first_asked(settings, tmp_path):
  clip = pretrained.load(tiny_clip.write(tmp_path / "clip"))
  head = AestheticFile(tiny_clip.write_aesthetic(tmp_path / "head.safetensors"), sha256="any")
  reward = ImageReward(settings, clip, head, num_images=2)
  rollout = RolloutReward(reward, str(tmp_path / "cache"))
  rollouts = [Rollout("the cat", " the cat, on", (), False), Rollout("the cat", " on", (), False),
              Rollout("on", f" on{' the cat' * 60}", (), False)]
  with pytest.warns(UserWarning, match="this end is cut off: '.* the cat'"):
    found = rollout(rollouts)
  assert found.shape == (3,) and np.isfinite(found).all() and len(set(found)) == 3
  scorer = reward.build(None, tmp_path / "cache")
  again = scorer(["on", "the cat"], [rollouts[2].response.strip(), "on"])
  np.testing.assert_allclose(again, found[[2, 1]], atol=1e-4)
  assert scorer.counts["cut_rewrites"] == 1 and scorer.counts["baselines_known"] == 2
