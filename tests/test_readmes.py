"""The README files: every system has one, and every command in them resolves."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from lmops_jax import cli
from lmops_jax.config import gin_files, resolve

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", *gin_files.guides()]
MAX_LINES = 125  # two screens


def commands(path: Path) -> list[str]:
  """`lmops ...` in a README's code blocks, continued lines joined, comments gone."""
  blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.M | re.S)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  found = [part.partition(" #")[0].strip() for line in lines for part in line.split(" && ")]
  return [line for line in found if line.startswith("lmops ")]


def files_and_bindings(command: str) -> tuple[list[str], list[str]] | None:
  """What a command hands to gin; None if it launches nothing or names what a reader brings."""
  rest, bindings = cli._split_bindings(shlex.split(command)[1:])
  name, systems = rest[0], gin_files.systems()
  if "my_package" in command or "own.gin" in command:
    return None
  if tuple(rest[:2]) in cli._ACTIONS:
    return None  # it has options of its own
  if name in systems:
    action = rest[1] if len(rest) > 1 and not rest[1].startswith("-") else "default"
    owed = [f"{option.removeprefix('--').upper()} = 'given'" for option in rest[2:]
            if option.startswith("--") and option != "--workdir"]
    return [gin_files.system_file(name, action)], bindings + owed
  if name in ("run", "plan", "aot"):
    return [rest[1]], bindings
  return None


def parse_action(command: str) -> bool:
  """Whether a command is an action with options of its own, which it must name rightly."""
  system, action, *options = [*shlex.split(command)[1:], "", ""]
  if (system, action) not in cli._ACTIONS:
    return False
  parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
  cli._ACTIONS[system, action][0](parser)
  parser.parse_args([option for option in options if option])
  return True


def test_every_system_has_a_readme():
  systems = {path.parent.name for path in (ROOT / "lmops_jax/systems").glob("*/__init__.py")}
  assert systems == {path.parent.name for path in gin_files.guides()} - {"pretrained"}


def test_readme_stays_under_two_screens():
  assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_commands_resolve(path):
  launched = [found for command in commands(path) if (found := files_and_bindings(command))]
  for files, bindings in launched:
    resolve.load(files, bindings, owed="named")
  acted = [command for command in commands(path) if parse_action(command)]
  assert launched or acted or path.parent.name == "pretrained"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_named_files_exist(path):
  text = path.read_text()
  for name in re.findall(r"(?:gin|tests|tpu_scripts|lmops_jax)/[\w/.]+\.(?:gin|py|md|sh)", text):
    beside = ROOT / name
    assert beside.is_file() or gin_files.root().joinpath(*Path(name).parts[1:]).is_file(), name
