"""RHO-loss: what the proxy has still to learn, as a score."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import optax

from lmops_jax.config.setting_types import (
  Name,
  Positive,
  PositiveInt,
  Seed,
  component,
)
from lmops_jax.shared_stages import language_training
from lmops_jax.systems.pds.methods.bench import Bench
from lmops_jax.training import language_models, optimizers


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class RhoLoss:
  """RHO-loss: the proxy's loss less the loss after fine-tuning the proxy on the target.

  Attributes:
    optimizer: that of the fine-tuning; None: AdamW at the constant `learning_rate`.
    learning_rate: that of this AdamW.
    epochs: passes of the fine-tuning over the target's dev part.
    batch_size: that of the fine-tuning; lowered to the target's size, in multiples of the mesh's
      shards.
  """

  name: Name = "rho_loss"
  optimizer: optax.GradientTransformation | None = None
  learning_rate: Positive = 1e-5
  epochs: PositiveInt = 3
  batch_size: PositiveInt = 32
  micro_batch_size: PositiveInt = 64
  data_seed: Seed = 0

  def score_proxies(self, bench: Bench) -> np.ndarray:
    bench.check_sizes(self)
    optimizer = self.optimizer or optimizers.adamw(self.learning_rate)
    target, shards = bench.prepared.target_dev, bench.partitioner.num_batch_shards
    # A target smaller than the mesh is repeated until every shard has a row.
    indices = np.resize(np.arange(len(target)), max(len(target), shards))
    size = max(min(self.batch_size, len(indices)) // shards, 1) * shards
    num_steps = self.epochs * (len(indices) // size)
    config = dataclasses.replace(
      bench.proxy, optimizer=optimizer, num_steps=num_steps, batch_size=size, keep_every=None,
      keep_steps=(), accumulate=math.gcd(bench.proxy.accumulate, size),
    )
    after = language_training.fit(
      bench.model, bench.example_losses, config,
      language_models.batch_source(target, indices, size, self.data_seed), bench.partitioner,
      directory=bench.context.directory / "fine_tuning" / bench.proxy_stage, seed=self.data_seed,
      initial_params=bench.proxy_params(), description=f"{self.name} fine-tuning",
    )
    before = bench.losses_of(bench.proxy_params(), bench.proxies, self.micro_batch_size)
    bench.add_flops(num_steps * size * target.length, 3)
    bench.add_flops(2 * len(bench.proxies["example_id"]) * bench.corpus.length, 1)
    return (before - bench.losses_of(after, bench.proxies, self.micro_batch_size))[None]
