"""What the processes of a job compare before their first stage, and how all of them end."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lmops_jax
from lmops_jax.host.manifests import StageError
from lmops_jax.mesh import agreement, processes

CONFIG = """\
import lmops_jax.systems.pds
import my_module

run:
  system = @pds.Pipeline()
  stages = ['solve']

proxy/pds.Pretrain:
  batch_size = 8
  keep_steps = (
    10,
    20,
  )

# pds.Pretrain.loss is my_module.loss
optim.sgd:
  learning_rate = 0.1
"""


class _Board:
  """What jax's coordination service is to processes, for threads."""

  def __init__(self):
    self.texts, self.changed = {}, threading.Condition()

  def put(self, key, text):
    with self.changed:
      assert key not in self.texts
      self.texts[key] = text
      self.changed.notify_all()

  def get(self, key, whose):
    with self.changed:
      self.changed.wait_for(lambda: key in self.texts)
      return self.texts[key]


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch):
  monkeypatch.setattr(processes._Requests, "all_end", False)


def _plan(workdir, config=CONFIG, stages=("solve",), data="d0"):
  identity = {"prepare": {"settings": {"corpus.fingerprint": data}}}
  return agreement.plan_of("pds", stages, identity, config, workdir)


def _meet(plans, workdirs, refusals=()):
  """What each of several processes raises, in their order; None where it goes on."""
  board = _Board()

  def process(index):
    council = agreement.Council(index, len(plans), board.put, board.get)
    try:
      if index in refusals:
        raise ValueError("no good")
      council.start()
      sign = {"sign": "sign"} if index == 0 else {}
      council.agree({**plans[index], **sign}, workdirs[index])
    except StageError as error:
      return str(error)
    except ValueError as error:
      council.refuse(str(error))
      return str(error)
    council.refuse("too late to be heard")
    return None

  with ThreadPoolExecutor(len(plans)) as pool:
    return list(pool.map(process, range(len(plans))))


@pytest.fixture
def workdir(tmp_path):
  """A folder with the sign that the first process puts there."""
  (tmp_path / "sign").touch()
  return tmp_path


def test_processes_that_agree_go_on(workdir):
  assert _meet([_plan(workdir)] * 3, [workdir] * 3) == [None] * 3
  assert not processes._Requests.all_end
  alone = agreement.Council()
  alone.start()
  alone.agree({}, workdir)
  alone.refuse("nobody hears it")


@pytest.mark.parametrize("change, said", [
  ({"config": CONFIG.replace("= 8", "= 4")},
   "proxy/pds.Pretrain.batch_size is 8 in process 0 and 4 in process 2; start all of them with the "
   "same gin files and bindings."),
  ({"config": CONFIG.replace("    20,", "    30,")},
   "proxy/pds.Pretrain.keep_steps is ( 10, 20, ) in process 0 and ( 10, 30, ) in process 2; "),
  ({"config": CONFIG.replace("my_module.loss", "my_module.other")},
   "pds.Pretrain.loss is my_module.loss in process 0 and my_module.other in process 2; "),
  ({"config": CONFIG + "  nesterov = True\n"},
   "optim.sgd.nesterov is not set in process 0 and True in process 2; "),
  ({"config": CONFIG.replace("  batch_size = 8\n", "")},
   "proxy/pds.Pretrain.batch_size is 8 in process 0 and not set in process 2; "),
  ({"stages": ("solve", "select")},
   "the list of stages is solve in process 0 and solve, select in process 2; "),
  ({"data": "d1"}, "corpus.fingerprint of stage prepare is d0 in process 0 and d1 in process 2; "
   "give all of them the same files and bindings."),
])
def test_the_first_difference_is_named_in_all(workdir, change, said):
  plans = [_plan(workdir)] * 2 + [_plan(workdir, **change)] * 2
  found = _meet(plans, [workdir] * 4)
  assert len(set(found)) == 1
  assert found[0].startswith(f"the processes of this job disagree: {said}")
  assert processes._Requests.all_end


def test_other_releases_code_and_options_are_named(workdir):
  ours = _plan(workdir)
  assert {"jax", "numpy", "lmops_jax", "code of lmops_jax"} <= set(ours["versions"])
  for kind, name in (("versions", "jax"), ("versions", "code of lmops_jax"),
                     ("environment", "XLA_FLAGS"), ("modules", "the module my_module")):
    other = {**ours, kind: {**ours[kind], name: "other"}}
    first, second = _meet([ours, other], [workdir] * 2)
    assert f"disagree: {name} is " in first and "other in process 1" in first and first == second


def test_what_one_process_may_have_for_itself_is_not_compared(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--b=1 --xla_dump_to=/tmp/0 --a=1")
  before = agreement._environment()
  monkeypatch.setenv("XLA_FLAGS", "--a=1  --b=1 --xla_dump_to=/tmp/1")
  assert agreement._environment() == before
  monkeypatch.setenv("XLA_FLAGS", "--a=1 --b=2")
  assert agreement._environment() != before


def test_names_of_stages_count_and_not_how_they_were_asked_for(workdir):
  other = _plan(workdir, config=CONFIG.replace("['solve']", "['solve/pds']"))
  assert _meet([_plan(workdir), other], [workdir] * 2) == [None, None]


def test_changed_code_of_the_same_release_is_seen(tmp_path):
  package = tmp_path / "lmops_jax"
  shutil.copytree(Path(lmops_jax.__file__).parent, package)
  with (package / "processes.py").open("a") as file:
    file.write("# changed\n")
  done = subprocess.run(
    [sys.executable, "-c", "from lmops_jax.mesh import agreement; print(agreement._code())"],
    env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, text=True, capture_output=True,
    check=True)
  assert done.stdout.strip() != agreement._code()


def test_another_folder_is_named(workdir, tmp_path_factory):
  elsewhere = tmp_path_factory.mktemp("elsewhere")
  found = _meet([_plan(workdir), _plan(elsewhere)], [workdir, elsewhere])
  assert len(set(found)) == 1
  assert f"the workdir is {workdir} in process 0 and {elsewhere}, another folder, in process 1" in (
    found[0])
  found = _meet([_plan(elsewhere)] * 2, [workdir, elsewhere])  # one path, two hosts' own disks
  assert f"and {elsewhere}, the same path on another disk, in process 1" in found[0]


@pytest.mark.parametrize("refusals", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_process_that_cannot_start_ends_the_others(workdir, refusals):
  found = _meet([_plan(workdir)] * 3, [workdir] * 3, refusals)
  for index, text in enumerate(found):
    said = "no good" if index in refusals else (
      f"process {refusals[0]} of this job cannot start: no good")
    assert text == said
