"""The packaged gin files: where they lie, which systems they launch, how a name is found.

Nothing here imports gin, so that `lmops --help` and `lmops list` answer at once.
"""

import os
import re
from pathlib import Path

from lmops_jax.config.refusals import ConfigError, nearest

PARTS = frozenset({"models", "optim", "mesh", "data", "train"})  # folders of no system


def root() -> Path:
  """The folder of the packaged gin files: inside the wheel, or beside the package in a checkout."""
  package = Path(__file__).resolve().parents[1]
  inside = package / "gin"
  return inside if inside.is_dir() else package.parent / "gin"


def packaged() -> list[str]:
  """All packaged gin files relative to `root()`, sorted, `/` between the parts."""
  return sorted(path.relative_to(root()).as_posix() for path in root().rglob("*.gin"))


def systems() -> list[str]:
  """Names of the packaged systems: the folders of `root()` that hold a `default.gin`.

  A folder `learning_law` is the system `learning-law`.
  """
  folders = (Path(file).parent.as_posix() for file in packaged()
             if file.count("/") == 1 and file.endswith("/default.gin"))
  return sorted(name.replace("_", "-") for name in folders if name not in PARTS)


def guides() -> list[Path]:
  """The README.md of each system, then that of published models."""
  package = Path(__file__).resolve().parents[1]
  return [*sorted(package.glob("systems/*/README.md")), package / "pretrained" / "README.md"]


def system_file(system: str, action: str = "default") -> str:
  """The gin file of a system's action, relative to `root()`: "learning_law/evaluate.gin".

  Raises:
    ConfigError: for an action that the system does not have.
  """
  folder = system.replace("-", "_")
  actions = [Path(file).stem for file in packaged() if Path(file).parent.as_posix() == folder]
  if action not in actions:
    raise ConfigError(f"lmops {system} has no action {action!r}{nearest(action, actions)}")
  return f"{folder}/{action}.gin"


def required(path: Path) -> list[str]:
  """Macros that a gin file leaves to its user, `NAME = %gin.REQUIRED`, includes not followed."""
  return re.findall(r"^(\w+) *= *%gin\.REQUIRED", Path(path).read_text(encoding="utf-8"), re.M)


def describe(path: Path) -> str:
  """The first sentence of a gin file's first comment, without a leading `name.gin:`."""
  comment = re.match(r"\s*(#.*\n?)*", Path(path).read_text(encoding="utf-8")).group()
  text = " ".join(line.lstrip("# ") for line in comment.strip().splitlines())
  text = re.sub(r"^[\w./-]+\.gin:\s*", "", text)
  return re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".;")


def find(name: str, beside: Path | None = None) -> Path:
  """The absolute path of a gin file.

  A name on the command line is looked for as given, then among the packaged files, where both
  `gin/pds/default.gin` and `pds/default.gin` are understood. A name in an `include` is looked for
  beside the including file (`beside`), then among the packaged files, then as given.
  """
  path = Path(os.path.expanduser(name))
  parts = path.parts[1:] if path.parts[:1] == ("gin",) else path.parts
  ours = path if path.is_absolute() else root().joinpath(*parts)
  places = [path, ours] if beside is None else [beside / path, ours, path]
  for place in places:
    if place.is_file():
      return place.resolve()
  candidates = packaged()
  here = path.parent if beside is None else (beside / path).parent
  if here.is_dir():
    candidates += [str(path.parent / file.name) for file in here.glob("*.gin")]
  raise ConfigError(f"there is no gin file {name!r}{nearest('/'.join(parts), candidates)}")


def display(path: Path) -> str:
  """The path as a reader knows it: `gin/...` if packaged, else relative if that is shorter."""
  packaged_root = root().resolve()
  if path.is_relative_to(packaged_root):
    return "gin/" + path.relative_to(packaged_root).as_posix()
  relative = os.path.relpath(path)
  return relative if len(relative) < len(str(path)) else str(path)
