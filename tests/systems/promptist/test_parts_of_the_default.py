"""Parts of the embedded default: its texts, losses, quality head, choices and comparisons."""

import json

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from lmops_jax.config import resolve
from lmops_jax.data.prompt_pairs import as_row
from lmops_jax.data.synthetic_pictures import StyledPictures, styled_pictures
from lmops_jax.data.synthetic_pictures.styles import MODIFIERS
from lmops_jax.systems.promptist import arms, generator, quality, report, world

FILE = "promptist/smoke.gin"
WORLD = world.World(StyledPictures(), num_pictures=8, num_tested=4, num_pairs=120)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  texts = [text for pair in world.pairs(WORLD) for text in as_row(pair).values()]
  return world.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


def test_every_stage_reads_what_it_depends_on():
  system = resolve.load([FILE]).build()
  names = [stage.name for stage in system.stages(None)]
  assert names == ["world", "towers", "quality", "unet", "fixed", "sft/seed0", "rl/seed0",
                   "evaluate/seed0", "report"]


@pytest.mark.parametrize("binding,changed", [
  ("UPDATES = 3", {"rl/seed0"}),
  ("reinforce.FixedKL.coefficient = 0.1", {"rl/seed0"}),
  ("PROMPTS = 2", {"fixed", "evaluate/seed0"}),
  ("UNET_STEPS = 3", {"unet"}),
  ("decoding.DpmSolver.num_steps = 3", {"fixed", "rl/seed0", "evaluate/seed0", "report"})])
def test_other_settings_leave_the_generator_as_it_is(binding, changed):
  from lmops_jax.stages import skeleton

  def settings(*bindings):
    loaded = resolve.load([FILE], list(bindings))
    system = loaded.build()
    return {stage.name: stage.settings for stage in skeleton.resolve_stages(
      system, system.stages(None), loaded.settings)}

  before, after = settings(), settings(binding)
  assert {name for name in before if before[name] != after[name]} == changed


@pytest.mark.parametrize("binding,message", [
  ("models.UNetConfig.in_channels = 4", "unet.in_channels=4 and the number of colours is 3"),
  ("models.UNetConfig.sample_size = 8", "unet.sample_size=8 and the pictures' side is 16"),
  ("models.UNetConfig.context_width = 32", "unet.context_width=32 and towers.text.width is 64"),
  ("data.StyledPictures.side = 32", "towers.vision.image_size=16 and the pictures' side is 32"),
  ("promptist.Policy.length = 128", "length=128 are longer")])
def test_models_that_do_not_fit_are_refused(binding, message):
  with pytest.raises(ValueError, match=message):
    resolve.load([FILE], [binding]).build()


def test_pairs_are_of_seen_contents_and_never_equal():
  pairs = list(world.pairs(WORLD))
  held_out = {content.said() for content in styled_pictures.HELD_OUT_CONTENTS}
  assert {pair.kind for pair in pairs} == {"MC", "MCM"}
  for pair in pairs:
    content = pair.completion.split(", ")[0]
    assert pair.prompt != pair.completion and content in pair.prompt and content not in held_out
    assert set(pair.completion.split(", ")[1:]) <= set(MODIFIERS)
  assert not any(content in text for text in world.train_prompts() for content in held_out)


def test_test_prompts_are_of_held_out_contents_in_two_kinds_of_wording():
  inside, outside = (world.test_prompts(WORLD, domain)
                     for domain in (world.IN_DOMAIN, world.OUT_OF_DOMAIN))
  for prompts in (inside, outside):
    assert {prompt.content for prompt in prompts} == set(styled_pictures.HELD_OUT_CONTENTS)
  assert not {p.text for p in inside} & {p.text for p in outside}
  assert all(prompt.human.startswith(f"{prompt.content.said()}, ") for prompt in inside)


