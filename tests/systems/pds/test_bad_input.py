"""What a user gets wrong: one sentence, before any work where that is possible (check 24)."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest

from lmops_jax import cli, control
from lmops_jax.models.config import TransformerConfig
from lmops_jax.systems.pds import methods, pretrain, scorer, select
from lmops_jax.training import optimizers

_LETTERS = np.array(list("etaoinshrdlu"))
WORDS = ["".join(row) for row in np.random.default_rng(0).choice(_LETTERS, (200, 5))]


def _texts(num, seed):
  rng = np.random.default_rng(seed)
  return [" ".join(rng.choice(WORDS, 80)) + f" {seed} {i}." for i in range(num)]


def _jsonl(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return path


@pytest.fixture
def lmops(tmp_path, capfd):
  """Runs the smoke setting on a corpus and a target of the test's own; returns code and stderr."""
  gin = tmp_path / "own.gin"
  gin.write_text(
    "include 'pds/smoke.gin'\ninclude 'data/jsonl.gin'\ninclude 'data/target_jsonl.gin'\n"
  )

  def run(corpus, target, *bindings, workdir=tmp_path / "run", stages='["prepare", "proxy"]'):
    code = cli.main([
      "run", str(gin), "--workdir", str(workdir), f"--gin.CORPUS_PATH='{corpus}'",
      f"--gin.TARGET_PATH='{target}'", "--gin.VOCAB_SIZE=320", "--gin.MESH=None",
      f"--gin.STAGES={stages}", *bindings,
    ])
    return code, capfd.readouterr().err

  return run


@pytest.fixture
def corpus(tmp_path):
  return _jsonl(tmp_path / "corpus.jsonl", _texts(120, 1))


@pytest.fixture
def target(tmp_path):
  return _jsonl(tmp_path / "target.jsonl", _texts(20, 2))


def test_empty_corpus(lmops, tmp_path, target):
  code, printed = lmops(_jsonl(tmp_path / "empty.jsonl", []), target)
  assert code == 2 and "empty" in printed and "empty.jsonl" in printed


def test_missing_corpus(lmops, tmp_path, target):
  code, printed = lmops(tmp_path / "absent.jsonl", target)
  assert code == 2 and "absent.jsonl" in printed


def test_corpus_smaller_than_what_is_held_out(lmops, tmp_path, target):
  code, printed = lmops(_jsonl(tmp_path / "small.jsonl", _texts(3, 1)), target)
  assert code == 2 and "num_held_out=32" in printed


SMALL_SCORER = "--gin.pds.Scorer.batch_size=8"


def test_corpus_smaller_than_a_batch(lmops, tmp_path, target):
  small = _jsonl(tmp_path / "small.jsonl", _texts(12, 1))
  code, printed = lmops(small, target, "--gin.BATCH_SIZE=512", "--gin.PROXIES=24", SMALL_SCORER)
  assert code == 2 and "batch_size=512" in printed and "fewer than one batch" in printed


def test_target_of_one_document(lmops, corpus, tmp_path):
  code, printed = lmops(corpus, _jsonl(tmp_path / "one.jsonl", _texts(1, 2)))
  assert code == 2 and "1 documents cannot be split" in printed


def test_documents_shared_with_the_target_are_reported_and_left_out(lmops, tmp_path, target):
  shared = _texts(20, 2)[:7]
  mixed = _jsonl(tmp_path / "mixed.jsonl", _texts(120, 1) + shared)
  code, printed = lmops(mixed, target, stages='["prepare"]')
  assert code == 0 and "7 corpus documents share their text with the target" in printed
  statistics = json.loads((tmp_path / "run" / "prepare" / "statistics.json").read_text())
  assert len(statistics["corpus"]["overlaps_with_target"]) == 7
  assert statistics["corpus"]["num_documents"] == 120


def test_undecodable_rows_are_counted(lmops, tmp_path, target):
  file = _jsonl(tmp_path / "bytes.jsonl", _texts(120, 1))
  with file.open("ab") as out:
    out.write(b'{"text": "\xff\xfe\xfa broken"}\n')
  code, _ = lmops(file, target, stages='["prepare"]')
  statistics = json.loads((tmp_path / "run" / "prepare" / "statistics.json").read_text())
  assert code == 0 and statistics["corpus"]["dropped"] == {"undecodable": 1}


def test_truncated_gzip(lmops, tmp_path, target):
  file = tmp_path / "cut.jsonl.gz"
  rows = "".join(json.dumps({"text": text}) + "\n" for text in _texts(300, 1)).encode()
  file.write_bytes(gzip.compress(rows)[:-200])
  code, printed = lmops(file, target)
  assert code == 2 and "cut.jsonl.gz" in printed


def test_more_proxies_than_instances(lmops, corpus, target):
  code, printed = lmops(
    corpus, target, "--gin.PROXIES=100000", stages='["prepare", "proxy", "solve"]'
  )
  assert code == 2 and "num_proxies=100000" in printed


def test_a_default_is_an_upper_bound_and_a_number_is_strict(lmops, tmp_path, corpus):
  few = _jsonl(tmp_path / "few.jsonl", _texts(4, 2))
  code, printed = lmops(corpus, few, "--gin.TARGET_INSTANCES=32")
  assert code == 2 and "num_target=32 (TARGET_INSTANCES), but the target's dev part has" in printed
  code, printed = lmops(corpus, few, "--gin.RATIO=0.01")
  assert code == 0 and "instances of the target's dev part, fewer than max_target=32" in printed
  assert "max_proxies" not in printed  # there are enough
  assert "fewer than pds.Pretrain.batch_size=16: the stage pretrain will refuse" in printed


