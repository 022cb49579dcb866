"""What a method works with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmops_jax import control
from lmops_jax.control.gradient_norms import gradient_norms
from lmops_jax.evaluation import examples
from lmops_jax.mesh import meshes, processes
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import prepare, pretrain
from lmops_jax.systems.pds.methods.proxy_set import ProxySet
from lmops_jax.systems.pds.methods.sizes import check_sizes
from lmops_jax.training import language_models, losses

DIVISORS = ("gradient_norm", "sqrt_length")


@dataclasses.dataclass
class Bench:
  """What a method works with: the opened inputs of its stage, and the proxy language model.

  Attributes:
    proxy_run: which of the proxy's trainings the parameters are from. A method that scores proxies
      is called for each; nothing that is kept here depends on it.
  """

  context: pipeline.StageContext
  prepared: prepare.Prepared
  proxy: pretrain.Pretrain
  proxy_set: ProxySet
  partitioner: meshes.Partitioner
  proxy_run: int = 0

  @functools.cached_property
  def corpus(self):
    return self.prepared.corpus

  @functools.cached_property
  def proxy_indices(self) -> np.ndarray:
    """Rows of the corpus that are the proxy set, `[M] int64`, ascending."""
    return self.proxy_set.indices(self.corpus.ids)

  @functools.cached_property
  def proxies(self) -> dict[str, np.ndarray]:
    """The proxy set as one host batch."""
    batch = self.corpus.batch(self.proxy_indices)
    self.example_losses.check_batch(batch)
    return batch

  @functools.cached_property
  def model(self):
    return language_models.language_model(
      self.proxy.model, self.corpus.vocab_size, self.corpus.length
    )

  @functools.cached_property
  def example_losses(self) -> Callable[[Any, Any], jax.Array]:
    return losses.lm_example_losses(self.model, chunk=self.proxy.loss_chunk)

  def place_rows(self, rows, micro_batch_size: int) -> tuple[dict[str, jax.Array], int]:
    """Places any number of rows, filled up with repeats of the first so that the mesh divides them.

    Args:
      rows: the rows, the same in every process of the job.
      micro_batch_size: the most rows to work on at a time.

    Returns:
      The placed rows, whose number is a multiple of the micro-batch size, and that size: at most
      `micro_batch_size` rounded up to a multiple of the mesh's shards.
    """
    num = len(next(iter(rows.values())))
    num_filled, size = self.partitioner.filled_rows(num, micro_batch_size)
    filler = num_filled - num
    filled = {k: np.concatenate([v, np.repeat(v[:1], filler, axis=0)]) for k, v in rows.items()}
    return self.partitioner.place_rows(filled), size

  def proxy_params(self, step: int | None = None):
    """Parameters of the proxy at a kept step (None: its last)."""
    step = self.proxy.num_steps if step is None else step
    if step not in self.proxy.kept_steps():
      raise ValueError(
        f"the proxy keeps no parameters at step {step}; add it to pds.Pretrain.keep_steps "
        f"(kept: {self.proxy.kept_steps()})."
      )
    return language_models.load_params(
      self.context.input(self.proxy_stage), step, self.model, self.partitioner
    )

  @property
  def proxy_stage(self) -> str:
    """The stage that trained the proxy."""
    return pretrain.proxy_stage(self.proxy_run)

  @functools.cached_property
  def _jitted_losses(self):
    return jax.jit(self.example_losses)

  def losses_of(self, params, rows, batch_size: int) -> np.ndarray:
    """`[N]` losses of the host batch `rows`, `batch_size` at a time."""
    return examples.map_examples(
      self._jitted_losses, params, rows, batch_size, self.partitioner
    )

  def target_batch(self, num: int | None) -> dict[str, np.ndarray]:
    """`num` random instances of the target's dev part, the same for every method (None: all).

    Runs of the proxy take one `num` after the other, from the beginning again behind the last.
    """
    target = self.prepared.target_dev
    num = len(target) if num is None else num
    order = np.random.default_rng(self.proxy_set.seed).permutation(len(target))
    batch = target.batch(np.sort(np.roll(order, -self.proxy_run * num)[:num]))
    self.example_losses.check_batch(batch)
    return batch

  def target_loss(self, num: int | None, micro_batch_size: int) -> Callable[[Any], jax.Array]:
    """`params -> J`, the mean loss over the target's dev part, a micro-batch at a time."""
    rows = self.target_batch(num)
    placed, size = self.place_rows(rows, micro_batch_size)
    return control.mean_target_loss(
      self.example_losses, placed, size, num_rows=len(rows["example_id"]),
      device_rows=self.partitioner.device_rows,
    )

  def check_sizes(self, method) -> None:
    """Refuses, before anything is placed or compiled, sizes that the data or the mesh cannot give.

    Raises:
      ValueError: if one does not fit; it names the macro of the PDS gin files to change.
    """
    check_sizes(
      method, self.proxy_set, num_corpus=len(self.corpus), num_target=len(self.prepared.target_dev),
      num_shards=self.partitioner.num_batch_shards,
    )

  def divided(self, values: np.ndarray, params, divide_by: str | None) -> np.ndarray:
    """Proxy scores `[M]` divided by what `divide_by` names, so that size alone makes no score.

    Args:
      values: scores of the proxies.
      params: the point at which the gradients are taken.
      divide_by: "gradient_norm" (the score becomes a cosine, up to a common factor),
        "sqrt_length" (the root of the number of positions that count), or None.
    """
    if divide_by is None:
      return values
    if divide_by == "sqrt_length":
      return values / np.sqrt(self.proxies["loss_mask"].sum(axis=1))
    # Norms are taken one example at a time, which no mesh splits: every device takes all examples.
    rows = {k: v for k, v in self.proxies.items() if k not in meshes.HOST_FIELDS}
    norms = processes.fetch(gradient_norms(self.example_losses, params, rows))
    self.add_flops(len(values) * self.corpus.length, 3)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)

  def add_flops(self, num_positions: float, passes: float) -> None:
    """Counts `passes` forward passes' worth of arithmetic over `num_positions` tokens."""
    per_token = flops.forward_flops_per_token(self.model.config, self.corpus.length)
    self.context.flops += passes * num_positions * per_token
