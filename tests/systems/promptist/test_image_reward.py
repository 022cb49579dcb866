"""The reward with painted pictures: its sums, its seeds, its cache, and pictures that fail."""

import dataclasses
import json

import gin
import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.pretrained.aesthetic import AestheticFile
from lmops_jax.systems.promptist.baselines import Baseline, Baselines
from lmops_jax.systems.promptist.image_reward import ImageReward, ImageScorer, OwnReward
from lmops_jax.systems.promptist.rating import Ratings
from tests.systems.promptist import tiny_clip

BROKEN = "broken"


class Painter:
  """One grey a picture: the text's length, plus noise of (seed, picture). Broken ones are black."""

  def __init__(self, settings="painted 1"):
    self.settings, self.asked = settings, []

  def __call__(self, prompts, num_images, seeds):
    self.asked += zip(prompts, seeds)
    found = np.zeros((len(prompts), num_images, 4, 4, 3), np.uint8)
    for p, (prompt, seed) in enumerate(zip(prompts, seeds)):
      for j in range(num_images):
        noise = np.random.default_rng((seed, j)).integers(0, 50)
        found[p, j] = 0 if BROKEN in prompt and j == 0 else 100 + len(prompt) + noise
    return found

  def fingerprint(self):
    return self.settings

  def build(self, partitioner):
    return self


class GreyRater:
  """Cosine by grey, rating twice the grey, none of black ones."""

  num_rows = 2

  def __call__(self, images, texts):
    grey = images[..., 0, 0, 0].astype(np.float64)
    grey[grey == 0] = np.nan
    cosine = grey / 1000 + np.array([len(text) for text in texts])[:, None] / 100
    return Ratings(cosine, 2 * grey, self.cut(texts))

  def cut(self, texts):
    return [text[20:] for text in texts]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("parts")
  clip = pretrained.load(tiny_clip.write(folder / "clip"))
  return clip, AestheticFile(tiny_clip.write_aesthetic(folder / "head.safetensors"), sha256="any")


@pytest.fixture
def scorer(parts):
  def make(folder=None, painter=None, **settings):
    painter = painter or Painter()
    reward = ImageReward(painter, *parts, **settings)
    return ImageScorer(reward, painter, GreyRater(), Baselines(reward.baseline_settings(), folder))

  return make


PROMPTS = ["a cat", "a dog in rain", "a cat"]
REWRITES = ["a cat, by Monet, detailed", "a dog in rain", "cat"]


def by_hand(text, against, seed, num=3):
  """Each picture's relevance and rating."""
  found = []
  for j in range(num):
    grey = 100 + len(text) + np.random.default_rng((seed, j)).integers(0, 50)
    found.append((min(20 * (grey / 1000 + len(against) / 100) - 5.6, 0), 2 * grey))
  return np.array(found).T


@pytest.mark.parametrize("common", [False, True])
def test_scores_are_the_papers_sum(scorer, common):
  painter = Painter()
  made = scorer(painter=painter, common_seeds=common, relevance_weight=0.5)
  with pytest.warns(UserWarning, match="all of 'a cat, by Monet, detailed'; .* cut off: 'ailed'"):
    found = made.measure(PROMPTS, REWRITES)
  asked = dict(painter.asked)
  seeds = [seed for _, seed in painter.asked]
  assert len(painter.asked) == 2 + 3  # a prompt that comes twice is drawn once
  if common:
    assert seeds[2:] == [seeds[0], seeds[1], seeds[0]]
  else:
    assert asked["cat"] != asked["a cat"] and asked["a dog in rain"] == seeds[1]
  for i, (prompt, rewrite) in enumerate(zip(PROMPTS, REWRITES)):
    raw_relevance, raw = by_hand(prompt, prompt, seeds[PROMPTS.index(prompt)])
    relevance, rating = by_hand(rewrite, prompt, seeds[2 + i])
    want = np.mean([r - np.mean(raw) + 0.5 * rel for r, rel in zip(rating, relevance)])
    assert found.score[i] == pytest.approx(want, abs=1e-9)
    assert found.raw.relevance[i] == pytest.approx(np.mean(raw_relevance), abs=1e-9)
  assert found.rewritten.aesthetic[1] == found.raw.aesthetic[1]  # the same text and noise
  assert made.counts["cut_rewrites"] == 1 and "CLIP cut 0 prompts and 1 rewrites" in made.summary()


