"""Who draws for a reward: Stable Diffusion from a folder, or a model that was made on the spot."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np

from lmops_jax.config.setting_types import ExistingPath, Positive, PositiveInt, Text, component
from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer
from lmops_jax.decoding.diffusion.plans import Sampler
from lmops_jax.decoding.diffusion.samplers import DpmSolver
from lmops_jax.host.hashing import digest
from lmops_jax.host.manifests import hash_file
from lmops_jax.host.words import shortened
from lmops_jax.mesh.meshes import MeshConfig, Partitioner
from lmops_jax.models.config import DTYPES
from lmops_jax.pretrained.pipelines import load_pipeline
from lmops_jax.systems.promptist.image_reward import TextReward
from lmops_jax.systems.promptist.rewriting import completion_text
from lmops_jax.text.clip import clip_texts
from lmops_jax.training.reinforce.rewards import Rollout

_SHOWN = 200  # characters of a prompt in a message


@runtime_checkable
class RewardSettings(Protocol):
  """A component that makes a `TextReward`."""

  def build(self, partitioner: Partitioner | None, cache: Path | str | None) -> TextReward:
    """Reads what it needs; see `ImageReward.build`."""


class DrawnImages:
  """An `image_reward.ImageSource` over an `Imaginer`.

  Args:
    draw: draws.
    tokens: texts to rows `[P,S] int32`.
    made_of: what pictures depend on besides prompt and seed.
    negative: the text that pictures lean away from.
    whole_batches: fill calls up to whole batches of the imaginer. One program then serves all
      numbers of prompts, which pays if drawing is cheaper than compiling.
  """

  def __init__(
    self, draw: Imaginer, tokens: Callable[[Sequence[str]], np.ndarray], made_of: str,
    negative: str = "", whole_batches: bool = False,
  ):
    self._whole_batches = whole_batches
    self._draw, self._tokens, self._made_of = draw, tokens, made_of
    self._negative = tokens([negative])[0]

  def __call__(
    self, prompts: Sequence[str], num_images: int, seeds: Sequence[int]
  ) -> np.ndarray:
    """See `ImageSource`.

    Raises:
      FloatingPointError: for a picture that is not finite; it names the prompt and the seed.
    """
    num = len(prompts) * num_images
    rows = np.repeat(self._tokens(prompts), num_images, axis=0)
    of_images = keys(np.asarray(seeds, np.uint32), num_images)
    if self._whole_batches:
      places = np.minimum(np.arange(-num % self._draw.batch_size + num), num - 1)
      rows, of_images = rows[places], of_images[places]
    found = self._draw(rows, of_images, self._negative)
    if not found.finite[:num].all():
      number = int(np.argmin(found.finite[:num]))
      i, j = divmod(number, num_images)
      raise FloatingPointError(
        f"picture {j} of {shortened(prompts[i], _SHOWN)!r} with seed {seeds[i]} is not finite; "
        "give the image model a wider dtype."
      )
    return found.images[:num].reshape(len(prompts), num_images, *found.images.shape[1:])

  def fingerprint(self) -> str:
    """See `ImageSource`."""
    return self._made_of


def keys(seeds: np.ndarray, num_images: int) -> jax.Array:
  """Keys of pictures, `[P * n]`, each a function of its prompt's seed and its number."""
  of_number = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(lambda seed: of_number(jax.random.key(seed), np.arange(num_images)))(
    seeds).reshape(-1)


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class RolloutReward:
  """A reward of prompts for `reinforce.Reinforce`; models are read when it is first asked.

  Attributes:
    reward: `@promptist.ImageReward()` or `@promptist.OwnReward()`. Each process draws the
      pictures of its own rollouts on all of its devices.
    cache: a folder for the numbers of users' prompts, which runs may share; None keeps none.
  """

  reward: RewardSettings
  cache: Text | None = None

  def __call__(self, rollouts: list[Rollout]) -> np.ndarray:
    """See `training.reinforce.rewards.Reward`; a prompt all of whose pictures failed is NaN."""
    return self._built(
      [rollout.prompt for rollout in rollouts],
      [completion_text(rollout.response) for rollout in rollouts])

  @functools.cached_property
  def _built(self) -> TextReward:
    return self.reward.build(MeshConfig().build(), self.cache)


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class StableDiffusion:
  """Stable Diffusion 1 or 2, an `image_reward.SourceSettings`. There is no safety checker.

  Attributes:
    path: a folder as diffusers writes it.
    sampler: of `decoding.diffusion.samplers`.
    guidance: how much pictures lean towards their prompt; 1 is not at all.
    negative: what they lean away from.
    size: their side in pixels.
    batch_size: most pictures at a time on each device.
    dtype: of activations and products.
  """

  path: ExistingPath
  sampler: Sampler = DpmSolver(20)
  guidance: Positive = 7.5
  negative: Text | Literal[""] = ""
  size: PositiveInt = 512
  batch_size: PositiveInt = 8
  dtype: Literal[DTYPES] = "bfloat16"

  def fingerprint(self) -> str:
    """A hash of all files of the models, and of the settings."""
    folder = Path(self.path).expanduser()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = dataclasses.replace(self, path="", batch_size=1)
    return digest([
      repr(own), *(f"{path.relative_to(folder)} {hash_file(path)}" for path in files)])

  def build(self, partitioner: Partitioner | None) -> DrawnImages:
    """Reads the models onto a mesh; see `SourceSettings`."""
    loaded = load_pipeline(self.path, dtype=self.dtype)

    def tokens(texts):
      return clip_texts(loaded.tokenizer, list(texts), loaded.text.max_length).tokens

    models = DiffusionModels.of(loaded.text, loaded.unet, loaded.autoencoder, loaded.schedule)
    imaginer = Imaginer(
      models, loaded.params, self.sampler, self.guidance, self.size, partitioner,
      batch_size=self.batch_size)
    return DrawnImages(imaginer, tokens, self.fingerprint(), self.negative)
