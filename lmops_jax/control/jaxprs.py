"""Reading jaxprs: the calls inside them, and which outputs are computed from which inputs."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

# Primitives that run one inner jaxpr on their own arguments.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint")


def called(eqn: Any) -> tuple[Any, Sequence]:
  """`(jaxpr, constants)` of an equation of `CALLS`."""
  return opened(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])


def opened(jaxpr: Any) -> tuple[Any, Sequence]:
  """The pair (jaxpr, constants) of a jaxpr that is closed or open."""
  return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def dependence(jaxpr: Any, masks: Sequence[int]) -> list[int]:
  """The set of inputs that each output is computed from; the bits of an integer are a set.

  Args:
    jaxpr: open; calls, `cond` and `scan` are followed, anything else is taken as a whole.
    masks: a set for each input.
  Returns:
    For each output the union of the sets of all inputs that it is computed from.
  """
  found = dict(zip(jaxpr.invars, masks, strict=True))

  def of(atom):
    return 0 if isinstance(atom, jex.Literal) else found.get(atom, 0)  # constants have no bit

  for eqn in jaxpr.eqns:
    found.update(zip(eqn.outvars, _of_equation(eqn, [of(v) for v in eqn.invars]), strict=True))
  return [of(v) for v in jaxpr.outvars]


def _of_equation(eqn: Any, masks: list[int]) -> list[int]:
  name = eqn.primitive.name
  if name in CALLS:
    return dependence(called(eqn)[0], masks)
  if name == "cond":
    index, *operands = masks
    branches = [dependence(opened(b)[0], operands) for b in eqn.params["branches"]]
    return [union((index, *outs)) for outs in zip(*branches, strict=True)]
  if name == "scan":
    return _of_scan(eqn.params, masks)
  return [union(masks)] * len(eqn.outvars)


def _of_scan(params: dict[str, Any], masks: list[int]) -> list[int]:
  body, _ = opened(params["jaxpr"])
  num_consts, num_carry = params["num_consts"], params["num_carry"]
  consts, rest = masks[:num_consts], masks[num_consts:]
  carry, xs = rest[:num_carry], rest[num_carry:]
  while True:
    outs = dependence(body, [*consts, *carry, *xs])
    wider = [a | b for a, b in zip(carry, outs[:num_carry])]
    if wider == carry:
      return [*carry, *outs[num_carry:]]
    carry = wider


def union(masks: Sequence[int]) -> int:
  """The union of sets that are the bits of integers."""
  return functools.reduce(operator.or_, masks, 0)
