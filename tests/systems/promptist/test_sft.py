"""Supervised fine-tuning from gin: what is learned, which step is kept, and what is exported."""

import json

import jax
import numpy as np
import optax
import pytest

from lmops_jax import cli, pretrained
from lmops_jax.data import PairFiles, supervised
from lmops_jax.data.prompt_pairs import ANCHOR
from lmops_jax.pretrained.model import load
from lmops_jax.systems.promptist.sft import SupervisedTuning, best_step
from tests.systems.promptist import tiny_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_gpt2.write(tmp_path_factory.mktemp("model") / "gpt2", spread=1.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
  path.write_text("".join(
    json.dumps({"prompt": f"cat {i}", "completion": f"cat {i}, 4k, art"}) + "\n"
    for i in range(60)))
  return path


def run(folder, pairs, workdir, *bindings):
  return cli.main([
    "run", "promptist/sft.gin", "--workdir", str(workdir), f"--gin.MODEL='{folder}'",
    f"--gin.PAIRS='{pairs}'", "--gin.LENGTH=48", "--gin.BATCH_SIZE=8", "--gin.LEARNING_RATE=1e-2",
    "--gin.STEPS=16", "--gin.promptist.SFT.eval_every=4",
    "--gin.promptist.SFT.validation_fraction=0.2", *bindings])


@pytest.fixture(scope="module")
def finished(folder, pairs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "work"
  assert run(folder, pairs, workdir, "--gin.promptist.SFT.select='nll'") == 0
  return workdir


def summary(workdir):
  return json.loads((workdir / "report" / "summary.json").read_text())


def test_it_learns_and_keeps_the_step_of_least_loss(finished):
  losses = {row["step"]: row["loss"] for row in summary(finished)["validation_loss"]}
  assert list(losses) == [0, 4, 8, 12, 16] and losses[16] < losses[0] - 1
  best = min((step for step in losses if step), key=losses.get)
  assert summary(finished)["chosen_step"] == best
  assert [p.name for p in (finished / "train" / "params").iterdir()] == [str(best)]
  counts = summary(finished)["counts"]
  assert counts["train"]["rows"] + counts["validation"]["rows"] == 60
  assert counts["train"]["sequences"] == counts["train"]["rows"]


def test_only_the_engineered_prompt_and_the_end_are_learned(finished, folder):
  data = supervised.load(finished / "prepare" / "train")
  tokenizer = pretrained.load(folder).tokenizer()
  for i in (0, 5):
    targets, mask = data.arrays["targets"][i], data.arrays["loss_mask"][i] != 0
    learned = targets[mask].tolist()
    assert learned[-1] == tokenizer.eos_id
    text = tokenizer.decode(learned[:-1])
    assert text.startswith(" cat ") and text.endswith(", 4k, art")
    first = int(np.flatnonzero(mask)[0])
    given = tokenizer.decode(data.arrays["tokens"][i][: first + 1])
    assert given == text.strip().removesuffix(", 4k, art") + ANCHOR


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_gives_the_same_logits_from_the_exported_folder(finished):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  exported = finished / "export" / "transformers"
  peer = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
  assert type(peer).__name__ == "GPT2LMHeadModel"
  source = load(finished / "train")
  ids = np.random.default_rng(0).integers(1, 200, (2, 9))
  got = source.model.apply({"params": source.params()}, ids.astype(np.int32), method="logits")
  with torch.no_grad():
    np.testing.assert_allclose(got, peer(torch.tensor(ids)).logits, rtol=1e-4, atol=2e-5)
  text = "cat 3" + ANCHOR
  theirs = transformers.AutoTokenizer.from_pretrained(exported)
  assert theirs(text)["input_ids"] == source.tokenizer().encode(text)


def test_the_exported_parameters_are_those_kept(finished):
  ours, theirs = load(finished / "train"), load(finished / "export" / "transformers")
  jax.tree.map(np.testing.assert_array_equal, ours.params(), theirs.params())


@pytest.mark.slow
def test_a_step_is_kept_by_its_number(folder, pairs, tmp_path):
  assert run(folder, pairs, tmp_path / "w", "--gin.promptist.SFT.select_step=6") == 0
  assert summary(tmp_path / "w")["chosen_step"] == 6
  assert load(tmp_path / "w" / "train").params() is not None


def test_a_validation_file_must_not_leak(folder, pairs, tmp_path, capsys):
  assert run(
    folder, pairs, tmp_path / "w", "--gin.VALIDATION_SOURCES=[@held/data.PairFiles()]",
    f"--gin.held/data.PairFiles.path='{pairs}'") == 2
  assert "the held-out set validation holds" in capsys.readouterr().err


@pytest.mark.parametrize("settings, why", [
  ({"length": 97}, "length=97 is beyond the 96 positions"),
  ({"select": "nll", "select_step": 3}, "select='nll' looks for the step itself"),
  ({"select": "nll", "validation_fraction": 0.0}, "needs held-out pairs"),
  ({"pairs": (3,)}, r"promptist.SFT.pairs\[0\]=3 must be a component"),
  ({"select_step": 11}, "select_step=11 is beyond num_steps=10"),
  ({"pairs": ()}, "promptist.SFT.pairs"), ({"batch_size": 3, "accumulate": 2}, "multiple")])
def test_settings_that_make_no_sense_are_refused(folder, settings, why):
  given = {"init": load(folder), "pairs": (PairFiles("pairs.jsonl"),),
           "optimizer": optax.sgd(0.1), "length": 32, "num_steps": 10, **settings}
  with pytest.raises(ValueError, match=why):
    SupervisedTuning(**given)


def test_the_best_step_is_the_first_of_the_least():
  history = [{"step": 0, "validation/loss": 1.0}, {"step": 4, "validation/loss": 3.0},
             {"step": 8, "validation/loss": 2.0}, {"step": 10, "loss": 0.1},
             {"step": 12, "validation/loss": 2.0}]
  assert best_step(history) == 8
