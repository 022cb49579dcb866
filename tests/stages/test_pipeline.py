"""Stages killed, corrupted, starved of disk space, contended for: never wrong, always explained."""

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lmops_jax.host import manifests
from lmops_jax.host.records import checksum
from lmops_jax.stages.pipeline import Group, Stage, StageError, read_manifest, run_stages

# The same three stages in this process and in ones that get killed: `count` writes ten pieces and
# keeps those of an earlier attempt, `sum/all` and `show` read them.
STAGES = textwrap.dedent("""
  import json, os, signal, sys, time
  from lmops_jax.stages.pipeline import Stage

  def stages(size=3, pause=0.0, tail="."):
    def count(context):
      for i in range(10):
        path = context.directory / "pieces" / f"{i}.json"
        if not path.exists():
          path.parent.mkdir(exist_ok=True)
          writing = path.with_suffix(".tmp")
          writing.write_text(json.dumps([i] * size))
          time.sleep(pause)
          writing.rename(path)
          context.flops += 1

    def add(context):
      pieces = sorted((context.input("count") / "pieces").glob("*.json"))
      total = sum(sum(json.loads(piece.read_text())) for piece in pieces)
      (context.directory / "total").write_text(str(total))
      context.extra["total"] = total

    def show(context):
      text = (context.input("sum/all") / "total").read_text() + tail
      (context.directory / "index.html").write_text(text)

    return [Stage("count", count, settings={"size": str(size)}),
            Stage("sum/all", add, ("count",)),
            Stage("show", show, ("count", "sum/all"), {"tail": repr(tail)})]
""")
_NAMESPACE: dict = {}
exec(STAGES, _NAMESPACE)
stages = _NAMESPACE["stages"]


def run(workdir, only=None, **settings):
  return run_stages(stages(**settings), workdir, only=only, system="toy")


def statuses(records):
  return [(record.name, record.status) for record in records]


def outputs(workdir):
  """Content of every file that the stages wrote, without the records of the pipeline."""
  ours = {"manifest.json", "log.txt", "config.gin", "lmops.json", ".lock"}
  return {path.relative_to(workdir).as_posix(): path.read_bytes()
          for path in Path(workdir).rglob("*") if path.is_file() and path.name not in ours}


