"""Argument checks of the solvers: every mistake is one sentence, before anything is compiled."""

import contextlib
import operator
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.control import jaxprs
from lmops_jax.control.surrogates import SURROGATES
from lmops_jax.mesh.micro_batches import DeviceRows


def is_concrete(*trees: Any) -> bool:
  """Whether no leaf is a tracer and every leaf can be read on this host."""
  return all(
    not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    for x in jax.tree.leaves(trees))


def integer(value: Any, name: str, low: int, high: int | None = None) -> int:
  """`value` as an int in `[low, high]`, or a ValueError that says what was expected."""
  expected = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
  try:
    if isinstance(value, bool):
      raise TypeError
    number = operator.index(value)
  except TypeError:
    raise ValueError(f"{name} must be {expected}, got {value!r}.") from None
  if number < low or (high is not None and number > high):
    raise ValueError(f"{name} must be {expected}, got {number}.")
  return number


def number(value: Any, name: str, *, positive: bool = False) -> None:
  """Refuses all but a finite number >= 0, or > 0 (looked at only if it is concrete)."""
  if not is_concrete(value):
    return
  try:
    if np.shape(value) or not (np.isfinite(value) and value >= 0) or (positive and value == 0):
      raise TypeError
  except TypeError:
    raise ValueError(
      f"{name} must be finite and {'>' if positive else '>='} 0, got {value!r}.") from None


def flag(value: Any, name: str) -> bool:
  if not isinstance(value, bool | np.bool_):
    raise ValueError(f"{name} must be True or False, got {value!r}.")
  return bool(value)


def function(value: Any, name: str) -> None:
  if not callable(value):
    raise ValueError(f"{name} must be a function, got {value!r}.")


def array(value: Any, name: str) -> jax.Array:
  """Real numbers as an array."""
  found = _held(value, name)
  if jnp.issubdtype(found.dtype, jnp.complexfloating):
    raise ValueError(f"{name} has dtype {found.dtype}; expected real numbers.")
  return found


def arrays(tree: Any, name: str) -> Any:
  """`tree` with every leaf an array."""
  return jax.tree.map_with_path(
    lambda path, x: _held(x, f"{name}{jax.tree_util.keystr(path)}"), tree)


def _held(value: Any, name: str) -> jax.Array:
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError, OverflowError):
    raise _not_numbers(value, name) from None


def _not_numbers(value: Any, name: str) -> ValueError:
  found = " ".join(reprlib.repr(value).split())
  return ValueError(f"{name} must be an array of numbers, got {found}.")


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
  """Turns what the code of others raises into one sentence that begins with `what`."""
  try:
    yield
  except Exception as error:
    line = next(iter(str(error).splitlines()), "").rstrip(".")
    raise ValueError(f"{what}: {type(error).__name__}: {line}.") from error


def one_of(value: Any, name: str, options: tuple[str, ...]) -> str:
  if not isinstance(value, str) or value not in options:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}.")
  return value


def surrogate(value: Any) -> str | None:
  return None if value is None else one_of(value, "surrogate (or None)", SURROGATES)


def device_rows(value: DeviceRows | None, **sizes: int) -> None:
  """Raises a ValueError if the devices of `value` do not divide one of the numbers of rows."""
  if value is not None and not isinstance(value, DeviceRows):
    raise ValueError(f"device_rows must be a DeviceRows or None, got {value!r}.")
  for name, size in sizes.items() if value is not None else ():
    if size % value.num_shards:
      raise ValueError(
        f"device_rows has {value.num_shards} devices, which do not divide the {size} rows of "
        f"{name}; give a multiple, or leave device_rows out.")


def optimizer(value: Any) -> None:
  if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
    raise ValueError(
      f"optimizer must be an optax.GradientTransformation (init and update), got {value!r}.")


def parameters(params: Any) -> None:
  """At least one leaf, all real floating point."""
  leaves = jax.tree.leaves_with_path(params)
  if not leaves:
    raise ValueError("params has no array leaf; there is nothing to train.")
  for path, leaf in leaves:
    if not (hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)):
      raise _not_numbers(leaf, f"params{jax.tree_util.keystr(path)}")
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"params{jax.tree_util.keystr(path)} has dtype {dtype}; every parameter must be real "
        "floating point (keep counters and tables out of params).")


