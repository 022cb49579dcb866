"""The `lmops` command as a person meets it: quick to help, one line for an error, stoppable."""

import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

import lmops_jax
from lmops_jax import cli
from lmops_jax.config import gin_files, resolve
from tests import several_processes

SYSTEM = """
  import dataclasses, sys, time
  import gin
  from lmops_jax.stages.skeleton import Stage

  @gin.register(module="toy")
  @dataclasses.dataclass(frozen=True)
  class System:
    steps: int = 3
    pause: float = 0.0
    fail: str = ""
    name = "toy"

    def __post_init__(self):
      if self.steps < 1:
        raise ValueError(f"steps={self.steps} is less than 1.")

    def stages(self, partitioner):
      assert partitioner is None
      def count(context):
        context.log(f"counting to {self.steps}")
        if self.fail:
          raise {"value": ValueError, "type": TypeError}[self.fail]("it is broken")
        for i in range(self.steps):
          path = context.directory / str(i)
          if not path.exists():
            path.write_text("x")
            print("counted", i, flush=True)
            time.sleep(self.pause)
        context.flops += 2.5e9
      def report(context):
        found = len([p for p in context.input("count").iterdir() if p.name != "manifest.json"])
        (context.directory / "index.html").write_text(str(found))
        (context.directory / "summary.json").write_text(f'{{"found": {found}}}')
      return [Stage("count", count, reads=("steps",)), Stage("report", report, ("count",))]

    def table(self, summary):
      return f"counted {summary['found']}"
"""
GIN = """
  # A toy system that counts.
  import toy_cli_system
  STEPS = 3
  STAGES = None
  run.system = @toy.System()
  run.stages = %STAGES
  toy.System.steps = %STEPS
"""

JOB = ["-m", "lmops_jax.cli", "run", "job.gin"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """A current directory with the gin file of a system whose module can be imported."""
  (tmp_path / "modules").mkdir()
  (tmp_path / "modules" / "toy_cli_system.py").write_text(textwrap.dedent(SYSTEM))
  (tmp_path / "toy.gin").write_text(textwrap.dedent(GIN))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(
    [str(tmp_path / "modules"), os.path.dirname(os.path.dirname(lmops_jax.__file__))]))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path


def lmops(*arguments, **kwargs):
  return subprocess.run([sys.executable, "-m", "lmops_jax.cli", *arguments], text=True,
                        capture_output=True, timeout=3600, **kwargs)


def error_of(*arguments):
  """The one line that a refused command prints."""
  done = lmops(*arguments)
  assert done.returncode == 2, done
  assert done.stdout == "" and done.stderr.startswith("lmops: error: "), done
  assert done.stderr.count("\n") == 1, done.stderr
  return done.stderr.removeprefix("lmops: error: ").strip()


# -------------------------------------------------------------------------------- help and lists


@pytest.mark.parametrize("arguments", [
  ["--help"], ["list"], ["pds", "--help"], ["run", "--help"], ["--version"]])
def test_loads_nothing_heavy(arguments):
  done = subprocess.run([sys.executable, "-X", "importtime", "-m", "lmops_jax.cli", *arguments],
                        capture_output=True, text=True, timeout=3600)
  assert done.returncode == 0 and done.stdout, done
  imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.MULTILINE))
  assert "argparse" in imported  # the pattern does find what was imported
  heavy = ("jax", "jaxlib", "flax", "tensorflow", "seqio", "numpy", "gin")
  assert not {name for name in imported if name.split(".")[0] in heavy}


def test_help_lists_systems_and_commands():
  text = lmops("--help").stdout
  for word in ("pds", "run", "show", "list", "--gin.NAME=VALUE"):
    assert word in text


def test_list_has_one_line_for_each_system_and_file():
  lines = lmops("list").stdout.splitlines()
  assert lines[0].startswith("systems")
  for name in [*gin_files.systems(), *gin_files.packaged()]:
    matching = [line for line in lines if line.split()[:1] == [name]]
    assert len(matching) == 1 and len(matching[0].split()) > 2, name