def test_what_can_be_known_is_refused_before_the_first_stage(lmops, corpus, target, tmp_path):
  for binding, message in (
    ("TARGET_INSTANCES=49", "num_target=49 (TARGET_INSTANCES), but pds.Prepare.max_target_inst"),
    ("MESH=@mesh.make()", "INNER_BATCH_SIZE) of 9, which does not split"),
  ):
    more = ("--gin.mesh.make.data=8", "--gin.INNER_BATCH_SIZE=9") if "MESH" in binding else ()
    code, printed = lmops(corpus, target, f"--gin.{binding}", *more)
    assert code == 2 and message in printed
  assert not (tmp_path / "run").exists()


def test_sequences_longer_than_the_model(lmops, corpus, target):
  code, printed = lmops(corpus, target, "--gin.LENGTH=256")
  assert code == 2 and "length=256" in printed and "max_length=128" in printed


def test_attention_that_the_machine_or_the_solve_cannot_use(lmops, corpus, target, tmp_path):
  binding = "--gin.models.TransformerConfig.attention='cudnn'"
  code, printed = lmops(corpus, target, binding)
  assert code == 2 and "method 'pds' differentiates the proxy in forward mode" in printed
  code, printed = lmops(corpus, target, binding, "--gin.METHODS=[@pds.RhoLoss(), @pds.Random()]")
  assert code == 2 and "attention='cudnn' needs a gpu" in printed
  assert not (tmp_path / "run").exists()


def test_workdir_of_something_else(lmops, corpus, target, tmp_path):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
  code, printed = lmops(corpus, target, workdir=tmp_path / "photos")
  assert code == 2 and "photos" in printed
  assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow"


def test_full_disk(lmops, corpus, target, tmp_path):
  small = tmp_path / "small_disk"
  small.mkdir()
  if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=48k tmpfs {small} 2>/dev/null"):
    pytest.skip("mounting a small tmpfs needs root")
  try:
    code, printed = lmops(corpus, target, workdir=small / "run")
    assert code == 2 and "no space" in printed.lower() and str(small) in printed
    assert not (small / "run" / "prepare").exists()
  finally:
    os.system(f"umount {small}")
    shutil.rmtree(small, ignore_errors=True)


SGD, MODEL = optimizers.sgd(0.1), TransformerConfig()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: select.Select(ratio=0), "ratio=0"),
    (lambda: select.Select(ratio=1.2), "ratio=1.2"),
    (lambda: select.Select(tau=-1), "tau=-1"),
    (lambda: select.Select(tau=float("nan")), "tau=nan"),
    (lambda: select.Select(tau=float("inf")), "tau=1e999"),
    (lambda: select.Select(ratio=float("nan")), "ratio=nan"),
    (lambda: select.Select(seed=-1), "seed=-1"),
    (lambda: select.Select(seed=0.5), "seed=0.5"),
    (lambda: select.Select(seed=1 << 64), "seed=18446744073709551616"),
    (lambda: select.Select(formats=("csv",)), r"formats\[0\]='csv'"),
    (lambda: pretrain.Pretrain(MODEL, SGD, num_steps=0), "num_steps=0"),
    (lambda: pretrain.Pretrain(MODEL, SGD, 10, batch_size=6, accumulate=4), "multiple"),
    (lambda: pretrain.Pretrain(MODEL, SGD, 10, keep_steps=(20,)), "step 20"),
    (lambda: scorer.Scorer(SGD, validation_fraction=1.0), "validation_fraction=1.0"),
    (lambda: scorer.Scorer(SGD, eval_every=0), "eval_every=0"),
    (lambda: methods.PMP(None), "pds.PMP.optimizer=None"),
    (lambda: methods.PMP(SGD, num_steps=0), "num_steps=0"),
    (lambda: control.SolveOptions(every_k=0), "every_k=0"),
    (lambda: methods.PMP(SGD, num_steps=4, options=control.SolveOptions(groups=5)), "groups=5"),
    (lambda: control.SolveOptions(objective="mean"), "objective='mean'"),
    (lambda: methods.PMP(SGD, matmul_precision="double"), "matmul_precision='double'"),
    (lambda: methods.PMP(SGD, num_steps=4, options=control.SolveOptions(proxy_samples=5)),
     "proxy_samples=5"),
    (lambda: control.SolveOptions(groups=1, proxy_samples=1), "neither groups=1 nor"),
    (lambda: methods.PMP(SGD, inner_data="target"), "inner_data='target'"),
    (lambda: methods.PMP(SGD, divide_by="length"), "pds.PMP.divide_by='length'"),
    (lambda: control.SolveOptions(surrogate="sign"), "control.SolveOptions.surrogate='sign'"),
    (lambda: methods.InfluenceScores(divide_by="x"), "pds.InfluenceScores.divide_by='x'"),
    (lambda: methods.InfluenceScores(num_hessian=100), "num_hessian=100"),
    (lambda: methods.Perplexity(prefer="high"), "prefer='high'"),
    (lambda: methods.ProxySet(num_proxies=1), "num_proxies=1"),
    (lambda: methods.ProxySet(max_proxies=1), "max_proxies=1"),
  ],
)
def test_settings_are_checked_when_they_are_built(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_an_inner_optimizer_without_derivative_is_refused_first(lmops, corpus, target, tmp_path):
  code, printed = lmops(corpus, target, "--gin.INNER_OPTIMIZER=@optim.lion()")
  assert code == 2 and "Every score would be 0: the update of pds.PMP.optimizer" in printed
  assert "scale_by_lion" in printed and "set control.SolveOptions.surrogate='clipped" in printed
  assert not list(tmp_path.glob("run/prepare/*"))
