# ruff: noqa: E402  malloc is set before jax is imported
"""Times a step of prototypical fine-tuning against a plain twin in PyTorch.

    python tests/benchmarks/prototypes_vs_torch.py --output results/prototypes_vs_torch.md

Made-up rows of MiniLM's width, classes of two modes each: vectors that are not trained, and states
of 32 tokens before two layers of BERT that are. Both sides begin at the same parameters and read
the same batches in the same order; each gets its batch as arrays of the host, and reads the loss
of a step after the next one has begun. They take turns, an epoch each, and the table gives the
median step of the epochs after warm-up and the first compiled one. The twin is written as one would
write it: functions of tensors with slots and a mask, creation in a Python loop over the rows of
batches that have one beyond the threshold, `torch.optim.Adam` (fused), distances by products.
"raw" is a linear head instead of prototypes, in ours alone: what prototypes cost beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from pathlib import Path

from lmops_jax.sizing.memory import keep_freed_memory

keep_freed_memory()  # before jax

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from lmops_jax.mesh.meshes import single_device
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.systems.prototypes import learning, methods
from lmops_jax.systems.prototypes.encoding import Encoded, Encoder, Encoding
from lmops_jax.systems.prototypes.learning import Growth
from lmops_jax.training import loop
from lmops_jax.training.learner import supervised
from lmops_jax.training.optimizers import adamw

WIDTH, HEADS, MLP, CLASSES, BATCH, TOKENS = 384, 12, 1536, 6, 32, 32
TRUNK = TransformerConfig(
  vocab_size=8, num_layers=3, width=WIDTH, num_heads=HEADS, mlp_width=MLP, max_length=TOKENS,
  causal=False, positions="learned", norm="layer", norm_placement="post", final_norm=False,
  norm_eps=1e-12, activation="gelu", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True)


def made_rows(number: int, tokens: int) -> tuple[Encoded, np.ndarray]:
  """Rows whose classes have two modes each."""
  rng = np.random.default_rng(0)
  targets = rng.integers(CLASSES, size=number).astype(np.int32)
  hidden = rng.normal(size=(number, tokens, WIDTH)).astype(np.float32)
  mode = targets * 2 + rng.integers(2, size=number)
  hidden[np.arange(number)[:, None], np.arange(tokens), mode[:, None]] += 5
  lengths = np.ones(number, np.int32) if tokens == 1 else rng.integers(
    5, tokens + 1, number).astype(np.int32)
  return Encoded(hidden, lengths, 0), targets


class Ours:
  """A learner's compiled step on one device."""

  def __init__(self, learner, first, batches):
    partitioner = single_device()
    self._place = partitioner.place_batch
    abstract = loop.abstract_state(learner)
    self._step = loop.compiled_step(learner, partitioner, partitioner.shardings(abstract))
    self._key, self._batches = jax.random.key(0), batches
    self.state = learner.init(self._key, jax.tree.map(jnp.array, first))

  def step(self, number: int):
    batch = self._place(self._batches[number % len(self._batches)])
    self.state, sums = self._step(self.state, batch, self._key, np.int32(number))
    return sums

  @staticmethod
  def loss(sums) -> float:
    return float(jax.device_get(sums)["loss_sum"]) / BATCH


