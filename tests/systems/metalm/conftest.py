"""A small corpus on disk, and a finished run of the smallest size on it."""

import numpy as np
import pytest

from lmops_jax.config import resolve
from lmops_jax.stages import pipeline, skeleton

WORDS = ("red green blue north south east west stone river cloud tree bird fish house road bridge "
         "one two three four five six seven eight nine ten").split()
ARMS = ("causal", "semi_causal")


@pytest.fixture(scope="session")
def bindings(tmp_path_factory):
  """Those of the smallest run, on files of two kinds."""
  folder = tmp_path_factory.mktemp("installed")
  for number in range(60):
    draws = np.random.default_rng(number)
    own = [f"{WORDS[draws.integers(len(WORDS))]}{number}" for _ in range(4)]
    lines = [" ".join(draws.choice([*WORDS, *own], 9)) for _ in range(40)]
    (folder / f"{number}.{('md', 'csv')[number % 2]}").write_text("\n".join(lines) + "\n")
  return [
    f"data.InstalledText.roots = [{str(folder)!r}]", f"ARMS = {ARMS}",
    "metalm.Texts.validation_fraction = 0.4"]


def load(bindings, *more, files=()):
  """The smoke run with bindings, and with further files behind its own."""
  return resolve.load(["metalm/smoke.gin", *files], [*bindings, *more])


def run(path, bindings, *more, only=None, files=()):
  """What became of each stage."""
  resolved = load(bindings, *more, files=files)
  job = resolved.run()
  stages = skeleton.resolve_stages(
    job.system, job.system.stages(None), resolved.tree.child("system"))
  found = pipeline.run_stages(stages, path, system=job.system.name, only=only)
  return {record.name: record.status for record in found}


@pytest.fixture(scope="session")
def workdir(bindings, tmp_path_factory):
  """A finished run."""
  path = tmp_path_factory.mktemp("metalm")
  assert set(run(path, bindings).values()) == {"ran"}
  return path


@pytest.fixture(scope="session")
def system(bindings):
  """The run's."""
  return load(bindings).build()
