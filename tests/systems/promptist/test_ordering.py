"""What policies learn from a judge that sees every picture's true style, on held-out prompts.

The world itself takes the generator's place, so that it takes minutes; what a trained
generator, its towers and the quality head lead to is measured by the default run.
"""

import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.data.prompt_parts import parts_of
from lmops_jax.data.synthetic_pictures import styled_pictures, styles
from lmops_jax.mesh import meshes
from lmops_jax.stages import pipeline
from lmops_jax.systems.promptist import arms, policy, report, world
from lmops_jax.systems.promptist.image_reward import Measured
from lmops_jax.systems.promptist.rewards import Terms, Weights, scores
from lmops_jax.systems.promptist.rewriting import completion_text

pytestmark = pytest.mark.slow
SEEDS = (0,)
NUM_IMAGES = 4
LOST = -2.0  # relevance for a word of the content that is missing
OF_CONTENTS = {*styled_pictures.SHAPES, *styles.COLORS, *styled_pictures.GROUNDS}


class TrueJudge:
  """Relevance counts words of the content that are missing; ratings are those of drawn styles."""

  @property
  def scorer(self):
    return self

  def summary(self):
    return "no pictures"

  def measure(self, prompts, rewrites):
    raw, rewritten = (
      Terms(*np.transpose([(_relevance(prompt, text), _rating(prompt, text), NUM_IMAGES)
                           for prompt, text in zip(prompts, texts)]))
      for texts in (prompts, rewrites))
    return Measured(scores(rewritten, raw.aesthetic, Weights()), rewritten, raw)

  def __call__(self, rollouts):
    found = self.measure([rollout.prompt for rollout in rollouts],
                         [completion_text(rollout.response) for rollout in rollouts])
    return {"relevance": found.rewritten.relevance,
            "aesthetic": found.rewritten.aesthetic - found.raw.aesthetic}


def _relevance(prompt, text):
  written = text.replace(",", " ").split()
  return LOST * sum(word not in written for word in OF_CONTENTS & set(prompt.split()))


def _rating(prompt, text):
  color = next(word for word in prompt.split() if word in styles.COLORS)
  words = [word for word in parts_of(text, styles.MODIFIERS).modifiers if word in styles.MODIFIERS]
  return np.mean([styles.rating(styles.drawn_style(np.random.default_rng(j), color, words))
                  for j in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """By seed, the rows of all arms."""
  system = resolve.load(
    ["promptist/default.gin"], ["PICTURES = 200", "promptist.World.num_tested = 16"]).build()
  partitioner, judge, workdir = (
    meshes.single_device(), TrueJudge(), tmp_path_factory.mktemp("ordering"))

  def of_seed(seed):
    sft, rl, asked = (f"{name}/seed{seed}" for name in ("sft", "rl", "evaluate"))
    return [
      pipeline.Stage(sft, lambda context: policy.run_sft(
        context, system.policy, system.world, seed, partitioner), (world.STAGE,)),
      pipeline.Stage(rl, lambda context: policy.run_rl(
        context, system.policy, judge, context.input(sft), seed, partitioner), (world.STAGE, sft)),
      pipeline.Stage(asked, lambda context: arms.run_policies(
        context, system.evaluation, system.world, system.policy, judge,
        {arms.SFT: context.input(sft), arms.RL: context.input(rl)}, partitioner),
        (world.STAGE, sft, rl))]

  made = pipeline.Stage(world.STAGE, lambda context: world.run(context, system.world))
  pipeline.run_stages(
    [made, *(stage for seed in SEEDS for stage in of_seed(seed))], workdir, system="test")
  prompts = arms.asked_prompts(system.evaluation, system.world)
  raw = arms.scored(judge, prompts, [[prompt.text] for _, prompt in prompts])
  return {seed: {arms.RAW: raw} | arms.read(workdir / f"evaluate/seed{seed}") for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("better,worse", [(arms.SFT, arms.RAW), (arms.RL, arms.SFT)])
def test_pictures_teach_more_than_pairs_and_these_more_than_nothing(rows, seed, better, worse):
  found = report.compared([rows[seed]], better, worse, world.IN_DOMAIN)
  assert found["low"] > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_words_that_help_are_written_and_contents_are_kept(rows, seed):
  written = [row for row in rows[seed][arms.RL] if row["domain"] == world.IN_DOMAIN]
  helpful, harmful = (np.mean([len(set(group) & set(row["modifiers"])) for row in written])
                      for group in (styles.HELPFUL, styles.HARMFUL))
  assert helpful > 5 * harmful
  # Of three words in each prompt 0.04 to 0.2 were lost, by seed and by how a processor rounds.
  assert np.mean([row["relevance"] / LOST for row in written]) < 0.5
