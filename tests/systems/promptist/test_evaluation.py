"""Comparing arms: means, pairs and domains against loops over prompts."""

import json

import numpy as np
import pytest

from lmops_jax.systems.promptist.evaluation import RAW, PromptSet, evaluate, table
from lmops_jax.systems.promptist.image_reward import Measured
from lmops_jax.systems.promptist.rewards import Terms, Weights, scores

WEIGHTS = Weights(2.0, 1.0)
IN = PromptSet("diffusion", True, ["a", "bb", "ccc", "dddd"], {
  "human": ["a x", "bb xx", "ccc x", "dddd"], "sft": ["a y z", "bb y", "ccc yyyy", "dddd y"],
  "rl": ["a yy z", "bb y yyy", "ccc yyyy yyyy", "dddd y yy"]})
OUT = PromptSet("captions", False, ["ee", "f"], {"sft": ["ee y", "f y"], "rl": ["ee yy", "f yy y"]})


def of_text(prompt, text):
  """Relevance and rating of a text's pictures: longer is prettier and less relevant."""
  return -0.1 * abs(len(text) - len(prompt)) - 0.05 * len(prompt), 5 + 0.3 * len(text)


def measure(prompts, rewrites):
  def terms(texts):
    found = np.array([of_text(p, t) for p, t in zip(prompts, texts)])
    return Terms(found[:, 0], found[:, 1], np.full(len(texts), 3))

  raw, rewritten = terms(prompts), terms(rewrites)
  return Measured(scores(rewritten, raw.aesthetic, WEIGHTS), rewritten, raw)


def by_hand(prompts, texts):
  values = []
  for prompt, text in zip(prompts, texts):
    relevance, rating = of_text(prompt, text)
    values.append(rating - of_text(prompt, prompt)[1] + 2 * relevance)
  return np.array(values)


def test_arms_are_compared_prompt_by_prompt():
  found = evaluate(measure, [IN, OUT], WEIGHTS, num_resamples=500)
  own = found["sets"]["diffusion"]
  assert list(own["arms"]) == [RAW, "human", "sft", "rl"] and own["num_prompts"] == 4
  for arm, texts in {RAW: IN.prompts, **IN.rewrites}.items():
    want = by_hand(IN.prompts, texts)
    assert own["arms"][arm]["score"] == pytest.approx(want.mean())
    assert own["arms"][arm]["aesthetic"] == pytest.approx(
      np.mean([of_text(p, t)[1] for p, t in zip(IN.prompts, texts)]))
    assert own["arms"][arm]["num_failed"] == 0
  assert own["arms"][RAW]["score"] < 0  # relevance of the raw prompt's own pictures
  gain = own["differences"]["rl - sft"]["score"]
  want = by_hand(IN.prompts, IN.rewrites["rl"]) - by_hand(IN.prompts, IN.rewrites["sft"])
  assert gain["value"] == pytest.approx(want.mean()) and gain["num_rows"] == 4
  assert want.min() <= gain["low"] <= gain["value"] <= gain["high"] <= want.max()
  assert {"sft - raw", "human - raw", "sft - human", "rl - human"} <= own["differences"].keys()
  assert own["arms"]["sft"]["distinct_1"] == 7 / 9 and 0 <= own["arms"]["sft"]["self_bleu"] <= 1


def test_domains_join_the_arms_that_all_sets_have():
  more = PromptSet("lexica", True, ["gg"], {"rl": ["gg yyyy"], "sft": ["gg y"]})
  found = evaluate(measure, [IN, OUT, more], WEIGHTS, num_resamples=100)
  inside = found["domains"]["in"]
  assert list(inside["arms"]) == [RAW, "sft", "rl"] and inside["num_prompts"] == 5
  want = [*by_hand(IN.prompts, IN.rewrites["rl"]), *by_hand(["gg"], ["gg yyyy"])]
  assert inside["arms"]["rl"]["score"] == pytest.approx(np.mean(want))
  assert found["domains"]["out"] == found["sets"]["captions"]
  json.dumps(found)
  lines = table(found).splitlines()
  assert len(lines) == 1 + 4 + 3 + 3 + 3 + 3
  assert lines[2].split()[:2] == ["diffusion", "human"] and "all out domain" in lines[-1]
  gain = found["sets"]["captions"]["differences"]["rl - raw"]["score"]["value"]
  assert f"{gain:+.3f} (" in lines[7]


def test_a_prompt_whose_pictures_failed_is_left_out_and_counted():
  def failing(prompts, rewrites):
    found = measure(prompts, rewrites)
    if "yy" in rewrites[0]:
      for values in (found.score, found.rewritten.relevance, found.rewritten.aesthetic):
        values[1] = np.nan
    return found

  own = evaluate(failing, [IN], WEIGHTS, num_resamples=50)["sets"]["diffusion"]
  assert own["arms"]["rl"]["num_failed"] == 1 and own["arms"]["sft"]["num_failed"] == 0
  want = np.delete(by_hand(IN.prompts, IN.rewrites["rl"]), 1)
  assert own["arms"]["rl"]["score"] == pytest.approx(want.mean())
  assert own["differences"]["rl - sft"]["score"]["num_rows"] == 3


@pytest.mark.parametrize("sets, why", [
  ([], "called nothing"), ([OUT, OUT], "captions, captions"),
  ([OUT._replace(rewrites={})], "has the arms none"),
  ([OUT._replace(rewrites={"raw": OUT.prompts})], "none of them called 'raw'"),
  ([OUT._replace(rewrites={"rl": ["x"]})], "has 1 texts for 2 prompts")])
def test_sets_that_cannot_be_compared_are_refused(sets, why):
  with pytest.raises(ValueError, match=why):
    evaluate(measure, sets, WEIGHTS)