def test_rewards_depend_on_neither_the_order_nor_the_company(scorer):
  whole = scorer()(PROMPTS, REWRITES)
  order = [2, 0, 1]
  again = scorer()([PROMPTS[i] for i in order], [REWRITES[i] for i in order])
  np.testing.assert_array_equal(again, whole[order])
  np.testing.assert_array_equal(scorer()(PROMPTS[1:2], REWRITES[1:2]), whole[1:2])
  assert not np.array_equal(scorer(seed=1)(PROMPTS, REWRITES), whole)
  assert scorer()([], []).shape == (0,)


def test_a_users_prompt_is_drawn_once_whatever_happens(scorer, tmp_path):
  first, second, third = Painter(), Painter(), Painter()
  want = scorer(tmp_path, first)(PROMPTS, REWRITES)
  file, = tmp_path.iterdir()
  lines = file.read_bytes()
  file.write_bytes(lines + b'{"prompt": "a bi')  # killed while it wrote
  resumed = scorer(tmp_path, second)
  np.testing.assert_array_equal(resumed(PROMPTS, REWRITES), want)
  assert [p for p, _ in second.asked] == REWRITES and resumed.counts["baselines_known"] == 2
  assert file.read_bytes() == lines
  file.write_bytes(lines.split(b"\n")[0])  # killed within the first line
  np.testing.assert_array_equal(scorer(tmp_path, third)(PROMPTS, REWRITES), want)
  assert len(third.asked) == 5 and file.read_bytes() == lines


@pytest.mark.parametrize("change", [
  {"num_images": 2}, {"painter": Painter("painted 2")}])
def test_numbers_of_other_settings_are_not_mixed(scorer, tmp_path, change):
  scorer(tmp_path)(PROMPTS, REWRITES)
  other = scorer(tmp_path, **change)
  other(PROMPTS, REWRITES)
  assert other.counts["baselines_drawn"] == 2 and len(list(tmp_path.iterdir())) == 2
  shared = scorer(tmp_path, aesthetic_weight=2.0, common_seeds=True)  # read what is known
  shared(PROMPTS, REWRITES)
  assert shared.counts["baselines_drawn"] == 0
  reseeded = scorer(tmp_path, seed=5)  # beside the others in the same file
  reseeded(PROMPTS, REWRITES)
  assert reseeded.counts["baselines_drawn"] == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_was_changed_is_named(scorer, tmp_path):
  scorer(tmp_path)(PROMPTS, REWRITES)
  file, = tmp_path.iterdir()
  lines = file.read_text().splitlines()
  file.write_text("\n".join([lines[0], "{}", lines[2], ""]))
  with pytest.raises(ValueError, match=r"\.jsonl:2 is not what was written"):
    scorer(tmp_path)
  file.write_text("\n".join([lines[0].replace("painted", "printed"), *lines[1:], ""]))
  with pytest.raises(ValueError, match="begins with other settings"):
    scorer(tmp_path)


def test_each_process_writes_its_own_file_and_reads_all(tmp_path):
  first, second = (Baselines({"a": "b"}, tmp_path, process) for process in (0, 1))
  first.put("x", 0, Baseline(0.0, 1.0, 3))
  second.put("y", 0, Baseline(0.0, 2.0, 3))
  assert first.get("y", 0) is None and first.get("x", 1) is None
  torn = second.path.read_bytes() + b'{"prompt"'
  second.path.write_bytes(torn)  # it writes at this moment
  again = Baselines({"a": "b"}, tmp_path)
  assert (again.get("x", 0).aesthetic, again.get("y", 0).aesthetic) == (1.0, 2.0)
  assert second.path.read_bytes() == torn and len(list(tmp_path.iterdir())) == 2


