"""What a compiled program does, read from the text of its optimised HLO.

A lowered program's text can be read too, `lowered.as_text("hlo")`.

XLA's own cost analysis counts the body of a loop once, and a scanned model is nearly all loop. Here
every computation is counted as often as it runs: loops by the trip count that the HLO states or
that follows from a counter compared with a constant; conditionals by the branch with the most
arithmetic, each time or for a share of the times that the caller gives.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "collective-broadcast", "ragged-all-to-all",
)
_ITEM_BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
  "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")  # lowered text has no signature


@dataclasses.dataclass
class Collective:
  """Collectives of one kind: how many a device takes part in, and the bytes of their results."""

  count: float = 0.0
  num_bytes: float = 0.0


@dataclasses.dataclass
class Counts:
  """What one device does in one call of a program.

  Attributes:
    product_flops: operations of matrix products and convolutions, not of kernels (custom calls).
    collectives: by kind.
    num_kernels: Pallas and other custom kernels run.
    unknown_loops: loops whose trip count the HLO does not tell, counted as one trip.
  """

  product_flops: float = 0.0
  collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
  num_kernels: float = 0.0
  unknown_loops: int = 0

  def add(self, other: Counts, times: float = 1.0) -> None:
    """Adds what `other` does in `times` calls."""
    self.product_flops += times * other.product_flops
    self.num_kernels += times * other.num_kernels
    self.unknown_loops += other.unknown_loops
    for kind, found in other.collectives.items():
      own = self.collectives.setdefault(kind, Collective())
      own.count += times * found.count
      own.num_bytes += times * found.num_bytes


def count(text: str, branch_shares: Mapping[str, float] | None = None) -> Counts:
  """Counts the program whose optimised HLO is `text` (`compiled.as_text()`).

  Args:
    branch_shares: from part of a conditional's `op_name` (a `jax.named_scope` in front of it) to
      the share of times at which its costly branch runs; 1 for others.
  """
  module = _Module(text, dict(branch_shares or {}))
  return module.of(module.entry)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str  # attributes

  def attribute(self, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
    return match and match[1]


def _instruction(name: str, text: str) -> _Instruction | None:
  """Splits `shape opcode(operands), attributes`; a tuple's shape is in parentheses itself."""
  end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
  match = re.compile(r"\s*([\w-]+)\(").match(text, end)
  if match is None:
    return None
  close = _closing(text, match.end() - 1)
  inside = text[match.end():close]
  has_operands = match[1] not in ("constant", "parameter")
  operands = re.findall(r"%([\w.-]+)", inside)
  if has_operands and not operands:  # lowered text names them without a sign
    operands = re.findall(r"[\w.-]+", inside)
  rest = "" if has_operands else f"({inside})"
  return _Instruction(name, text[:end], match[1], tuple(operands), rest + text[close + 1:])


