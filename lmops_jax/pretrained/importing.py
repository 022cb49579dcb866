"""Published tensors to parameters, one leaf at a time, straight to where each device wants them.

A leaf is assembled on the host only as far as this process's devices ask for it, from memory-mapped
files, so a model larger than one device's share is never held twice. Every tensor of the checkpoint
is used and every parameter filled, or the error lists both sides.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.partitioning import unboxed
from lmops_jax.pretrained.families.family import Family
from lmops_jax.pretrained.rules import Rule

if TYPE_CHECKING:
  from lmops_jax.pretrained.sources import TensorSource

_MAX_LISTED = 12


def abstract_params(family: Family, config):
  """The model's parameters as shapes, boxed with logical axes; nothing is allocated."""
  module, inputs = family.module(config), family.inputs(config)
  return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]


class NameTable:
  """The tensors of a source under the full names of a family's rules.

  A checkpoint of the bare body lacks the prefix; old ones call a norm's tensors gamma and beta.
  """

  def __init__(self, source: TensorSource, prefix: str):
    self._source = source
    self.actual: dict[str, str] = {}  # name without prefix -> name in the source
    self._prefix = prefix
    for name in source.names():
      bare = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
      self.actual[self.bare(bare)] = name

  def bare(self, name: str) -> str:
    return name.removeprefix(self._prefix)

  def find(self, name: str) -> str | None:
    """The name in the source of a rule's tensor, None if it has none."""
    return self.actual.get(self.bare(name))

  def shape(self, name: str) -> tuple[int, ...] | None:
    found = self.find(name)
    return None if found is None else tuple(self._source.shape(found))

  def dtype(self, name: str) -> np.dtype:
    return self._source.dtype(self.find(name))

  def read(self, name: str) -> np.ndarray:
    return self._source.read(self.find(name))

  def has(self, patterns: Iterable[str]) -> bool:
    """Whether any tensor's name without prefix starts like one of the patterns."""
    return any(re.match(p, bare) for p in patterns for bare in self.actual)


def load_params(
  source: TensorSource,
  family: Family,
  config,
  *,
  partitioner=None,
  ignore: Sequence[str] = (),
):
  """The parameters of a checkpoint as a tree like the module's `init`, in `param_dtype`.

  Args:
    source: the checkpoint's tensors.
    family: whose table names them.
    config: of the model.
    partitioner: a `training.mesh.Partitioner` whose mesh the parameters are placed on; None is
      this process's first device.
    ignore: patterns of further tensor names to leave out.

  Raises:
    ValueError: tensors are missing, left over or of another shape; the sentence lists them.
  """
  names = NameTable(source, family.prefix)
  boxed = abstract_params(family, config)
  ignored = (*family.ignored, *ignore)
  tied = family.tied if getattr(config, "tied_embeddings", False) else ()
  rules = family.rules(config)
  table = check_fit(names, source, rules, unboxed(boxed), ignored, tied)
  _check_tied(names, rules, tied)
  return place(names, table, boxed, partitioner)


def place(names, table: Mapping[str, tuple[Rule, int]], boxed, partitioner):
  """Reads every leaf that `table` describes into its place on the mesh."""
  shardings = _shardings(boxed, partitioner)

  def make(path, leaf, sharding):
    rule, which = table[joined(path)]
    read = functools.partial(_read_leaf, names, rule, which, leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, _once_a_part(read))

  return jax.tree_util.tree_map_with_path(make, unboxed(boxed), shardings)


def _shardings(boxed, partitioner):
  if partitioner is not None:
    return partitioner.shardings(boxed, uneven="whole")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda _: device, unboxed(boxed))


def joined(path) -> str:
  """A tree path as a rule spells it."""
  return "/".join(part.key for part in path)


def _read_leaf(names, rule: Rule, which: int, leaf, index) -> np.ndarray:
  """The part `index` of a leaf; of a layer's leaf the first axis is the layer."""
  if not rule.of_layers:
    return np.asarray(rule.split(names.read(rule.theirs))[which][index]).astype(leaf.dtype)
  layers = range(leaf.shape[0])[index[0]]
  parts = [
    np.asarray(rule.split(names.read(rule.theirs.format(i=i)))[which][index[1:]])
    for i in layers
  ]
  return np.stack(parts).astype(leaf.dtype)


def _once_a_part(read):
  """Devices that replicate a part ask for it again; it is assembled once."""
  last: dict[tuple, np.ndarray] = {}

  def callback(index):
    key = tuple((s.start, s.stop) for s in index)
    if key not in last:
      last.clear()  # of all parts, only one is held
      last[key] = read(index)
    return last[key]

  return callback


def check_fit(
  names: NameTable, source: TensorSource, rules: Sequence[Rule], params, ignored: Sequence[str],
  tied: Sequence[str],
) -> dict[str, tuple[Rule, int]]:
  """Compares a checkpoint with a model by name and shape.

  Returns:
    For each path of the tree, the rule that fills it and which of the rule's leaves it is.

  Raises:
    ValueError: listing what the model wants and lacks, and what the checkpoint holds in vain.
  """
  leaves = {
    joined(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  table: dict[str, tuple[Rule, int]] = {}
  used, missing, wrong = set(), [], []
  for rule in rules:
    for which, path in enumerate(rule.ours):
      table[path] = (rule, which)
    own = leaves[rule.ours[0]]
    want = own[1 if rule.of_layers else 0 :] if rule.shape is None else rule.shape
    for name in rule.names(own[0] if rule.of_layers else 0):
      shape = names.shape(name)
      if shape is None:
        missing.append(f"{name} {list(want)}")
        continue
      used.add(names.find(name))
      if not jnp.issubdtype(names.dtype(name), jnp.floating):
        wrong.append(
          f"{names.find(name)} holds {names.dtype(name)} and should hold floating-point numbers")
      if shape != tuple(want):
        wrong.append(f"{names.find(name)} is {list(shape)} and should be {list(want)}")
  unfilled = sorted(leaves.keys() - table.keys())
  assert not unfilled, unfilled  # a family's table covers its own models
  patterns = [re.compile(pattern) for pattern in ignored]
  left = [
    f"{name} {list(source.shape(name))}" for bare, name in names.actual.items()
    if name not in used and bare not in {names.bare(t) for t in tied}
    and not any(p.fullmatch(bare) or p.fullmatch(name) for p in patterns)
  ]
  if missing or wrong or left:
    problems = []
    if missing:
      problems.append(f"it lacks {_listed(missing)}")
    if wrong:
      problems.append(_listed(wrong))
    if left:
      problems.append(f"the model has no place for its {_listed(left)}")
    raise ValueError(
      f"The checkpoint {source.where} does not fit its configuration: {'; '.join(problems)}. Give "
      "it the config.json that it was saved with, or name tensors to leave out in "
      "pretrained.load.ignore."
    )
  return table


def _check_tied(names: NameTable, rules: Sequence[Rule], tied: Sequence[str]) -> None:
  """A stored output matrix of a tied model must be the embedding."""
  for name in filter(names.find, tied):
    embedding = next(rule.theirs for rule in rules if rule.ours == ("embedding",))
    if not np.array_equal(names.read(name), names.read(embedding)):
      raise ValueError(
        f"{names.find(name)} differs from {names.find(embedding)} though the model ties its "
        "embeddings; set tie_word_embeddings to false in config.json to load both."
      )


def _listed(items: Sequence[str]) -> str:
  more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
  return ", ".join(items[:_MAX_LISTED]) + more
