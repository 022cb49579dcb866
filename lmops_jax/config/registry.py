"""Gin's registry: what is registered, how people write its name, and what gin may bind of it."""

import inspect

from gin import config as gin_config

from lmops_jax.config.refusals import ConfigError, nearest

ROOT = "lmops.run"


def short_name(selector: str) -> str:
  """The selector as people write it: `run` for the root, else gin's shortest unambiguous one that
  keeps the module (`optim.sgd`)."""
  if selector == ROOT:
    return "run"
  minimal = gin_config._REGISTRY.minimal_selector(selector)
  wanted = ".".join(selector.split(".")[-2:])
  return wanted if len(minimal) < len(wanted) else minimal


def _selectors() -> list[str]:
  return [short_name(s) for s, _ in gin_config._REGISTRY.items() if not s.startswith("gin.")]


def configurable_named(selector: str, where: str) -> gin_config.Configurable:
  matches = gin_config._REGISTRY.matching_selectors(selector)
  if len(matches) == 1:
    return gin_config._REGISTRY[matches[0]]
  if matches:
    raise ConfigError(f"{where}: {selector!r} may be any of {', '.join(sorted(matches))}; "
                      "write one of these in full.")
  raise ConfigError(f"{where}: nothing is registered as {selector!r}"
                    f"{nearest(selector, _selectors())}")


def parameters_of(
  configurable: gin_config.Configurable,
) -> tuple[dict[str, inspect.Parameter], bool]:
  """Parameters that gin may bind, in the order of the signature, and whether any name will do."""
  parameters = inspect.signature(configurable.wrapped).parameters.values()
  named = {p.name: p for p in parameters
           if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
           and not (configurable.allowlist and p.name not in configurable.allowlist)
           and not (configurable.denylist and p.name in configurable.denylist)}
  return named, any(p.kind is p.VAR_KEYWORD for p in parameters)
