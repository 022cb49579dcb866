"""Which policy of recomputation a device's memory allows, at the edges."""

import dataclasses

import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.shared_stages.language_training import LanguageTraining
from lmops_jax.sizing.budget import Memory
from lmops_jax.sizing.recomputation import training_model
from lmops_jax.sizing.training import language_training_phase
from lmops_jax.training import optimizers

LENGTH, VOCAB = 64, 512
MODEL = TransformerConfig(
  num_layers=4, width=128, num_heads=4, mlp_width=384, max_length=LENGTH, dtype="bfloat16",
  attention="chunked", remat="dots")
CONFIG = LanguageTraining(
  MODEL, optimizers.adamw(1e-3), num_steps=4, batch_size=64, accumulate=2, remat="auto")
PLACE = MeshConfig(data=2, fsdp=4, reduction="step").plan(8)


def _chosen(device_bytes, config=CONFIG):
  return training_model(config, VOCAB, LENGTH, PLACE, Memory(device_bytes), "tpu").config


def _needed(remat):
  """The least memory for which a policy is chosen."""
  model = training_model(
    dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, remat=remat), remat=None), VOCAB,
    LENGTH, PLACE, Memory(), "tpu")
  phase = language_training_phase("", CONFIG, model, LENGTH, PLACE, "tpu")
  return 1.4 * phase.total_bytes


def test_what_fits_is_kept():
  none, dots, full = map(_needed, ("none", "dots", "full"))
  assert full < dots < none
  for device_bytes, want in (
    (none, "none"), (none - 1, "dots"), (dots, "dots"), (dots - 1, "full"), (full - 1, "full")):
    assert _chosen(device_bytes) == dataclasses.replace(MODEL, vocab_size=VOCAB, remat=want)


def test_more_micro_batches_leave_room():
  device_bytes = _needed("dots") - 1
  assert _chosen(device_bytes, dataclasses.replace(CONFIG, accumulate=4)).remat == "dots"


def test_a_choice_needs_the_memory_and_a_given_policy_does_not():
  with pytest.raises(ValueError, match="set training.LanguageTraining.remat to None"):
    _chosen(None)
  assert _chosen(None, dataclasses.replace(CONFIG, remat=None)).remat == "dots"
  with pytest.raises(ValueError, match="remat='auto' must be 'none', 'dots' or 'full'"):
    dataclasses.replace(MODEL, remat="auto")