def leading_axes(tree: Any, name: str, num_axes: int, letters: str) -> tuple[int, ...]:
  """The common leading axes of all leaves, each at least 1."""
  leaves = jax.tree.leaves_with_path(tree)
  if not leaves:
    raise ValueError(f"{name} has no array leaf; every leaf must have leading axes [{letters}].")
  shape = None
  for path, leaf in leaves:
    where, found = f"{name}{jax.tree_util.keystr(path)}", tuple(np.shape(leaf))
    if len(found) < num_axes:
      raise ValueError(f"{where} has shape {found}; expected leading axes [{letters}].")
    if shape is not None and found[:num_axes] != shape:
      raise ValueError(
        f"{where} has leading axes {found[:num_axes]}, other leaves have {shape}; all leaves of "
        f"{name} must share [{letters}].")
    shape = found[:num_axes]
  if min(shape) < 1:
    raise ValueError(f"{name} has leading axes [{letters}] = {shape}; each must be at least 1.")
  return shape


def step_weights(weights: jax.Array, num_steps: int, batch_size: int) -> None:
  """`[T, B]`, finite and >= 0 (values are looked at only if they are concrete)."""
  if weights.shape != (num_steps, batch_size):
    raise ValueError(
      f"weights has shape {weights.shape}; expected [T, B] = {(num_steps, batch_size)} as in "
      "batches.")
  if is_concrete(weights):
    values = np.asarray(weights)
    bad = np.argwhere(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
      t, n = bad[0]
      raise ValueError(
        f"weights[{t}, {n}] is {values[t, n]}; data weights must be finite and >= 0.")


def simplex(gamma: Any, num_examples: int) -> None:
  """`[N]`, finite, >= 0, summing to one."""
  if np.shape(gamma) != (num_examples,):
    raise ValueError(
      f"gamma has shape {np.shape(gamma)}; expected one weight for each of the {num_examples} "
      "examples.")
  if is_concrete(gamma):
    values = np.asarray(gamma, np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
      raise ValueError(
        f"gamma[{bad[0]}] is {values[bad[0]]}; data weights must be finite and >= 0.")
    if abs(values.sum() - 1) > 1e-4:
      raise ValueError(
        f"gamma sums to {values.sum():.6g}, not 1; project it with control.project_simplex.")


def losses(example_losses: Callable, params: Any, batch: Any, batch_size: int, name: str) -> None:
  """Checks by abstract evaluation that `example_losses(params, batch)` is `[B]` floating point."""
  function(example_losses, "example_losses")
  leaves = ", ".join(jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(batch))
  with failing(f"example_losses fails on {name} with the leaves {leaves}"):
    closed, out = jax.make_jaxpr(example_losses, return_shape=True)(params, batch)
  if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != (batch_size,):
    raise ValueError(
      f"example_losses returned {_describe(out)} for {name} of {batch_size} examples; expected one "
      f"loss an example, shape ({batch_size},).")
  if not jnp.issubdtype(out.dtype, jnp.floating):
    raise ValueError(f"example_losses returned dtype {out.dtype}; expected floating point.")
  _depends(closed.jaxpr, params, "example_losses")


def target(target_loss: Callable, params: Any, name: str = "target_loss") -> None:
  """Checks by abstract evaluation that `target_loss(params)` is a floating-point scalar."""
  function(target_loss, name)
  with failing(f"{name} fails"):
    closed, out = jax.make_jaxpr(target_loss, return_shape=True)(params)
  if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != ():
    raise ValueError(
      f"{name} returned {_describe(out)}; expected a scalar (take the mean over the target).")
  if not jnp.issubdtype(out.dtype, jnp.floating):
    raise ValueError(f"{name} returned dtype {out.dtype}; expected floating point.")
  _depends(closed.jaxpr, params, name)


def like_params(tree: Any, name: str, params: Any) -> Any:
  """`tree` as arrays, checked to have the structure and shapes of `params`."""
  shapes = [np.shape(x) for x in jax.tree.leaves(params)]
  if jax.tree.structure(tree) != jax.tree.structure(params) or shapes != [
      np.shape(x) for x in jax.tree.leaves(tree)]:
    raise ValueError(f"{name} must have the structure and shapes of params.")
  return arrays(tree, name)


def micro_batch(value: Any, name: str, batch_size: int) -> int | None:
  if value is None:
    return None
  size = integer(value, name, 1)
  if batch_size % min(size, batch_size):
    raise ValueError(
      f"{name}={size} does not divide the batch of {batch_size} examples; choose a divisor.")
  return size


def _depends(jaxpr: Any, params: Any, name: str) -> None:
  num_params, num = len(jax.tree.leaves(params)), len(jaxpr.invars)
  if not any(jaxprs.dependence(jaxpr, [1] * num_params + [0] * (num - num_params))):
    raise ValueError(f"{name} does not depend on params; there is nothing to differentiate.")


def _describe(out: Any) -> str:
  if isinstance(out, jax.ShapeDtypeStruct):
    return f"an array of shape {out.shape}"
  return f"a {type(out).__name__}"
