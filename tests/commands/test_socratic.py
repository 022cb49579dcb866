"""`lmops socratic`: from the command line to a page, with what is refused before any call."""

import json

import pytest

from lmops_jax import cli
from lmops_jax.commands import socratic_view
from lmops_jax.systems.socratic import Limits, Usage, backend_of
from tests.systems.socratic import study
from tests.systems.socratic.rules import cooperative, engine


@pytest.fixture
def problem(tmp_path):
  path = tmp_path / "problem.txt"
  path.write_text("Is 91 prime?\n")
  return path


@pytest.fixture
def model(monkeypatch):
  """What a plan names is replaced by rules."""
  from lmops_jax.systems.socratic import Rules
  made = Rules(cooperative())
  monkeypatch.setattr(backend_of, "backend_of", lambda named, read_seconds=None: made)
  return made


def lmops(*arguments):
  return cli.main(["socratic", *map(str, arguments)])


def solve(problem, tmp_path, *more):
  return lmops("solve", "--problem", problem, "--model", "m", "--workdir", tmp_path / "run",
               "--max-depth", 1, *more)


def test_solve_show_export_and_resume(problem, model, tmp_path, capsys):
  assert solve(problem, tmp_path, "--price-in", 2, "--price-out", 10) == 0
  shown = capsys.readouterr()
  assert "at most 200 calls, 400,000 tokens and a cost of 4, in" in shown.err
  assert "└─ ✓ 0.2  question 2 of 0  [verified]" in shown.out
  assert "verified, by the model's own checks only:\nwhole 0 from" in shown.out
  assert "0.1 -> verified" in shown.err and "9/200 calls" in shown.err
  calls = model.num_calls
  assert lmops("show", tmp_path / "run") == 0 == lmops("resume", tmp_path / "run")
  assert lmops("replay", tmp_path / "run") == 0
  assert "9 of 9 requests were built again exactly; the tree is the same" in capsys.readouterr().out
  for name in ("page.html", "page.md", "page.json"):
    assert lmops("export", tmp_path / "run", "--to", tmp_path / name) == 0
  assert model.num_calls == calls
  assert "Is 91 prime?" in (tmp_path / "page.html").read_text()
  assert json.loads((tmp_path / "page.json").read_text())["spent"]["turns"] == calls == 9


def test_a_run_whose_time_is_up_has_its_own_exit_code(problem, model, tmp_path, capsys,
                                                      monkeypatch):
  from lmops_jax.commands import socratic
  monkeypatch.setattr(socratic, "_clock", lambda minutes: lambda: model.num_calls >= 2)
  assert solve(problem, tmp_path, "--minutes", 5) == 3
  assert "the time is up" in capsys.readouterr().err
  assert lmops("show", tmp_path / "run") == 0
  assert "not finished" in capsys.readouterr().out


def test_interactive_runs_ask(problem, model, tmp_path, monkeypatch, capsys):
  said = iter(["a", "SOLVE", ".", "", "", "x", "Say more.", "."])
  monkeypatch.setattr("builtins.input", lambda prompt: next(said, ""))
  assert solve(problem, tmp_path, "--interactive", "--rounds", 0) == 0
  lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
  actions = [line["action"] for line in map(json.loads, lines) if line["kind"] == "human"]
  assert actions[0] == {"do": "answer", "text": "SOLVE"}
  assert {"do": "reject", "critique": "Say more."} in actions
  assert model.num_calls == 2


