"""Without the extra there is one sentence, and nothing else needs it."""

import importlib.util
import subprocess
import sys

import pytest

from lmops_jax.data.distributed import Engine


def test_a_missing_beam_is_told_before_anything_runs(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "apache_beam" else find(name)
  )
  with pytest.raises(ValueError, match=r"run pip install 'lmops_jax\[beam\]', or set ENGINE=None"):
    Engine()


def test_the_stages_import_no_beam():
  code = (
    "import sys, lmops_jax.systems.pds; "
    "sys.exit(any(name.split('.')[0] == 'apache_beam' for name in sys.modules))"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
