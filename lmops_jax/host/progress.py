"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere.

A terminal gets a tqdm bar. A log file or a pipe gets one line when the work has taken a while, then
one at every interval, then one at the end, so that a log of hours stays readable. Rate and time
left are those after the first update, in which programs are compiled. Nothing here imports jax.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator

FIRST_LINE_SECONDS = 5.0
LINE_INTERVAL_SECONDS = 20.0


def format_seconds(seconds: float) -> str:
  """`8.2s`, `3m05s`, `2h07m`: how a duration is written in logs and tables."""
  if seconds < 0:
    raise ValueError(f"a duration is not negative, got {seconds}.")
  if seconds < 59.95:
    return f"{seconds:.1f}s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes}m{rest:02d}s"
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02d}m"


def format_count(count: float) -> str:
  """`0.25`, `950`, `12.3k`, `4.56M`, `7.8G`: about three figures, for counts and rates."""
  unit = ""
  for limit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(count) >= limit:
      count, unit = count / limit, name
      break
  return f"{count:.0f}{unit}" if abs(count) >= 100 else f"{count:.3g}{unit}"


def log(text: str, stream=None) -> None:
  """Writes one line to `stream` (stderr) without tearing a bar that is being drawn there."""
  stream = stream or sys.stderr
  tqdm = sys.modules.get("tqdm")
  if tqdm is not None:
    tqdm.tqdm.write(text, file=stream)
  else:
    print(text, file=stream)
  with contextlib.suppress(OSError, ValueError):
    stream.flush()


class Progress:
  """Counts done units of a known or unknown total; also a context manager.

  Args:
    total: number of units, or None if it is not known beforehand.
    unit: plural name of what is counted ("steps", "documents").
    description: what is being done, put in front.
    initial: units done by an earlier attempt; they count as done but, like those of the
      first update, not towards the rate.
    stream: where to draw (default stderr).
    first_line_seconds, interval_seconds: when a stream that is no terminal gets a line.
    quiet: show nothing, only count; for the other processes of a job.
    clock: a monotonic clock in seconds.
  """

  def __init__(self, total: int | None, unit: str = "steps", description: str = "", *,
               initial: int = 0, stream=None, first_line_seconds: float = FIRST_LINE_SECONDS,
               interval_seconds: float = LINE_INTERVAL_SECONDS, quiet: bool = False,
               clock=time.monotonic):
    self.total, self.unit, self.description = total, unit, description
    self.initial, self.done = initial, initial
    self._stream = stream or sys.stderr
    self._clock, self._interval = clock, interval_seconds
    self._start = clock()
    self._next_line = float("inf") if quiet else self._start + first_line_seconds
    self._lines, self._closed, self._note = 0, False, ""
    self._first: tuple[int, float] | None = None  # done and time after the first update
    self._bar = None
    if not quiet and getattr(self._stream, "isatty", lambda: False)():
      self._bar = self._make_bar()

  def update(self, n: int = 1, **figures: float) -> None:
    """Adds `n` done units; `figures` (for example `loss=3.2`) are shown beside the count."""
    self.done += n
    if n and self._first is None:
      self._first = self.done, self._clock()
    if figures:
      self._note = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
    if self._bar is not None:
      if figures:
        self._bar.set_postfix_str(self._note, refresh=False)
      self._bar.update(n)
    elif self._clock() >= self._next_line:
      self._next_line = self._clock() + self._interval
      self._lines += 1
      self._write(self._status())

  def close(self) -> None:
    """Ends the bar, or writes the closing line if any line was written before."""
    if self._closed:
      return
    self._closed = True
    if self._bar is not None:
      self._bar.close()
    elif self._lines:
      seconds = max(self._clock() - self._start, 0.0)
      self._write(f"{self._count()} in {format_seconds(seconds)}{self._rate(self._per_second())}")

  def _count(self) -> str:
    of = "" if self.total is None else f"/{self.total}"
    return f"{self.done}{of} {self.unit}"

  def _make_bar(self):
    from tqdm import tqdm

    class Bar(tqdm):
      """Shows our rate, and "?" as long as there is none."""

      @property
      def format_dict(bar):
        return {**super().format_dict, "rate": self._per_second()}

    return Bar(total=self.total, initial=self.initial, unit=f" {self.unit}", leave=False,
               desc=self.description or None, file=self._stream, dynamic_ncols=True)

  def _per_second(self) -> float:
    """Units a second after the first update; 0 while nothing is known yet."""
    if self._first is None:
      return 0.0
    done, since = self._first
    seconds = self._clock() - since
    return (self.done - done) / seconds if seconds > 0 else 0.0

  def _rate(self, rate: float) -> str:
    return f", {format_count(rate)} {self.unit}/s" if rate else ""

  def _status(self) -> str:
    rate = self._per_second()
    text = self._count() + self._rate(rate)
    if rate and self.total is not None and self.done < self.total:
      text += f", {format_seconds((self.total - self.done) / rate)} left"
    return f"{text}, {self._note}" if self._note else text

  def _write(self, text: str) -> None:
    log(f"{self.description}: {text}" if self.description else text, self._stream)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def track(iterable: Iterable, total: int | None = None, unit: str = "items",
          description: str = "", **kwargs) -> Iterator:
  """Yields the items of `iterable`, counting each when the next one is asked for."""
  if total is None and hasattr(iterable, "__len__"):
    total = len(iterable)
  with Progress(total, unit, description, **kwargs) as progress:
    for item in iterable:
      yield item
      progress.update()
