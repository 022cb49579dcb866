"""What a user installs: the wheel holds code, gin files and templates, and works from anywhere."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lmops_jax
from lmops_jax.config import gin_files

ROOT = Path(lmops_jax.__file__).resolve().parent.parent
PROJECT = ROOT / "pyproject.toml"

needs_checkout = pytest.mark.skipif(not PROJECT.exists(), reason="needs a checkout, not a wheel")


@pytest.fixture(scope="module")
def project():
  return tomllib.loads(PROJECT.read_text())


def _name(requirement):
  return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


@needs_checkout
def test_every_dependency_is_ranged_and_none_is_a_git_head(project):
  for requirement in project["project"]["dependencies"]:
    assert re.search(r">=\d", requirement) and "@" not in requirement, requirement


@needs_checkout
def test_torch_comes_with_the_parity_extra_only(project):
  extras = project["project"]["optional-dependencies"]
  assert set(extras) == {"test", "gpu", "tpu", "parity", "beam", "lm-eval", "grit", "socratic"}
  holding = {name for name, listed in extras.items() if "torch" in map(_name, listed)}
  assert holding == {"parity"}
  pulled, pending = set(), list(map(_name, project["project"]["dependencies"]))
  while pending:
    name = pending.pop()
    if name in pulled:
      continue
    pulled.add(name)
    try:
      requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
      continue
    pending += [_name(line) for line in requirements if "extra ==" not in line]
  assert {"jax", "tensorflow", "tensorflow-text", "ml-dtypes"} <= pulled  # the walk does walk
  assert not pulled & {"torch", "transformers", "pandas"}


@needs_checkout
def test_imports_are_declared(project):
  """Every top-level package that the library imports is a dependency, of an extra at most."""
  requirements = [*project["project"]["dependencies"]]
  for listed in project["project"]["optional-dependencies"].values():
    requirements += listed
  declared = {_name(requirement).replace("-", "_") for requirement in requirements}
  declared |= {"gin", "orbax", "sklearn", "PIL", "pysat"}  # gin-config, orbax-checkpoint and so on
  local = {"lmops_jax", *sys.stdlib_module_names}
  imported = {}
  for path in (ROOT / "lmops_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      else:
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
      imported.update({name.split(".")[0]: path.name for name in names})
  assert {"jax", "tqdm"} <= set(imported)
  undeclared = {name: file for name, file in imported.items() if name not in local | declared}
  assert not undeclared


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wheel")
  subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir",
                  folder, ROOT], check=True, timeout=600)
  path, = folder.glob("*.whl")
  return path


@pytest.mark.slow
@needs_checkout
def test_wheel_holds_everything(wheel):
  assert wheel.name == f"lmops_jax-{lmops_jax.__version__}-py3-none-any.whl"
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  for name in gin_files.packaged():
    assert f"lmops_jax/gin/{name}" in names
  for path in (ROOT / "lmops_jax").rglob("*"):
    if path.is_file() and "__pycache__" not in path.parts:
      assert path.relative_to(ROOT).as_posix() in names
  assert any(name.endswith("licenses/LICENSE") for name in names)
  assert not [name for name in names if name.startswith(("tests", "gin/"))]


@pytest.mark.slow
@needs_checkout
def test_installed_wheel_works_from_another_directory(wheel, tmp_path):
  """Installed into a virtual environment that borrows the dependencies of this one."""
  environment = tmp_path / "venv"
  subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=3600)
  python = environment / "bin" / "python"
  subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel],
                 check=True, timeout=3600)
  run = dict(cwd=tmp_path, capture_output=True, text=True, timeout=3600, env={"PATH": "/usr/bin"})

  listed = subprocess.run([environment / "bin" / "lmops", "list"], **run)  # no dependency at all
  assert listed.returncode == 0, listed.stderr
  assert "pds/default.gin" in listed.stdout and f"in {environment}" in listed.stdout

  site, = (environment / "lib").glob("*/site-packages")
  (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
  where = subprocess.run([python, "-c", "import lmops_jax; print(lmops_jax.__file__)"], **run)
  assert where.stdout.startswith(str(site)), where
  for file in ("pds", "gin/pds/default.gin", "pds/default.gin"):
    shown = subprocess.run([environment / "bin" / "lmops", "show", file], **run)
    assert shown.returncode == 0, shown.stderr
    assert "system = @pds.Pipeline()" in shown.stdout
