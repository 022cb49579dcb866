"""What the backward pass of a language-model training recomputes, chosen by arithmetic.

Recomputing takes operations and keeping takes memory. A plan and the training that it is of ask the
same function, so that they choose alike.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lmops_jax.mesh.meshes import Partitioner
from lmops_jax.models.config import REMAT_POLICIES
from lmops_jax.models.transformer import Transformer
from lmops_jax.sizing.budget import Memory
from lmops_jax.sizing.training import language_training_phase
from lmops_jax.training import language_models

AUTO = "auto"
# Compiled, a step that keeps anything takes up to so much of its planned bytes, for the compiler's
# copies of activations, gradients and their sums (tests/benchmarks/results/aot.md).
COMPILED = 1.4


def training_model(
  config: Any, vocab_size: int, length: int, partitioner: Partitioner, memory: Memory,
  platform: str,
) -> Transformer:
  """The model that a `shared_stages.language_training.LanguageTraining` trains.

  Its `remat` is that of `config.model`; or, if `config.remat` is "auto", the policy that recomputes
  least of those whose bytes fit `COMPILED` times; or "full" if none does.

  Args:
    memory: that of a device.
    platform: the devices' kind: "cpu", "gpu" or "tpu".

  Raises:
    ValueError: if the memory has to be known and is not.
  """
  model = language_models.language_model(config.model, vocab_size, length)
  if config.remat != AUTO:
    return model
  if memory.device_bytes is None:
    raise ValueError(
      f'{config.setting}.remat="{AUTO}" needs to know the memory of a device, which jax does not '
      f"tell here; set {config.setting}.remat to None, which takes "
      "models.TransformerConfig.remat.")
  for policy in REMAT_POLICIES:
    model = Transformer(dataclasses.replace(model.config, remat=policy))
    phase = language_training_phase("", config, model, length, partitioner, platform)
    if COMPILED * phase.total_bytes <= memory.device_bytes:
      break
  return model
