"""Prototypical fine-tuning as stages: rows, encoder, vectors, fits by size and seed, report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from lmops_jax.config.setting_types import Distinct, NonEmpty, PositiveInt, Seeds, component
from lmops_jax.host import seals
from lmops_jax.host.whole_files import write_json
from lmops_jax.mesh import meshes
from lmops_jax.mesh.checkpoints import load_params, save_params
from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.text_encoders import without_heads
from lmops_jax.shared_stages.small_model import ModelSource
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.prototypes import classifier, report, rows, stopping
from lmops_jax.systems.prototypes.encoding import Encoded, Encoding
from lmops_jax.systems.prototypes.methods import Material, Method
from lmops_jax.systems.prototypes.report import (
  CLASSIFIER,
  ENCODE,
  RESULTS_FILE,
  ROWS,
  SAID_FILE,
  VECTORS_FILE,
)
from lmops_jax.systems.prototypes.rows import Rows
from lmops_jax.systems.prototypes.texts import TextReader, encoder_of

_HIDDEN, _TOP = "{}_hidden.npy", "top"


@component(module="prototypes")
@dataclasses.dataclass(frozen=True)
class Study:
  """Every method on the same encoder, rows, subsets and seeds, and a classifier to keep.

  Attributes:
    rows: labelled texts.
    model: `@pretrained.choose()`, the encoder.
    encoding: how it reads.
    methods: each with a label of its own; the first is the one whose classifier is kept.
    sizes: numbers of rows to learn from, subsets of each other; those beyond what there is are left
      out, and said to be.
    seeds: of subsets, order and first prototypes.

  Raises:
    ValueError: for two methods of one label, or a model that is no transformer of text.
  """

  rows: Rows
  model: ModelSource
  encoding: Encoding
  methods: Annotated[Sequence[Method], NonEmpty]
  sizes: Annotated[Sequence[PositiveInt], NonEmpty, Distinct] = (100, 200, 500, 1000, 2000)
  seeds: Seeds = (0, 1, 2, 3, 4)

  name = "prototypes"

  def __post_init__(self):
    labels = [method.label for method in self.methods]
    if len(set(labels)) != len(labels):
      raise ValueError(
        f"prototypes.Study.methods are called {', '.join(labels)}; give each a label of its own."
      )
    if not isinstance(self.model.config, TransformerConfig):
      raise ValueError(
        f"{self.model.label} is a {self.model.family} model, which is no transformer of text "
        "alone; give a BERT, RoBERTa, ELECTRA, or a language model."
      )

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    of_model = self.model.stages("model", partitioner)
    before = tuple(stage.name for stage in of_model)
    model = self.model.reads("model")
    stages = [
      skeleton.Stage(ROWS, self._read, reads=("rows",)), *of_model,
      skeleton.Stage(
        ENCODE, functools.partial(self._encode, model=before, partitioner=partitioner),
        inputs=(ROWS, *before), reads=(*model, "encoding")),
    ]
    fits = []
    # Programs are made for a size, so that all seeds of one come before the next.
    for size in sorted(self.sizes):
      for seed in self.seeds:
        for i, method in enumerate(self.methods):
          name = f"fit/{method.label}/{size}/seed{seed}"
          fits.append((method.label, size, seed, name))
          stages.append(skeleton.Stage(
            name,
            functools.partial(
              self._fit, method=method, size=size, seed=seed, model=before,
              partitioner=partitioner),
            inputs=(ROWS, *before, ENCODE), reads=(*model, "encoding", f"methods[{i}]"),
            seed=seed))
    kept = tuple(name for label, _, seed, name in fits
                 if (label, seed) == (self.methods[0].label, self.seeds[0]))
    stages.append(skeleton.Stage(
      "classifier", functools.partial(self._ship, fits=kept, model=before), result="classifier",
      inputs=(ROWS, *before, *kept), reads=(*model, "encoding")))
    inputs = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report",
      functools.partial(report.run, fits=fits, stages=inputs, encoder=self.model.label),
      inputs=inputs))
    return stages

  def _read(self, context: pipeline.StageContext) -> None:
    train, test = self.rows.read()
    rows.write_rows(context.directory, train, test)
    of = f" of {len(train.names)} classes" if train.names else ", targets are numbers"
    context.log(f"{len(train.texts)} rows to learn from, {len(test.texts)} to test on{of}")
    context.extra |= {"name": self.rows.name, "num_train": len(train.texts),
                      "num_test": len(test.texts), "names": train.names}

  def _encode(self, context: pipeline.StageContext, model, partitioner) -> None:
    source = self.model.opened(*(context.input(name) for name in model))
    reader, counts = TextReader(source, self.encoding, partitioner), {}
    for part, labelled in zip(("train", "test"), rows.read_rows(context.input(ROWS))):
      number = len(labelled.texts)
      with context.progress(
        total=number, unit="texts", description=f"{context.name}, {part}"
      ) as bar:
        encoded = reader.read(labelled.inputs, bar.update)
      np.save(context.directory / _HIDDEN.format(part), encoded.hidden)
      np.save(context.directory / f"{part}_lengths.npy", encoded.lengths)
      counts[part] = encoded.num_cut
      if encoded.num_cut:
        context.log(
          f"{encoded.num_cut} of {number} texts are read to their first "
          f"{self.encoding.max_tokens} tokens (prototypes.Encoding.max_tokens)")
    if reader.top:
      save_params(context.directory / _TOP, reader.top)
    context.extra |= {"num_cut": counts, "width": reader.encoder.width}

  def _fit(
    self, context: pipeline.StageContext, method, size, seed, model, partitioner
  ) -> None:
    train, test = rows.read_rows(context.input(ROWS))
    if size > len(train.texts):
      write_json(context.directory / RESULTS_FILE, {"left_out": len(train.texts)})
      context.log(f"left out: there are {len(train.texts)} rows")
      return
    source = self.model.opened(*(context.input(name) for name in model))
    encoder = encoder_of(without_heads(source.config), self.encoding)
    folder = context.input(ENCODE)
    of_train, of_test = (_encoded(folder, part) for part in ("train", "test"))
    number = len(train.names) or None
    chosen = rows.nested_order(train.targets, train.ids, seed, number is not None)[:size]
    kind = np.int32 if number else np.float32
    top = load_params(folder / _TOP) if (folder / _TOP).is_dir() else {}
    fitted = method.fit(Material(
      encoder, top, taken(of_train, chosen),
      np.asarray(train.targets, kind)[chosen], number, seed, context.directory / "run",
      partitioner, context.name))
    said = fitted.predict(of_test)
    np.savez(context.directory / SAID_FILE, said=said.astype(np.float32), chosen=chosen)
    targets = np.asarray(test.targets, kind)
    if number:
      right = np.argmax(said, axis=1) == targets
      figures = {"accuracy": float(right.mean()), "right": right.astype(int).tolist(),
                 "nats": stopping.mean_loss(said, targets)}
      context.log(f"accuracy {figures['accuracy']:.3f} on {len(right)} rows")
    else:
      errors = np.square(said - targets)
      figures = {"squared_error": float(errors.mean()), "errors": errors.tolist()}
      context.log(f"mean squared error {figures['squared_error']:.4g} on {len(errors)} rows")
    with seals.replacing(context.directory / RESULTS_FILE) as partial:
      write_json(partial, {**figures, "fit": dict(fitted.figures), "history": list(fitted.history)})
    if fitted.params is not None:
      classifier.save(context.directory / CLASSIFIER, fitted.params)
      np.save(
        context.directory / VECTORS_FILE,
        encoder.all_vectors(fitted.params["encoder"], taken(of_train, chosen)))

  def _ship(self, context: pipeline.StageContext, fits, model) -> None:
    """Writes as a folder the classifier of the last of some fits that keeps one."""
    train, _ = rows.read_rows(context.input(ROWS))
    kept = [name for name in fits if (context.input(name) / CLASSIFIER).is_dir()]
    if not kept or not train.names:
      context.log("no classifier is written: the first method keeps none, or targets are numbers")
      return
    folder = context.input(kept[-1])
    some = train.taken(np.load(folder / SAID_FILE)["chosen"])
    source = self.model.opened(*(context.input(name) for name in model))
    classifier.write(
      context.directory / "kept", source, self.encoding, some.names,
      classifier.load(folder / CLASSIFIER), some.inputs, some.targets,
      np.load(folder / VECTORS_FILE))
    context.log(f"the classifier of {kept[-1]}: lmops prototypes predict --model WORKDIR")

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)


def taken(encoded: Encoded, index: np.ndarray) -> Encoded:
  """Some of the rows."""
  return Encoded(np.asarray(encoded.hidden[index]), encoded.lengths[index])


def _encoded(folder, part) -> Encoded:
  return Encoded(np.load(folder / _HIDDEN.format(part), mmap_mode="r"),
                 np.load(folder / f"{part}_lengths.npy"))