def test_every_word_is_one_token_and_decodes_to_itself(tokenizer):
  text = "a picture of a red circle on black Rephrase: red circle on black, sharp focus"
  ids = tokenizer.encode(text, False)
  assert tokenizer.decode(ids) == text
  assert len(ids) == len(text.split()) + 2  # a colon and a comma
  assert tokenizer.encode(text)[-1] == tokenizer.eos_id


def test_contrastive_losses_are_those_of_a_plain_computation(tokenizer):
  system = resolve.load([FILE]).build()
  model = system.generator.clip(tokenizer.vocab_size, tokenizer.eos_id)
  rng = np.random.default_rng(0)
  batch = {"images": rng.integers(0, 256, (2, 3, 16, 16, 3), np.uint8),
           "tokens": rng.integers(1, 50, (2, 3, 8)).astype(np.int32)}
  batch["tokens"][..., -1] = tokenizer.eos_id
  params = generator.nn.unbox(jax.jit(generator.towers_init(model))(jax.random.key(0)))
  found = jax.jit(generator.ContrastiveLosses(model))(params, batch)
  features = [
    np.asarray(x, np.float64).reshape(2, 3, -1) for x in (
      generator.image_features(model, params, batch["images"].reshape(6, 16, 16, 3)),
      generator.text_features(model, params, batch["tokens"].reshape(6, 8)))]
  for loss, images, texts in zip(found, *features, strict=True):
    logits = np.exp(float(params["logit_scale"])) * images @ texts.T
    both = [np.log(np.exp(of).sum(axis=1)) - np.diag(of) for of in (logits, logits.T)]
    assert loss == pytest.approx(np.mean(both), abs=2e-4)


def test_the_quality_head_is_ridge_regression():
  rng = np.random.default_rng(0)
  features, ratings = rng.normal(size=(60, 5)), rng.normal(5, 1, 60)
  head = quality.fit_head(features, ratings, penalty=0.01)
  other = Ridge(alpha=0.01 * 60).fit(features, ratings)
  np.testing.assert_allclose(head.kernel, other.coef_, rtol=1e-5)
  assert head.bias == pytest.approx(other.intercept_, rel=1e-6)


class _Scorer:
  """Likes two words, and longer prompts a little."""

  def __call__(self, prompts, rewrites):
    return np.array([("sharp focus" in text) + 2 * ("noise free" in text) + len(text) / 1e4
                     for text in rewrites], np.float64)


def test_the_suffix_is_the_words_that_alone_help_most():
  config = resolve.load([FILE], ["promptist.Evaluation.suffix_words = 2"]).build().evaluation
  words, gains = arms.best_words(config, _Scorer())
  assert words == ["noise free", "sharp focus"] and set(gains) == set(MODIFIERS)
  assert gains["noise free"] == pytest.approx(2, abs=0.01)


def _rows(scores, relevance=0.0):
  return [{"domain": world.IN_DOMAIN, "prompt": f"p{i // 2}", "content": f"c{i // 4}",
           "score": score, "relevance": relevance, "aesthetic": score, "modifiers": ["a"] * (i % 2)}
          for i, score in enumerate(scores)]


def test_arms_are_compared_prompt_by_prompt():
  seeds = [{"sft": _rows(np.arange(16.0) + seed), "rl": _rows(np.arange(16.0) + 3 * seed + 1)}
           for seed in (0, 1)]
  found = report.compared(seeds, "rl", "sft", world.IN_DOMAIN)
  assert found == {"mean": 2.0, "low": 2.0, "high": 2.0}  # 1 of one seed, 3 of the other
  told = report.figures([of["sft"] for of in seeds], world.IN_DOMAIN)
  assert told["score"] == 8.0 and told["modifiers"] == 0.5 and told["distinct"] == 2 / 16


def test_high_rewards_with_little_relevance_are_shown_first(tmp_path):
  rows = [{"step": 0, "prompt": "p", "response": f"r{i}", "score": float(i),
           "parts": {"relevance": -float(i % 3)}} for i in range(60)]
  (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = report.worst_kept(tmp_path / "rollouts.jsonl")
  assert [row["response"] for row in found] == ["r59", "r56", "r58", "r55"]
