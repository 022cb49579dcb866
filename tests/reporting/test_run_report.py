"""What the reports of all systems share: costs, pictures, writing, the last words of a run."""

import json

import pytest
from matplotlib.figure import Figure

from lmops_jax.host import records
from lmops_jax.host.manifests import MANIFEST
from lmops_jax.reporting import html, run_report
from lmops_jax.stages import pipeline, skeleton


@pytest.fixture
def report(tmp_path):
  """Of three finished stages: 30 seconds and 6 GFLOP, 10 and 1, 0 and none."""
  def train(context, flops):
    context.flops += flops

  names = "train/a", "train/b", "read"
  pipeline.run_stages([
    pipeline.Stage(name, lambda context, flops=flops: train(context, flops))
    for name, flops in zip(names, (6e9, 1e9, 0.0))], tmp_path / "w", system="toy")
  for name, seconds in zip(names, (30.0, 10.0, 0.0)):
    path = tmp_path / "w" / name / MANIFEST
    records.write(path, {**pipeline.read_manifest(tmp_path / "w", name), "seconds": seconds})
  (tmp_path / "report").mkdir()
  return run_report.RunReport(pipeline.StageContext(
    "report", tmp_path / "report", {name: tmp_path / "w" / name for name in names}, print), names)


def test_costs_are_those_of_the_stages(report):
  assert report.costs[0] == {"name": "train/a", "seconds": 30.0, "flops": 6e9}
  assert report.seconds == 40.0 and report.work_figure().value == report.work
  assert ", lmops_jax " in report.versions


@pytest.mark.parametrize("options, columns, rows", [
  ({}, ["stage", "seconds", "share", "operations"],
   [["train/a", 30.0, 0.75, 6e9], ["train/b", 10.0, 0.25, 1e9], ["read", 0.0, 0.0, None]]),
  ({"by_kind": True, "shares": False}, ["stages", "seconds", "operations"],
   [["train", 40.0, 7e9], ["read", 0.0, None]]),
  ({"total": True}, ["stage", "seconds", "share", "operations", "GFLOP/s"],
   [["train/a", 30.0, 0.75, 6e9, 0.2], ["train/b", 10.0, 0.25, 1e9, 0.1],
    ["read", 0.0, 0.0, None, None], ["all", 40.0, 1.0, 7e9, None]]),
])
def test_the_cost_section(report, options, columns, rows):
  table, = report.cost_section(**options).tables
  titles = [column.title if isinstance(column, html.Column) else column for column in table.columns]
  assert titles == columns and table.rows == rows
  assert list(table.highlight) == ([3] if "total" in options else [])


def test_it_is_written_beside_its_pictures(report):
  folder = report.context.directory
  figure = report.figure("curve", Figure(figsize=(1, 1)), "A curve.")
  assert (folder / "curve.png").read_bytes() == figure.png
  page = html.Report("Title", sections=[html.Section("One", figures=[figure])])
  with pytest.raises(ValueError, match="lacks loss"):
    report.write({"stages": report.costs}, page, required=["loss"])
  assert not (folder / "index.html").exists()
  report.write({"loss": 1.5, "stages": report.costs}, page, required=["loss"])
  assert json.loads((folder / "summary.json").read_text())["loss"] == 1.5
  assert "A curve." in (folder / "index.html").read_text()


def test_the_last_words_of_a_run(report, tmp_path):
  class System:
    def table(self, summary):
      return run_report.text_table([("name", "loss"), ("a", str(summary["loss"]))])

  report.write({"loss": 1.5}, html.Report("Title"))
  stages = [skeleton.Stage("train", print, result="model"), skeleton.Stage("report", print)]
  assert run_report.ending(System(), stages, tmp_path) == (
    f"name  loss\na     1.5\n\nmodel:  {tmp_path / 'train'}\n"
    f"report: {tmp_path / 'report' / 'index.html'}")
