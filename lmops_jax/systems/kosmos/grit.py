"""GrIT made from captions and pictures of one's own (arXiv:2306.14824, section 3.1), as stages.

- phrases: what each caption names, by a parser of the language. Its files are also the questions
  for a detector that runs elsewhere.
- rows: a detector's boxes for the phrases, those that count, and the referring expressions with
  them: what `data.GritJsonl` and `data.GritShards` read.
- report: what became of the captions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from lmops_jax.config.setting_types import PositiveInt, Probability, component
from lmops_jax.data.distributed.engine import Engine
from lmops_jax.data.grit import building
from lmops_jax.data.grit.detection import Detector
from lmops_jax.data.grit.files import GritCorpus
from lmops_jax.data.grit.phrases import PhraseFinder
from lmops_jax.data.multimodal import LeftOut
from lmops_jax.reporting import html
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.stages import pipeline, skeleton

_PHRASES, _ROWS = "phrases", "rows"
_PUBLISHED = {  # section 3.1: 90,614,680 pictures, 114,978,233 spans, 137,349,210 boxes
  "expressions a row": 114_978_233 / 90_614_680, "boxes an expression": 137_349_210 / 114_978_233,
  "words an expression": 4.7,
}


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Grit:
  """Finds the boxes of what captions name.

  Attributes:
    captions: the captions with their pictures; boxes that they have are replaced.
    finder: finds what captions name.
    detector: finds it in pictures; None: only the phrases are written, for a detector elsewhere.
    min_score: a box's score has to be above it.
    max_overlap: of two boxes of a picture with a larger intersection over union, of whatever
      phrases, the surer one stays. The paper does not tell its own.
    form: "jsonl" names each picture by its path, "tar" holds it.
    rows_per_file: captions of a file, the most that a killed run does again.
    batch_size: pictures that the detector gets together.
    engine: spreads the files of captions over workers, which all need the parser, the detector and
      the workdir; None: this process does them one by one.
  """

  captions: GritCorpus
  finder: PhraseFinder
  detector: Detector | None = None
  min_score: float = 0.65
  max_overlap: Probability = 0.5
  form: Literal[building.FORMATS] = "jsonl"
  rows_per_file: PositiveInt = 4096
  batch_size: PositiveInt = 16
  engine: Engine | None = None

  name = "kosmos_grit"

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    phrases = skeleton.Stage(
      _PHRASES, functools.partial(self._phrases, engine=self.engine), together=False,
      reads=("captions", "finder", "rows_per_file"), result=_PHRASES)
    rows = skeleton.Stage(
      _ROWS, functools.partial(self._rows, engine=self.engine), inputs=(_PHRASES,), together=False,
      reads=("captions", "detector", "min_score", "max_overlap", "form", "rows_per_file",
             "batch_size"), result=_ROWS)
    work = [phrases] if self.detector is None else [phrases, rows]
    names = tuple(stage.name for stage in work)
    return [*work, skeleton.Stage(
      "report", functools.partial(self._report, names=names), inputs=names, together=False)]

  def _phrases(self, context: pipeline.StageContext, engine: Engine | None) -> None:
    with self._spread(context, engine, "parsing") as spread:
      found = building.write_phrases(
        context.directory, self.captions, self.finder, rows_per_file=self.rows_per_file,
        spread=spread)
    _note(context, found, needed="phrases")

  def _rows(self, context: pipeline.StageContext, engine: Engine | None) -> None:
    rules = building.Rules(
      self.min_score, self.max_overlap, self.form, self.rows_per_file, self.batch_size)
    with self._spread(context, engine, "looking") as spread:
      found = building.write_rows(
        context.directory, self.captions, context.input(_PHRASES), self.detector, rules,
        spread=spread)
    _note(context, found, needed="rows")

  @contextlib.contextmanager
  def _spread(
    self, context: pipeline.StageContext, engine: Engine | None, doing: str
  ) -> Iterator[building.Spread]:
    """What does the files of captions: the engine, or this process with a bar."""
    if engine is not None:
      yield engine
      return
    with context.progress(len(self.captions.pieces()), "files", doing) as bar:
      yield building.Here(bar.update)

  def _report(self, context: pipeline.StageContext, names: Sequence[str]) -> None:
    report = RunReport(context, names)
    counts = {name: context.manifest(name)["extra"]["counts"] for name in names}
    figures = _figures(counts[names[-1]]) if _ROWS in counts else {}
    table = [[name, what, number] for name, of in counts.items() for what, number in of.items()]
    shown = [[name, value, _PUBLISHED[name]] for name, value in figures.items()]
    first, unit = ("rows", "captions with boxes") if figures else ("phrases", "to find")
    number = counts[names[-1]][first]
    report.write(
      {"counts": counts, "figures": figures, "stages": report.costs},
      html.Report(
        title="GrIT: captions with boxes of what they name",
        lead=f"Of {counts[_PHRASES]['captions']:,} captions there are {number:,} {first}.",
        key_figures=[html.KeyFigure(f"{number:,}", first, unit), report.work_figure()],
        sections=[
          *([html.Section("Like GrIT?", "The published corpus beside this one.", tables=[html.Table(
            ["what", html.Column("here", ",.2f"), html.Column("published", ",.2f")], shown)])]
            if shown else []),
          html.Section("Captions", "What became of them, and what was left out.", tables=[
            html.Table(["stage", "what", html.Column("number", ",d")], table)]),
          report.cost_section()],
        facts={"work": report.work, "versions": report.versions}),
      required=[f"counts.{_PHRASES}.captions"])

  def table(self, summary: Mapping[str, Any]) -> str:
    """What became of the captions, for the terminal."""
    return text_table([
      ("stage", "what", "number"),
      *((stage, what, f"{number:,}") for stage, of in summary["counts"].items()
        for what, number in of.items())])


def _note(context: pipeline.StageContext, found: LeftOut, needed: str) -> None:
  """Keeps and logs the counts; refuses a stage of which nothing came.

  Raises:
    ValueError: if the count `needed` is 0.
  """
  if not found.counts[needed]:
    raise ValueError(
      f"no caption has {needed} ({found}); look at what was left out, and at the settings of "
      "kosmos.Grit."
    )
  for reason, names in found.named.items():
    context.log(f"{found.counts[reason]} {reason}, {names[0]} first")
  context.extra["counts"] = dict(found.counts)


def _figures(counts: Mapping[str, int]) -> dict[str, float]:
  """What tells one corpus of this kind from another."""
  ratios = (
    counts["expressions"] / counts["rows"], counts["expression_boxes"] / counts["expressions"],
    counts["expression_words"] / counts["expressions"])
  return dict(zip(_PUBLISHED, ratios))