def test_systems_are_folders_with_a_default(tmp_path, monkeypatch):
  for name in ("pds/default", "learning_law/default", "pds/paper", "optim/default", "empty/other",
               "top", "a/b/default"):
    path = tmp_path / f"{name}.gin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# x")
  monkeypatch.setattr(gin_files, "root", lambda: tmp_path)
  assert gin_files.systems() == ["learning-law", "pds"]


# ------------------------------------------------------------------------------------------ runs


def test_run_and_rerun(toy):
  done = lmops("run", "toy.gin")
  assert done.returncode == 0, done.stderr
  page = "lmops_runs/toy/report/index.html"
  assert done.stdout.endswith(f"counted 3\n\nreport: {page}\n")
  assert (toy / page).read_text() == "3"
  table = [line.split() for line in done.stdout.splitlines()[3:6]]  # below "counted 0" to 2
  assert table[0] == ["stage", "time", "FLOPs"]
  assert table[1][:2] == ["count", "ran"] and table[1][3] == "2.5G"
  assert re.search(r"^  total .*  2.5G$", done.stdout, flags=re.MULTILINE)
  assert "workdir: lmops_runs/toy\n" in done.stderr
  assert "count: counting to 3" in done.stderr
  again = lmops("run", "toy.gin")
  assert [line.split()[1] for line in again.stdout.splitlines()[1:3]] == ["cached", "cached"]
  changed = lmops("run", "toy.gin", "--gin.STEPS=4")
  assert "count: running (steps: 3 -> 4)" in changed.stderr
  assert "counted 4" in changed.stdout


def test_an_address_is_no_workdir(toy):
  done = lmops("run", "toy.gin", "--workdir", "gs://bucket/run")
  assert done.returncode == 2 and done.stderr == (
    "lmops: error: --workdir gs://bucket/run is an address, not a folder; mount the storage and "
    "give the path of a folder on it.\n")
  assert not (toy / "gs:").exists()


def test_workdir_keeps_the_resolved_configuration(toy):
  assert lmops("run", "toy.gin", "--workdir", "w", "--gin.STEPS=2").returncode == 0
  kept = (toy / "w" / "config.gin").read_text()
  assert "  steps = 2\n" in kept and "%" not in kept
  again = lmops("run", "w/config.gin", "--workdir", "w")
  assert [line.split()[1] for line in again.stdout.splitlines()[1:3]] == ["cached", "cached"]


def test_some_stages(toy):
  done = lmops("run", "toy.gin", '--gin.STAGES="count"')
  assert done.returncode == 0 and "counted 3" not in done.stdout  # no summary of half a run
  assert error_of("run", "toy.gin", "--gin.STAGES=['reprot']") == (
    "there is no stage 'reprot'; the nearest valid name is 'report'.")
  assert "out of date (steps: 3 -> 9); run 'count' first" in error_of(
    "run", "toy.gin", '--gin.STAGES="report"', "--gin.STEPS=9")
  assert "counted 3" not in lmops("run", "toy.gin", '--gin.STAGES="report"').stdout


def test_further_gin_files_and_plugins(toy):
  (toy / "more.gin").write_text("STEPS = 5\n")
  assert "counted 5" in lmops("run", "toy.gin", "--gin_file", "more.gin", "--workdir", "a").stdout
  assert "counted 5" in lmops("run", "toy.gin", "more.gin", "--workdir", "a").stdout
  (toy / "modules" / "plugin.py").write_text(textwrap.dedent("""
    import gin
    @gin.register(module="plugin")
    def seven():
      return 7
  """))
  for option in (["--gin_import", "plugin"], ["--gin_import=plugin"]):
    done = lmops("run", "toy.gin", *option, "--gin.STEPS=@plugin.seven()", "--workdir", "b")
    assert "counted 7" in done.stdout, done.stderr


@pytest.mark.parametrize("file, name", [
  ("pds/default.gin", "pds"), ("pds/smoke.gin", "pds-smoke"), ("toy.gin", "toy")])
def test_default_workdir(toy, file, name):
  (toy / "pds").mkdir()
  path = gin_files.root() / file if file.startswith("pds") else toy / file
  assert str(cli._default_workdir(path.resolve())) == f"lmops_runs/{name}"


