"""Functions as arguments of jitted functions."""

import functools
from collections.abc import Callable

import jax


def as_pytree(fn: Callable) -> Callable:
  """`fn` as an argument of a jitted function: arrays traced if it is a pytree, the rest static.

  A plain function is compared by identity, so the same function object compiles once.
  """
  if not jax.tree_util.treedef_is_leaf(jax.tree.structure(fn)):
    return fn
  try:
    hash(fn)
  except TypeError:  # what cannot be hashed compiles anew at each call
    return jax.tree_util.Partial(functools.partial(fn))
  return jax.tree_util.Partial(fn)
