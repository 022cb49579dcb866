"""The embedded default: arms at equal cost, what is said of verification, and a run to its report.
"""

import json

import pytest

from lmops_jax.config import resolve
from lmops_jax.systems.socratic import Calls, Engine, NoLog, Rules, arms, simulate, skills
from lmops_jax.systems.socratic import study_report as report
from lmops_jax.systems.socratic.journal import read
from lmops_jax.systems.socratic.skills import Arithmetic

FILE = "socratic/smoke.gin"


def test_the_most_frequent_answer_counts_and_the_earliest_of_several():
  assert arms.majority(["2", "1", None, "1"]) == "1"
  assert arms.majority(["2", "1"]) == "2"
  assert arms.majority([None, None, "3"]) == "3"
  assert arms.majority([None]) is None


def _recorded(replies, statement="((1+2)*(3-1))"):
  """The nodes of a run whose replies are looked up by problem and pattern, in turn."""
  def rule(messages, place, unused):
    found = replies.get((place.problem, place.pattern))
    if found is not None:
      return found[place.attempt - 1]
    return {"CHECK": "VERDICT: OK", "VER": "VERDICT: OK",
            "ASSESS": f"DECISION: {'SPLIT' if place.problem == '0' else 'SOLVE'}"}[place.pattern]

  arithmetic, recorder = Arithmetic(modulus=10, levels=2), arms.Recorder()
  limits = arms.Solving().limits(arms.CHECKED, arithmetic)
  engine = Engine(statement, Calls(Rules(rule), NoLog(), limits, skills.patterns(),
                                   watch=recorder))
  engine.run()
  return {node["id"]: node for node in recorder.nodes(engine.tree, arithmetic)}


PLAN = {
  ("0", "DEC"): ["PART 1: (1+2)\nPART 2: (3-1)"],
  ("0.1", "DED"): ["CONCLUSION: 1+2=4\nANSWER: 4"],
  ("0.1", "VER"): ["VERDICT: ISSUE\nISSUE: wrong", "VERDICT: OK"],
  ("0.1", "REFINE"): ["CONCLUSION: 1+2=3\nANSWER: 3"],
  ("0.2", "DED"): ["CONCLUSION: 3-1=1\nANSWER: 1"],
  ("0", "INT"): ["[S1] [S2]\nCONCLUSION: 3*1=3\nANSWER: 3"],
}


def test_a_recorder_tells_what_became_of_each_operator():
  nodes = _recorded(PLAN)
  assert nodes["0.1"]["said"] == ["1+2=4", "1+2=3"] and nodes["0.1"]["right"] == [False, True]
  assert report.kind_of(nodes["0.1"]) == "mended"
  assert list(arms.verdicts(nodes["0.1"])) == [(False, False), (True, True)]
  assert report.kind_of(nodes["0.2"]) == "missed"  # 3-1 is 2
  assert list(arms.verdicts(nodes["0.2"])) == [(False, True)]
  assert report.kind_of(nodes["0"]) == "right at once"  # 3 times 1, as its parts came to
  found = report.verified(nodes.values())
  assert found["error"] == pytest.approx(2 / 3) and found["badly_split"] == 0
  assert found["accept"] == 1 and found["catch"] == 0.5 and found["mended"] == 1
  assert found["num"] == {"error": 3, "accept": 2, "catch": 2, "mended": 1}
  assert report.drawn({"nodes": list(nodes.values())}) == (
    "((1+2)*(3-1))   3*1=3\n├─ (1+2)   1+2=4 ✗ → 1+2=3\n└─ (3-1)   3-1=1 ✗")


def test_harm_is_told_from_mending():
  nodes = _recorded(PLAN | {
    ("0.2", "DED"): ["CONCLUSION: 3-1=2\nANSWER: 2"],
    ("0.2", "VER"): ["VERDICT: ISSUE\nISSUE: wrong", "VERDICT: ISSUE\nISSUE: wrong"],
    ("0.2", "REFINE"): ["CONCLUSION: 3-1=2\nANSWER: 2", "CONCLUSION: 3-1=5\nANSWER: 5"],
    ("0", "INT"): ["[S1] [S2]\nCONCLUSION: 3*5=5\nANSWER: 5"]})
  assert nodes["0.2"]["right"] == [True, True, False] and nodes["0.2"]["state"] == "unverified"
  assert report.kind_of(nodes["0.2"]) == "spoiled"
  assert list(arms.verdicts(nodes["0.2"])) == [(True, False), (True, False)]


