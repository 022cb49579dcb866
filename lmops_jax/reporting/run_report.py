"""The report of a run: what every system's stage `report` writes, and the last words of a run."""

from collections.abc import Sequence
from pathlib import Path

from lmops_jax.config.resolve import System
from lmops_jax.reporting.summary import read_summary
from lmops_jax.stages.skeleton import Stage

STAGE = "report"
SUMMARY_FILE, PAGE_FILE = "summary.json", "index.html"


def ending(system: System, stages: Sequence[Stage], workdir: Path) -> str:
  """What a finished run says on the terminal: the system's table, then where to read on."""
  folder = Path(workdir) / STAGE
  table = system.table(read_summary(folder / SUMMARY_FILE))
  places = {stage.result: Path(workdir) / stage.name for stage in stages if stage.result}
  places[STAGE] = folder / PAGE_FILE
  width = max(map(len, places)) + 1
  told = [f"{name + ':':{width}} {place}" for name, place in places.items()]
  return "\n".join([table, "", *told])
