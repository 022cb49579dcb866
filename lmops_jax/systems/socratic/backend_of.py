"""The backend that a plan names, which the log keeps without any key."""

from __future__ import annotations

from typing import Any

from lmops_jax.systems.socratic.backends import Backend


def backend_of(named: dict[str, Any], read_seconds: float | None = None) -> Backend:
  """The backend of a run.

  Args:
    named: `{"kind": "http", "endpoint", "model", "key_env", "window", "requests_per_minute"}` or
      `{"kind": "model", "model", "window"}`.
    read_seconds: how long to wait for the next piece of a reply from an endpoint; None is what the
      backend takes for usual. It decides nothing, so it is no part of what a log keeps.

  Raises:
    ValueError: for another kind, or what the backend itself refuses.
  """
  kind, options = _parted(named)
  if kind == "http":
    from lmops_jax.systems.socratic.http_backend import Http

    if read_seconds is not None:
      options["read_seconds"] = read_seconds
    return Http(options.pop("endpoint"), options.pop("model"), **options)
  if read_seconds is not None:
    raise ValueError("--read-seconds belongs to --endpoint URL.")
  from lmops_jax.systems.socratic.in_process import InProcess

  return InProcess(options["model"], window=options["window"])


def counting(named: dict[str, Any]) -> Backend:
  """A backend that counts tokens as the run's does and needs no key; for logs that are read."""
  kind, _ = _parted(named)
  return backend_of({**named, "key_env": None} if kind == "http" else named)


def _parted(named: dict[str, Any]) -> tuple[str, dict[str, Any]]:
  options = dict(named)
  kind = options.pop("kind", None)
  if kind not in ("http", "model"):
    raise ValueError(f"there is no backend {kind!r}; there are http and model.")
  return kind, options
