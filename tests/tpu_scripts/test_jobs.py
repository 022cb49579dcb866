"""Launching, following and ending a job on all hosts, and keeping it alive through pre-emptions."""

import subprocess

import pytest

POD = {"PROJECT": "p", "ZONE": "z", "NAME": "pod"}
# What a shell could change: quotes of both kinds, blanks, dollars, stars, newlines, nothing.
ARGUMENTS = ["run", "train/finetune.gin", "--gin.MODEL='/shared/my model'", "--gin.N=\"it's\"",
             "--gin.STAGES=[\"a\", 'b']", "--gin.A=$HOME `id` $(id) \\ * ; & | > ~ !", "",
             "two\nlines"]


def _launch(cloud, *options, arguments=("run", "a.gin"), workdir=None):
  return cloud("launch.sh", *options, "--", *arguments, "--workdir", str(workdir or cloud.folder))


@pytest.fixture
def pod(cloud):
  cloud.hosts(2)
  cloud.installed()
  return cloud


def test_arguments_reach_lmops_on_every_host_as_they_were_given(pod):
  done = _launch(pod, "--assume-shared", "--job-env", "LIBTPU_INIT_ARGS=--a=1 --b='2'",
                 "--job-env=EMPTY=", arguments=ARGUMENTS)
  assert done.returncode == 0, done.stderr
  assert pod.actions == ["hosts", "ssh check", "ssh start"]
  assert [line.split()[:2] for line in done.stdout.splitlines()] == [
    ["0-0", "started"], ["0-1", "started"]]
  pod.until_ended()
  assert sorted(run["env"]["HOST"] for run in pod.runs) == ["0-0", "0-1"]
  for run in pod.runs:
    assert run["argv"] == [*ARGUMENTS, "--workdir", str(pod.folder)]
    assert run["env"]["LIBTPU_INIT_ARGS"] == "--a=1 --b='2'" and run["env"]["EMPTY"] == ""
    assert run["env"]["LMOPS_DISTRIBUTED"] == "1"
    assert run["cwd"] == run["env"]["HOME"] + "/lmops"


def test_a_job_on_one_host_is_alone_and_starts_in_the_checkout(cloud):
  cloud.installed()
  (cloud.homes()[0] / "lmops" / "checkout").mkdir()
  assert _launch(cloud, arguments=("lmops", "run", "a.gin")).returncode == 0
  cloud.until_ended()
  run, = cloud.runs
  assert run["argv"][:2] == ["run", "a.gin"] and "LMOPS_DISTRIBUTED" not in run["env"]
  assert run["cwd"] == run["env"]["HOME"] + "/lmops/checkout"


def test_every_slice_gets_the_job(cloud):
  cloud.hosts(1, slices=2)
  cloud.installed()
  assert _launch(cloud, "--num-slices=2", "--assume-shared").returncode == 0
  cloud.until_ended()
  assert [run["env"]["LMOPS_DISTRIBUTED"] for run in cloud.runs] == ["1", "1"]


def test_a_second_job_is_refused_and_the_first_goes_on(pod):
  pod.codes("wait")
  assert _launch(pod, "--assume-shared").returncode == 0
  done = _launch(pod, "--assume-shared")
  assert done.returncode == 1
  assert "2 of 2 hosts refused: 0-0: a job is running (process " in done.stderr
  assert len(pod.runs) == 2 and "start" not in pod.actions[3:]
  states = pod("status.sh").stdout.splitlines()[1:]
  assert [line.split()[1] for line in states] == ["running", "running"]


def test_one_busy_host_keeps_the_others_from_starting(pod):
  pod.codes("wait")
  (pod.folder / "silent.json").write_text('["0-1"]')
  assert _launch(pod, "--assume-shared").returncode == 1  # one does not answer
  assert pod.runs == []
  (pod.folder / "silent.json").unlink()
  (pod.homes()[1] / "lmops" / "venv" / "bin" / "lmops").unlink()
  done = _launch(pod, "--assume-shared")
  assert done.returncode == 1 and pod.runs == []
  assert "1 of 2 hosts refused: 0-1: lmops_jax is not installed; run install.sh" in done.stderr


def test_storage_of_one_host_is_refused_on_several(pod):
  done = _launch(pod, workdir=pod.folder / "not yet" / "run")
  assert done.returncode == 1 and pod.runs == []
  assert f"0-0: {pod.folder}/not yet/run is on storage of this host alone (" in done.stderr
  assert "give --assume-shared" in done.stderr