class Twin:
  """The method in PyTorch, from the same first parameters."""

  def __init__(self, first, settings: Growth, rate, rate_of_prototypes, batches, num_epochs):
    def tensor(x):
      return torch.from_numpy(np.array(x))

    prototypes, table = first["prototypes"], first["table"]
    self.centers = torch.nn.Parameter(tensor(prototypes.centers))
    self.logits = torch.nn.Parameter(tensor(prototypes.logits))
    self.log_variance = torch.nn.Parameter(tensor(prototypes.log_variance))
    self.own = [self.centers, self.logits, self.log_variance]
    self.layers = Layers(first["encoder"]["layers"]) if first["encoder"] else None
    groups = [{"params": self.own, "lr": rate * rate_of_prototypes}]
    if self.layers is not None:
      groups.append({"params": list(self.layers.parameters()), "lr": rate})
    self.adam = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    self.label, self.active = tensor(table.label).long(), tensor(table.active)
    self.born, self.window = tensor(table.born).long(), tensor(table.window)
    self.created = self.pruned = self.suppressed = 0
    self.settings, self.per_epoch, self.num_epochs = settings, len(batches), num_epochs
    self.batches = batches

  def features(self, batch):
    hidden = torch.from_numpy(batch["hidden"])
    if self.layers is None:
      return hidden[:, 0]
    lengths = torch.from_numpy(batch["lengths"])
    real = torch.arange(hidden.shape[1]) < lengths[:, None]
    x = self.layers(hidden, real[:, None, None, :])
    return (x * real[:, :, None]).sum(1) / lengths[:, None]

  def threshold(self):
    s, used = self.settings, self.centers[self.active]
    variance, spread = self.log_variance.exp(), used.var(0, correction=1).mean()
    return (2 * variance * math.log(1 / s.alpha)
            + WIDTH * variance * torch.log1p(spread / variance)).detach()

  def step(self, number: int):
    s = self.settings
    batch = self.batches[number % self.per_epoch]
    label = torch.from_numpy(batch["label"]).long()
    features = self.features(batch)
    score = -squares(features, self.centers) / (2 * self.log_variance.exp())
    importance = score.masked_fill(~self.active, -math.inf).log_softmax(1)
    said = (importance[:, :, None] + self.logits.log_softmax(1)).logsumexp(1)
    loss = F.nll_loss(said, label)
    value = loss
    if s.diversity:
      used = self.centers[self.active]
      gaps = (squares(used, used) + 1e-12).sqrt()
      open_ = (self.threshold().sqrt() - gaps).clamp(min=0).square()
      value = loss + s.diversity * open_.triu(1).sum()
    self.adam.zero_grad(set_to_none=True)
    value.backward()
    for group in self.adam.param_groups:
      torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    self.adam.step()
    with torch.no_grad():
      mine = F.one_hot(self.label, CLASSES).bool()
      self.logits.copy_(torch.where(mine, self.logits.clamp(min=0), self.logits.clamp(max=0)))
      self.window[number % len(self.window)] = importance.exp().mean(0)
      done, warm = number + 1, s.warmup_epochs * self.per_epoch
      if s.create and warm < done <= (self.num_epochs - s.cooldown_epochs) * self.per_epoch:
        self.create(features.detach(), label, done)
      every = max(self.per_epoch // max(s.prunings_per_epoch, 1), 1)
      if s.prunings_per_epoch and done % every == 0 and done > warm:
        self.prune(number)
    return loss.detach()

  def create(self, features, label, done):
    limit = self.threshold()
    apart = squares(features, self.centers)
    same = self.active & (label[:, None] == self.label)
    beyond = apart.masked_fill(~same, math.inf).amin(1) > limit
    if self.active.all():
      self.suppressed += int(beyond.sum())
      return
    if not beyond.any():
      return
    for x, own in zip(features, label):
      mine = self.active & (self.label == own)
      if (x - self.centers[mine]).square().sum(1).min() <= limit:
        continue
      if self.active.all():
        self.suppressed += 1
        continue
      slot = int((~self.active).nonzero()[0, 0])
      self.centers[slot], self.label[slot], self.active[slot] = x, own, True
      size = 0.5 * math.log(9 * (CLASSES - 1))
      self.logits[slot] = -size
      self.logits[slot, own] = size
      self.born[slot], self.window[:, slot] = done, 0
      for parameter in (self.centers, self.logits):
        moments = self.adam.state[parameter]
        moments["exp_avg"][slot] = moments["exp_avg_sq"][slot] = 0
      self.created += 1

  def prune(self, number):
    size = len(self.window)
    age = (number - torch.arange(size)) % size
    recent = ((size - age) / size) @ self.window / size
    same = (self.label[:, None] == self.label) & self.active
    may_go = self.active & (number + 1 - self.born >= size) & (same.sum(1) > 1) & (
      recent < self.settings.least_importance)
    if may_go.any():
      slot = int(recent.masked_fill(~may_go, math.inf).argmin())
      self.active[slot], self.window[:, slot] = False, 0
      self.pruned += 1

  @staticmethod
  def loss(value) -> float:
    return float(value)


def squares(a, b):
  """Squared distances by products."""
  return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


class Layers(torch.nn.Module):
  """Post-norm layers of BERT with the weights of ours."""

  def __init__(self, params):
    super().__init__()
    at, mlp = params["attention"], params["mlp"]

    def parameters(of, *shape):
      return torch.nn.ParameterList(
        torch.from_numpy(np.array(x).reshape(shape)) for x in np.asarray(of))

    d = WIDTH
    self.qkv = torch.nn.ParameterList(torch.cat(k, 1) for k in zip(*(
      parameters(at[name]["kernel"], d, d) for name in ("query", "key", "value"))))
    self.qkv_bias = torch.nn.ParameterList(torch.cat(b) for b in zip(*(
      parameters(at[name]["bias"], d) for name in ("query", "key", "value"))))
    self.out, self.out_bias = parameters(at["out"]["kernel"], d, d), parameters(
      at["out"]["bias"], d)
    self.up, self.up_bias = parameters(mlp["up"]["kernel"], d, MLP), parameters(
      mlp["up"]["bias"], MLP)
    self.down, self.down_bias = parameters(mlp["down"]["kernel"], MLP, d), parameters(
      mlp["down"]["bias"], d)
    self.scales, self.biases = (torch.nn.ModuleList(
      parameters(params[name][which], d) for name in ("attention_norm", "mlp_norm"))
      for which in ("scale", "bias"))

  def forward(self, x, mask):
    b, s, d = x.shape
    for i in range(len(self.out)):
      q, k, v = (x @ self.qkv[i] + self.qkv_bias[i]).view(
        b, s, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
      y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
      y = y.transpose(1, 2).reshape(b, s, d) @ self.out[i] + self.out_bias[i]
      x = F.layer_norm(x + y, (d,), self.scales[0][i], self.biases[0][i], TRUNK.norm_eps)
      y = F.gelu(x @ self.up[i] + self.up_bias[i]) @ self.down[i] + self.down_bias[i]
      x = F.layer_norm(x + y, (d,), self.scales[1][i], self.biases[1][i], TRUNK.norm_eps)
    return x


def compared(tuned: int, number: int, num_epochs: int, growth: Growth, rate: float):
  """Sides by name, the batches of an epoch on the host."""
  encoder = Encoder(TRUNK, Encoding(tuned_layers=tuned, max_tokens=TOKENS))
  top = jax.tree.map(np.asarray, nn.unbox(encoder.init_top(jax.random.key(0))))
  rows, targets = made_rows(number, TOKENS if tuned else 1)
  per_epoch = number // BATCH
  batches = [
    {"hidden": rows.hidden[i], "lengths": rows.lengths[i], "label": targets[i]}
    for i in np.random.default_rng(1).permutation(number)[: per_epoch * BATCH].reshape(-1, BATCH)]
  optimizer = adamw(rate, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
  first = {"encoder": top, **learning.first_prototypes(
    encoder.all_vectors(top, rows), targets, CLASSES, growth, growth.steps_of_window(per_epoch), 0)}
  learner = learning.prototypical(
    encoder.init_top, encoder.vectors, optimizer, growth, width=WIDTH, num_classes=CLASSES,
    steps_per_epoch=per_epoch, num_epochs=num_epochs)
  init, losses = methods._head(encoder, CLASSES)
  raw = supervised(init, losses, optimizer, keyed=True)
  begun = {**jax.tree.map(np.asarray, nn.unbox(init(jax.random.key(0)))), "encoder": top}
  return {
    "pfit": Ours(learner, first, batches),
    "pfit, PyTorch": Twin(first, growth, rate, growth.rate_of_prototypes, batches, num_epochs),
    "raw": Ours(raw, begun, batches)}, per_epoch


def measured(tuned: int, number: int, num_epochs: int, growth: Growth, rate: float):
  """Lines of the table, and how far the two sides are apart."""
  sides, per_epoch = compared(tuned, number, num_epochs, growth, rate)
  times, losses = ({name: [] for name in sides} for _ in range(2))
  for epoch in range(num_epochs):
    for name, side in sides.items():
      began, cpu, before = time.perf_counter(), time.process_time(), None
      for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        under_way = side.step(step)
        if before is not None:
          losses[name].append(side.loss(before))
        before = under_way
      losses[name].append(side.loss(before))
      times[name].append(np.array(
        [time.perf_counter() - began, time.process_time() - cpu]) / per_epoch)
  state, twin = sides["pfit"].state, sides["pfit, PyTorch"]
  ours, theirs = state.table, twin
  counts = [tuple(int(x) for x in of) for of in (
    (ours.created, ours.pruned, ours.suppressed, ours.active.sum()),
    (theirs.created, theirs.pruned, theirs.suppressed, theirs.active.sum()))]
  same_slots = bool(np.all(np.asarray(ours.active) == twin.active.numpy()) and np.all(
    np.asarray(ours.label)[np.asarray(ours.active)] == twin.label[twin.active].numpy()))
  used = np.asarray(ours.active)
  far = np.abs(np.asarray(state.params["prototypes"].centers) - twin.centers.detach().numpy())
  apart = np.abs(np.array(losses["pfit"]) - losses["pfit, PyTorch"])
  middle = {name: np.median(found[2:], axis=0) for name, found in times.items()}
  what = "last two layers trained" if tuned else "vectors"
  peer = middle["pfit, PyTorch"]
  lines = [
    f"| {what} | {name} | {1e3 * wall:.2f} | {1e3 * cpu:.2f} | "
    + (f"{peer[1] / cpu:.2f}" if name != "raw" else "") + " |"
    for name, (wall, cpu) in middle.items()]
  cost = middle["pfit"][1] / middle["raw"][1]
  said = (
    f"{what.capitalize()}: {number} rows, {num_epochs} epochs of {per_epoch} steps; created, "
    f"pruned, without room, at the end: {counts[0]} and {counts[1]} in PyTorch"
    f"{', in the same slots' if same_slots else ', NOT in the same slots'}. Losses of steps differ "
    f"by at most {apart.max():.1e} (median {np.median(apart):.1e}), places of prototypes in use by "
    f"{far[used].max():.1e}. pfit takes {cost:.2f} times raw's processor time.")
  return lines, said


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=500)
  parser.add_argument("--tuned-rows", type=int, default=192)
  parser.add_argument("--output", type=Path)
  arguments = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  load = os.getloadavg()[0]
  found = [
    measured(0, arguments.rows, 20, Growth(), 1e-2),
    measured(2, arguments.tuned_rows, 5, Growth(rate_of_prototypes=20.0), 1e-4)]
  table = "\n".join([
    f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s), Python "
    f"{platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, load "
    f"{load:.1f} at the start. Width {WIDTH}, {CLASSES} classes, batches of {BATCH}.", "",
    "| trained | step | ms | processor ms | PyTorch's processor time over it |",
    "|---|---|---|---|---|",
    *(line for lines, _ in found for line in lines), "",
    *(said for _, said in found)]) + "\n"
  print(table)
  if arguments.output:
    arguments.output.write_text(
      "# A step of prototypical fine-tuning against PyTorch\n\nWritten by "
      "`tests/benchmarks/prototypes_vs_torch.py`, whose docstring says what is timed.\n\n" + table)


if __name__ == "__main__":
  main()
