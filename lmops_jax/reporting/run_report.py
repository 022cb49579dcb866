"""The report of a run: what every system's stage `report` writes, and the last words of a run."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmops_jax.config.resolve import System
from lmops_jax.host import progress
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.summary import read_summary, write_summary
from lmops_jax.stages.pipeline import StageContext
from lmops_jax.stages.skeleton import Stage

STAGE = "report"
SUMMARY_FILE, PAGE_FILE = "summary.json", "index.html"
COST = "Seconds on the clock, compilation included, and operations by count."


class RunReport:
  """What a running stage `report` shares with those of other systems.

  Attributes:
    context: the running stage's.
    costs: `name`, `seconds` and `flops` of each stage, for the summary's "stages".
    seconds: those of all stages together.
    work: the same for people.
    versions: of this and other packages, as the first stage noted them, for people.
  """

  def __init__(self, context: StageContext, stages: Sequence[str]):
    self.context = context
    manifests = {name: context.manifest(name) for name in stages}
    self.costs = [{"name": name, "seconds": manifest["seconds"], "flops": manifest["flops"]}
                  for name, manifest in manifests.items()]
    self.seconds = sum(cost["seconds"] for cost in self.costs)
    self.work = progress.format_seconds(self.seconds)
    self.versions = ", ".join(
      f"{package} {version}" for package, version in manifests[stages[0]]["versions"].items())

  def figure(self, name: str, figure: Any, caption: str) -> html.Figure:
    """A figure for the page, whose picture is also saved as `NAME.png` beside it."""
    return html.Figure(plots.save(self.context.directory / f"{name}.png", figure), caption)

  def work_figure(self, note: str = "all stages together") -> html.KeyFigure:
    """The work as a number to see first."""
    return html.KeyFigure(self.work, "work", note)

  def cost_section(
    self, text: str = COST, *, by_kind: bool = False, shares: bool = True, total: bool = False,
  ) -> html.Section:
    """Seconds and operations by stage.

    Args:
      text: shown above the table.
      by_kind: put stages whose names begin alike, up to the first `/`, into one row.
      shares: show each row's share of the seconds.
      total: show a last row of all, and operations a second.
    """
    sums: dict[str, list[float]] = {}
    for cost in self.costs:
      row = sums.setdefault(cost["name"].split("/")[0] if by_kind else cost["name"], [0.0, 0.0])
      row[0], row[1] = row[0] + cost["seconds"], row[1] + cost["flops"]
    rows = [[name, seconds, seconds / self.seconds if self.seconds else 0.0, flops or None,
             flops / seconds / 1e9 if flops else None] for name, (seconds, flops) in sums.items()]
    if total:
      rows.append(["all", self.seconds, 1.0, sum(cost["flops"] for cost in self.costs), None])
    columns = ["stages" if by_kind else "stage", html.Column("seconds", ",.1f"),
               html.Column("share", ".1%"), html.Column("operations", ".2e"),
               html.Column("GFLOP/s", ",.1f")]
    kept = [0, 1, *([2] if shares else []), 3, *([4] if total else [])]
    return html.Section("What it cost", text, tables=[html.Table(
      [columns[i] for i in kept], [[row[i] for i in kept] for row in rows],
      highlight=[len(rows) - 1] if total else [])])

  def write(
    self, summary: Mapping[str, Any], page: html.Report, *, required: Iterable[str] = (),
  ) -> None:
    """Writes summary.json, after checking it, and index.html.

    Args:
      required: paths that the summary must have, see `write_summary`.
    """
    write_summary(self.context.directory / SUMMARY_FILE, summary, required=required)
    html.write_report(self.context.directory / PAGE_FILE, page)


def text_table(rows: Sequence[Sequence[str]]) -> str:
  """Rows of equal length for the terminal, their columns set to the left."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def ending(system: System, stages: Sequence[Stage], workdir: Path) -> str:
  """What a finished run says on the terminal: the system's table, then where to read on."""
  folder = Path(workdir) / STAGE
  table = system.table(read_summary(folder / SUMMARY_FILE))
  places = {stage.result: Path(workdir) / stage.name for stage in stages if stage.result}
  places[STAGE] = folder / PAGE_FILE
  width = max(map(len, places)) + 1
  told = [f"{name + ':':{width}} {place}" for name, place in places.items()]
  return "\n".join([table, "", *told])