def test_network_storage_is_taken(pod):
  """df knows it, and lists it no longer where only local file systems are asked for."""
  df = "import sys\nassert sys.argv[1] == '--local'\nsys.exit('df: no file systems processed')"
  pod.program(pod.folder / "host_bin" / "df", df)
  assert _launch(pod, workdir=pod.folder / "not yet" / "run").returncode == 0
  pod.until_ended()
  assert len(pod.runs) == 2


def test_before_install(cloud):
  done = _launch(cloud)
  assert done.returncode == 1 and "run install.sh" in done.stderr


def test_the_log_is_kept_over_launches_and_followed(pod):
  for _ in range(2):
    assert _launch(pod, "--assume-shared").returncode == 0
    pod.until_ended()
  assert pod("status.sh").stdout == "pod ACTIVE\n0-0 finished 0\n0-1 finished 0\n"
  lines = pod("tail.sh").stdout.splitlines()
  assert [line for line in lines if "hello" in line] == ["0-0: lmops says hello"] * 2
  assert sum("launched: env LMOPS_DISTRIBUTED=1 lmops run a.gin" in line for line in lines) == 2
  lines = pod("tail.sh", "--node=all", "--worker=all", "--tail-lines=1", "--no-follow").stdout
  assert lines.splitlines() == ["0-0: lmops says hello", "0-1: lmops says hello"]
  command, = [a for a in pod.calls[-1] if a.startswith("--command")]
  assert command == "--command=bash lmops/host.sh tail 1"


def test_following_ends_with_the_job(cloud):
  cloud.installed()
  cloud.codes("wait")
  assert _launch(cloud).returncode == 0
  tail = cloud.start("tail.sh", **POD)
  assert "0-0: lmops says hello\n" in (tail.stdout.readline(), tail.stdout.readline())
  assert cloud("stop.sh").returncode == 0
  tail.communicate(timeout=3600)
  assert tail.returncode == 0


def test_stop_sends_sigterm_to_all_and_waits_for_143(pod):
  pod.codes("wait")
  assert _launch(pod, "--assume-shared").returncode == 0
  done = pod("stop.sh")
  assert done.returncode == 0, done.stderr
  assert done.stdout == "0-0 stopped 143\n0-1 stopped 143\n"
  done = pod("stop.sh")  # nothing to stop
  assert (done.returncode, done.stdout) == (0, "0-0 stopped 143\n0-1 stopped 143\n")
  pod.codes(0)
  assert _launch(pod, "--assume-shared").returncode == 0  # and again


def test_stop_tells_of_a_job_that_does_not_end(cloud):
  cloud.installed()
  cloud.codes("wait")
  text = (cloud.folder / "lmops").read_text()
  cloud.program(cloud.homes()[0] / "lmops" / "venv" / "bin" / "lmops",
                text.replace("signal.sigwait([signal.SIGTERM])", "signal.sigwait([signal.SIGINT])"))
  assert _launch(cloud).returncode == 0
  done = cloud("stop.sh", "--stop-seconds=3")
  assert done.returncode == 1 and "the job still runs after 3 seconds." in done.stderr
  assert "0-0 running " in done.stdout


def test_a_host_that_was_restarted_has_lost_its_job(cloud):
  cloud.installed()
  cloud.codes("wait")
  assert _launch(cloud).returncode == 0
  cloud.end_all()
  cloud.until_ended()
  assert cloud("status.sh").stdout == "pod ACTIVE\n0-0 lost\n"


# ------------------------------------------------------------------------------------ keep alive

SLICE = ("--accelerator-type=v4-8", "--runtime-version=base", "--spot", "--assume-shared",
         "--requirement=lmops_jax", "--keep-alive")


def _short(actions):
  """Repeated looks in one: ssh state and describe between other calls are left out."""
  return [action for action in actions if action not in ("describe", "ssh state", "hosts")]


MAKE = ["create", "ssh", "scp", "ssh install"]
START = ["ssh check", "ssh start"]


def test_keep_alive_makes_the_slice_and_ends_with_the_job(cloud):
  cloud.hosts(2)
  cloud.lives(["ABSENT"], ["PROVISIONING", "ACTIVE"])
  done = _launch(cloud, *SLICE)
  assert done.returncode == 0, done.stderr
  assert _short(cloud.actions) == [*MAKE, *START]
  assert done.stdout.splitlines()[-2:] == ["0-0 finished 0", "0-1 finished 0"]


