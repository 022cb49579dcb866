"""Functions over many items on Apache Beam (extra `beam`), on this machine or on a cluster."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import pickle
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.config.setting_words import Rule, Words
from lmops_jax.host.whole_files import replacing_shared

# Not DirectRunner, which first looks for a program of another runner on the network.
_DEFAULT_RUNNER = "FnApiRunner"
BeamOption = Annotated[
  str, Rule(lambda text: text.startswith("--")), Words("an option such as '--runner=FlinkRunner'")
]


@component(module="beam")
@dataclasses.dataclass(frozen=True)
class Engine:
  """How stages that can be spread over workers are run; results do not depend on it.

  Workers read the corpus, and read and write the workdir, under the paths that this process uses:
  on several machines both have to be on a file system that all of them mount.

  Attributes:
    options: Beam's options as on its command line, handed on untouched: `["--runner=FlinkRunner",
      "--flink_master=host:8081", "--parallelism=64"]`. Without `--runner` it is Beam's own runner
      in this process, to which `--direct_num_workers` and `--direct_running_mode` apply.
    num_buckets: parts that a corpus is sorted into; a worker holds one of them in memory.

  Raises:
    ValueError: if Beam is not installed, or a setting is out of range.
  """

  options: Sequence[BeamOption] = ()
  num_buckets: PositiveInt = 64

  def __post_init__(self):
    if importlib.util.find_spec("apache_beam") is None:
      raise ValueError(
        "beam.Engine needs Apache Beam, which is not installed; run pip install "
        "'lmops_jax[beam]', or set ENGINE=None."
      )

  def each(
    self, function: Callable[..., None], items: Iterable[Any], *,
    setup: Callable[[], Any] | None = None,
  ) -> None:
    """Calls `function(item)` for every item, for what it writes.

    Args:
      function: must give the same files when an item is done again.
      setup: called once by every worker; its result is then the function's first argument.
    """
    from lmops_jax.data.distributed import transforms

    items = list(items)
    if items:
      self._run(lambda spread: spread | transforms.apply(function, setup), items)

  def total(self, function: Callable[[Any], Any], items: Iterable[Any], zero: Any, folder: Path):
    """The sum of `function(item)` over all items, in any order and any grouping.

    Args:
      zero: what a sum begins with; `+` must be associative and commutative, exactly.
      folder: a folder that workers can write to, for the result on its way here.
    """
    from lmops_jax.data.distributed import transforms

    path = folder / f"total-{uuid.uuid4().hex}"
    self._run(
      lambda spread: spread | transforms.total(function, zero)
      | transforms.apply(lambda total: _save(path, total)),
      list(items),
    )
    with path.open("rb") as file:
      total = pickle.load(file)
    path.unlink()
    return total

  def group(
    self, read: Callable[[Any], Iterable[tuple[int, Any]]], items: Iterable[Any],
    write: Callable[[int, Iterable[Any]], None],
  ) -> None:
    """Calls `write(key, values)` once for every key among the pairs that `read(item)` yields."""
    from lmops_jax.data.distributed import transforms

    self._run(lambda spread: spread | transforms.group(read, write), list(items))

  def _run(self, build, items) -> None:
    import apache_beam as beam
    from apache_beam.options import pipeline_options

    options = pipeline_options.PipelineOptions(list(self.options))
    runner = options.view_as(pipeline_options.StandardOptions).runner or _DEFAULT_RUNNER
    # A worker's error comes back as an exception with its trace; once is enough.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    try:
      with beam.Pipeline(runner, options=options) as pipeline:
        build(pipeline | beam.Create(items) | beam.Reshuffle())
    except Exception as error:
      sentence = _refusal(f"{type(error).__name__}: {error}")
      if sentence is None:
        raise
      raise ValueError(sentence) from error


def _refusal(text: str) -> str | None:
  """The sentence of a worker's ValueError, out of the traces that runners wrap it in."""
  found = re.findall(r"^(?:RuntimeError: )*ValueError: (.+?)(?: \[while running .*)?$", text, re.M)
  return found[-1] if found else None


def _save(path: Path, value: Any) -> None:
  with replacing_shared(path) as partial:
    partial.write_bytes(pickle.dumps(value))