def test_environment_defaults_do_not_override(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  cli._set_environment()
  assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "lmops_jax" / "xla")
  monkeypatch.undo()


# ------------------------------------------------------------------------------------------ show


def test_show(toy):
  done = lmops("show", "toy.gin", "--gin.STEPS=8")
  assert done.returncode == 0, done.stderr
  assert "# --gin.NAME=VALUE sets:\n#   STEPS = 8\n" in done.stdout
  assert "toy.System:\n  steps = 8\n" in done.stdout
  assert not (toy / "lmops_runs").exists()
  (toy / "shown.gin").write_text(done.stdout)
  again = lmops("show", "shown.gin")
  strip = [line for line in done.stdout.splitlines() if not line.startswith("#")]
  assert [line for line in again.stdout.splitlines() if not line.startswith("#")] == strip


def test_reader_that_leaves_early(toy):
  shell = f"{sys.executable} -m lmops_jax.cli list | true; echo ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=3600)
  assert done.stderr == "" and done.stdout.strip() in ("0", "141")


# ---------------------------------------------------------------------------------------- errors


def test_refused_before_any_work(toy):
  assert error_of("pdss") == (
    "there is no system or command 'pdss'; the nearest valid name is 'pds'.")
  assert error_of("toy.gin") == (
    "'toy.gin' is not a command; to run that file, write lmops run toy.gin.")
  assert error_of("run", "toi.gin") == (
    "there is no gin file 'toi.gin'; the nearest valid name is 'toy.gin'.")
  assert "'STEPS'" in error_of("run", "toy.gin", "--gin.STEPZ=3")
  assert "'steps'" in error_of("run", "toy.gin", "--gin.toy.System.step=3")
  assert error_of("run", "toy.gin", "--gin.STEPS") == (
    "--gin.STEPS has no value; write --gin.STEPS=VALUE.")
  assert "no bindings" in error_of("list", "--gin.STEPS=3")
  assert error_of("run", "toy.gin", "--gin.STEPS=0") == (
    "run.system=@toy.System: steps=0 is less than 1.")
  assert "--worrkdir" in error_of("run", "toy.gin", "--worrkdir", "x")
  assert "COMMAND" in error_of()
  assert not (toy / "lmops_runs").exists()


def test_failing_stage(toy):
  assert "stage count: it is broken" in lmops("run", "toy.gin", "--gin.toy.System.fail='value'"
                                              ).stderr.splitlines()[-1]
  done = lmops("run", "toy.gin", "--gin.toy.System.fail='type'")
  assert done.stderr.splitlines()[-1] == (
    "lmops: error: stage count: TypeError: it is broken (--traceback shows where)")
  assert "Traceback" not in done.stderr
  done = lmops("run", "toy.gin", "--gin.toy.System.fail='type'", "--traceback")
  assert done.returncode == 2 and "Traceback" in done.stderr
  assert 'raise {"value": ValueError' in done.stderr