def test_keep_alive_makes_a_pre_empted_slice_anew_and_launches_the_same(cloud):
  cloud.hosts(2)
  cloud.lives(["ABSENT"], [*["ACTIVE"] * 5, "SUSPENDING", "SUSPENDED"],
              ["WAITING_FOR_RESOURCES", "ACTIVE"])
  cloud.codes("wait", 0)
  done = _launch(cloud, *SLICE, arguments=ARGUMENTS)
  assert done.returncode == 0, done.stderr
  assert _short(cloud.actions) == [*MAKE, *START, "delete", *MAKE, *START]
  assert "launch.sh: pod is SUSPENDING; restart 1" in done.stderr
  creates = [call for call in cloud.calls if call[3] == "create"]
  assert len(creates) == 2 and creates[0] == creates[1] and "--spot" in creates[0]
  starts = [a for call in cloud.calls for a in call if "host.sh start" in a]
  assert len(starts) == 2 and starts[0] == starts[1]
  assert len(cloud.runs) == 4
  assert all(run["argv"][:len(ARGUMENTS)] == ARGUMENTS for run in cloud.runs)


def test_keep_alive_notices_a_slice_that_was_taken_before_its_queued_resource_does(pod):
  pod.codes("wait", 0)
  pod.lives(["ACTIVE"], ["ACTIVE"])
  arguments = [*SLICE, "--", "run", "a.gin", "--workdir", str(pod.folder)]
  launch = pod.start("launch.sh", *arguments, **POD)
  assert launch.stderr.readline() == "launch.sh: pod is ACTIVE, the job is running\n"
  (pod.folder / "node_state").write_text("PREEMPTED")
  (pod.folder / "silent.json").write_text('["0-1"]')
  _, err = launch.communicate(timeout=3600)
  assert launch.returncode == 0, err
  assert "pod is PREEMPTED; restart 1" in err
  assert _short(pod.actions) == [*START, "delete", *MAKE, *START]


def test_keep_alive_ends_with_the_code_of_a_job_that_failed(pod):
  pod.codes(2)
  done = _launch(pod, *SLICE)
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    "launch.sh: the job failed: 0-0 finished 2,0-1 finished 2,")
  assert _short(pod.actions) == START


@pytest.mark.parametrize("code", [143, 75])
def test_keep_alive_launches_again_where_the_processes_were_told_to_end(pod, code):
  """As by the maintenance of a host, which keeps its disk and its slice."""
  pod.codes(code, 0)
  done = _launch(pod, *SLICE)
  assert done.returncode == 0, done.stderr
  assert _short(pod.actions) == START * 2
  assert "its processes ended (interrupted); restart 1" in done.stderr


def test_keep_alive_takes_the_end_of_peers_for_what_it_is(pod):
  """One host is told to end; the process of the other fails because it has lost its peer."""
  pod.codes({"0-0": 2, "0-1": 143}, 0)
  done = _launch(pod, *SLICE)
  assert done.returncode == 0 and _short(pod.actions) == START * 2, done.stderr


def test_keep_alive_gives_up_after_the_last_restart(pod):
  pod.codes(143)
  done = _launch(pod, *SLICE, "--max-restarts=2")
  assert done.returncode == 1 and _short(pod.actions) == START * 3
  assert "that was the last of --max-restarts 2." in done.stderr


def test_keep_alive_ends_after_stop(pod):
  pod.codes("wait")
  arguments = [*SLICE, "--", "run", "a.gin", "--workdir", str(pod.folder)]
  launch = pod.start("launch.sh", *arguments, **POD)
  assert launch.stderr.readline() == "launch.sh: pod is ACTIVE, the job is running\n"
  assert pod("stop.sh").returncode == 0
  out, _ = launch.communicate(timeout=3600)
  assert launch.returncode == 143
  assert out.splitlines()[-2:] == ["0-0 stopped 143", "0-1 stopped 143"]


def test_keep_alive_leaves_a_slice_alone_that_it_cannot_reach(pod):
  pod.codes("wait")
  pod.lives([*["ACTIVE"] * 3, "DENIED"])
  done = _launch(pod, *SLICE)
  assert done.returncode == 1 and "delete" not in pod.actions
  assert done.stderr.splitlines()[-1].endswith("the slices and the job are left as they are.")
  locks = [home / "lmops" / "job" / "lock" for home in pod.homes()]
  assert all(subprocess.run(["flock", "--nonblock", lock, "true"]).returncode for lock in locks)


@pytest.mark.parametrize("life,message", [
  ([["FAILED", "no capacity"]], "pod is FAILED: no capacity"), (["DENIED"], "active account"),
])
def test_keep_alive_does_not_repeat_what_never_worked(cloud, life, message):
  cloud.lives(["ABSENT"], life)
  done = _launch(cloud, *SLICE)
  assert done.returncode == 1 and message in done.stderr
  assert done.stderr.splitlines()[-1] == "launch.sh: nothing has been launched."
  assert cloud.actions.count("create") == 1
