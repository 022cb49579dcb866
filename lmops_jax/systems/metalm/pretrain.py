"""Semi-causal training on a corpus of one's own, at any size, as stages: texts, train, report.

With a reader to start from there is a stage `encoder` too; without one the encoder is drawn like
the decoder, which the paper's is not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from lmops_jax.config.setting_types import Seed, component
from lmops_jax.data.spans import SpanSampler
from lmops_jax.evaluation.lm import perplexity
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.models.universal import UniversalConfig
from lmops_jax.reporting import html, plots
from lmops_jax.reporting.run_report import RunReport, text_table
from lmops_jax.sizing.vocabulary import vocabulary_size
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.metalm import plan, reader, starts, texts, training
from lmops_jax.systems.metalm.arms import Arm, sized
from lmops_jax.systems.metalm.report import drawn_row
from lmops_jax.systems.metalm.training import VALIDATION
from lmops_jax.training import language_models
from lmops_jax.training.metrics import read_records

TRAIN, REPORT = "train", "report"


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Pretrain(plan.Planned):
  """Trains a decoder whose spans an encoder reads.

  Attributes:
    texts: what is read.
    model: decoder and reader; sizes of vocabularies that it lacks come from the texts.
    spans: which stretches the reader encodes, such as `@data.RandomSpans()`.
    training: how; it may freeze layers of the reader.
    reader: where the reader's parameters come from; None draws them.
    seed: of initialisation and order.

  Raises:
    ValueError: for a model without a reader, rows longer than the decoder's positions, or a start
      that does not fit the reader.
  """

  texts: texts.Texts
  model: UniversalConfig
  spans: SpanSampler
  training: training.Training
  reader: starts.ReaderStart | None = None
  seed: Seed = 0

  name = "metalm_pretrain"

  def __post_init__(self):
    if self.model.reader is None:
      raise ValueError(
        "metalm.Pretrain.model has no reader; dock one with models.UniversalConfig.reader, or take "
        "a system that trains a decoder alone."
      )
    language_models.check_length(self.model.text, self.texts.length)
    if self.reader is not None:
      self.reader.check(self.model.reader.encoder)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    attention.check_platform(self.model.text.attention, partitioner.platform)
    stages = [skeleton.Stage(texts.STAGE, self._texts, reads=("texts",), together=False)]
    if self.reader is not None:
      stages.append(skeleton.Stage(
        reader.STAGE,
        functools.partial(self._reader, seed=self.seed, partitioner=partitioner),
        inputs=(texts.STAGE,), reads=("reader", "model.reader", "seed")))
    before = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      TRAIN, functools.partial(self._train, seed=self.seed, partitioner=partitioner),
      inputs=before, reads=("training", "model", "spans", "reader", "seed")))
    names = (*before, TRAIN)
    stages.append(skeleton.Stage(
      REPORT, functools.partial(self._report, stages=names), inputs=names,
      reads=("model", "spans"), together=False))
    return stages

  def arm(self, vocab_size: int) -> Arm:
    """The model with a vocabulary of that size, and its spans.

    Raises:
      ValueError: for a model with fewer words of its own.
    """
    return Arm(sized(self.model, vocab_size), self.spans)

  def _texts(self, context: pipeline.StageContext) -> None:
    texts.run(context, self.texts)

  def _reader(self, context: pipeline.StageContext, seed, partitioner) -> None:
    prepared = texts.Prepared(context.input(texts.STAGE))
    encoder = self.arm(prepared.vocabulary.vocab_size).config.reader.encoder
    self.reader.run(context, encoder, prepared, seed=seed, partitioner=partitioner)

  def _train(self, context: pipeline.StageContext, seed, partitioner) -> None:
    prepared = texts.Prepared(context.input(texts.STAGE))
    arm = self.arm(prepared.vocabulary.vocab_size)
    training.train(
      context, self.training, arm, prepared.train, prepared.validation, seed=seed,
      reader=None if self.reader is None else functools.partial(
        self.reader.load, context.input(reader.STAGE), arm.config.reader.encoder,
        prepared.vocabulary, partitioner),
      partitioner=partitioner)

  def _report(self, context: pipeline.StageContext, stages) -> None:
    report = RunReport(context, stages)
    records = read_records(context.input(TRAIN) / "metrics.jsonl")
    trained, measured = (
      [record for record in records if name in record] for name in ("loss", f"{VALIDATION}/loss"))
    of_train = context.manifest(TRAIN)["extra"]
    loss = measured[-1][f"{VALIDATION}/loss"]
    figure = plots.curves(
      {"training": [plots.Run([r["step"] for r in trained], [r["loss"] for r in trained])],
       "unseen text": [plots.Run([r["step"] for r in measured],
                                 [r[f"{VALIDATION}/loss"] for r in measured])]},
      x_label="optimizer steps", y_label="loss (nats a learned token)")
    prepared = texts.Prepared(context.input(texts.STAGE))
    arm = self.arm(prepared.vocabulary.vocab_size)
    report.write(
      {"validation_loss": loss, "train_loss": trained[-1]["loss"],
       "num_steps": trained[-1]["step"], **of_train, "stages": report.costs},
      html.Report(
        title="MetaLM: semi-causal training",
        lead=f"The loss of unseen text is {loss:.3f} nats a learned token after "
             f"{trained[-1]['step']} steps.",
        key_figures=[
          html.KeyFigure(f"{perplexity(loss):.1f}", "perplexity", "learned tokens of unseen text"),
          html.KeyFigure(f"{of_train['num_params']:,}", "parameters"), report.work_figure()],
        sections=[
          html.Section("Loss", figures=[report.figure("loss", figure, "Loss by step.")]),
          html.Section(
            "What the encoder reads", "Marked spans reach the decoder as vectors.",
            tables=[html.Table(["of rows to train on", html.Column("number", ",d")],
                               [list(item) for item in of_train["spans"].items()])],
            excerpts=[drawn_row(arm, prepared, "unseen text")]),
          report.cost_section()],
        facts={"work": report.work, "versions": report.versions}),
      required=["validation_loss", "spans.*", "stages[].seconds"])

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return text_table([
      ["unseen text, nats a learned token", f"{summary['validation_loss']:.4f}"],
      ["training, the same", f"{summary['train_loss']:.4f}"],
      ["parameters", f"{summary['num_params']:,}"]])

  def planned(self) -> plan.Step:
    """See `plan.Planned`."""
    size = vocabulary_size(
      self.model.vocab_size, self.texts.vocabulary,
      "text/models.TransformerConfig.vocab_size=64000")
    return plan.of_arm(self.training, self.arm(size), self.texts.length)
