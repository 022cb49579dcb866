"""Sizes that corpus, target and mesh must have for a method, told before anything is placed."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

from lmops_jax.control.options import AUTO
from lmops_jax.systems.pds.methods.kinds import ProxyMethod, ScorerMethod
from lmops_jax.systems.pds.methods.proxy_set import ProxySet


@runtime_checkable
class TargetMethod(Protocol):
  """A method that reads `num_target` instances of the target's dev part; None: all.

  "auto" takes at most `max_target`, a further setting of such a method.
  """

  num_target: int | Literal[AUTO] | None


class Inner(NamedTuple):
  """Instances that a method takes together.

  Attributes:
    size: how many.
    setting: the setting that says so, by name.
    of_proxies: whether they are drawn from the proxies.
  """

  size: int
  setting: str
  of_proxies: bool = False


@runtime_checkable
class InnerMethod(Protocol):
  """A method that takes instances of the corpus together."""

  def inner(self) -> Inner:
    """How many, and by which setting."""


def check_sizes(
  method, proxy_set: ProxySet, *, num_corpus: int, num_target: int, num_shards: int = 1
) -> None:
  """Refuses sizes of a method on proxies that do not fit corpus, target or mesh.

  Args:
    method: any of those here, or a user's own.
    proxy_set: the set that such a method works on.
    num_corpus: instances of the corpus.
    num_target: instances of the target's dev part.
    num_shards: parts that the mesh splits a batch into.
  """
  if not isinstance(method, ProxyMethod | ScorerMethod):
    return
  proxy_set.count(num_corpus)
  check_most_target(method, num_target, f"the target's dev part has {num_target} instances")
  inner = method.inner() if isinstance(method, InnerMethod) else None
  if inner is not None and inner.size > num_corpus:
    raise ValueError(
      f"method {method.name!r} has {inner.setting} of {inner.size}, more than the corpus's "
      f"{num_corpus} instances; lower it or enlarge the corpus."
    )
  check_inner_size(method, proxy_set.count(num_corpus), num_shards)


def check_most_target(method, most: int, why: str) -> None:
  """Refuses a number of target instances that is more than there can be."""
  wanted = method.num_target if isinstance(method, TargetMethod) else None
  if isinstance(wanted, int) and wanted > most:
    raise ValueError(
      f"method {method.name!r} has num_target={wanted} (TARGET_INSTANCES), but {why}; lower it, "
      "or set None for all."
    )


def check_inner_size(method, num_proxies: int, num_shards: int) -> None:
  """Refuses an inner batch that the proxies or the mesh cannot give."""
  if not isinstance(method, InnerMethod):
    return
  size, what, of_proxies = method.inner()
  if of_proxies and size > num_proxies:
    raise ValueError(
      f"method {method.name!r} has {what} of {size}, more than the {num_proxies} proxies that it "
      "draws from; lower it or raise PROXIES."
    )
  if size % num_shards:
    raise ValueError(
      f"method {method.name!r} has {what} of {size}, which does not split over the mesh's "
      f"{num_shards} data shards; set it to a multiple of {num_shards}."
    )


def fewer_than_most(
  method, proxy_set: ProxySet, *, num_corpus: int, num_target: int
) -> list[str]:
  """A sentence for each "auto" that takes less than its bound; arguments as for `check_sizes`."""
  if not isinstance(method, ProxyMethod | ScorerMethod):
    return []
  told = []
  if proxy_set.num_proxies == AUTO and num_corpus < proxy_set.most:
    told.append(
      f"all {num_corpus} instances of the corpus are proxies, fewer than "
      f"pds.ProxySet.max_proxies={proxy_set.most}"
    )
  is_auto = isinstance(method, TargetMethod) and method.num_target == AUTO
  if is_auto and num_target < method.max_target:
    told.append(
      f"method {method.name!r} takes all {num_target} instances of the target's dev part, fewer "
      f"than max_target={method.max_target}"
    )
  return told
