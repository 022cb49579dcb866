"""The reward of a rewritten prompt, from pictures that an image model draws for both prompts.

Who draws is behind a protocol, so that nothing here depends on a diffusion model. What a prompt's
pictures are is a function of the prompt, the seed and the picture's number: a run that resumes, or
runs on another mesh, meets the same rewards.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from lmops_jax.config.setting_types import (
  NonNegative,
  PositiveInt,
  Probability,
  Seed,
  component,
)
from lmops_jax.host.hashing import digest
from lmops_jax.host.words import shortened
from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.pretrained.aesthetic import AestheticFile
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.systems.promptist.baselines import Baseline, Baselines
from lmops_jax.systems.promptist.rating import Rater
from lmops_jax.systems.promptist.rewards import Terms, Weights, finite, scores, terms

_SEED_BYTES = 4
_SHOWN = 200  # characters of a prompt in a message


class ImageSource(Protocol):
  """Draws pictures for prompts."""

  def __call__(
    self, prompts: Sequence[str], num_images: int, seeds: Sequence[int]
  ) -> np.ndarray:
    """Pictures; each process of a job asks for those of its own prompts.

    Args:
      prompts: P texts, of which some may be empty.
      num_images: n, pictures of each.
      seeds: P numbers of 32 bits. The noise of picture j of a prompt is a function of its seed and
        of j alone: two prompts with one seed start from the same noise.

    Returns:
      `[P,n,height,width,3] uint8`.
    """

  def fingerprint(self) -> str:
    """A text that differs if pictures would: models, sampler, steps, guidance, size."""


@runtime_checkable
class SourceSettings(Protocol):
  """A component that makes an `ImageSource`."""

  def build(self, partitioner: Partitioner | None) -> ImageSource:
    """Reads the models' weights onto a mesh."""

  def fingerprint(self) -> str:
    """The one of what it builds, told without building it."""


class TextReward(Protocol):
  """A reward by texts alone, as a system calls it."""

  def __call__(self, prompts: Sequence[str], rewrites: Sequence[str]) -> np.ndarray:
    """Rewards of rewritten prompts, `[P] float64`; NaN for a row that none can be given."""


class Scoring(Protocol):
  """What an `ImageScorer` reads of its settings; `ImageReward` tells what they mean."""

  num_images: int
  common_seeds: bool
  seed: int
  max_bad_share: float

  @property
  def weights(self) -> Weights:
    """Of the two terms."""


class Measured(NamedTuple):
  """What P rewritten prompts score.

  Attributes:
    score: `[P] float64`, NaN if all pictures of a prompt failed.
    rewritten: `Terms` of the pictures of the rewritten prompts.
    raw: `Terms` of the pictures of the users' prompts.
  """

  score: np.ndarray
  rewritten: Terms
  raw: Terms


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class ImageReward:
  """Relevance and aesthetic gain of pictures (`rewards`).

  Attributes:
    source: who draws.
    clip: rates relevance, and gives the vectors that the aesthetic predictor reads.
    aesthetic: its file.
    num_images: pictures of a prompt, 3 in the paper and 2 in its code.
    relevance_weight, aesthetic_weight: of the two terms.
    common_seeds: draw both prompts of a pair from the same noise, which makes their difference less
      noisy; the paper does not.
    seed: of the pictures.
    max_bad_share: if more of a call's pictures are not finite, the run ends.
    num_rows: prompts that are drawn and rated together.
  """

  source: SourceSettings
  clip: PretrainedModel
  aesthetic: AestheticFile
  num_images: PositiveInt = 3
  relevance_weight: NonNegative = 1.0
  aesthetic_weight: NonNegative = 1.0
  common_seeds: bool = False
  seed: Seed = 0
  max_bad_share: Probability = 0.01
  num_rows: PositiveInt = 8

  def fingerprint(self) -> str:
    """A hash of all that decides a reward."""
    return digest([json.dumps(self.baseline_settings(), sort_keys=True), repr(self.weights),
                   f"{self.common_seeds} {self.seed}"])

  @property
  def weights(self) -> Weights:
    """Of the two terms."""
    return Weights(self.relevance_weight, self.aesthetic_weight)

  def baseline_settings(self) -> dict[str, str]:
    """What numbers of users' prompts depend on besides prompt and seed."""
    return {
      "source": self.source.fingerprint(), "clip": self.clip.fingerprint(),
      "aesthetic": self.aesthetic.fingerprint(), "num_images": str(self.num_images),
    }

  def build(
    self, partitioner: Partitioner | None = None, cache: Path | str | None = None
  ) -> ImageScorer:
    """The reward with its models on a mesh.

    Args:
      partitioner: of its mesh each process uses its own devices, for prompts of its own; None is
        the default device.
      cache: a folder for the numbers of users' prompts; runs of other settings may share it.

    Raises:
      ValueError: a model of another kind, files that do not fit together, or a damaged cache.
    """
    if self.clip.family != "clip":
      raise ValueError(
        f"promptist.ImageReward.clip is a {self.clip.family} model, and pictures are rated by one "
        "of the family clip; load CLIP ViT-L/14."
      )
    partitioner = None if partitioner is None else partitioner.local()
    rater = Rater(
      self.clip.model, self.clip.params(partitioner), self.aesthetic.folded(),
      self.clip.tokenizer(), partitioner, num_rows=self.num_rows)
    known = Baselines(self.baseline_settings(), cache, jax.process_index())
    return ImageScorer(self, self.source.build(partitioner), rater, known)


