"""`lmops meta-optimizer` as a user runs it, on a tiny random model."""

import json

import numpy as np
import pytest

from lmops_jax import cli
from lmops_jax.config import resolve
from lmops_jax.systems.meta_optimizer import settings, study
from lmops_jax.systems.meta_optimizer.study import Results

SMALL = [
  "--gin_import=tests.systems.meta_optimizer.parts", "--gin.CHOSEN_MODEL=@tiny.Model()",
  "--gin.TASKS=[@tiny.Task()]", "--gin.SEEDS=[0, 1]",
  "--gin.DEMONSTRATIONS=3", "--gin.RATES=[0.01, 0.1]",
  "--gin.VALIDATION_ROWS=4", "--gin.CONTROLS=['untrained']", "--gin.MESH=None",
]


def lmops(capsys, *arguments):
  code = cli.main([str(a) for a in arguments])
  printed = capsys.readouterr()
  return code, printed.out + printed.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("meta_optimizer") / "run"
  assert cli.main(["meta-optimizer", "--workdir", str(workdir), *SMALL]) == 0
  return workdir, json.loads((workdir / "report" / "summary.json").read_text())


def test_the_summary_is_complete(finished):
  workdir, summary = finished
  task = summary["tasks"]["toy"]
  assert task["seeds"] == [0, 1] and task["num_rows"] == 9 and len(task["runs"]) == 2
  assert set(task["networks"]) == {"trained", "untrained"}
  results = [Results.load(workdir / "study" / "toy" / f"seed{seed}") for seed in (0, 1)]
  for metric in study.METRICS:
    of = task["networks"]["trained"][metric]
    values = [r.arrays[f"trained/{metric}"].mean() for r in results]
    np.testing.assert_allclose(of["values"], values, rtol=1e-6)
    assert of["mean"] == pytest.approx(np.mean(values))
    assert of["deviation"] == pytest.approx(np.std(values, ddof=1))
  assert results[0].summary["demonstration_ids"] != results[1].summary["demonstration_ids"]
  assert [stage["name"] for stage in summary["stages"]] == ["study/toy/seed0", "study/toy/seed1"]
  assert all(stage["flops"] > 0 for stage in summary["stages"])


def test_the_report_is_one_page_with_its_figures(finished):
  workdir, _ = finished
  page = (workdir / "report" / "index.html").read_text()
  for text in ("Task toy", "A positive SimAOU alone proves little", "Rec2FTP", "Kendall",
               "untrained", "the best on validation rows"):
    assert text in page
  names = {path.stem for path in (workdir / "report").glob("*.png")}
  assert names == {"toy_aou", "toy_aou_raw", "toy_am", "toy_am_delta", "toy_kendall",
                   "toy_attention"}
  assert page.count("data:image/png;base64,") == len(names)


def test_running_again_is_free_and_another_task_runs_alone(finished, capsys):
  workdir, _ = finished
  code, printed = lmops(capsys, "meta-optimizer", "--workdir", workdir, *SMALL)
  assert code == 0 and printed.count("cached") == 4
  assert "SimAOU" in printed and "in context" in printed
  code, printed = lmops(
    capsys, "meta-optimizer", "--workdir", workdir, *SMALL, "--gin.tiny.Task.seed=3",
    "--gin.STAGES=['task/toy', 'study/toy/seed0']")
  assert code == 0 and "task.fingerprint" in printed


@pytest.mark.parametrize("arguments, match", [
  (["--gin.TASKS=[]"], "tasks=[] must be a list of one or more"),
  (["--gin.TASKS=[@tiny.Task(), @tiny.Task()]"], "'toy' twice"),
  (["--gin.SEEDS=[]"], "seeds=[] must be a list of one or more different"),
  (["--gin.SEEDS=[1, 1]"], "seeds=[1, 1] must be a list of one or more different"),
  (["--gin.RATES=[-1.0]"], "rates[0]=-1.0"), (["--gin.READOUT='end'"], "readout='end'"),
  (["--gin.DEMONSTRATIONS=99"],
   "stage task/toy: task toy: 99 demonstrations are wanted and the training rows are 14"),
])
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, match):
  code, printed = lmops(
    capsys, "meta-optimizer", "--workdir", tmp_path / "w", *SMALL, *arguments)
  assert code == 2 and match in printed and printed.count("lmops: error:") == 1


def test_the_papers_setting_resolves():
  own = ["import tests.systems.meta_optimizer.parts", "CHOSEN_MODEL = @tiny.Model()",
         "TASKS = [@tiny.Task()]"]
  system = resolve.load(["meta_optimizer/paper.gin"], own).build()
  assert tuple(system.study.rates) == settings.GRID and system.study.demonstrations == 32
  assert system.study.readout == "first_label" and system.seeds == [1, 2, 3, 4, 5, 6, 7]
