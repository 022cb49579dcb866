"""Published tensors to parameters, one leaf at a time, straight to where each device wants them.

A leaf is assembled on the host only as far as this process's devices ask for it, from memory-mapped
files, so a model larger than one device's share is never held twice. Every tensor of the checkpoint
is used and every parameter filled, or the error lists both sides.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.host.words import listed
from lmops_jax.models.partitioning import unboxed
from lmops_jax.pretrained.families.family import Family
from lmops_jax.pretrained.rules import Rule

if TYPE_CHECKING:
  from lmops_jax.pretrained.sources import TensorSource

_MAX_LISTED = 12
# Heads of other tasks, which the function of a language model does not depend on.
_OTHER_HEADS = re.compile(
  r"(score|classifier|qa_outputs|v_head|value_head|multiple_choice_head|summary)\..*"
)


def abstract_params(family: Family, config):
  """The model's parameters as shapes, boxed with logical axes; nothing is allocated."""
  module, inputs = family.module(config), family.inputs(config)
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


class NameTable:
  """The tensors of a source under the full names of a family's rules.

  A checkpoint of the bare body lacks the prefix; old ones call a norm's tensors gamma and beta; the
  authors' own may have other names; of two names for one tensor it may have either.

  Args:
    family: see `Family`.
    twins: names, each with another name of the same tensor.

  Raises:
    ValueError: if a checkpoint has both the name with prefix and the bare one.
  """

  def __init__(
    self, source: TensorSource, family: Family, twins: Mapping[str, str] | None = None
  ):
    self._source = source
    self.actual: dict[str, str] = {}  # name without prefix -> name in the source
    self._prefix = family.prefix
    self.twins = dict(twins or {})
    pairs = [(self.bare(a), self.bare(b)) for a, b in self.twins.items()]
    self._other = dict(pairs) | {b: a for a, b in pairs}
    for name in source.names():
      published = family.published_name(name)
      bare = self.bare(re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", published)))
      if bare in self.actual:
        raise ValueError(
          f"{source.where} holds both {self.actual[bare]} and {name}, which name one tensor of the "
          "model; keep the one that is right."
        )
      self.actual[bare] = name

  def bare(self, name: str) -> str:
    return name.removeprefix(self._prefix)

  def find(self, name: str) -> str | None:
    """The name in the source of a rule's tensor, None if it has none."""
    return self.stored(name) or self.stored(self._other.get(self.bare(name), name))

  def stored(self, name: str) -> str | None:
    """The name in the source of just this tensor, its twin's name aside."""
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


def named(source: TensorSource, family: Family, config) -> NameTable:
  """The tensors of a checkpoint of a model; a tied one may have its embedding by either name."""
  tied = family.tied if family.ties(config) else {}
  return NameTable(source, family, {**tied, **family.same})


def check_sizes(names: NameTable, source: TensorSource, family: Family, config, where: str) -> None:
  """Checks declared sizes against the tensors, before anything is made of those sizes.

  Args:
    where: the file that declares them.

  Raises:
    ValueError: if the checkpoint cannot have a declared number of layers or size.
  """
  rules = [rule for rule in family.rules(config) if rule.of_layers]
  largest = max(source.names(), key=lambda name: max(source.shape(name), default=0), default=None)
  most = 0 if largest is None else max(source.shape(largest), default=0)
  for sizes in family.sizes(config):
    rule = next(rule for rule in rules if rule.ours[0].startswith(sizes.part))
    held = _num_layers(names, rule.theirs)
    if sizes.num_layers > held:
      raise ValueError(
        f"{where}: {sizes.layers}={sizes.num_layers}, but {source.where} holds {held} layers: it "
        f"lacks {rule.theirs.format(i=held)}."
      )
    for field, size in sizes.axes.items():
      if size > most:
        raise ValueError(
          f"{where}: {field}={size}, but no tensor of {source.where} is that large; its longest "
          f"axis is {most} ({largest})."
        )


def _num_layers(names: NameTable, theirs: str) -> int:
  """How many layers of the checkpoint, counted from the first, hold tensors named like a rule's."""
  before = re.escape(names.bare(theirs).split("{i}")[0])
  matches = (re.match(rf"{before}(\d+)\.", bare) for bare in names.actual)
  found = {match[1] for match in matches if match}
  return next(i for i in itertools.count() if str(i) not in found)


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
    family: its table names them.
    config: the model's configuration.
    partitioner: a `mesh.meshes.Partitioner` whose mesh the parameters are placed on; None is
      this process's first device.
    ignore: patterns of further tensor names to leave out.

  Raises:
    ValueError: if tensors are missing, left over or of another shape; the sentence lists them.
  """
  return place(*matched(source, family, config, ignore), partitioner)


def matched(
  source: TensorSource, family: Family, config, ignore: Sequence[str] = (),
  most_listed: int = _MAX_LISTED,
):
  """What `place` wants of a checkpoint that fits a model, of which no weight has been read yet.

  Args:
    source, family, config, ignore: as in `load_params`.
    most_listed: names of a kind that the error lists.

  Returns:
    The tensors by their full names, the rule of each leaf, and the leaves' shapes.

  Raises:
    ValueError: as `load_params`.
  """
  names = named(source, family, config)
  boxed = abstract_params(family, config)
  ignored = (*family.ignored, *ignore)
  table = check_fit(names, source, family.rules(config), unboxed(boxed), ignored, most_listed)
  if family.ties(config):
    _check_twins(names)
  return names, table, boxed


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
  """The part `index` of a leaf; the first axis of a leaf that holds layers is the layer."""
  if not rule.of_layers:
    return np.asarray(rule.split(names.read(rule.theirs))[which][index]).astype(leaf.dtype)
  layers = rule.names(leaf.shape[0])[index[0]]
  parts = [np.asarray(rule.split(names.read(name))[which][index[1:]]) for name in layers]
  return np.stack(parts).astype(leaf.dtype)


def _once_a_part(read):
  """Devices that replicate a part ask for it again; it is assembled once."""
  last: dict[tuple, np.ndarray] = {}

  def callback(index):
    key = tuple((s.start, s.stop) for s in index)
    if key not in last:
      last.clear()  # only one part is held
      last[key] = read(index)
    return last[key]

  return callback


def check_fit(
  names: NameTable, source: TensorSource, rules: Sequence[Rule], params, ignored: Sequence[str],
  most_listed: int = _MAX_LISTED,
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
  twins = {names.bare(twin) for twin in names.twins}
  left = {
    bare: f"{name} {list(source.shape(name))}" for bare, name in names.actual.items()
    if name not in used and bare not in twins
    and not any(p.fullmatch(bare) or p.fullmatch(name) for p in patterns)
  }
  if missing or wrong or left:
    problems = []
    if missing:
      problems.append(f"it lacks {listed(missing, most_listed)}")
    if wrong:
      problems.append(listed(wrong, most_listed))
    if left:
      problems.append(f"the model has no place for its {listed(list(left.values()), most_listed)}")
    advice = "Give it the configuration that it was saved with"
    if left and not missing and not wrong and all(map(_OTHER_HEADS.fullmatch, left)):
      advice += ", or leave the other task's head out by its name in pretrained.load.ignore"
    raise ValueError(
      f"The checkpoint {source.where} does not fit its configuration: {'; '.join(problems)}. "
      f"{advice}."
    )
  return table


def _check_twins(names: NameTable) -> None:
  """If both of two names for one tensor are stored, their numbers must be the same."""
  for twin, name in names.twins.items():
    first, second = names.stored(twin), names.stored(name)
    if first and second and not np.array_equal(names.read(twin), names.read(name)):
      raise ValueError(
        f"{first} differs from {second} though the model ties its embeddings; set "
        "tie_word_embeddings to false in config.json to load both."
      )
