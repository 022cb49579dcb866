"""The resolved configuration as gin text, which parses back to the same tree."""

import re
from collections.abc import Iterator

from lmops_jax.config.gin_text import LINE_WIDTH, Named, is_literal, literal_text, plain_text
from lmops_jax.config.settings import SINGLETON, Settings, settings_in


class Printer:
  """Writes a tree as gin blocks, one for each different call, scoped if a name has several."""

  def __init__(self, root: Settings):
    self._scopes: dict[str, str] = {}  # identity of a call -> scope written before its selector
    self._identities: dict[int, str] = {}
    self._order: dict[str, Settings] = {}
    paths: dict[str, tuple[str, ...]] = {}
    self.whole = self.identity(root)  # equal for trees with equal values
    self._collect(root, (), paths)
    by_selector: dict[str, list[str]] = {}
    for identity, settings in self._order.items():
      by_selector.setdefault(settings.selector, []).append(identity)
    for selector, identities in by_selector.items():
      self._name_scopes(selector, identities, paths)

  def identity(self, settings: Settings) -> str:
    """Equal for calls with equal values, whatever their scopes."""
    key = id(settings)
    if key not in self._identities:
      scope = "/".join(settings.scope) if settings.selector == SINGLETON else ""
      params = "; ".join(
        f"{name}={literal_text(value, self._mention) if is_literal(value) else plain_text(value)}"
        for name, value in settings.params.items())
      self._identities[key] = f"{scope}/{settings.selector}({params})"
    return self._identities[key]

  def _mention(self, value: Named) -> str:
    if not isinstance(value, Settings):
      return value.spelling()
    return self.identity(value) + ("()" if value.called else "")

  def _collect(self, settings: Settings, path: tuple[str, ...], paths) -> None:
    identity = self.identity(settings)
    if identity in self._order:
      return
    self._order[identity], paths[identity] = settings, path
    for name, value in settings.params.items():
      found = list(settings_in(value))
      for i, below in enumerate(found):
        step = (name,) if len(found) == 1 else (name, str(i))
        self._collect(below, path + step, paths)

  def _name_scopes(self, selector, identities, paths) -> None:
    if len(identities) == 1 and selector != SINGLETON:
      self._scopes[identities[0]] = ""
      return
    rest, taken = list(identities), set()
    plain = next((i for i in rest if self._may_be_plain(i, identities)), None)
    if plain is not None:
      self._scopes[plain] = ""
      rest.remove(plain)
    for identity in list(rest):
      scope = "_".join(self._order[identity].scope)
      if scope and scope not in taken:
        self._scopes[identity] = scope
        taken.add(scope)
        rest.remove(identity)
    for identity in rest:
      path = [re.sub(r"\W", "_", step) for step in paths[identity]]
      names = ["_".join(path[-n:]) for n in range(1, len(path) + 1)]
      names = [name for name in names if re.match(r"[A-Za-z_]", name)]
      names += [f"variant_{n}" for n in range(len(identities) + 1)]
      self._scopes[identity] = next(name for name in names if name not in taken)
      taken.add(self._scopes[identity])

  def _may_be_plain(self, identity: str, identities: list[str]) -> bool:
    """Whether a block without scope says what it is, and nothing of the calls that have scopes.

    Gin hands its parameters on to those that do not bind them themselves.
    """
    own = self._order[identity]
    if own.selector == SINGLETON or own.scope:
      return False
    return all(_bound(own) <= _bound(self._order[other]) for other in identities)

  def _written(self, settings: Settings) -> str:
    scope = self._scopes[self.identity(settings)]
    return f"{scope}/{settings.selector}" if scope else settings.selector

  def _reference(self, value: Named) -> str:
    if not isinstance(value, Settings):
      return value.spelling()
    return f"@{self._written(value)}{'()' if value.called else ''}"

  def blocks(self) -> Iterator[str]:
    for settings in self._order.values():
      bound, comments = [], []
      for name, value in settings.params.items():
        if is_literal(value):
          width = LINE_WIDTH - len(name) - 5
          bound.append(f"  {name} = {literal_text(value, self._reference, 2, width)}")
        else:
          comments.append(f"# {self._written(settings)}.{name} is {plain_text(value)}")
      if bound:
        yield "\n".join([*comments, f"{self._written(settings)}:", *bound])
      elif comments:
        yield "\n".join(comments)


def _bound(settings: Settings) -> set[str]:
  """The parameters that a block of these settings binds."""
  return {name for name, value in settings.params.items() if is_literal(value)}