@pytest.mark.parametrize("number, code, word", [
  (signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_stopped_by_a_signal(toy, number, code, word):
  process = subprocess.Popen(
    [sys.executable, "-m", "lmops_jax.cli", "run", "toy.gin", "--gin.toy.System.pause=0.3",
     "--gin.STEPS=6"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "counted 0\n"
  process.send_signal(number)
  _, err = process.communicate(timeout=3600)
  assert process.returncode == code
  assert err.splitlines()[-1] == (
    f"lmops: {word}; run the same command again to continue where it stopped.")
  done = lmops("run", "toy.gin", "--gin.STEPS=6")
  assert "count: resuming (interrupted earlier)" in done.stderr
  assert "counted 0" not in done.stdout and "counted 6" in done.stdout


def test_bindings_are_split_from_arguments():
  arguments = ["run", "a.gin", "--gin.A=1", "--workdir", "w", "--gin.b/c.d='x=y'"]
  assert cli._split_bindings(arguments) == (
    ["run", "a.gin", "--workdir", "w"], ["A = 1", "b/c.d = 'x=y'"])


def test_messages_are_one_line():
  assert cli._one_line(ValueError("two\n  lines")) == "two lines"
  assert cli._one_line(KeyError("a name")) == "KeyError: a name (--traceback shows where)"
  assert cli._one_line(resolve.ConfigError("x.")) == "x."
  assert cli._one_line(ValueError()) == "no message"


@pytest.fixture
def job(toy):
  """Gin files of a system that takes a mesh; all processes work in its first stage."""
  (toy / "modules" / "toy_job_system.py").write_text(textwrap.dedent("""
    import gin
    from lmops_jax.stages.skeleton import Stage

    @gin.register(module="toy_job")
    class System:
      name = "job"

      def __init__(self, size=8):
        self.size = size

      def stages(self, partitioner):
        if self.size > 99:
          raise ValueError(f"size={self.size} is too large.")
        assert partitioner.mesh.size == 2
        def work(context):
          (context.directory / f"part{context.group.index}").write_text(str(context.group.count))
        def read(context):
          folder = context.input("work")
          found = [(folder / f"part{i}").read_text() for i in range(2)]
          (context.directory / f"saw{context.group.index}").write_text(" ".join(found))
          if context.writes:
            (context.directory / "summary.json").write_text("{}")
        return [Stage("work", work, reads=("size",)), Stage("report", read, ("work",))]

      def table(self, summary):
        return "all done"
  """))
  (toy / "job.gin").write_text(textwrap.dedent("""
    import toy_job_system
    import lmops_jax.mesh.meshes
    SIZE = 8
    STAGES = None
    run.system = @toy_job.System()
    run.mesh = @mesh.make()
    run.stages = %STAGES
    toy_job.System.size = %SIZE
  """))
  return toy


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_one_job(job):
  """Both work in each stage; only the first decides, writes manifests and prints the table."""
  for status in ("ran", "cached"):
    ended = several_processes.finish(several_processes.start(JOB, 2))
    assert [code for code, _ in ended] == [0, 0], ended
    first, second = (out.splitlines() for _, out in ended)
    assert [line.split()[1] for line in first[-7:-5]] == [status, status]
    assert first[-3] == "all done" and "all done" not in second
  work = job / "lmops_runs" / "job"
  for index in range(2):
    assert (work / "report" / f"saw{index}").read_text() == "2 2"
  assert not list(work.glob(".job-*"))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("other, said", [
  ("--gin.SIZE=4", "disagree: toy_job.System.size is 8 in process 0 and 4 in process 1; start all"),
  ("--gin.STAGES='work'", "the list of stages is work, report in process 0 and work in process 1;"),
  ("--workdir=elsewhere", "lmops_runs/job in process 0 and .*/elsewhere, another folder, in "),
  ("--gin.SIZE=100", r"process 1 of this job cannot start: size=100 is too large\."),
  ("--gin.SIZE='", r"process 1 of this job cannot start: --gin\.SIZE"),
  ("--gin.run.mesh=None", "process 1 of this job cannot start: .*run.mesh is None"),
])
def test_processes_that_disagree_all_end_with_the_same_sentence(job, other, said):
  """Before any stage, and long before jax would notice (100 seconds and more)."""
  ended = several_processes.finish(several_processes.start(JOB, 2, own=((), (other,))))
  assert [code for code, _ in ended] == [2, 2], ended
  first, second = (out.strip().splitlines()[-1] for _, out in ended)
  assert re.search(said, first), ended
  assert second == first.replace("process 1 of this job cannot start: ", "")
  assert not (job / "lmops_runs" / "job" / "work").exists() and not (job / "elsewhere").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_first_process_cannot_start_and_the_other_ends(job):
  ended = several_processes.finish(
    several_processes.start(JOB, 2, own=(("--gin.SIZE=100",), ())))
  assert [code for code, _ in ended] == [2, 2], ended
  first, other = (out.strip().splitlines()[-1] for _, out in ended)
  assert first == "lmops: error: size=100 is too large."
  assert other == "lmops: error: process 0 of this job cannot start: size=100 is too large."
