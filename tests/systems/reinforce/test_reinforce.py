"""Reinforcement learning from the command line: it learns, exports, and refuses bad input."""

import json

import jax
import numpy as np
import pytest

from lmops_jax import cli, pretrained
from lmops_jax.config import resolve
from lmops_jax.config.refusals import ConfigError
from lmops_jax.mesh.meshes import MeshConfig, single_device
from lmops_jax.models.transformer import num_params
from lmops_jax.sizing.flops import forward_flops_per_token
from lmops_jax.training.reinforce.journal import read_journal
from tests import model_folders

SIZES = ["--gin.STEPS=10", "--gin.BATCH_SIZE=32", "--gin.PROMPT_LENGTH=8", "--gin.NEW_TOKENS=8",
         "--gin.LEARNING_RATE=4e-2", "--gin.KL_COEFFICIENT=0.01", "--gin.SHORTEST=4",
         "--gin.pretrained.load.dtype='float32'"]

GRPO = ["--gin.ALGORITHM=@reinforce.GRPO()", "--gin.reinforce.GRPO.kl=%KL"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return model_folders.write(tmp_path_factory.mktemp("model"), spread=1.0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
  path.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(40)))
  return path


def _run(folder, prompts, workdir, *bindings):
  return cli.main([
    "run", "train/reinforce.gin", "--workdir", str(workdir), f"--gin.MODEL='{folder}'",
    f"--gin.PROMPTS='{prompts}'", *SIZES,
    "--gin.reinforce.ShareOf.characters='abcdefghijklmnopqrstuvwxyz'", *bindings])


@pytest.fixture(scope="module")
def finished(folder, prompts, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "work"
  assert _run(folder, prompts, workdir) == 0
  return workdir


def test_the_score_rises_and_is_reported(finished):
  summary = json.loads((finished / "report" / "summary.json").read_text())
  curve = [row["score"] for row in summary["curve"]]
  assert len(curve) == 10 and curve[-1] > curve[0] + 0.4
  assert summary["curve"][0]["kl"] == 0.0 and 0 < summary["kl"] < 30
  page = (finished / "report" / "index.html").read_text()
  assert f"{curve[-1]:.3f}" in page and (finished / "report" / "score.png").stat().st_size > 5000
  rows = list(read_journal(finished / "train" / "rollouts.jsonl"))
  assert len(rows) == 10 * 32
  for step in (0, 9):
    of_step = [row["score"] for row in rows if row["step"] == step]
    assert np.mean(of_step) == pytest.approx(curve[step], rel=1e-5)


def test_the_result_is_a_model_here_and_for_transformers(folder, finished):
  ours = pretrained.load(str(finished / "train")).params()
  theirs = pretrained.load(str(finished / "export" / "model"))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs.params())
  before = pretrained.load(str(folder)).params()
  assert np.abs(ours["embedding"] - before["embedding"]).max() > 1e-3
  assert theirs.tokenizer().encode("say") == pretrained.load(str(folder)).tokenizer().encode("say")


def test_a_plan_counts_writing_and_learning(folder, prompts, capsys):
  assert cli.main([
    "plan", "train/reinforce.gin", f"--gin.MODEL='{folder}'", f"--gin.PROMPTS='{prompts}'",
    *SIZES]) == 0
  shown = capsys.readouterr().out
  config = pretrained.load(str(folder)).config
  assert "10 steps" in shown and "the reward's models and operations are not counted" in shown
  system = resolve.load(["train/reinforce.gin"], [
    f"MODEL = '{folder}'", f"PROMPTS = '{prompts}'", *(x[6:] for x in SIZES)]).build()
  phase, = system.phases(single_device(), None, platform="cpu")
  # Written once; scored by policy, values and reference; policy and values learn 4 times.
  passes = 1 + 3 + 4 * 2 * 3
  assert phase.flops == 10 * 32 * passes * 16 * forward_flops_per_token(config, 16)
  # Values have a trunk of their own, without an output matrix.
  assert num_params(config) < phase.num_params < 2 * num_params(config)
  assert phase.parts["reference"] == 4 * num_params(config)
  assert phase.parts["data"] == 32 * 4 * (3 * 16 + 4 * 9)
  with pytest.raises(ConfigError, match="32 rollouts do not split over the mesh's 64 data shards"):
    system.phases(MeshConfig(data=64).plan(64), None, platform="cpu")


@pytest.mark.slow
def test_grpo_with_a_reward_of_ones_own_on_a_mesh(folder, prompts, tmp_path, monkeypatch):
  """From beams, with parts in the journal."""
  (tmp_path / "own_reward.py").write_text(
    "import gin\nimport numpy as np\n\n"
    "@gin.register(module='own')\n"
    "def letters(rollouts):\n"
    "  return {'letters': np.array([sum(map(str.isalpha, r.response)) for r in rollouts], float),\n"
    "          'price': np.array([-0.5 * len(r.ids) for r in rollouts])}\n")
  (tmp_path / "own.gin").write_text(
    "import own_reward\ninclude 'train/grpo.gin'\nREWARD = @own.letters\nGROUP_SIZE = 4\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  assert cli.main([
    "run", str(tmp_path / "own.gin"), "--workdir", str(tmp_path / "w"), f"--gin.MODEL='{folder}'",
    f"--gin.PROMPTS='{prompts}'", *SIZES, "--gin.STEPS=3", "--gin.mesh.make.fsdp=2",
    "--gin.decoding.GenerationOptions.temperature=0.0",
    "--gin.decoding.GenerationOptions.num_beams=4",
    "--gin.decoding.GenerationOptions.num_beam_groups=4",
    "--gin.decoding.GenerationOptions.diversity_penalty=1.0"]) == 0
  rows = list(read_journal(tmp_path / "w" / "train" / "rollouts.jsonl"))
  assert len(rows) == 3 * 32 and set(rows[0]["parts"]) == {"letters", "price"}
  for i in range(0, 96, 4):
    assert len({row["example_id"] for row in rows[i : i + 4]}) == 1


@pytest.mark.parametrize("bindings, message", [
  (["--gin.PROMPTS='absent.jsonl'"], "prompts='absent.jsonl' must be an existing path"),
  (["--gin.NEW_TOKENS=250"], "max_new_tokens=250 are beyond the 256 positions"),
  (["--gin.PROMPT_LENGTH=5"], "prompts.jsonl:1 has a prompt of 6 tokens, and prompt_length=5"),
  ([*GRPO, "--gin.reinforce.GRPO.group_size=3", "--gin.ANSWERS=3"],
   "batch_size=32 is not a multiple of group_size=3"),
  ([*GRPO, "--gin.ANSWERS=2"], "num_return_sequences=2 is less than group_size=8"),
  (["--gin.BATCH_SIZE=48"], "40 examples are fewer than one batch"),
  (["--gin.decoding.GenerationOptions.temperature=0.0"], "always gives the same answer"),
])
def test_bad_input_is_one_sentence(folder, prompts, tmp_path, capsys, bindings, message):
  capsys.readouterr()
  assert _run(folder, prompts, tmp_path / "w", *bindings) == 2
  error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
  assert len(error) == 1 and message in error[0], error


def test_a_line_without_a_prompt_is_named(folder, tmp_path, capsys):
  path = tmp_path / "p.jsonl"
  path.write_text('{"prompt": "a"}\n{"prompt": "  "}\n')
  capsys.readouterr()
  assert _run(folder, path, tmp_path / "w") == 2
  assert "p.jsonl:2 has no text in the field" in capsys.readouterr().err
