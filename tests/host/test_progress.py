"""Progress: a bar on a terminal, few and telling lines elsewhere."""

import io

import pytest

from lmops_jax.host.progress import Progress, format_count, format_seconds, log, track


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock():
  return Clock()


@pytest.mark.parametrize("seconds, text", [
  (0, "0.0s"), (8.24, "8.2s"), (59.94, "59.9s"), (59.97, "1m00s"), (185, "3m05s"),
  (3599.6, "1h00m"), (7620, "2h07m"), (360000, "100h00m")])
def test_format_seconds(seconds, text):
  assert format_seconds(seconds) == text


def test_negative_duration():
  with pytest.raises(ValueError, match="not negative, got -1"):
    format_seconds(-1)


@pytest.mark.parametrize("count, text", [
  (0, "0"), (0.25, "0.25"), (7, "7"), (950, "950"), (12345, "12.3k"), (456_000, "456k"),
  (4.56e6, "4.56M"), (7.8e9, "7.8G"), (3.1e12, "3.1T"), (2e15, "2P"), (5e18, "5E")])
def test_format_count(count, text):
  assert format_count(count) == text


def test_lines_at_intervals_with_rate_and_time_left(clock):
  out = io.StringIO()
  with Progress(1000, "steps", "train", stream=out, clock=clock, first_line_seconds=5,
                interval_seconds=20) as progress:
    for _ in range(500):
      clock.now += 0.125
      progress.update(loss=3.14159)
  assert out.getvalue().splitlines() == [
    "train: 40/1000 steps, 8 steps/s, 2m00s left, loss 3.142",
    "train: 200/1000 steps, 8 steps/s, 1m40s left, loss 3.142",
    "train: 360/1000 steps, 8 steps/s, 1m20s left, loss 3.142",
    "train: 500/1000 steps in 1m02s, 8 steps/s"]


def test_quick_work_writes_nothing(clock):
  out = io.StringIO()
  assert list(track(range(3), stream=out, clock=clock)) == [0, 1, 2]
  assert out.getvalue() == ""


def test_units_of_an_earlier_attempt_do_not_count_towards_the_rate(clock):
  out = io.StringIO()
  progress = Progress(100, "shards", stream=out, clock=clock, initial=90, first_line_seconds=1,
                      interval_seconds=1)
  clock.now += 600
  progress.update(2)
  clock.now += 2
  progress.update(2)
  assert out.getvalue() == "92/100 shards\n94/100 shards, 1 shards/s, 6.0s left\n"


def test_the_first_update_compiles_and_tells_no_rate(clock):
  out = io.StringIO()
  with Progress(201, "steps", "train", stream=out, clock=clock, interval_seconds=10) as progress:
    clock.now += 60
    progress.update(loss=3.0)
    for _ in range(40):
      clock.now += 0.25
      progress.update(loss=2.0)
  assert out.getvalue().splitlines() == [
    "train: 1/201 steps, loss 3",
    "train: 41/201 steps, 4 steps/s, 40.0s left, loss 2",
    "train: 41/201 steps in 1m10s, 4 steps/s"]


def test_unknown_total(clock):
  out = io.StringIO()
  progress = Progress(None, "documents", "packing", stream=out, clock=clock, first_line_seconds=1)
  progress.update(1)
  clock.now += 4
  progress.update(5000)
  progress.close()
  progress.close()
  assert out.getvalue().splitlines() == [
    "packing: 5001 documents, 1.25k documents/s",
    "packing: 5001 documents in 4.0s, 1.25k documents/s"]


def test_quiet(clock):
  for out in (io.StringIO(), Terminal()):
    progress = Progress(10, stream=out, clock=clock, quiet=True)
    clock.now += 1e6
    progress.update(3)
    progress.close()
    assert out.getvalue() == "" and progress.done == 3


def test_a_bar_leaves_the_first_update_out_too(clock):
  out = Terminal()
  with Progress(201, "steps", stream=out, clock=clock) as progress:
    clock.now += 600
    progress.update()
    progress._bar.refresh()
    assert "1/201" in out.getvalue() and "<?, ? steps/s" in out.getvalue()
    clock.now += 10
    progress.update(40)
    progress._bar.refresh()
  assert "41/201" in out.getvalue() and "<00:40,  4.00 steps/s" in out.getvalue()


def test_bar_on_a_terminal():
  out = Terminal()
  with Progress(4, "steps", "train", stream=out) as progress:
    progress.update(2, loss=1.5)
    progress._bar.refresh()
    log("a line", out)
  text = out.getvalue()
  assert "train:  50%" in text and "2/4" in text and "loss 1.5" in text
  assert "a line\n" in text


def test_track_takes_the_length_and_closes_on_errors(clock):
  out = io.StringIO()
  with pytest.raises(RuntimeError):
    for _ in track([1, 2, 3], unit="files", stream=out, clock=clock, first_line_seconds=2):
      clock.now += 1
      if clock.now > 102:
        raise RuntimeError
  assert out.getvalue().startswith("2/3 files, 1 files/s, 1.0s left\n")