def test_what_is_not_split_as_it_is_built_counts_apart():
  nodes = _recorded(PLAN | {("0", "DEC"): ["PART 1: (1+2)\nPART 2: (3-2)"]})
  assert not nodes["0"]["well_split"] and nodes["0"]["right"] == [False]
  assert report.verified(nodes.values())["badly_split"] == 1


def test_the_closed_form_is_that_of_the_simulation():
  found = {"error": 0.05, "accept": 0.95, "catch": 0.8}
  row = {"levels": 4, "nodes": [{"right": [True]}] * 15}
  said = report.predicted(found, 2, [row, {"levels": 4, "nodes": [{"right": [False]}] * 15}])
  assert said["measured"] == 0.5
  assert said["expected"] == pytest.approx(simulate.expected(0.05, 2).node ** 15)
  assert report.predicted({**found, "error": None}, 2, [row])["expected"] is None


def test_a_request_that_does_not_fit_is_refused_before_anything_runs():
  with pytest.raises(ValueError, match="longest request has 73 characters.*max_length=96"):
    resolve.load([FILE], ["LEVELS = 3"]).build()


@pytest.fixture(scope="module")
def workdir(run_stages, tmp_path_factory):
  path = tmp_path_factory.mktemp("study")
  assert set(run_stages(FILE, path).statuses.values()) == {"ran"}
  return path


@pytest.mark.slow
def test_a_run_ends_in_a_report(workdir):
  summary = json.loads((workdir / "report" / "summary.json").read_text())
  rows = {arm: arms.read_rows(workdir / report.stage_of(arm, 0)) for arm in arms.ARMS}
  for arm, of in rows.items():
    assert [row["number"] for row in of] == list(range(4))
    for row in of:
      assert row["right"] == (row["said"] == str(row["answer"]))
      lines = list(read(workdir / report.stage_of(arm, 0) / "journals" / f"{row['number']:04d}"))
      assert sum(line["kind"] == "reply" for line in lines) == row["calls"]
      assert sum(line["usage"]["prompt"] + line["usage"]["reply"] for line in lines
                 if line["kind"] == "reply") == row["tokens"]
    for level in (1, 2):
      own = [row["right"] for row in of if row["levels"] == level]
      assert summary["accuracy"][arm][str(level)]["mean"] == sum(own) / len(own)
  for arm in (arms.UNCHECKED, arms.STEPS, arms.VOTE):
    for row, checked in zip(rows[arm], rows[arms.CHECKED]):
      costs, budget = row["costs"], checked["tokens"]
      assert len(costs) == len(row["answers"]) and sum(costs) == row["tokens"]
      for i in range(1, len(costs)):
        assert sum(costs[:i]) + max(costs[:i]) <= budget
      assert len(costs) == 2 or sum(costs) + max(costs) > budget
  assert all(len(row["answers"]) == 1 for row in rows[arms.CHECKED] + rows[arms.GREEDY])
  page = (workdir / "report" / "index.html").read_text()
  assert "What verification did" in page and "A tree" in page
  assert "Socratic, checked" in resolve.load([FILE]).build().table(summary)


@pytest.mark.slow
def test_a_killed_stage_takes_its_replies_from_the_journals(run_stages, workdir):
  """Without the last lines of one journal the same rows come out, and the rest is not asked."""
  stage = workdir / report.stage_of(arms.CHECKED, 0)
  want = (stage / arms.ROWS).read_bytes()
  log = stage / "journals" / "0003" / "log.jsonl"
  whole = log.read_bytes().splitlines(keepends=True)
  partial = stage.with_name(stage.name + ".partial")
  stage.rename(partial)
  (partial / arms.ROWS).unlink()
  (partial / "journals" / "0003" / "log.jsonl").write_bytes(b"".join(whole[:-5]))
  before = {path: path.read_bytes() for path in partial.glob("journals/000[012]/log.jsonl")}
  run_stages(FILE, workdir, only=[report.stage_of(arms.CHECKED, 0)])
  assert (stage / arms.ROWS).read_bytes() == want and log.read_bytes() == b"".join(whole)
  assert all((stage / path.relative_to(partial)).read_bytes() == of for path, of in before.items())
