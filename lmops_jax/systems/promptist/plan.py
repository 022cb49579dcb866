"""What the stages of the embedded default take, from shapes alone: for `lmops plan` and manifests.

Counted are matrix products and convolutions, a gradient as twice its forward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.mesh.meshes import Partitioner, single_device
from lmops_jax.models.clip import ClipConfig
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion.unet import UNet
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.vision import NUM_CHANNELS
from lmops_jax.sizing import activations, diffusion, encoders, flops, reinforce
from lmops_jax.sizing.budget import Phase, check_splits
from lmops_jax.sizing.training import count_params, training_phase, transformer_bytes
from lmops_jax.systems.promptist import generator as generator_lib
from lmops_jax.systems.promptist import policy as policy_lib
from lmops_jax.systems.promptist.fitting import Fit
from lmops_jax.systems.promptist.generator import Generator, unet_init
from lmops_jax.systems.promptist.judging import Judging
from lmops_jax.systems.promptist.policy import Policy
from lmops_jax.training import loop, losses
from lmops_jax.training.learner import Learner

# ------------------------------------------------------------------------------------- operations


def towers_flops(config: ClipConfig, size: int) -> float:
  """Operations of a step on a group of `size` pictures and captions."""
  logits = 2.0 * size**2 * config.projection_width
  return 3 * (size * (text_flops(config) + picture_flops(config)) + logits)


def text_flops(config: ClipConfig) -> float:
  """Operations of the vector of a text."""
  length, width = config.text.max_length, config.text.width
  reading = length * flops.forward_flops_per_token(config.text, length, unembedding=False)
  return reading + 2.0 * width * config.projection_width


def picture_flops(config: ClipConfig) -> float:
  """Operations of the vector of a picture."""
  trunk, num = config.vision.trunk, 1 + config.vision.num_patches
  seeing = num * flops.forward_flops_per_token(trunk, num, unembedding=False)
  return encoders.patch_flops(config.vision) + seeing + 2.0 * trunk.width * config.projection_width


def unet_flops(config: Generator) -> float:
  """Operations of a step of the UNet, whose texts were read before."""
  side, length = config.unet.sample_size, config.towers.text.max_length
  return 3 * config.unet_fit.batch_size * diffusion.unet_flops(config.unet, side, side, length)


def sft_flops(batch_size: int, length: int, model: TransformerConfig) -> float:
  """Operations of a step on pairs of `length` predicted positions."""
  return 3 * batch_size * length * flops.forward_flops_per_token(model, length)


def judged_flops(config: Generator, judging: Judging) -> float:
  """Operations of drawing and rating the pictures of one prompt."""
  side = config.unet.sample_size
  drawing = diffusion.drawing_flops(
    config.towers.text, config.unet, None, side, side,
    config.sampler.plan(config.schedule).num_evaluations, guided=config.guidance != 1)
  return judging.num_images * (drawing + picture_flops(config.towers)) + text_flops(config.towers)


def rl_flops(
  config: Policy, model: TransformerConfig, generator: Generator, judging: Judging
) -> float:
  """Operations of a batch of rollouts: writing, pictures of rewrites, scoring and updates.

  Pictures of users' prompts are drawn once and kept; they are not counted.
  """
  learning = reinforce.rollout_flops(config.algorithm, model, _writing(config))
  return config.batch_size * (judged_flops(generator, judging) + learning)


# ----------------------------------------------------------------------------------------- phases


def phases(
  generator: Generator, policy: Policy, judging: Judging, vocab_size: int, seeds: int,
  partitioner: Partitioner, platform: str,
) -> list[Phase]:
  """What training takes: of the towers, the UNet, and of one policy both parts.

  Args:
    vocab_size: tokens, at most.
    seeds: policies.
  """
  clip = generator.clip(vocab_size, 0)
  model = Transformer(dataclasses.replace(policy.model, vocab_size=vocab_size))
  each = f"each of {seeds} policies" if seeds > 1 else "one policy"
  return [
    _towers(generator, clip), _unet(generator, clip.config, partitioner),
    tuning_phase("sft", policy.sft, model, policy.length, each, partitioner, platform),
    _rl(policy, model, generator, judging, each, partitioner, platform)]


def _towers(config: Generator, clip) -> Phase:
  fit, c = config.towers_fit, clip.config
  side = c.vision.image_size
  batch = {
    "images": _shape((1, fit.batch_size, side, side, NUM_CHANNELS), jnp.uint8),
    "tokens": _shape((1, fit.batch_size, c.text.max_length), jnp.int32)}
  learner = generator_lib.towers_learner(config, clip)
  kept = _kept(generator_lib.ContrastiveLosses(clip), learner, batch)
  return _phase(
    generator_lib.TOWERS, fit, learner, batch, kept, towers_flops(c, fit.batch_size),
    single_device(), f"groups of {fit.batch_size} pictures, on one device")


def _unet(config: Generator, clip: ClipConfig, partitioner) -> Phase:
  fit, c, text = config.unet_fit, config.unet, clip.text
  check_splits(fit.batch_size, "pictures", partitioner, "unet/promptist.Fit.batch_size")
  states = (text.max_length, text.width)
  losses = generator_lib.unet_losses(config, np.zeros(states, np.float32))
  learner = generator_lib.unet_learner(config, losses, text.max_length, partitioner)

  def batch(num, **more):
    return {"clean": _shape((num, c.sample_size, c.sample_size, c.in_channels), jnp.float32),
            "condition": _shape((num, *states), jnp.float32), **more}

  own = fit.batch_size // partitioner.num_batch_shards
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), own))
  kept = _kept(losses, learner, batch(own, key=keys))
  return _phase(
    generator_lib.UNET, fit, learner, batch(fit.batch_size), kept, unet_flops(config), partitioner,
    f"{fit.batch_size} pictures", ("a smaller unet/promptist.Fit.batch_size",))


def tuning_phase(
  name: str, fit: Fit, model: Transformer, length: int, note: str, partitioner, platform: str, *,
  accumulate: int = 1, setting: str = "sft/promptist.Fit.batch_size",
) -> Phase:
  """What training on pairs takes.

  Args:
    length: predicted positions of a pair.
    accumulate: micro-batches of a step.
    setting: the name of the batch size in gin files, for messages.
  """
  check_splits(fit.batch_size, "pairs", partitioner, setting)
  loss = losses.weighted_example_losses(losses.lm_example_losses(model))
  batch = {name: _shape((fit.batch_size, length), dtype) for name, dtype in (
    ("tokens", jnp.int32), ("targets", jnp.int32), ("loss_mask", jnp.float32))}
  return _phase(
    name, fit, policy_lib.sft_learner(fit, model, loss, partitioner, accumulate), batch,
    transformer_bytes(model.config, fit.batch_size / accumulate, length, partitioner, platform),
    sft_flops(fit.batch_size, length, model.config), partitioner, note,
    (f"a smaller {setting}", f"more devices on mesh.make.fsdp (now "
     f"{partitioner.mesh.shape['fsdp']})"), accumulate)


def _rl(config: Policy, model: Transformer, generator, judging, note, partitioner,
        platform) -> Phase:
  drawing = jax.eval_shape(
    unet_init(UNet(generator.unet), generator.towers.text.max_length), jax.random.key(0))
  return reinforce.rollouts_phase(
    "rl", config.algorithm, model, config.optimizer, _writing(config),
    num_steps=config.num_updates, batch_size=config.batch_size, partitioner=partitioner,
    platform=platform, setting="promptist.Policy.batch_size",
    reward_flops=judged_flops(generator, judging),
    held={"unet": 4.0 * count_params(drawing)}, note=note)


def _writing(config: Policy) -> reinforce.Writing:
  return reinforce.Writing.of(config.exploration.options, config.prompt_length)


def _phase(
  name: str, fit: Fit, learner: Learner, batch: Mapping[str, jax.ShapeDtypeStruct],
  kept: float, step_flops: float, partitioner, note: str, remedies: tuple[str, ...] = (),
  accumulate: int = 1,
) -> Phase:
  data = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values())
  return training_phase(
    name, partitioner.placed_shapes(loop.abstract_state(learner), uneven="whole"), step_flops,
    fit.num_steps, data=data / partitioner.num_batch_shards, kept=kept, accumulate=accumulate,
    note=note, remedies=remedies)


def _kept(losses, learner: Learner, batch) -> float:
  """What the backward pass keeps of a device's rows."""
  params = nn.unbox(loop.abstract_state(learner)).params
  return activations.kept_bytes(losses, (params,), batch)


def _shape(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)