class ImageScorer:
  """Scores rewritten prompts by pictures; made by `ImageReward.build`.

  Attributes:
    counts: so far: "images", "bad_images" (not finite), "dropped_rows" (all pictures of a prompt),
      "baselines_drawn" and "baselines_known", "prompts", and the prompts and rewrites that CLIP cut
      ("cut_prompts", "cut_rewrites").
  """

  def __init__(
    self, settings: Scoring, source: ImageSource, rater: Rater, baselines: Baselines
  ):
    self.counts: Counter[str] = Counter()
    self._settings, self._source, self._rater = settings, source, rater
    self._baselines = baselines

  def __call__(self, prompts: Sequence[str], rewrites: Sequence[str]) -> np.ndarray:
    """See `TextReward` and `measure`."""
    return self.measure(prompts, rewrites).score

  def measure(self, prompts: Sequence[str], rewrites: Sequence[str]) -> Measured:
    """Scores rewritten prompts, term by term.

    Args:
      prompts: what users wrote, P texts.
      rewrites: what they became; an empty text is drawn as such.

    Raises:
      ValueError: different numbers of both, or pictures of another shape than asked for.
      FloatingPointError: if too many pictures are not finite; it names one's prompt and seed.
    """
    if len(prompts) != len(rewrites):
      raise ValueError(
        f"{len(prompts)} prompts and {len(rewrites)} rewritten ones are to be scored; give one for "
        "one."
      )
    bad: list[str] = []
    before = self.counts["images"]
    raw = self._of_users(prompts, bad)
    seeds = [
      self._seed(prompt if self._settings.common_seeds else rewrite)
      for prompt, rewrite in zip(prompts, rewrites)]
    rewritten = _joined(self._drawn(rewrites, seeds, prompts, bad))
    self._check(bad, self.counts["images"] - before)
    found = scores(rewritten, raw.aesthetic, self._settings.weights)
    self.counts.update(
      prompts=len(prompts), dropped_rows=int(np.isnan(found).sum()),
      cut_prompts=self._count_cut(prompts), cut_rewrites=self._count_cut(rewrites))
    return Measured(found, rewritten, raw)

  def summary(self) -> str:
    """The counts as a line of a log."""
    c = self.counts
    return (
      f"{c['images']:,} pictures, {c['bad_images']} not finite, {c['dropped_rows']} rows dropped; "
      f"users' prompts: {c['baselines_drawn']:,} drawn, {c['baselines_known']:,} known; of "
      f"{c['prompts']:,} pairs CLIP cut {c['cut_prompts']} prompts and {c['cut_rewrites']} rewrites"
    )

  def _count_cut(self, texts: Sequence[str]) -> int:
    """How many texts CLIP cuts; the first one ever is shown with its end that is not read."""
    cut = {text: end for text, end in zip(texts, self._rater.cut(texts)) if end}
    if cut and not self.counts["cut_prompts"] + self.counts["cut_rewrites"]:
      text, end = next(iter(cut.items()))
      warnings.warn(
        f"CLIP does not read all of {shortened(text, _SHOWN)!r}; this end is cut off: {end!r}. "
        "Further ones are counted.", stacklevel=2)
    return sum(text in cut for text in texts)

  def _of_users(self, prompts: Sequence[str], bad: list[str]) -> Terms:
    """The terms of users' prompts; each that is not known is drawn once."""
    seed = self._settings.seed
    distinct = list(dict.fromkeys(prompts))
    new = [prompt for prompt in distinct if self._baselines.get(prompt, seed) is None]
    self.counts.update(baselines_drawn=len(new), baselines_known=len(distinct) - len(new))
    failed = {}
    start = 0
    for part in self._drawn(new, [self._seed(prompt) for prompt in new], new, bad):
      for prompt, *values, num in zip(new[start:], *part):
        found = Baseline(*map(float, values), int(num))
        if num == self._settings.num_images:
          self._baselines.put(prompt, seed, found)
        else:  # drawn again at the next visit
          failed[prompt] = found
      start += len(part.num)
    rows = [self._baselines.get(prompt, seed) or failed[prompt] for prompt in prompts]
    return Terms(*(np.array(column) for column in zip(*rows))) if rows else _joined([])

  def _drawn(self, prompts, seeds, against, bad: list[str]):
    """Draws pictures a few prompts at a time; yields `Terms`, and adds to `bad`."""
    num, size = self._settings.num_images, self._rater.num_rows
    for start in range(0, len(prompts), size):
      part = slice(start, start + size)
      images = np.asarray(self._source(prompts[part], num, seeds[part]))
      if images.dtype != np.uint8 or images.ndim != 5 or images.shape[:2] != (
        len(prompts[part]), num
      ):
        raise ValueError(
          f"the image source gave {images.dtype} {list(images.shape)} for {len(prompts[part])} "
          f"prompts and {num} pictures of each; it should give uint8 [prompts, pictures, height, "
          "width, 3]."
        )
      cosine, aesthetic, _ = self._rater(images, against[part])
      wrong = ~finite(cosine, aesthetic)
      self.counts.update(images=wrong.size, bad_images=int(wrong.sum()))
      bad += [
        f"picture {j} of {shortened(prompts[part][i], _SHOWN)!r} with seed {seeds[part][i]}"
        for i, j in np.argwhere(wrong)]
      yield terms(cosine, aesthetic)

  def _check(self, bad: list[str], num: int) -> None:
    share = self._settings.max_bad_share
    if len(bad) > share * num:
      raise FloatingPointError(
        f"{len(bad)} of {num} pictures have no finite cosine or rating, more than "
        f"promptist.ImageReward.max_bad_share={share}; the first is {bad[0]}; look at it, and give "
        "the models a wider dtype."
      )

  def _seed(self, text: str) -> int:
    """The 32 bits that a prompt's pictures start from."""
    return int(digest([text, f"\0{self._settings.seed}"], _SEED_BYTES), 16)


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class OwnReward:
  """A reward of one's own, `@promptist.OwnReward()` with `function = @my_module.brevity`.

  Attributes:
    function: see `TextReward`.
    version: changes if the function does, so that a run does not go on with another reward.
  """

  function: Callable[[Sequence[str], Sequence[str]], np.ndarray]
  version: str = ""

  def fingerprint(self) -> str:
    """The function's name and the version."""
    return f"{self.function.__module__}.{self.function.__qualname__} {self.version}".strip()

  def build(
    self, partitioner: Partitioner | None = None, cache: Path | str | None = None
  ) -> TextReward:
    """The function, whose answers are checked; arguments as for `ImageReward.build`."""
    def reward(prompts: Sequence[str], rewrites: Sequence[str]) -> np.ndarray:
      found = np.asarray(self.function(prompts, rewrites), np.float64)
      if found.shape != (len(prompts),):
        raise ValueError(
          f"promptist.OwnReward.function gave rewards of shape {list(found.shape)} for "
          f"{len(prompts)} prompts; it should give a number for each."
        )
      return found

    return reward


def _joined(parts) -> Terms:
  """Terms of prompts one behind the other."""
  parts = [*parts, Terms(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))]
  return Terms(*(np.concatenate(column) for column in zip(*parts)))
