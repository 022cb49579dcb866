"""A language-model training as a stage: what it decides before it trains."""

import dataclasses
import types

import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.shared_stages import language_training
from lmops_jax.sizing import budget, recomputation
from lmops_jax.systems.pds import plan, pretrain
from lmops_jax.training import optimizers

LENGTH, VOCAB = 64, 512


class Rows:
  """As many packed instances, of which none is read."""

  vocab_size, length, batch = VOCAB, LENGTH, None

  def __len__(self):
    return 64


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_training_recomputes_what_its_plan_says(monkeypatch, tmp_path, remat):
  partitioner = MeshConfig(data=2, fsdp=4).build()
  model = TransformerConfig(num_layers=4, num_heads=4, max_length=LENGTH, remat=remat)
  given = pretrain.Pretrain(model, optimizers.adamw(1e-3), num_steps=2, batch_size=64)
  config = dataclasses.replace(
    given, remat="auto", model=dataclasses.replace(model, remat="none"))

  def planned(config, memory=None):
    return plan._training(
      "pretrain", config, VOCAB, LENGTH, partitioner, budget.Memory(memory), "cpu")

  needed = planned(given)
  device_bytes = recomputation.COMPILED * needed.total_bytes
  trained, lines = [], []
  monkeypatch.setattr(budget, "memory_of", lambda *_: budget.Memory(device_bytes))
  monkeypatch.setattr(language_training, "fit", lambda model, *_, **__: trained.append(model))
  context = types.SimpleNamespace(
    name="pretrain", directory=tmp_path, log=lines.append, flops=0.0, extra={}, progress=None)
  language_training.train(context, config, Rows(), partitioner, seed=0)
  assert trained[0].config.remat == remat
  phase = planned(config, device_bytes)
  assert (phase.parts, phase.note) == (needed.parts, needed.note)
  assert lines == [
    f"pretrain: {phase.note}, about {phase.total_bytes / 2**20:,.1f} of "
    f"{device_bytes / 2**20:,.1f} MiB a device"]
