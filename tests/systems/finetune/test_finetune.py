"""The fine-tuning run from the command line: it learns, resumes, exports, and refuses bad input."""

import json
import os
import re
import shutil

import jax
import numpy as np
import optax
import pytest

from lmops_jax import cli, pretrained
from lmops_jax.data import supervised
from lmops_jax.training import losses
from tests import model_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return model_folders.write(tmp_path_factory.mktemp("model"), spread=3.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
  path.write_text("".join(
    json.dumps({"prompt": f"{i}+{i}=", "completion": str(2 * i)}) + "\n" for i in range(60)
  ))
  return path


def _run(folder, rows, workdir, *bindings):
  return cli.main([
    "run", "train/finetune.gin", "--workdir", str(workdir), f"--gin.MODEL='{folder}'",
    f"--gin.TRAIN='{rows}'", "--gin.LENGTH=32", "--gin.BATCH_SIZE=8", "--gin.LEARNING_RATE=3e-3",
    "--gin.STEPS=24", "--gin.finetune.Finetune.eval_every=12",
    "--gin.finetune.Finetune.validation_fraction=0.2", *bindings,
  ])


@pytest.fixture(scope="module")
def finished(folder, rows, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "work"
  assert _run(folder, rows, workdir) == 0
  return workdir


def test_validation_loss_falls_and_is_reported(finished):
  summary = json.loads((finished / "report" / "summary.json").read_text())
  losses = [row["loss"] for row in summary["validation_loss"]]
  assert len(losses) == 3 and losses[-1] < losses[1] < losses[0] - 0.3
  page = (finished / "report" / "index.html").read_text()
  assert f"{losses[-1]:.3f}" in page and (finished / "report" / "loss.png").stat().st_size > 5000
  assert summary["counts"]["train"]["rows"] + summary["counts"]["validation"]["rows"] == 60


def test_the_result_is_a_model_that_loads_exports_and_generates(finished, tmp_path, capsys):
  assert cli.main([
    "export", "--checkpoint", str(finished / "train"), "--to", str(tmp_path / "out")]) == 0
  ours, theirs = pretrained.load(str(finished / "train")), pretrained.load(str(tmp_path / "out"))
  jax.tree.map(np.testing.assert_array_equal, ours.params(), theirs.params())
  assert theirs.tokenizer().encode("1+1=") == ours.tokenizer().encode("1+1=")
  capsys.readouterr()
  assert cli.main([
    "generate", "--model", str(tmp_path / "out"), "--prompt", "3+3=", "--max-new-tokens", "4"]) == 0
  assert re.search(r"\d", capsys.readouterr().out)


@pytest.mark.parametrize("damaged", [
  "report/summary.json", "train/model.json", "train/params/24/manifest.ocdbt",
  "train/tokenizer/tokenizer.json"])
def test_a_flipped_bit_in_what_is_shown_or_exported_is_named(
    folder, rows, finished, tmp_path, capsys, damaged):
  """At the same size and time, which a run that is finished takes as it is."""
  shutil.copytree(finished, tmp_path / "w")
  path = tmp_path / "w" / damaged
  status, data = path.stat(), bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  capsys.readouterr()
  if damaged.startswith("report"):
    assert _run(folder, rows, tmp_path / "w") == 2
  else:
    model = str(tmp_path / "w" / "train")
    assert cli.main(["export", "--checkpoint", model, "--to", str(tmp_path / "out")]) == 2
    assert cli.main(["convert", "--model", model, "--to", str(tmp_path / "out")]) == 2
    assert cli.main(["generate", "--model", model, "--prompt", "3+3="]) == 2
    assert not (tmp_path / "out").exists()
  said = capsys.readouterr()
  errors = [line for line in said.err.splitlines() if "error" in line]
  assert errors and not any("validation loss" in line for line in said.out.splitlines())
  for line in errors:
    assert f"{path}, an output of stage '{damaged.split('/')[0]}', is corrupted" in line


@pytest.mark.parity
def test_transformers_gives_the_same_logits_after_training(finished, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  cli.main(["export", "--checkpoint", str(finished / "train"), "--to", str(tmp_path / "out")])
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", attn_implementation="eager"
  )
  source = pretrained.load(str(finished / "train"))
  ids = np.random.default_rng(0).integers(2, 200, (2, 9))
  got = source.model.apply({"params": source.params()}, ids.astype(np.int32), method="logits")
  with torch.no_grad():
    np.testing.assert_allclose(got, peer(torch.tensor(ids)).logits, rtol=1e-4, atol=2e-5)


def test_a_mesh_gives_the_same_losses(folder, rows, finished, tmp_path):
  assert _run(folder, rows, tmp_path / "w", "--gin.mesh.make.fsdp=2", "--gin.mesh.make.tensor=2",
              "--gin.finetune.Finetune.accumulate=2") == 0
  read = lambda w: json.loads((w / "report" / "summary.json").read_text())  # noqa: E731
  for a, b in zip(read(finished)["validation_loss"], read(tmp_path / "w")["validation_loss"]):
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)


def test_the_step_learns_tokens_not_sequences(folder):
  source = pretrained.load(str(folder))
  tokenizer, params = source.tokenizer(), source.params()
  examples = [
    supervised.encode_row(tokenizer, {"prompt": "p", "completion": "x" * n}, n, "f")
    for n in (2, 20)
  ]
  batch = supervised.build(examples, 24, pad_id=0, pack=False).batch([0, 1])
  inner = losses.lm_example_losses(source.model)
  got = jax.numpy.mean(losses.weighted_example_losses(inner)(params, batch))
  logits = source.model.apply(
    {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"], method="logits"
  )
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  mask = batch["loss_mask"]
  assert float(got) == pytest.approx(float((nats * mask).sum() / mask.sum()), rel=1e-5)


@pytest.mark.parametrize(
  "bindings,message",
  [
    (["--gin.TRAIN='absent.jsonl'"], "train='absent.jsonl' must be an existing path"),
    (["--gin.LENGTH=300"], "length=300 is beyond the 256 positions"),
    (["--gin.LENGTH=12", "--gin.BATCH_SIZE=60"], "sequences of length 12, fewer than one batch"),
    (["--gin.LENGTH=2"], "no row of the train part is left"),
    (["--gin.finetune.Finetune.too_long='keep'"], "too_long='keep' must be 'drop', 'cut'"),
    (["--gin.MODEL='absent'"], "neither a folder nor a .gguf file"),
  ],
)
def test_bad_input_is_one_sentence(folder, rows, tmp_path, capsys, bindings, message):
  capsys.readouterr()
  assert _run(folder, rows, tmp_path / "w", *bindings) == 2
  error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
  assert len(error) == 1 and message in error[0], error