def spawn(script, *arguments, **kwargs):
  """A Python process that knows `stages` and `run_stages`."""
  code = STAGES + "\nfrom lmops_jax.stages.pipeline import run_stages\n" + textwrap.dedent(script)
  return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Outputs of `stages(size)` by size."""
  found = {}
  for size in (3, 4):
    workdir = tmp_path_factory.mktemp(f"size{size}")
    run(workdir, size=size)
    found[size] = outputs(workdir)
  return found


# --------------------------------------------------------------------------------- ordinary runs


def test_runs_in_order_and_is_free_when_finished(tmp_path, undisturbed):
  records = run(tmp_path)
  assert statuses(records) == [("count", "ran"), ("sum/all", "ran"), ("show", "ran")]
  assert (tmp_path / "show" / "index.html").read_text() == "135."
  assert outputs(tmp_path) == undisturbed[3]
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*/*")}
  again = run(tmp_path)
  assert statuses(again) == [("count", "cached"), ("sum/all", "cached"), ("show", "cached")]
  assert [r.flops for r in again] == [10, 0, 0]
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*/*")} == before


def test_manifest(tmp_path):
  run(tmp_path)
  manifest = read_manifest(tmp_path, "sum/all")
  assert manifest["settings"] == {} and manifest["extra"] == {"total": 135}
  assert manifest["inputs"] == {"count": read_manifest(tmp_path, "count")["fingerprint"]}
  assert manifest["seconds"] >= 0 and manifest["attempts"] == 1
  assert list(manifest["files"]) == ["total"] and manifest["files"]["total"][0] == 3
  assert {"python", "lmops_jax", "jax", "numpy"} <= set(manifest["versions"])
  with pytest.raises(StageError, match="stage 'sum/most' is not finished"):
    read_manifest(tmp_path, "sum/most")


def test_changed_setting_runs_what_depends_on_it_and_says_why(tmp_path, undisturbed):
  run(tmp_path)
  records = run(tmp_path, size=4)
  assert [(r.name, r.status, r.reason) for r in records] == [
    ("count", "ran", "size: 3 -> 4"), ("sum/all", "ran", "input count changed"),
    ("show", "ran", "input count changed; input sum/all changed")]
  assert outputs(tmp_path) == undisturbed[4]
  records = run(tmp_path, size=4, tail="!")
  assert [(r.name, r.status, r.reason) for r in records][2] == ("show", "ran", "tail: '.' -> '!'")
  assert statuses(records)[:2] == [("count", "cached"), ("sum/all", "cached")]
  log = (tmp_path / "log.txt").read_text()
  assert "count: running (size: 3 -> 4)" in log


def test_reasons_name_added_and_removed_settings_and_inputs(tmp_path):
  def go(inputs, **settings):
    made = [Stage("a", lambda c: None), Stage("b", lambda c: None),
            Stage("c", lambda c: None, inputs, settings)]
    return run_stages(made, tmp_path, system="toy")[-1].reason

  go(("a",), x="1", y="2")
  assert go(("b",), x="1", z="3") == (
    "z: not set -> 3; y: 2 -> not set; new input b; no longer reads a")
  many = {f"k{i}": "1" for i in range(9)}
  assert go(("b",), x="1", z="3", **many).endswith("k3: not set -> 1; and 5 more")


def test_context(tmp_path, capsys):
  def first(context):
    context.log("hello")
    context.extra.update(mean=np.float32(0.5), row=np.arange(2), by_id={1: "a", 10: "b", 9: "c"})
    (context.directory / "deep/er").mkdir(parents=True)
    (context.directory / "deep/er/x").write_bytes(b"1")

  def second(context):
    assert context.name == "second"
    assert context.input("first") == tmp_path / "first"
    assert context.manifest("first")["extra"] == {
      "mean": 0.5, "row": [0, 1], "by_id": {"1": "a", "10": "b", "9": "c"}}
    with pytest.raises(KeyError, match="does not name 'frist' among its inputs.*'first'"):
      context.input("frist")
    with context.progress(2) as bar:
      bar.update(2)

  run_stages([Stage("first", first), Stage("second", second, ("first",))], tmp_path, system="toy")
  assert "first: hello" in capsys.readouterr().err
  assert "first: hello" in (tmp_path / "log.txt").read_text()


def test_config_is_kept(tmp_path):
  run_stages([], tmp_path, system="toy", config="run.system = 1\n")
  assert (tmp_path / "config.gin").read_text() == "run.system = 1\n"


# ------------------------------------------------------------------------------ parts of a run


def test_only_some_stages(tmp_path):
  with pytest.raises(StageError, match="stage 'sum/all' reads stage 'count', which is not finished "
                     ".*; run 'count' first"):
    run(tmp_path, only=["sum"])
  assert statuses(run(tmp_path, only=["count"])) == [("count", "ran")]
  assert statuses(run(tmp_path, only=["sum", "count"])) == [("count", "cached"), ("sum/all", "ran")]
  assert statuses(run(tmp_path, only=["sum/all"])) == [("sum/all", "cached")]
  with pytest.raises(StageError, match="'show' reads stage 'count', which is out of date "
                     r"\(size: 3 -> 5\)"):
    run(tmp_path, only=["show"], size=5)
  assert not (tmp_path / "show").exists() and not (tmp_path / "show.partial").exists()


@pytest.mark.parametrize("name, near", [("cuont", "count"), ("sun", "sum"), ("sum/al", "sum/all")])
def test_unknown_stage_in_only(tmp_path, name, near):
  with pytest.raises(StageError, match=f"there is no stage '{name}'; .* '{near}'"):
    run(tmp_path, only=[name])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made, message", [
  ([Stage("a", None, ("bb",)), Stage("b", None)], "'a' reads 'bb', which is not a stage; .*'b'"),
  ([Stage("a", None, ("b",)), Stage("b", None, ("c",)), Stage("c", None, ("b",))],
   "wait for each other: b <- c <- b"),
  ([Stage("a", None, ("a",))], "wait for each other: a <- a"),
  ([Stage("a", None), Stage("a", None)], "two stages are called 'a'"),
  ([Stage("a", None), Stage("a/b/c", None)], "'a/b/c' would lie inside the folder of stage 'a'"),
  ([Stage("../a", None)], "'../a' cannot name a stage"),
  ([Stage("a.partial", None)], "'a.partial' cannot name a stage"),
  ([Stage("", None)], "'' cannot name a stage"),
])
def test_bad_graphs(tmp_path, made, message):
  with pytest.raises(StageError, match=message):
    run_stages(made, tmp_path / "new", system="toy")
  assert not (tmp_path / "new").exists()


def test_inputs_come_first_whatever_the_order(tmp_path):
  assert [r.name for r in run_stages(stages()[::-1], tmp_path, system="toy")] == [
    "count", "sum/all", "show"]


# ---------------------------------------------------------------------------------------- failure


def test_failing_stage_names_itself_and_resumes(tmp_path):
  def fail(context):
    (context.directory / "kept").write_text("x")
    raise ValueError("no good")

  with pytest.raises(ValueError, match="no good") as error:
    run_stages([Stage("a/b", fail)], tmp_path, system="toy")
  assert error.value.__notes__ == ["in stage a/b"]
  assert not (tmp_path / "a/b").exists()

  def succeed(context):
    assert (context.directory / "kept").read_text() == "x"

  record, = run_stages([Stage("a/b", succeed)], tmp_path, system="toy")
  assert (record.status, record.reason) == ("resumed", "interrupted earlier")
  assert read_manifest(tmp_path, "a/b")["attempts"] == 2


def test_partial_folder_of_other_settings_is_not_used(tmp_path):
  def fail(context):
    (context.directory / "old").write_text("x")
    raise ValueError

  with pytest.raises(ValueError):
    run_stages([Stage("a", fail, settings={"k": "1"})], tmp_path, system="toy")

  def succeed(context):
    assert not (context.directory / "old").exists()

  record, = run_stages([Stage("a", succeed, settings={"k": "2"})], tmp_path, system="toy")
  assert (record.status, record.reason) == ("ran", "started earlier, then k: 1 -> 2")


def test_half_deleted_folder_is_never_resumed(tmp_path, monkeypatch):
  """Killed while it deletes the partial folder of other settings, then run with these again."""
  def fail(context):
    for name in ("first", "second"):
      (context.directory / name).write_text("x")
    raise ValueError

  def killed(folder):
    next(Path(folder).glob("[fs]*")).unlink()
    raise KeyboardInterrupt

  with pytest.raises(ValueError):
    run_stages([Stage("a", fail, settings={"k": "1"})], tmp_path, system="toy")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(shutil, "rmtree", killed)
    run_stages([Stage("a", fail, settings={"k": "2"})], tmp_path, system="toy")

  def look(context):
    left = {path.name for path in context.directory.glob("[fs]*")}
    assert left in (set(), {"first", "second"})

  run_stages([Stage("a", look, settings={"k": "1"})], tmp_path, system="toy")
  assert not (tmp_path / "a.discarded").exists()


def test_records_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
  run(tmp_path)
  before = (tmp_path / "config.gin").exists(), (tmp_path / "lmops.json").read_bytes()

  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  run_stages([], tmp_path, system="toy", config="old = 1\n")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(StageError, match="the workdir: no space is left"):
    run_stages([], tmp_path, system="toy", config="new = 2\n")
  assert (tmp_path / "config.gin").read_text() == "old = 1\n"
  assert (before[0], before[1]) == (False, (tmp_path / "lmops.json").read_bytes())


def test_extra_must_fit_json(tmp_path):
  def stage(context):
    context.extra["bad"] = object()

  with pytest.raises(TypeError, match="context.extra holds a object, which JSON cannot hold"):
    run_stages([Stage("a", stage)], tmp_path, system="toy")
  assert not (tmp_path / "a").exists()


def test_stage_may_not_write_the_manifest(tmp_path):
  def stage(context):
    (context.directory / "manifest.json").write_text("{}")

  with pytest.raises(StageError, match="wrote a file called manifest.json"):
    run_stages([Stage("a", stage)], tmp_path, system="toy")


# ------------------------------------------------------------------------------------ corruption


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path):
  path.write_bytes(path.read_bytes() + b"x")


def _flip(path):
  data = bytearray(path.read_bytes())
  data[0] ^= 1
  path.write_bytes(data)


def _flip_silently(path):
  """Bit rot: same size, same times."""
  status = path.stat()
  _flip(path)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("damage, word", [
  (_truncate, r"truncated \(8 bytes instead of 9\)"), (_lengthen, "longer than it was"),
  (_flip, "corrupted"), (_flip_silently, "corrupted"), (Path.unlink, "missing")])
def test_damaged_output_is_named_before_it_is_read(tmp_path, damage, word):
  run(tmp_path)
  victim = tmp_path / "count" / "pieces" / "3.json"
  damage(victim)
  with pytest.raises(StageError, match=f"^{victim}, an output of stage 'count', is {word}.*delete "
                     f"the folder {tmp_path}/count and run again"):
    run(tmp_path, tail="!")
  shutil.rmtree(tmp_path / "count")
  assert statuses(run(tmp_path, tail="!")) == [
    ("count", "ran"), ("sum/all", "cached"), ("show", "ran")]
  assert (tmp_path / "show" / "index.html").read_text() == "135!"


@pytest.mark.parametrize("damage, word", [
  (_truncate, "truncated"), (_flip, "corrupted"), (Path.unlink, "missing")])
def test_damaged_output_is_named_also_when_nothing_runs(tmp_path, damage, word):
  run(tmp_path)
  damage(tmp_path / "show" / "index.html")
  with pytest.raises(StageError, match=f"index.html, an output of stage 'show', is {word}"):
    run(tmp_path)


def _halve(path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [_halve, _flip, _lengthen, lambda p: p.write_text("")])
def test_damaged_manifest_is_named(tmp_path, damage):
  run(tmp_path)
  damage(tmp_path / "count" / "manifest.json")
  with pytest.raises(StageError, match="count/manifest.json, the manifest of stage 'count', is "
                     "damaged; delete the folder"):
    run(tmp_path)


def test_manifest_whose_figures_were_changed_is_damaged(tmp_path):
  run(tmp_path)
  path = tmp_path / "count" / "manifest.json"
  path.write_text(path.read_text().replace('"size": "3"', '"size": "4"'))
  with pytest.raises(StageError, match="damaged"):
    run(tmp_path, size=4)


def _fields(change):
  """A manifest or record whose checksum is right, and which lacks or holds what it should not."""
  def damage(path):
    record = json.loads(path.read_text())
    change(record)
    record.pop("checksum")
    path.write_text(json.dumps({**record, "checksum": checksum(record)}))

  return damage


_WRONG = {
  "empty": lambda path: path.write_text(""),
  "null": lambda path: path.write_text("null"),
  "list": lambda path: path.write_text("[]"),
  "number": lambda path: path.write_text("5"),
  "no field": lambda path: path.write_text("{}"),
  "deep": lambda path: path.write_text("[" * 100_000),
  "deep object": lambda path: path.write_text('{"a":' * 5000 + "1" + "}" * 5000),
  "digits": lambda path: path.write_text('{"attempts": ' + "9" * 5000 + "}"),
  "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
  "no seconds": _fields(lambda record: record.pop("seconds")),
  "no inputs": _fields(lambda record: record.pop("inputs")),
  "no fingerprint": _fields(lambda record: record.pop("fingerprint")),
  "settings": _fields(lambda record: record.update(settings=["size"])),
  "setting": _fields(lambda record: record.update(settings={"size": 3})),
  "nan": _fields(lambda record: record.update(seconds=float("nan"))),
  "infinite": _fields(lambda record: record.update(seconds=float("inf"))),
  "negative": _fields(lambda record: record.update(seconds=-1.0)),
  "text": _fields(lambda record: record.update(attempts="1")),
  "truth": _fields(lambda record: record.update(attempts=True)),
  "checksum": lambda path: path.write_text(path.read_text().replace('"size": "4"', '"size": "3"')),
}


@pytest.mark.parametrize("damage", [
  *_WRONG.values(), _fields(lambda record: record.pop("files")),
  _fields(lambda record: record.update(files=[])),
  _fields(lambda record: record["files"].update(total=[3])),
  _fields(lambda record: record["files"].update(total="abc")),
  _fields(lambda record: record.pop("stage")), _fields(lambda record: record.update(extra=5)),
], ids=[*_WRONG, "no files", "files", "file", "file text", "no stage", "extra"])
def test_a_manifest_of_any_other_content_is_damaged(tmp_path, damage):
  run(tmp_path, size=4)
  damage(tmp_path / "count" / "manifest.json")
  for only in (None, ["sum"]):
    with pytest.raises(StageError, match="count/manifest.json, the manifest of stage 'count', is "
                       "damaged; delete the folder"):
      run(tmp_path, only=only, size=4)


@pytest.mark.parametrize("damage", [
  *_WRONG.values(), Path.unlink, lambda path: (path.unlink(), path.mkdir()),
  lambda path: (path.unlink(), os.mkfifo(path)),
], ids=[*_WRONG, "missing", "folder", "fifo"])
def test_a_damaged_record_of_an_attempt_starts_the_stage_anew(tmp_path, undisturbed, damage):
  def killed(context):
    (context.directory / "pieces").mkdir()
    (context.directory / "pieces" / "0.json").write_text("[7]")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run_stages([Stage("count", killed, settings={"size": "4"})], tmp_path, system="toy")
  damage(tmp_path / "count.partial" / ".attempt.json")
  records = run(tmp_path, size=4)
  assert (records[0].status, records[0].reason) == (
    "ran", "the record of an earlier attempt is missing or damaged")
  assert outputs(tmp_path) == undisturbed[4]


@pytest.mark.parametrize("make", [
  lambda path: path.write_text("x"), lambda path: path.symlink_to("nowhere"),
  lambda path: path.symlink_to(path.parent)], ids=["file", "dangling link", "link"])
def test_whatever_lies_where_a_stage_works_is_put_away(tmp_path, undisturbed, make):
  run_stages([], tmp_path, system="toy")
  make(tmp_path / "count.partial")
  run(tmp_path, size=4)
  assert outputs(tmp_path) == undisturbed[4]


def test_a_record_that_cannot_be_read_now_is_left(tmp_path, monkeypatch):
  run(tmp_path, only=["count"])
  (tmp_path / "show.partial").mkdir()
  (tmp_path / "show.partial" / ".attempt.json").write_text("{}")
  read = Path.read_bytes

  def failing(path):
    if path.name == broken:
      raise OSError(errno.EIO, "Input/output error", str(path))
    return read(path)

  def failing_hash(paths):
    for path in paths:
      raise OSError(errno.EIO, "Input/output error", str(path))
    return []

  with monkeypatch.context() as patch, pytest.raises(StageError, match="count/pieces/0.json cannot "
                                                     "be read .Input/output error.; it was left"):
    patch.setattr(manifests, "hash_all", failing_hash)
    run(tmp_path)
  monkeypatch.setattr(Path, "read_bytes", failing)
  for broken in (".attempt.json", "manifest.json"):
    with pytest.raises(StageError, match=f"{broken} cannot be read .Input/output error.; it was "
                       "left as it is"):
      run(tmp_path)
  assert (tmp_path / "show.partial" / ".attempt.json").exists()


def test_file_that_the_stage_did_not_write(tmp_path):
  run(tmp_path)
  (tmp_path / "count" / "pieces" / "10.json").write_text("[1]")
  with pytest.raises(StageError, match="pieces/10.json was not written by stage 'count'"):
    run(tmp_path)


# --------------------------------------------------------------------------------- whose workdir


def test_foreign_workdir_is_refused_and_left_alone(tmp_path):
  for name in ("thesis.tex", "data.csv", "x", "y"):
    (tmp_path / name).write_text("mine")
  with pytest.raises(StageError, match=r"holds files that lmops did not write \(data.csv, "
                     r"thesis.tex, x and 1 more\); choose an empty or a new --workdir"):
    run(tmp_path)
  assert len(list(tmp_path.iterdir())) == 4


def test_foreign_folder_in_place_of_a_stage(tmp_path):
  run(tmp_path, only=["count"])
  (tmp_path / "show").mkdir()
  (tmp_path / "show" / "mine.txt").write_text("mine")
  with pytest.raises(StageError, match="show has no manifest.json, so lmops did not write it"):
    run(tmp_path)
  assert (tmp_path / "show" / "mine.txt").read_text() == "mine"


def test_workdir_of_another_system(tmp_path):
  run(tmp_path)
  with pytest.raises(StageError, match="belongs to the system 'toy', not to 'pds'"):
    run_stages([], tmp_path, system="pds")


@pytest.mark.parametrize("text", [
  "{", "", "[]", "{}", "5", '{"system": 5}', '{"system": null}', "[" * 100_000])
def test_damaged_marker(tmp_path, text):
  run(tmp_path)
  (tmp_path / "lmops.json").write_text(text)
  with pytest.raises(StageError, match="lmops.json is damaged"):
    run(tmp_path)


@pytest.mark.parametrize("name", ["lmops.json", ".lock", "log.txt"])
def test_a_fifo_among_the_files_of_a_workdir_does_not_hang(tmp_path, name):
  run(tmp_path)
  (tmp_path / name).unlink()
  os.mkfifo(tmp_path / name)
  with pytest.raises(StageError, match=f"{name} is (a FIFO|damaged)"):
    run(tmp_path)


def test_a_lock_that_holds_no_text_still_locks(tmp_path):
  run(tmp_path)
  with open(tmp_path / ".lock", "wb") as holder:
    fcntl.flock(holder, fcntl.LOCK_EX)
    holder.write(b"\xff\xfe")
    holder.flush()
    with pytest.raises(StageError, match="is in use by"):
      run(tmp_path)
  assert statuses(run(tmp_path))[0] == ("count", "cached")


def test_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(StageError, match=r"the workdir .*file/work cannot be used \(Not a directory"):
    run(tmp_path / "file" / "work")


def test_workdir_in_use(tmp_path):
  holder = spawn("""
    def hold(context):
      print("holding", flush=True)
      sys.stdin.read()
    run_stages([Stage("hold", hold)], sys.argv[1], system="toy")
  """, tmp_path, stdin=subprocess.PIPE)
  try:
    assert holder.stdout.readline() == "holding\n"
    with pytest.raises(StageError, match=f"is in use by process {holder.pid} on .* since "):
      run(tmp_path)
  finally:
    holder.kill()
    holder.communicate()
  assert statuses(run(tmp_path))[0] == ("count", "ran")  # the lock went with its process


# ------------------------------------------------------------------------------------ full disks


def test_full_disk_in_a_stage(tmp_path):
  """On a real file system of one MiB; what is there afterwards is complete or partial."""
  mount = tmp_path / "mount"
  mount.mkdir()
  made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount],
                        capture_output=True, text=True)
  if made.returncode:
    pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")
  try:
    work = mount / "work"
    run(work, only=["count"])
    rest = stages()[1:]

    def big(context):
      (context.directory / "big").write_bytes(bytes(2 << 20))

    made = [stages()[0], Stage("big", big, ("count",)), *rest]
    with pytest.raises(StageError, match="^stage big: no space is left on the device while writing "
                       f"{work}/big.partial .*MiB free.; make room and run the same command"):
      run_stages(made, work, system="toy")
    assert not (work / "big").exists()
    made[1] = Stage("big", lambda context: None, ("count",))
    (work / "big.partial" / "big").unlink()
    assert statuses(run_stages(made, work, system="toy")) == [
      ("count", "cached"), ("big", "resumed"), ("sum/all", "ran"), ("show", "ran")]

    filler = mount / "filler"  # not a byte left: nothing can be begun, and that is said
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
      while True:
        file.write(bytes(4096))
    with pytest.raises(StageError, match="no space is left on the device while writing"):
      run(work, size=4)
    with pytest.raises(StageError, match="^the workdir: no space is left on the device"):
      run(mount / "other")
    filler.unlink()
    assert statuses(run(work, size=4))[0] == ("count", "ran")
  finally:
    subprocess.run(["umount", mount], check=True)


def test_file_size_limit(tmp_path):
  """A quota that needs no privilege: no file of this process may exceed 4 KiB."""
  limited = spawn("""
    def big(context):
      with open(context.directory / "big", "wb") as file:
        file.write(bytes(10000))
    try:
      run_stages([Stage("big", big)], sys.argv[1], system="toy")
    except Exception as error:
      print(type(error).__name__, error)
  """, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
  out, _ = limited.communicate(timeout=3600)
  assert out.startswith(f"StageError stage big: the file would exceed the size limit while writing "
                        f"{tmp_path}/big"), out
  assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("error", [
  OSError(errno.ENOSPC, "No space left on device", "/data/x.bin"),
  OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x.bin"),
  ValueError("RESOURCE_EXHAUSTED: /data/x.bin: No space left on device [OS error 28]"),
], ids=["enospc", "quota", "library"])
def test_full_disk_under_other_names(tmp_path, error):
  def stage(context):
    try:
      raise error
    except type(error) as first:
      raise RuntimeError("could not save") from first

  with pytest.raises(StageError, match="stage a: no space is left on the device while writing "):
    run_stages([Stage("a", stage)], tmp_path, system="toy")


# ---------------------------------------------------------------------------------------- SIGKILL


def test_killed_before_every_change_of_the_disk(tmp_path, undisturbed):
  """Kills a run before its first, second, ... write, rename or deletion, then runs it to the end.

  It starts from a finished run of other settings, so that replacing old outputs is covered too. A
  forked child kills itself in an audit hook, which Python calls before each such operation.
  """
  script = spawn("""
    import shutil
    EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.link"}

    def child(workdir, fatal):
      seen = 0
      def hook(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[0], str) and arguments[2] & os.O_ACCMODE
        if event in EVENTS or writes:
          seen += 1
          if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
      pid = os.fork()
      if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.addaudithook(hook)
        try:
          run_stages(stages(4), workdir, system="toy")
          os._exit(0)
        except BaseException as error:
          print("died of", repr(error), flush=True)
          os._exit(1)
      return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    base = sys.argv[1]
    run_stages(stages(3), base + "/before", system="toy")
    for fatal in range(1, 1000):
      workdir = f"{base}/{fatal}"
      shutil.copytree(base + "/before", workdir)
      code = child(workdir, fatal)
      if code == 0:
        shutil.rmtree(workdir)
        break
      assert code == -signal.SIGKILL, code
      if fatal % 3 == 0:  # killed again, soon after it has resumed
        assert child(workdir, 5) == -signal.SIGKILL
    print(fatal - 1)
  """, tmp_path)
  out, err = script.communicate(timeout=3600)
  assert script.returncode == 0, out + err
  kills = int(out)
  assert kills > 60
  for fatal in range(1, kills + 1):
    workdir = tmp_path / str(fatal)
    records = run(workdir, size=4)
    assert all(record.status in ("ran", "resumed", "cached") for record in records)
    assert outputs(workdir) == undisturbed[4], f"after kill {fatal}"
    folders = {p.relative_to(workdir).as_posix() for p in workdir.rglob("*") if p.is_dir()}
    assert folders == {"count", "count/pieces", "sum", "sum/all", "show"}, f"after kill {fatal}"
    assert statuses(run(workdir, size=4)) == [
      ("count", "cached"), ("sum/all", "cached"), ("show", "cached")]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, undisturbed):
  rng = random.Random(0)
  script = """
    print("imported", flush=True)
    run_stages(stages(4, pause=0.01), sys.argv[1], system="toy")
  """
  resumed = 0
  for trial in range(12):
    workdir = tmp_path / str(trial)
    for _ in range(6):
      process = spawn(script, workdir)
      process.stdout.readline()  # a kill before would find nothing to spoil
      try:
        process.communicate(timeout=rng.uniform(0, 0.15))
        break
      except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    process = spawn(script, workdir)
    _, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    assert outputs(workdir) == undisturbed[4]
    resumed += read_manifest(workdir, "count")["attempts"] > 1
  assert resumed > 0


def test_killed_stage_resumes_and_keeps_its_clock(tmp_path):
  process = spawn("""
    from lmops_jax.stages import pipeline
    pipeline._SAVE_SECONDS = 0.02
    run_stages(stages(4, pause=0.2), sys.argv[1], system="toy")
  """, tmp_path)
  partial = tmp_path / "count.partial"
  def saved_flops():
    path = partial / ".attempt.json"
    return json.loads(path.read_text())["flops"] if path.exists() else 0

  while saved_flops() < 2:
    assert process.poll() is None
    time.sleep(0.01)
  process.kill()
  process.communicate()
  kept = sorted(path.name for path in (partial / "pieces").glob("*.json"))
  saved = json.loads((partial / ".attempt.json").read_text())
  assert saved["seconds"] > 0.2 and saved["flops"] >= 2
  record = run(tmp_path, size=4)[0]
  assert (record.name, record.status, record.reason) == ("count", "resumed", "interrupted earlier")
  assert record.seconds > saved["seconds"]
  assert record.flops == saved["flops"] + 10 - len(kept)


def test_complete_output_is_adopted_without_running_again(tmp_path):
  """Killed between the manifest and the rename."""
  run(tmp_path)
  (tmp_path / "count").rename(tmp_path / "count.partial")
  assert statuses(run(tmp_path))[0] == ("count", "resumed")
  assert not (tmp_path / "count.partial").exists()
  (tmp_path / "count").rename(tmp_path / "count.partial")
  _flip_silently(tmp_path / "count.partial" / "pieces" / "3.json")
  assert statuses(run(tmp_path))[0] == ("count", "ran")


def test_interrupt_leaves_a_resumable_folder(tmp_path):
  def interrupted(context):
    (context.directory / "kept").write_text("x")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)

  with pytest.raises(KeyboardInterrupt):
    run_stages([Stage("a", interrupted)], tmp_path, system="toy")
  assert (tmp_path / "a.partial" / "kept").exists()
  assert run_stages([Stage("a", lambda c: None)], tmp_path, system="toy")[0].status == "resumed"


# --------------------------------------------------------------------------- several processes


def test_processes_of_one_job_share_a_stage(tmp_path):
  """Two threads stand for two processes: the first decides and publishes, both do the work."""
  barrier, count, found = threading.Barrier(2, timeout=3600), 2, {}

  def work(context):
    (context.directory / f"part{context.group.index}").write_text("x")

  def read(context):
    parts = sorted(path.name for path in context.input("work").glob("part*"))
    (context.directory / f"saw{context.group.index}").write_text(" ".join(parts))

  def process(index):
    group = Group(index, count, lambda label: barrier.wait())
    made = [Stage("work", work), Stage("read", read, ("work",))]
    found[index] = [run_stages(made, tmp_path, system="toy", group=group) for _ in range(2)]

  threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert statuses(found[0][0]) == [("work", "ran"), ("read", "ran")]
  assert statuses(found[0][1]) == [("work", "cached"), ("read", "cached")]
  assert statuses(found[1][0]) == statuses(found[0][0])
  assert [r.seconds for r in found[1][0]] == [read_manifest(tmp_path, n)["seconds"]
                                              for n in ("work", "read")]
  for index in range(count):
    assert (tmp_path / "read" / f"saw{index}").read_text() == "part0 part1"