@pytest.mark.parametrize("change, message", [
  (("--max-turns", "-1"), "socratic.Limits.max_turns=-1"),
  (("--deduce", "Q"), "no persona 'Q'"), (("--key-env", "K"), "--key-env belongs to --endpoint"),
  (("--template", "XYZ=problem.txt"), "problem.txt"), (("--window", "0"), "--window 0 must be"),
  (("--pattern", "other"), "no installed package registers the pattern 'other'"),
  (("--endpoint", "http://example.com"), "uses http to the host"),
  (("--tools", "calculator"), "there is no tool 'calculator'"),
  (("--read-seconds", "0"), "--read-seconds 0.0 must be above 0"),
  (("--read-seconds", "9"), "--read-seconds belongs to --endpoint"),
  (("--endpoint", "https://example.com", "--key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY holds no key"),
])
def test_what_is_refused_before_any_call(problem, tmp_path, change, message, capsys):
  pytest.importorskip("httpx2")
  assert solve(problem, tmp_path, *change) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_tools_are_named_on_the_command_line(problem, model, tmp_path, capsys):
  pytest.importorskip("sympy")
  assert solve(problem, tmp_path) == 0  # without tools
  assert solve(problem, tmp_path, "--tools", "arithmetic") == 2
  assert "holds a run with another tools" in capsys.readouterr().err
  assert lmops("solve", "--problem", problem, "--model", "m", "--workdir", tmp_path / "other",
               "--max-depth", 0, "--tools", " arithmetic") == 0
  assert lmops("replay", tmp_path / "other") == 0 == lmops("replay", tmp_path / "run")
  assert '"tools": ["arithmetic"]' in (tmp_path / "other" / "log.jsonl").read_text()
  assert '"tools"' not in (tmp_path / "run" / "log.jsonl").read_text()


def test_how_long_to_wait_for_an_endpoint_is_no_part_of_the_plan(problem, tmp_path, monkeypatch):
  pytest.importorskip("httpx2")
  from lmops_jax.systems.socratic import http_backend
  waits = []

  class Waiting(http_backend.Http):
    def __init__(self, *args, read_seconds=None, **options):
      super().__init__(*args, **options)
      waits.append(read_seconds)

    def complete(self, messages, sampling, place, stream=None):
      return http_backend.Reply(cooperative()(messages, place, None), "stop", Usage(1, 1))

  monkeypatch.setattr(http_backend, "Http", Waiting)
  endpoint = ("--endpoint", "http://localhost:9/v1")
  assert solve(problem, tmp_path, *endpoint) == 0
  assert solve(problem, tmp_path, *endpoint, "--read-seconds", 600) == 0  # the same run
  assert lmops("resume", tmp_path / "run", "--read-seconds", 700) == 0
  assert waits == [None, 600, 700]


@pytest.mark.parametrize("data, message", [
  (b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (b"a\x07lpha", "control character '\\x07'")])
def test_problems_that_are_refused(problem, model, tmp_path, data, message, capsys):
  problem.write_bytes(data)
  assert solve(problem, tmp_path) == 2 and model.num_calls == 0
  assert message in capsys.readouterr().err


def test_repair_takes_control_characters_out(problem, model, tmp_path):
  problem.write_bytes(b"a\x07lpha")
  assert solve(problem, tmp_path, "--repair") == 0
  assert '"statement": "alpha"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_import_and_replay_of_the_study(tmp_path, capsys):
  path = tmp_path / "study.jsonl"
  path.write_text("\n".join(study.transcript_lines()))
  assert lmops("import", path, "--to", tmp_path / "page.html") == 0
  assert "95 whole" in capsys.readouterr().out.replace("\n", " ")
  assert lmops("replay", path) == 0
  assert "97 of 97 requests" in capsys.readouterr().out


def test_simulate(capsys):
  assert lmops("simulate", "--error", 0.05, "--problems", 5, "--levels", 2) == 0
  out = capsys.readouterr().out
  assert "closed form" in out and "verification helps: accept + catch = 1.75" in out


def test_without_an_action_the_study_runs(capsys):
  assert cli.main(["show", "socratic"]) == 0
  assert "@socratic.Study()" in capsys.readouterr().out
  assert cli.main(["socratic", "solv"]) == 2
  assert "solv" in capsys.readouterr().err


def test_the_drawn_tree_shows_states_and_cannot_be_styled_by_a_model(capsys):
  rich = pytest.importorskip("rich.console")
  drawn = socratic_view._Drawn(Limits())
  made, _ = engine(cooperative({"DEC": "PART 1: [red]x[/red]\nPART 2: y\u202ez"}), max_depth=1,
                   watch=drawn)
  made.run()
  console = rich.Console(width=120, no_color=True)
  with console.capture() as captured:
    console.print(drawn.tree())
  text = captured.get()
  assert "0.1 [red]x[/red]  verified" in text and r"y\u202ez" in text and "9/200 calls" in text
