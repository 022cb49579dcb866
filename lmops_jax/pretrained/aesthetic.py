"""The published aesthetic predictor (`models.aesthetic`) from a `.pth` or a safetensors file.

Its ratings steer a policy for days, and its siblings (reluMSE, ava+logos) have the same tensors and
other numbers: the file's SHA-256 is held against the published one before it is used. The weights
are under Apache-2.0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lmops_jax.config.setting_types import ByteCount, ExistingPath, Text, component
from lmops_jax.host.words import listed
from lmops_jax.models.aesthetic import LAYERS, Folded, fold
from lmops_jax.pretrained.sources import MAX_INFLATED_BYTES, TensorSource, open_source

PUBLISHED, ANY = "published", "any"
SHA256 = {
  "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0":
    "sac+logos+ava1-l14-linearMSE.pth",
  "66bd9d23beb91df38c2c2c298c2a38eaa78dcbc6d7e5c26ea86b6225eddca66d":
    "the same tensors as safetensors",
}
_DIGEST = re.compile("[0-9a-f]{64}")
_TENSORS = tuple((name, name.replace("_", ".")) for name in LAYERS)  # ours, theirs


@component("aesthetic", module="pretrained")
@dataclasses.dataclass(frozen=True)
class AestheticFile:
  """An aesthetic predictor on disk whose numbers have not been read yet.

  Attributes:
    path: a `.pth` or `.safetensors` file.
    sha256: "published", one of the known files; 64 hex digits, just this file; "any", unchecked.
    max_inflated_bytes: see `pretrained.load`.

  Raises:
    ValueError: another form of `sha256`.
  """

  path: ExistingPath
  sha256: Text = PUBLISHED
  max_inflated_bytes: ByteCount = MAX_INFLATED_BYTES

  def __post_init__(self):
    if self.sha256 not in (PUBLISHED, ANY) and not _DIGEST.fullmatch(self.sha256):
      raise ValueError(
        f"pretrained.aesthetic.sha256={self.sha256!r} must be {PUBLISHED!r}, {ANY!r} or the 64 hex "
        "digits of a file."
      )

  def fingerprint(self) -> str:
    """SHA-256 of the file, 64 hex digits."""
    with Path(self.path).expanduser().open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()

  def params(self) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of `AestheticPredictor`, float32.

    Raises:
      ValueError: another file than `sha256` says, a damaged one, or one whose tensors are not the
        five layers'; the sentence lists all that are wrong.
    """
    self._check_digest()
    with open_source(Path(self.path).expanduser(), self.max_inflated_bytes) as source:
      _check_tensors(source)
      return {
        ours: {
          "kernel": np.array(source.read(f"{theirs}.weight"), np.float32).T,
          "bias": np.array(source.read(f"{theirs}.bias"), np.float32),
        } for ours, theirs in _TENSORS
      }

  def folded(self) -> Folded:
    """The folded form of `params`."""
    return fold(self.params())

  def _check_digest(self) -> None:
    if self.sha256 == ANY:
      return
    found, wanted = self.fingerprint(), list(SHA256) if self.sha256 == PUBLISHED else [self.sha256]
    if found not in wanted:
      raise ValueError(
        f"{self.path} has SHA-256 {found} and pretrained.aesthetic.sha256={self.sha256!r} wants "
        f"{' or '.join(wanted)}; fetch {SHA256[next(iter(SHA256))]} again, or, if you mean this "
        "file, set sha256 to its digits."
      )


def _check_tensors(source: TensorSource) -> None:
  """Every tensor of the five layers, in a chain of widths that ends in one number."""
  names = set(source.names())
  wanted = [f"{theirs}.{part}" for _, theirs in _TENSORS for part in ("weight", "bias")]
  problems = [f"it lacks {name}" for name in wanted if name not in names]
  problems += [f"nothing takes its {name}" for name in source.names() if name not in wanted]
  width = None
  for _, theirs in _TENSORS:
    weight, bias = f"{theirs}.weight", f"{theirs}.bias"
    if not {weight, bias} <= names:
      width = None
      continue
    shape = source.shape(weight)
    last = theirs == _TENSORS[-1][1]
    outputs = 1 if last else shape[0] if shape else 0
    inputs = shape[-1] if width is None and shape else width
    for name, want in ((weight, (outputs, inputs)), (bias, (outputs,))):
      if source.shape(name) != want:
        problems.append(f"{name} is {list(source.shape(name))} and should be {list(want)}")
      if not jnp.issubdtype(source.dtype(name), jnp.floating):
        problems.append(f"{name} holds {source.dtype(name)} and should hold floating-point numbers")
    width = outputs
  if problems:
    raise ValueError(
      f"{source.where} is no aesthetic predictor of five linear layers: {listed(problems, 20)}; "
      "take the published linearMSE file."
    )
