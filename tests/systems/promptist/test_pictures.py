"""Who draws for a reward, and rewards of rollouts."""

import jax
import numpy as np
import pytest

from lmops_jax.decoding.diffusion.imagine import Imagined
from lmops_jax.systems.promptist.image_reward import OwnReward
from lmops_jax.systems.promptist.pictures import (
  DrawnImages,
  RolloutReward,
  StableDiffusion,
  keys,
)
from lmops_jax.training.reinforce.rewards import Rollout


def lengths(prompts, rewrites):
  """A reward."""
  return np.array([len(rewrite) - len(prompt) for prompt, rewrite in zip(prompts, rewrites)])


def _tokens(texts):
  return np.array([[len(text)] for text in texts], np.int32)


class _Draw:
  """Paints the length of a text; notes how many pictures it was asked for."""

  batch_size = 8

  def __init__(self, bad=()):
    self._bad, self.asked = bad, []

  def __call__(self, tokens, of_images, negative):
    assert negative == [0] and of_images.shape == (len(tokens),)
    self.asked.append(len(tokens))
    images = np.broadcast_to(tokens[:, :, None, None], (len(tokens), 2, 2, 3)).astype(np.uint8)
    return Imagined(images, ~np.isin(np.arange(len(tokens)), self._bad))


def test_pictures_stand_by_prompt_and_number():
  source = DrawnImages(_Draw(), _tokens, "models")
  found = source(["a", "bcd"], 2, [7, 7])
  assert found.shape == (2, 2, 2, 2, 3) and source.fingerprint() == "models"
  np.testing.assert_array_equal(found[:, :, 0, 0, 0], [[1, 1], [3, 3]])


def test_calls_are_filled_up_to_whole_batches():
  drawing = _Draw(bad=[7])
  source = DrawnImages(drawing, _tokens, "models", whole_batches=True)
  found = source(["a", "bcd", "ef"], 2, [1] * 3)
  np.testing.assert_array_equal(found[:, :, 0, 0, 0], [[1, 1], [3, 3], [2, 2]])
  assert drawing.asked == [8]


def test_a_picture_that_is_not_finite_ends_the_run_and_is_named():
  source = DrawnImages(_Draw(bad=[3]), _tokens, "models")
  with pytest.raises(FloatingPointError, match="picture 1 of 'bcd' with seed 8 is not finite"):
    source(["a", "bcd"], 2, [7, 8])


def test_noise_is_a_function_of_seed_and_number():
  data = np.asarray(jax.random.key_data(keys(np.array([5, 5, 6], np.uint32), 2)))
  np.testing.assert_array_equal(data[:2], data[2:4])
  assert len({tuple(key) for key in data.tolist()}) == 4


def test_rollouts_are_judged_by_what_becomes_of_their_text():
  reward = RolloutReward(OwnReward(lengths))
  rollouts = [Rollout("cat", " a cat ", (), False), Rollout("dog", " dog Rephrase: x", (), False),
              Rollout("emu", "", (), True)]
  np.testing.assert_array_equal(reward(rollouts), [2, 0, -3])


def test_models_are_known_by_their_files(tmp_path):
  (tmp_path / "unet").mkdir()
  weights = tmp_path / "unet" / "weights.bin"
  weights.write_bytes(b"one")
  before = StableDiffusion(str(tmp_path)).fingerprint()
  assert StableDiffusion(str(tmp_path), batch_size=2).fingerprint() == before
  assert StableDiffusion(str(tmp_path), guidance=5.0).fingerprint() != before
  weights.write_bytes(b"two")
  assert StableDiffusion(str(tmp_path)).fingerprint() != before
