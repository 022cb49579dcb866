"""Stages `sft/seed<k>` and `rl/seed<k>`: a small policy learns from pairs, then from pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import optax

from lmops_jax.config.setting_types import Positive, PositiveInt, component
from lmops_jax.data import supervised as rows_lib
from lmops_jax.data.prompt_pairs import as_row, asked
from lmops_jax.decoding.rollouts import Exploration, Responder
from lmops_jax.evaluation.lm import mean_loss
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.transformer import Transformer
from lmops_jax.sizing.training import count_params
from lmops_jax.stages import pipeline
from lmops_jax.systems.promptist import fitting, world
from lmops_jax.systems.promptist.fitting import Fit
from lmops_jax.systems.promptist.judging import Judge
from lmops_jax.systems.promptist.world import Prepared, World
from lmops_jax.training import loop, losses, reinforce
from lmops_jax.training.learner import Learner, supervised
from lmops_jax.training.reinforce.rollouts import Question, Rollouts
from lmops_jax.training.reinforce.updates import Updating
from lmops_jax.training.sources import Epochs

JOURNAL = "rollouts.jsonl"
_HELD_OUT_SHARE = 8  # one pair of so many is for validation


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class Policy:
  """The policy, and how it learns.

  Attributes:
    model: a decoder; its vocabulary comes from the world.
    sft: how it is fitted to pairs.
    eval_every: steps between two validations of that.
    length: predicted positions of a pair.
    algorithm: how it learns from rollouts.
    optimizer: of that.
    num_updates: batches of rollouts.
    batch_size: rollouts of a batch.
    exploration: how it writes them.
    prompt_length: most tokens of a prompt with its anchor.
    checkpoint_every: batches between two checkpoints.
    max_kl: nats a response beyond which the run ends; None for any.
  """

  model: TransformerConfig
  sft: Fit
  algorithm: Updating
  optimizer: optax.GradientTransformation
  exploration: Exploration
  num_updates: PositiveInt = 40
  batch_size: PositiveInt = 32
  eval_every: PositiveInt = 100
  length: PositiveInt = 48
  prompt_length: PositiveInt = 16
  checkpoint_every: PositiveInt | None = 10
  max_kl: Positive | None = None

  def built(self, prepared: Prepared) -> Transformer:
    """The model for the world's tokenizer."""
    return Transformer(
      dataclasses.replace(self.model, vocab_size=prepared.tokenizer.vocab_size))

  def load_sft(self, folder: Path, prepared: Prepared, partitioner):
    """The parameters of a finished stage `sft/seed<k>`."""
    return fitting.fitted(folder, self.sft, loop.initializer(self.built(prepared)), partitioner)

  def load_rl(self, folder: Path, prepared: Prepared, partitioner):
    """The parameters of a finished stage `rl/seed<k>`."""
    return fitting.fitted(folder, self.rl, loop.initializer(self.built(prepared)), partitioner)

  @property
  def rl(self) -> Fit:
    """The loop's settings of the second training."""
    return Fit(self.optimizer, self.num_updates, self.batch_size, self.checkpoint_every)


def sft_learner(
  config: Fit, model: Transformer, loss, partitioner, accumulate: int = 1
) -> Learner:
  """What training on pairs descends."""
  return supervised(
    loop.initializer(model), loss, config.optimizer, accumulate=accumulate,
    check_batch=loss.check_batch, partitioner=partitioner)


def run_sft(
  context: pipeline.StageContext, config: Policy, of_world: World, seed: int, partitioner
) -> None:
  """Stage `sft/seed<k>`: the loss is on what the experienced person writes."""
  prepared = Prepared(context.input(world.STAGE))
  tokenizer, model = prepared.tokenizer, config.built(prepared)
  examples = [rows_lib.encode_row(tokenizer, as_row(pair), pair.id, pair.where)
              for pair in world.pairs(of_world)]
  parts = [[e for i, e in enumerate(examples) if (i % _HELD_OUT_SHARE == 0) == held]
           for held in (False, True)]
  train, held_out = (
    rows_lib.build(part, config.length, pad_id=tokenizer.eos_id, pack=False, too_long="error",
                   name="pairs") for part in parts)
  loss = losses.weighted_example_losses(losses.lm_example_losses(model))
  size = config.sft.batch_size

  def validation(params):
    batches = ({name: array[i : i + size] for name, array in held_out.arrays.items()}
               for i in range(0, len(held_out), size))
    return {"loss": mean_loss(
      loss.inner, params, batches, place=partitioner.place_rows,
      multiple_of=partitioner.num_batch_shards)}

  fitting.fit(
    context, config.sft, sft_learner(config.sft, model, loss, partitioner),
    Epochs(train.batch, len(train), config.sft.batch_size, seed, whole=True), seed, partitioner,
    hooks=[loop.Evaluate("validation", config.eval_every, validation)])


def run_rl(
  context: pipeline.StageContext, config: Policy, judge: Judge, sft: Path, seed: int, partitioner
) -> None:
  """Stage `rl/seed<k>`: rollouts of users' prompts, rewarded by pictures.

  Args:
    judge: the reward.
    sft: the finished stage that it starts from and must stay near.
  """
  prepared = Prepared(context.input(world.STAGE))
  tokenizer, model = prepared.tokenizer, config.built(prepared)
  reference = config.load_sft(sft, prepared, partitioner)
  rollouts = Rollouts(
    model, reference, questions(tokenizer, world.train_prompts()),
    Responder(config.exploration, model, tokenizer, partitioner), judge,
    batch_size=config.batch_size, seed=seed, prompt_length=config.prompt_length,
    response_length=config.exploration.options.max_new_tokens, end_id=tokenizer.eos_id,
    group_size=config.algorithm.group_size,
    live_blocks=reinforce.updates.live_blocks(config.algorithm), partitioner=partitioner,
    journal=context.directory / JOURNAL, max_kl=config.max_kl)
  result = loop.train(
    reinforce.updates.learner(config.algorithm, model, config.optimizer, partitioner), rollouts,
    config.num_updates, seed, context.directory, partitioner,
    initial_params=lambda: config.load_sft(sft, prepared, partitioner), records=loop.Records(
      checkpoint_every=config.checkpoint_every, params_at=(config.num_updates,), log_every=1,
      description=context.name, progress=context.progress))
  context.extra["num_params"] = count_params(result.state.params)
  context.log(judge.scorer.summary())


def questions(tokenizer, prompts) -> list[Question]:
  """Prompts as a policy is asked for them."""
  return [Question(i, text, tokenizer.encode(asked(text), False)) for i, text in enumerate(prompts)]