def test_failed_pictures_are_left_out_and_counted(scorer, tmp_path):
  prompts, rewrites = ["a broken cup", "a cat"], ["a cup", "broken cat"]
  made = scorer(tmp_path, max_bad_share=0.25)
  found = made.measure(prompts, rewrites)
  assert found.raw.num.tolist() == [2, 3] and found.rewritten.num.tolist() == [3, 2]
  assert np.isfinite(found.score).all()
  assert made.counts["bad_images"] == 2 and made.counts["images"] == 12
  again = scorer(tmp_path, max_bad_share=0.25)  # of the whole prompt only, three pictures are known
  again.measure(prompts, rewrites)
  assert again.counts["baselines_drawn"] == 1
  gone = scorer(num_images=1, max_bad_share=0.6)
  np.testing.assert_array_equal(np.isnan(gone(prompts, rewrites)), [True, True])
  assert gone.counts["dropped_rows"] == 2


def test_too_many_failures_end_the_run_and_name_the_prompt(scorer):
  with pytest.raises(FloatingPointError, match=r"1 of 12 pictures .* picture 0 of 'broken cat'"):
    scorer()(["a cup", "a cat"], ["a cup", "broken cat"])


def test_what_cannot_be_scored_is_refused(scorer):
  with pytest.raises(ValueError, match="3 prompts and 2 rewritten"):
    scorer()(PROMPTS, REWRITES[:2])

  class Wrong(Painter):
    def __call__(self, prompts, num_images, seeds):
      return super().__call__(prompts, num_images, seeds) / 255

  with pytest.raises(ValueError, match="gave float64 .* it should give uint8"):
    scorer(painter=Wrong())(PROMPTS, REWRITES)


def test_the_fingerprint_knows_what_decides_a_reward(parts):
  reward = ImageReward(Painter(), *parts)
  same = dataclasses.replace(reward, num_rows=3, max_bad_share=0.5)
  assert reward.fingerprint() == same.fingerprint()
  for change in ({"seed": 1}, {"num_images": 2}, {"common_seeds": True},
                 {"relevance_weight": 2.0}, {"source": Painter("other")}):
    assert dataclasses.replace(reward, **change).fingerprint() != reward.fingerprint()


def test_the_whole_reward_from_files(parts, tmp_path):
  reward = ImageReward(Painter(), *parts, num_images=2, num_rows=4)
  made = reward.build(cache=tmp_path / "known")
  found = made.measure(PROMPTS, REWRITES)
  assert np.isfinite(found.score).all() and found.score[1] == found.rewritten.relevance[1]
  row = json.loads(next((tmp_path / "known").iterdir()).read_text().splitlines()[1])
  assert row["aesthetic"] == found.raw.aesthetic[0] and row["num"] == 2
  with pytest.raises(ValueError, match="is a gpt2 model"):
    dataclasses.replace(
      reward, clip=dataclasses.replace(reward.clip, family="gpt2")).build()


def test_ones_own_reward_is_a_reference_in_gin():
  gin.clear_config()
  gin.external_configurable(brevity, module="mine")
  with gin.unlock_config():
    gin.parse_config("""
      promptist.OwnReward.function = @mine.brevity
      promptist.OwnReward.version = "2"
    """)
  try:
    made = gin.get_configurable("promptist.OwnReward")()
    reward = made.build()
    np.testing.assert_array_equal(reward(["a", "b"], ["xyz", ""]), [-3, 0])
    assert made.fingerprint().endswith("brevity 2")
    with pytest.raises(ValueError, match=r"shape \[\] for 1 prompts"):
      OwnReward(lambda prompts, rewrites: 1.0).build()(["a"], ["b"])
  finally:
    gin.clear_config()


def brevity(prompts, rewrites):
  return [-len(rewrite) for rewrite in rewrites]
