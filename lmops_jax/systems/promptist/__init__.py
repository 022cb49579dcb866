"""Promptist (arXiv 2212.09611): a language model that rewrites prompts for an image model."""

from lmops_jax.systems.promptist.image_reward import ImageReward, OwnReward
from lmops_jax.systems.promptist.pictures import RolloutReward, StableDiffusion
from lmops_jax.systems.promptist.sft import SupervisedTuning
from lmops_jax.systems.promptist.system import Promptist

__all__ = [
  "ImageReward", "OwnReward", "Promptist", "RolloutReward", "StableDiffusion", "SupervisedTuning"]
