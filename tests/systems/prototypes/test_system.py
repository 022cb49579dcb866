"""The whole study on a few made rows: stages, report, and the classifier that it leaves."""

import json

import pytest

from lmops_jax.cli import main
from lmops_jax.config import resolve
from tests import model_folders

WORDS = {"cat": "purrs and meows", "dog": "barks at night", "bird": "sings at dawn"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rows")
  for part, number in (("train", 36), ("test", 12)):
    (folder / f"{part}.jsonl").write_text("".join(
      json.dumps({"text": f"number {i} {list(WORDS.values())[i % 3]}", "label": list(WORDS)[i % 3]})
      + "\n" for i in range(number)))
  model_folders.write(folder / "model")
  return folder


@pytest.fixture(scope="module")
def bindings(rows):
  return [
    f"TRAIN = '{rows / 'train.jsonl'}'", f"TEST = '{rows / 'test.jsonl'}'",
    f"MODEL = '{rows / 'model'}'", "SIZES = [12, 30, 500]", "SEEDS = [0, 1]", "EPOCHS = 3",
    "METHODS = [%PFIT, %RAW, %LOGISTIC]", "prototypes.Encoding.max_tokens = 32"]


@pytest.fixture(scope="module")
def workdir(bindings, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "work"
  given = [f"--gin.{name}={value}" for name, value in (b.split(" = ", 1) for b in bindings)]
  assert main(["prototypes", "--workdir", str(folder), *given]) == 0
  return folder


def test_every_method_size_and_seed_is_told(workdir):
  summary = json.loads((workdir / "report/summary.json").read_text())
  assert summary["sizes"] == [12, 30] and summary["left_out"] == [500]
  assert summary["methods"] == ["pfit", "raw", "logistic"]
  for of in summary["figures"].values():
    assert [len(of[str(size)]["values"]) for size in summary["sizes"]] == [2, 2]
  assert summary["figures"]["logistic"]["30"]["mean"] > 0.8  # bytes tell the classes apart
  assert summary["prototypes"]["pfit"]["30"]["prototypes"]["mean"] >= 3
  page = (workdir / "report/index.html").read_text()
  assert "What prototypes stand for" in page and "purrs and meows" in page


def test_the_classifier_of_the_run_predicts_and_explains(workdir, rows, capsys):
  assert main(["prototypes", "predict", "--model", str(workdir), "--text", "it barks at night",
               "--input", str(rows / "test.jsonl")]) == 0
  said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert len(said) == 13 and said[0]["text"] == "it barks at night"
  stored = json.loads((workdir / "fit/pfit/30/seed0/results.json").read_text())["right"]
  right = [int(row["label"] == list(WORDS)[i % 3]) for i, row in enumerate(said[1:])]
  assert right == stored, "the folder predicts as the run did"
  for row in said:
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert row["behind"][0]["text"].startswith("number")
  assert main(["prototypes", "predict", "--model", str(workdir), "--input",
               str(rows / "test.jsonl"), "--other", "text"]) == 2
  assert "pairs of texts, and the classifier has learned from single" in capsys.readouterr().err
  assert main(["prototypes", "inspect", "--model", str(workdir)]) == 0
  assert "purity" in capsys.readouterr().out


@pytest.mark.parametrize("given, says", [
  (["predict", "--model", "x"], "nothing to tell the class of"),
  (["predict", "--model", "x", "--text", "a", "--behind", "0"], "--behind 0 must be 1 or more"),
  (["inspect", "--model", "x"], "holds no classifier.json"),
  (["inspect", "--model", "x", "--gin.SEEDS=[0]"], "takes no bindings"),
])
def test_bad_commands_are_refused(given, says, capsys):
  assert main(["prototypes", *given]) == 2
  assert says in capsys.readouterr().err


def test_methods_need_labels_of_their_own(bindings):
  config = resolve.load(
    ["prototypes/default.gin"], [*bindings[:-2], "METHODS = [%PFIT, %PFIT]"])
  with pytest.raises(ValueError, match="called pfit, pfit; give each a label of its own"):
    config.build()
