"""The embedded default as a run: its stages end in a report, and a second run uses them again."""

import json

import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.host.manifests import load_manifest
from lmops_jax.mesh.meshes import single_device
from lmops_jax.systems.promptist import arms, plan, policy
from lmops_jax.training.reinforce.journal import read_journal

FILE = "promptist/smoke.gin"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(run_stages, tmp_path_factory):
  path = tmp_path_factory.mktemp("promptist")
  assert set(run_stages(FILE, path).statuses.values()) == {"ran"}
  return path


def test_a_run_ends_in_a_report(workdir):
  summary = json.loads((workdir / "report" / "summary.json").read_text())
  rows = arms.read(workdir / "fixed") | arms.read(workdir / "evaluate/seed0")
  assert set(rows) == set(arms.ARMS)
  for domain in arms.DOMAINS:
    for arm in arms.ARMS:
      own = [row for row in rows[arm] if row["domain"] == domain]
      assert len(own) == 3
      score = np.mean([row["score"] for row in own])
      assert summary["figures"][domain][arm]["score"] == pytest.approx(score)
      for row in own:
        assert row["score"] == pytest.approx(row["relevance"] + row["gain"], abs=1e-5)
    difference = summary["compared"][domain]["rl - sft"]
    assert difference["mean"] == pytest.approx(
      summary["figures"][domain]["rl"]["score"] - summary["figures"][domain]["sft"]["score"])
  assert all(row["gain"] == 0 for row in rows["raw"])
  assert "rl - raw" in resolve.load([FILE]).build().table(summary)
  page = (workdir / "report" / "index.html").read_text()
  assert "Before and after" in page and "High reward, low relevance" in page


def test_manifests_hold_operations(workdir):
  system = resolve.load([FILE]).build()
  of = {stage: load_manifest(workdir / stage, stage)["flops"]
        for stage in ("towers", "unet", "sft/seed0", "rl/seed0")}
  assert of["unet"] == 2 * plan.unet_flops(system.generator)
  planned = {phase.name: phase.flops for phase in system.phases(
    single_device(), None, platform="cpu")}
  for stage, flops in of.items():  # a plan counts the largest vocabulary
    assert planned[stage.split("/")[0]] * 0.7 < flops <= planned[stage.split("/")[0]]


def test_every_rollout_is_kept(workdir):
  rows = list(read_journal(workdir / "rl/seed0" / policy.JOURNAL))
  assert [row["step"] for row in rows] == [0] * 8 + [1] * 8
  for row in rows:
    assert row["score"] == pytest.approx(sum(row["parts"].values()), abs=1e-6)
  assert all(row["kl"] == 0 for row in rows[:8])


def test_a_second_run_uses_the_generator_again(run_stages, workdir):
  again = run_stages(FILE, workdir, "UPDATES = 1").statuses
  assert {name for name, status in again.items() if status == "ran"} == {
    "rl/seed0", "evaluate/seed0", "report"}