def _closing(text: str, start: int) -> int:
  """The index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text)


class _Module:
  def __init__(self, text: str, branch_shares: dict[str, float]):
    self._computations: dict[str, dict[str, _Instruction]] = {}
    self._roots: dict[str, str] = {}
    self._branch_shares = branch_shares
    self.entry, current = "", None
    for line in text.splitlines():
      header = _COMPUTATION.match(line)
      if header:
        current = self._computations.setdefault(header[1], {})
        name_of_current = header[1]
        if line.startswith("ENTRY"):
          self.entry = header[1]
        continue
      body = _INSTRUCTION.match(line) if current is not None else None
      if body is None:
        continue
      found = _instruction(body[1], body[2])
      if found is not None:
        current[found.name] = found
        if line.lstrip().startswith("ROOT "):
          self._roots[name_of_current] = found.name
    if not self.entry:
      raise ValueError("the text is no HLO module: it has no ENTRY computation.")
    self.of = functools.cache(self._count)

  def _count(self, name: str) -> Counts:
    total = Counts()
    computation = self._computations.get(name, {})
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in COLLECTIVES and self._begins(instruction, computation):
        total.add(Counts(collectives={kind: Collective(1, _result_bytes(instruction))}))
      elif instruction.opcode in ("dot", "convolution"):
        total.product_flops += _product_flops(instruction, computation)
      elif instruction.opcode == "while":
        trips = self._trips(instruction, computation)
        total.unknown_loops += trips is None
        total.add(self.of(instruction.attribute("body")), trips or 1)
      elif instruction.opcode == "conditional":
        branches = [self.of(b) for b in _branches(instruction)]
        total.add(max(branches, key=lambda c: c.product_flops), self._share(instruction))
      elif instruction.opcode == "custom-call":
        total.num_kernels += _is_kernel(instruction)
        called = instruction.attribute("called_computations") or instruction.attribute("to_apply")
        if called:
          total.add(self.of(called))
      elif instruction.opcode in ("fusion", "call", "async-start"):
        called = instruction.attribute("calls") or instruction.attribute("to_apply")
        if called:
          total.add(self.of(called))
    return total

  def _begins(self, collective: _Instruction, computation: dict[str, _Instruction]) -> bool:
    """False if a collective that runs beside other work is shown again.

    TPUs spread one over a chain of fusions, each of which repeats it; only the first starts it.
    """
    return "chain_id=" not in collective.rest or any(
      'custom_call_target="AsyncCollectiveStart"' in other.rest for other in computation.values())

  def _share(self, instruction: _Instruction) -> float:
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    for part, share in self._branch_shares.items():
      if name and part in name[1]:
        return share
    return 1.0

  def _trips(self, loop: _Instruction, outside: dict[str, _Instruction]) -> int | None:
    stated = re.search(r'known_trip_count"?:?\s*=?\{"?n"?[:=]"?(\d+)', loop.rest)
    if stated:
      return int(stated[1])
    condition = self._computations.get(loop.attribute("condition"), {})
    compare = condition.get(self._roots.get(loop.attribute("condition"), ""))
    if compare is not None and compare.opcode == "fusion":
      condition = self._computations[compare.attribute("calls")] | {
        "outer": compare}  # the comparison may be wrapped
      compare = condition.get(self._roots[compare.attribute("calls")])
    if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.rest:
      return None
    limit = _constant(condition.get(compare.operands[1]))
    counter = condition.get(compare.operands[0])
    if limit is None or counter is None or counter.opcode != "get-tuple-element":
      return None
    index = int(counter.attribute("index"))
    start = self._start(loop, outside, index)
    step = self._step(loop.attribute("body"), index)
    return max(0, -(-(limit - start) // step))

  def _start(self, loop, outside, index) -> int:
    """The counter's first value; 0, as in every scan, if the HLO does not show it."""
    initial = outside.get(loop.operands[0])
    if initial is None or initial.opcode != "tuple":
      return 0
    value = outside.get(initial.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast", "convert") and value.operands:
      value = outside.get(value.operands[0])
    return _constant(value) or 0

  def _step(self, body: str, index: int) -> int:
    """What a trip adds to the counter; 1 if the HLO does not show it."""
    computation = self._computations.get(body, {})
    root = computation.get(self._roots.get(body, ""))
    if root is None or root.opcode != "tuple":
      return 1
    value = computation.get(root.operands[index])
    if value is None or value.opcode != "add":
      return 1
    steps = [_constant(computation.get(name)) for name in value.operands]
    return next((s for s in steps if s), 1)


def _constant(instruction: _Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "constant":
    return None
  match = re.match(r"\((-?\d+)\)", instruction.rest)
  return int(match[1]) if match else None


def _branches(instruction: _Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
  if listed:
    return re.findall(r"%?([\w.-]+)", listed[1])
  return [instruction.attribute("true_computation"), instruction.attribute("false_computation")]


def _is_kernel(instruction: _Instruction) -> bool:
  target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
  return bool(target) and target[1] in ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")


def _dims(shape: str) -> list[int]:
  """Sizes of the first array in a shape's text."""
  match = _SHAPE.search(shape)
  return [int(n) for n in match[2].split(",") if n] if match else []


def _bytes(kind: str, sizes: str) -> float:
  return _ITEM_BYTES.get(kind, 1) * math.prod(int(n) for n in sizes.split(",") if n)


def _result_bytes(instruction: _Instruction) -> float:
  """Bytes that a collective hands to each device."""
  arrays = [_bytes(kind, sizes) for kind, sizes in _SHAPE.findall(instruction.shape)]
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):
    # (operands, results, flags): the results are as many as the operands and follow them.
    num = len(instruction.operands)
    return sum(arrays[num:2 * num]) or max(arrays, default=0)
  return sum(arrays)


def _product_flops(instruction: _Instruction, computation: dict[str, _Instruction]) -> float:
  out = math.prod(_dims(instruction.shape))
  left, right = (_dims(computation[name].shape) for name in instruction.operands[:2])
  if instruction.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    return 2.0 * out * math.prod(left[axis] for axis in axes)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
  inputs, kernel, outputs = labels[1], labels[2], labels[3]
  flops = 2.0 * out * right[kernel.index("i")]
  window = _window(instruction.rest)
  for axis, size in enumerate(window["size"]):
    name = str(axis)
    positions = _dims(instruction.shape)[outputs.index(name)]
    flops *= _valid(left[inputs.index(name)], positions, size, axis, window) / positions
  return flops


def _window(rest: str) -> collections.defaultdict[str, list]:
  text = re.search(r"window=\{([^}]*)\}", rest)
  fields = dict(part.split("=") for part in text[1].split()) if text else {}
  window = collections.defaultdict(list)
  for name, value in fields.items():
    parts = value.split("x")
    window[name] = ([tuple(map(int, p.split("_"))) for p in parts] if name == "pad"
                    else [int(p) for p in parts])
  return window


def _valid(length: int, positions: int, size: int, axis: int, window) -> int:
  """Pairs of output and window position along one axis that read data and not padding.

  A product with a batch axis may be written as a convolution whose window meets one element at
  each output position, all others being padding; they cost nothing in the product it stands for.
  """
  def field(name, default):
    return window[name][axis] if window[name] else default

  stride, low = field("stride", 1), field("pad", (0, 0))[0]
  base, dilation = field("lhs_dilate", 1), field("rhs_dilate", 1)
  extent = (length - 1) * base + 1
  total = 0
  for k in range(size):
    first = k * dilation - low  # read at output position 0
    if base == 1:
      lowest = max(0, -(first // stride))
      highest = min(positions - 1, (extent - 1 - first) // stride)
      total += max(0, highest - lowest + 1)
    else:
      reads = (first + stride * p for p in range(positions))
      total += sum(0 <= r < extent and r % base == 0 for r in reads)
  return total
