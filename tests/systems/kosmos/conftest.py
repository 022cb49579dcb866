"""What tests of the systems of Kosmos share: runs of a system by its gin file."""

from types import SimpleNamespace

import pytest

from lmops_jax.config import resolve
from lmops_jax.stages import pipeline, skeleton


@pytest.fixture(scope="session")
def run_stages():
  """`(gin file, workdir, *bindings, only=None, change=None) -> system, statuses by stage`.

  `only` names stages; `change` makes another system of the one that the file describes.
  """
  def run(file, workdir, *bindings, only=None, change=None):
    resolved = resolve.load([str(file)], bindings)
    system = resolved.run().system
    system = system if change is None else change(system)
    stages = skeleton.resolve_stages(system, system.stages(None), resolved.tree.child("system"))
    records = pipeline.run_stages(stages, workdir, only=only, system=system.name)
    return SimpleNamespace(
      system=system, statuses={record.name: record.status for record in records})

  return run
