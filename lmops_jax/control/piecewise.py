"""Which parameters an optimizer moves by a piecewise constant function of the gradient.

No costate passes through such an update (a sign, a rounding, a comparison): every exact score is 0.
The traced pullback alone tells so before a solve: JAX's derivative of a piecewise constant
operation is a symbolic zero, so the cotangent of the gradient is not computed from the costate at
all. Nothing is evaluated, so the answer holds for every state, step and value and for any optax
transformation, and costs two traces. A derivative that only rounding keeps from 0, such as that of
`g / |g|`, is not detected.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lmops_jax.control import adjoint, checks, jaxprs
from lmops_jax.control.dynamics import State, apply_update, init_state
from lmops_jax.control.surrogates import SURROGATES

_WRAPPERS = ("chain", "with_extra_args_support")  # names that do not tell the transformation inside


def check_optimizer(optimizer: Any, params: Any, surrogate: str | None = None, owner: str = "",
                    surrogate_owner: str | None = None) -> str | None:
  """Refuses an optimizer under which every score is 0, from shapes alone; see `used_surrogate`.

  Args:
    params: arrays or `ShapeDtypeStruct`s.
  """
  checks.optimizer(optimizer)
  checks.parameters(params)
  state = jax.eval_shape(functools.partial(init_state, optimizer.init, optimizer.update), params)
  return used_surrogate(optimizer.update, state, checks.surrogate(surrogate), owner,
                        surrogate_owner)


def used_surrogate(update: Callable, state: State, surrogate: str | None,
                   owner: str = "", surrogate_owner: str | None = None) -> str | None:
  """The surrogate that a solve needs: None if the exact derivatives reach every parameter.

  If costates pass some parameters and not others, a warning names those that they do not pass.

  Args:
    update: `optimizer.update`. state: its first state, arrays or shapes.
    surrogate: what the user chose, a name of `surrogates.SURROGATES`, or None.
    owner: the prefix of the name under which a user binds `optimizer`, such as "pds.PMP.".
    surrogate_owner: the prefix for `surrogate`, if it is another.
  Raises:
    ValueError: if no costate passes the update of any parameter, so that every score is 0.
  """
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params)]
  moved, passed = _moved(update, state), _passed(update, state, None)
  named = f"{owner or 'the '}optimizer ({optimizer_name(update)})"
  if not any(moved):
    raise ValueError(
      f"Every score would be 0: the update of {named} does not depend on the gradient of any "
      "parameter.")
  if all(p or not m for m, p in zip(moved, passed)):
    return None
  if surrogate is not None:
    passed = _passed(update, state, surrogate)
  lost = [name for name, m, p in zip(names, moved, passed) if m and not p]
  if not lost:
    return surrogate
  why = (f"the update of {named} is piecewise constant in the gradient, so that its derivative is "
         "0 almost everywhere")
  owner = owner if surrogate_owner is None else surrogate_owner
  what = f"set {owner}surrogate={SURROGATES[0]!r} for an approximate derivative of its signs"
  if surrogate is not None:
    what = f"{owner}surrogate={surrogate!r} is for signs (jnp.sign) only: write the update with one"
  if not any(passed):
    raise ValueError(
      f"Every score would be 0: {why}; {what}, or use an optimizer with a derivative, such as SGD "
      "or AdamW.")
  warnings.warn(
    f"Scores do not count what moves {len(lost)} of {len(names)} parameters ({_listed(lost)}): "
    f"there {why}; {what}.", stacklevel=2)
  return surrogate


def optimizer_name(update: Callable) -> str:
  """The transformations that a gradient transformation is made of, as far as Python tells.

  optax makes them of nested functions: `scale_by_lion.<locals>.update_fn`.
  """
  names, seen = [], []

  def visit(x):
    if any(x is y for y in seen):
      return
    seen.append(x)
    if isinstance(x, functools.partial):
      visit((x.func, x.args, x.keywords))
    elif inspect.isfunction(x):
      outer, _, inner = x.__qualname__.partition(".<locals>.")
      if "." not in outer and ("update" in inner or not (inner or outer.startswith("init"))):
        names.append(outer)
      visit(tuple(map(_contents, x.__closure__ or ())))
    elif inspect.ismethod(x):
      names.append(type(x.__self__).__name__)
      visit(getattr(x.__self__, "__dict__", {}))
    elif isinstance(x, Mapping):
      visit(tuple(x.values()))
    elif isinstance(x, tuple | list):
      for part in x:
        visit(part)

  visit(update)
  found = list(dict.fromkeys(name for name in names if name not in _WRAPPERS))
  return ", ".join(found) or getattr(update, "__qualname__", type(update).__name__)


def _contents(cell: Any) -> Any:
  try:
    return cell.cell_contents
  except ValueError:  # empty
    return None


def _moved(update: Callable, state: State) -> list[bool]:
  """For each parameter, whether the gradients of a run change it."""
  jaxpr = jax.make_jaxpr(functools.partial(apply_update, update))(state, state.params).jaxpr
  num_params = len(jax.tree.leaves(state.params))
  known = [0] * len(jax.tree.leaves(state))
  while True:
    wider = jaxprs.dependence(jaxpr, [*known, *[1] * num_params])
    if wider == known:
      return [bool(x) for x in known[:num_params]]
    known = wider


def _passed(update: Callable, state: State, surrogate: str | None) -> list[bool]:
  """For each parameter, whether its costate reaches the cotangent of some step's gradient."""
  def pull(state, grads, costate, opt_cotangent):
    return adjoint.update_pullback(update, state, grads, costate, opt_cotangent, surrogate)

  floats = jax.eval_shape(lambda s: adjoint.float_leaves(s.opt_state), state)
  jaxpr = jax.make_jaxpr(pull)(state, state.params, state.params, floats).jaxpr
  num_params, num = len(jax.tree.leaves(state.params)), len(floats)
  num_given = len(jaxpr.invars) - num_params - num
  outs = jaxprs.dependence(jaxpr, [0] * num_given + [1 << i for i in range(num_params + num)])
  # The first outputs, the cotangents of the state before the step, are what the step before it
  # takes in, in the same order; the rest are the cotangents of the gradient.
  earlier, of_gradient = outs[:num_params + num], outs[num_params + num:]
  reached = jaxprs.union(of_gradient)
  while True:
    wider = jaxprs.union([reached, *(x for i, x in enumerate(earlier) if reached >> i & 1)])
    if wider == reached:
      return [bool(reached >> i & 1) for i in range(num_params)]
    reached = wider


def _listed(names: list[str]) -> str:
  return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
