"""A system of one's own, written from the public skeleton alone: it runs, resumes, plans, refuses.

The README has a smaller one, which runs as it stands there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmops_jax

SYSTEM = '''\
import dataclasses
import functools

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, Seeds, component
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.sizing.budget import Phase
from lmops_jax.stages.skeleton import Stage


@component(module="dice")
@dataclasses.dataclass(frozen=True)
class Dice:
  """Throws dice and reports their mean."""

  sides: PositiveInt = 6
  throws: PositiveInt = 100
  digits: PositiveInt = 2
  seeds: Seeds = (0, 1)
  name = "dice"

  def stages(self, partitioner):
    throws = [Stage(f"throw/seed{seed}", functools.partial(self.throw, seed=seed),
                    reads=("sides", "throws"), seed=seed) for seed in self.seeds]
    names = tuple(stage.name for stage in throws)
    return [*throws, Stage("report", self.report, inputs=names, reads=("digits",))]

  def throw(self, context, seed):
    for i in range(self.throws):
      path = context.directory / f"{i}.txt"
      if not path.exists():  # a killed attempt left what it had
        path.write_text(str(np.random.default_rng((seed, i)).integers(1, self.sides + 1)))
    context.flops += self.throws

  def report(self, context):
    report = RunReport(context, [f"throw/seed{seed}" for seed in self.seeds])
    found = {seed: [int(path.read_text())
                    for path in context.input(f"throw/seed{seed}").glob("*.txt")]
             for seed in self.seeds}
    means = {str(seed): round(float(np.mean(of)), self.digits) for seed, of in found.items()}
    figure = plots.histogram({f"seed {seed}": of for seed, of in found.items()}, x_label="eyes")
    report.write({"means": means, "stages": report.costs}, html.Report(
      title="Dice", key_figures=[report.work_figure()],
      sections=[html.Section("Eyes", figures=[report.figure("eyes", figure, "All throws.")]),
                report.cost_section()],
      facts={"work": report.work, "versions": report.versions}), required=["means.*"])

  def table(self, summary):
    return text_table([("seed", "mean"), *((k, str(v)) for k, v in summary["means"].items())])

  def phases(self, partitioner, memory, **sizes):
    return [Phase("throw", num_params=0, flops=self.throws, steps=self.throws, parts={"eyes": 8.0})]
'''
GIN = """\
# Throws dice.
import dice
run.system = @dice.Dice()
dice.Dice.throws = %THROWS
dice.Dice.digits = %DIGITS
THROWS = 20
DIGITS = 2
"""
KILLER = """\
import os
import signal

from dice import Dice


def throw(self, context, seed, _whole=Dice.throw):
  for i in range(5):
    (context.directory / f"{i}.txt").write_text("6")
  os.kill(os.getpid(), signal.SIGKILL)


Dice.throw = throw
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  for name, text in (("dice.py", SYSTEM), ("dice.gin", GIN), ("killer.py", KILLER)):
    (tmp_path / name).write_text(text)
  monkeypatch.chdir(tmp_path)
  package = os.path.dirname(os.path.dirname(lmops_jax.__file__))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), package]))
  return tmp_path


def lmops(*arguments):
  return subprocess.run([sys.executable, "-m", "lmops_jax.cli", *arguments], text=True,
                        capture_output=True, timeout=600)


def _statuses(done):
  assert done.returncode == 0, done.stderr
  return {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:4]}


def test_it_fits_on_a_page():
  assert len(SYSTEM.splitlines()) < 60 and max(map(len, SYSTEM.splitlines())) <= 100


def test_it_runs_resumes_and_plans(folder):
  killed = lmops("run", "dice.gin", "--gin_import", "killer")
  assert killed.returncode == -9
  first = lmops("run", "dice.gin")
  assert _statuses(first) == {
    "throw/seed0": "resumed", "throw/seed1": "ran", "report": "ran"}
  work = folder / "lmops_runs" / "dice"
  eyes = [(work / "throw/seed0" / f"{i}.txt").read_text() for i in range(20)]
  assert eyes[:5] == ["6"] * 5 and eyes[5:] != ["6"] * 15
  summary = json.loads((work / "report" / "summary.json").read_text())
  assert f"0     {summary['means']['0']}\n" in first.stdout
  assert first.stdout.endswith("\n\nreport: lmops_runs/dice/report/index.html\n")
  assert "What it cost" in (work / "report" / "index.html").read_text()
  assert (work / "report" / "eyes.png").is_file()

  assert set(_statuses(lmops("run", "dice.gin")).values()) == {"cached"}
  shown = lmops("run", "dice.gin", "--gin.DIGITS=1")
  assert _statuses(shown) == {"throw/seed0": "cached", "throw/seed1": "cached", "report": "ran"}
  assert "report: running (digits: 2 -> 1)" in shown.stderr
  more = lmops("run", "dice.gin", "--gin.DIGITS=1", "--gin.dice.Dice.seeds=(0, 1)",
               "--gin.dice.Dice.sides=8")
  assert set(_statuses(more).values()) == {"ran"}
  assert "throw/seed0: running (sides: 6 -> 8)" in more.stderr

  planned = lmops("plan", "dice.gin")
  assert planned.returncode == 0, planned.stderr
  assert "throw: 0 parameters, 20FLOP in 20 steps of 1FLOP" in planned.stdout
  refused = lmops("aot", "dice.gin", "--topology", "v5e:2x2")
  assert refused.returncode == 2
  assert "dice.Dice does not say what it takes; lmops aot is for systems" in refused.stderr


def test_the_system_of_the_readme_runs_as_it_stands_there(folder):
  text = Path(__file__).parents[2].joinpath("README.md").read_text()
  section = text.partition("## Add a system")[2].partition("\n## ")[0]
  code, = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
  (folder / "dice.py").write_text(code)
  (folder / "dice.gin").write_text("import dice\nrun.system = @dice.Dice()\n")
  first = lmops("run", "dice.gin")
  assert first.returncode == 0, first.stderr
  summary = json.loads((folder / "lmops_runs/dice/report/summary.json").read_text())
  assert f"{summary['mean']:.2f}" in first.stdout
  again = lmops("run", "dice.gin")
  assert [line.split()[1] for line in again.stdout.splitlines()[1:3]] == ["cached", "cached"]
  changed = lmops("run", "dice.gin", "--gin.dice.Dice.sides=8")
  assert "throw: running (sides: 6 -> 8)" in changed.stderr
