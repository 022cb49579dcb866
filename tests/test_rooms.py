"""What imports what: the rooms of the package stand on each other in one order, without circles.

Imports are read from the source, those inside of functions too: a lazy import saves time, it does
not turn an arrow round.
"""

import ast
from pathlib import Path

import pytest

import lmops_jax

ROOT = Path(lmops_jax.__file__).parent
ROOMS = (  # bottom up: a room imports from itself and from those before it
  "host", "config", "models", "mesh", "stages", "text", "data", "pretrained", "control", "training",
  "sizing", "decoding", "evaluation", "reporting", "shared_stages", "systems", "commands", "cli",
)
HEAVY = ("seqio", "tensorflow", "tensorflow_datasets")  # seconds and hundreds of MB
HEAVY_MODULES = {"lmops_jax.data.tfds_builders", "lmops_jax.text.seqio_vocabulary"}


def _name(path: Path) -> str:
  parts = path.relative_to(ROOT.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py")}


def _imported(tree: ast.AST) -> set[str]:
  """Names of the modules that a syntax tree imports, as far down as the package has them."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: imports are absolute"
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= {name if name in MODULES else node.module for name in names}
  return found


GRAPH = {module: _imported(tree) & set(MODULES) for module, tree in MODULES.items()}


def _part(module: str, depth: int) -> str:
  return ".".join(module.split(".")[1:depth])


def _room(module: str) -> str:
  return _part(module, 2)


def test_every_module_has_a_room():
  assert {_room(module) for module in MODULES} == {*ROOMS, ""}
  loose = {path.name for path in ROOT.glob("*.py")}
  assert loose == {"__init__.py", "cli.py"}


def test_arrows_point_down():
  upward = [
    f"{module} -> {other}" for module, others in GRAPH.items() for other in others
    if _room(module) and _room(other) and ROOMS.index(_room(other)) > ROOMS.index(_room(module))
  ]
  assert not upward


def test_no_system_imports_another():
  crossing = [
    f"{module} -> {other}" for module, others in GRAPH.items() for other in others
    if _room(module) == _room(other) == "systems" and _part(module, 3) != _part(other, 3)
  ]
  assert not crossing


def _circle(graph) -> list[str]:
  """Modules that import each other round in a circle; none if there is no circle."""
  done, path = set(), []

  def visit(module):
    if module in path:
      return [*path[path.index(module):], module]
    if module in done:
      return []
    path.append(module)
    found = next(filter(None, map(visit, sorted(graph[module]))), [])
    path.pop()
    done.add(module)
    return found

  return next(filter(None, map(visit, sorted(graph))), [])


def test_no_circle():
  assert not _circle(GRAPH)


@pytest.mark.parametrize("graph, circle", [
  ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
  ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
])
def test_a_circle_is_found(graph, circle):
  assert _circle(graph) == circle


def _imported_at_once(tree: ast.AST) -> set[str]:
  """What `_imported` finds outside of functions: what importing the module imports."""
  found = set()
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      found |= _imported(node)
    elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      found |= _imported_at_once(node)
  return found


def _is_heavy(name: str) -> bool:
  return name.split(".")[0] in HEAVY


def test_tensorflow_comes_only_when_it_is_asked_for():
  """Functions of `data` and `text` import it, and modules that only such functions import."""
  asking = {module for module, tree in MODULES.items() if any(map(_is_heavy, _imported(tree)))}
  assert {_room(module) for module in asking} == {"data", "text"}
  at_once = {module: _imported_at_once(tree) for module, tree in MODULES.items()}
  assert {m for m, names in at_once.items() if any(map(_is_heavy, names))} == HEAVY_MODULES
  assert not [m for m, names in at_once.items() if names & HEAVY_MODULES]
