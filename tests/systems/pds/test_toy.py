"""PDS finds the useful part of a corpus whose sources are known (spec section 9, check 25)."""

import json

import numpy as np
import pytest

from lmops_jax import cli

pytestmark = pytest.mark.slow

SOURCES = ("target_like", "off_target", "noise")


def _language(seed, num_words=60, num_followers=4):
  """A random bigram language over words of its own."""
  rng = np.random.default_rng(seed)
  letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
  words = ["".join(rng.choice(letters, rng.integers(3, 8))) for _ in range(num_words)]
  followers = rng.integers(num_words, size=(num_words, num_followers))

  def text(rng, num):
    state, out = rng.integers(num_words), []
    for _ in range(num):
      out.append(words[state])
      state = followers[state, rng.integers(num_followers)]
    return " ".join(out) + "."

  return text


def _noise(rng, num):
  letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
  return " ".join("".join(rng.choice(letters, rng.integers(3, 8))) for _ in range(num)) + "."


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
  folder = tmp_path_factory.mktemp("toy")
  makers = dict(zip(SOURCES, [_language(1), _language(2), _noise], strict=True))
  rng = np.random.default_rng(0)
  with (folder / "corpus.jsonl").open("w") as file:
    for _ in range(400):
      for kind, make in makers.items():
        print(json.dumps({"text": make(rng, 60), "kind": kind}), file=file)
  with (folder / "target.jsonl").open("w") as file:
    for _ in range(60):
      text = makers["target_like"](rng, 60)
      print(json.dumps({"text": text, "kind": "target"}), file=file)
  (folder / "toy.gin").write_text(
    """
include 'pds/baselines.gin'
include 'pds/smoke_sizes.gin'
include 'data/jsonl.gin'
include 'data/target_jsonl.gin'
data.TrainSentencePiece.sample_bytes = 200_000
data.Jsonl.kind_field = "kind"
RATIO = 0.3333
pds.InfluenceScores.num_hessian = 64
pds.InfluenceScores.iterations = 8
PROXY_STEPS = 60
CHECKPOINTS = (60,)
INNER_STEPS = 12
PROXIES = 384
SCORER_STEPS = 60
TRAIN_STEPS = 80
pds.Pretrain.keep_every = 20
SEEDS = [0]
"""
  )
  workdir = folder / "run"
  code = cli.main([
    "run", str(folder / "toy.gin"), "--workdir", str(workdir),
    f"--gin.CORPUS_PATH='{folder / 'corpus.jsonl'}'",
    f"--gin.TARGET_PATH='{folder / 'target.jsonl'}'", "--gin.VOCAB_SIZE=384", "--gin.MESH=None",
  ])
  assert code == 0
  return json.loads((workdir / "report" / "summary.json").read_text())


def test_selection_is_four_fifths_target_like(summary):
  assert 0.3 < summary["corpus_share_by_kind"]["target_like"] < 0.37
  assert summary["selected_share_by_kind"]["pds"]["target_like"] > 0.8


def test_model_on_the_selection_beats_random(summary):
  methods = summary["methods"]
  assert methods["pds"]["target_test_loss"][0] < methods["random"]["target_test_loss"][0] - 0.05


@pytest.mark.parametrize("name", ["no_hessian", "one_step", "if_score", "rho_loss", "dsir"])
def test_baselines_prefer_the_target_too(summary, name):
  assert summary["selected_share_by_kind"][name]["target_like"] > 0.5


def test_every_method_is_measured(summary):
  names = {"pds", "random", "no_hessian", "one_step", "if_score", "in_run", "metagradient",
           "data_rater", "rho_loss", "dsir", "perplexity", "length"}
  assert set(summary["methods"]) == set(summary["selected_share_by_kind"]) == names
  assert set(summary["scorer"]["validation_spearman_by_method"]) == {
    "pds", "no_hessian", "one_step", "if_score", "in_run", "metagradient", "rho_loss"
  }


def test_costs_are_logged(summary):
  flops = {stage["name"]: stage["flops"] for stage in summary["stages"]}
  assert flops["solve/pds"] > flops["solve/one_step"] > 0
  assert flops["pretrain/pds/seed0"] == flops["pretrain/random/seed0"] > 0
