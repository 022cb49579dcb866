"""Reinforcement learning as stages: train, export, report.

The stage `train` is a model folder, as that of fine-tuning is; `export` holds the same model for
transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from lmops_jax import pretrained
from lmops_jax.config.setting_types import ExistingPath, PositiveInt, Seed, component
from lmops_jax.data import files
from lmops_jax.decoding.rollouts import Exploration, Responder
from lmops_jax.mesh.meshes import single_device
from lmops_jax.pretrained import exporting
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.sizing import flops, reinforce
from lmops_jax.sizing.budget import Phase
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.reinforce import report
from lmops_jax.systems.reinforce.prompts import read_prompts
from lmops_jax.training import loop
from lmops_jax.training.reinforce import updates
from lmops_jax.training.reinforce.rollouts import Rollouts

ROLLOUTS, MODEL = "rollouts.jsonl", "model"


@component(module="reinforce")
@dataclasses.dataclass(frozen=True)
class Reinforce:
  """One run of reinforcement learning.

  Attributes:
    init: the model to start from and to stay near, `@pretrained.load()`.
    prompts: a file of JSON lines with a field `prompt`.
    reward: judges responses, see `training.reinforce.rewards.Reward`.
    algorithm: `@reinforce.PPO()` or `@reinforce.GRPO()`.
    exploration: how responses are written, `@decoding.Exploration()`.
    optimizer: an optax transformation, of `policy/...` and `value/...`.
    num_steps: batches of responses.
    batch_size: responses of a batch.
    prompt_length: the most tokens of a prompt.
    too_long: "drop" longer prompts, or make them an "error".
    ending: text that the model reads behind every prompt, and rewards do not see.
    min_kl, max_kl: mean nats a response by which the policy may leave the model that it began as;
      beyond them the run ends.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.
    log_every: steps between two records.
    num_shown: responses of the first and the last batch in the report.
    seed: of all choices.

  Raises:
    ValueError: for values out of range, or that do not fit each other or the model.
  """

  init: PretrainedModel
  prompts: ExistingPath
  reward: Callable
  algorithm: updates.Updating
  exploration: Exploration
  optimizer: optax.GradientTransformation
  num_steps: PositiveInt
  batch_size: PositiveInt = 64
  prompt_length: PositiveInt = 64
  too_long: Literal["error", "drop"] = "error"
  ending: str = ""
  min_kl: float | None = None
  max_kl: float | None = None
  checkpoint_every: PositiveInt | None = 50
  log_every: PositiveInt = 1
  num_shown: PositiveInt = 8
  seed: Seed = 0
  name = "reinforce"

  def __post_init__(self):
    config = self.init.config
    if not getattr(config, "causal", False):
      raise ValueError(
        f"init is a {self.init.family} model, which does not predict the next token; take a "
        "decoder."
      )
    options, group_size = self.exploration.options, self.algorithm.group_size
    if self.prompt_length + options.max_new_tokens > config.max_length:
      raise ValueError(
        f"prompt_length={self.prompt_length} and decoding.GenerationOptions.max_new_tokens="
        f"{options.max_new_tokens} are beyond the {config.max_length} positions of "
        f"{self.init.path}; lower one of them."
      )
    if options.num_return_sequences < group_size:
      raise ValueError(
        f"decoding.GenerationOptions.num_return_sequences={options.num_return_sequences} is less "
        f"than group_size={group_size} of the algorithm; raise it."
      )
    if self.batch_size % group_size:
      raise ValueError(
        f"batch_size={self.batch_size} is not a multiple of group_size={group_size} of the "
        "algorithm; choose a multiple."
      )
    if not Path(self.prompts).expanduser().is_file():
      raise ValueError(f"prompts={self.prompts!r} is not a file; give JSON lines.")

  @property
  def rows(self) -> dict[str, files.Jsonl]:
    """The file that prompts are read from."""
    return {"prompts": files.Jsonl(str(Path(self.prompts).expanduser()))}

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    return [
      skeleton.Stage(
        "train", functools.partial(self._train, partitioner=partitioner or single_device()),
        result="model",
        reads=("init", "prompts", "rows.fingerprint", "reward", "algorithm", "exploration",
               "optimizer", "num_steps", "batch_size", "prompt_length", "too_long", "ending",
               "min_kl", "max_kl", "checkpoint_every", "log_every", "seed"),
      ),
      skeleton.Stage("export", self._export, inputs=("train",), together=False,
                     result="for transformers"),
      skeleton.Stage("report", self._report, inputs=("train",), reads=("num_shown",),
                     together=False),
    ]

  def phases(self, partitioner, memory, *, platform: str, **sizes) -> list[Phase]:
    """What training takes; see `commands.plans.Planned`. Prompts are not read."""
    return [reinforce.rollouts_phase(
      "train", self.algorithm, self.init.model, self.optimizer,
      reinforce.Writing.of(self.exploration.options, self.prompt_length),
      num_steps=self.num_steps, batch_size=self.batch_size, partitioner=partitioner,
      platform=platform, setting="reinforce.Reinforce.batch_size",
      note=f"{self.batch_size} rollouts; the reward's models and operations are not counted")]

  def _train(self, context: pipeline.StageContext, partitioner) -> None:
    tokenizer, model = self.init.tokenizer(), self.init.model
    end_id = next(iter(tokenizer.stop_ids), None)
    if end_id is None:
      raise ValueError(
        f"the tokenizer of {self.init.path} has no end token, so no response could end; name its "
        "eos_token in tokenizer_config.json."
      )
    path = Path(self.prompts).expanduser()
    questions, counts = read_prompts(
      path, tokenizer, self.prompt_length, self.too_long, self.ending)
    context.extra["prompts"] = counts
    context.log(", ".join(f"{value} {name}" for name, value in counts.items()))
    reference = self.init.params(partitioner)
    source = Rollouts(
      model, reference, questions,
      Responder(self.exploration, model, tokenizer, partitioner), self.reward,
      batch_size=self.batch_size, seed=self.seed, prompt_length=self.prompt_length,
      response_length=self.exploration.options.max_new_tokens, end_id=end_id,
      group_size=self.algorithm.group_size, live_blocks=updates.live_blocks(self.algorithm),
      partitioner=partitioner,
      journal=context.directory / ROLLOUTS, min_kl=self.min_kl, max_kl=self.max_kl)
    result = loop.train(
      updates.learner(self.algorithm, model, self.optimizer, partitioner), source, self.num_steps,
      self.seed, context.directory, partitioner, initial_params=reference,
      records=loop.Records(
        checkpoint_every=self.checkpoint_every, params_at=(self.num_steps,),
        log_every=self.log_every, flops_per_token=self._flops_per_token(),
        description=context.name),
    )
    context.flops = result.flops
    context.group.barrier("trained")
    if not context.writes:
      return
    shutil.rmtree(context.directory / "checkpoints")  # only for resuming; the parameters stay
    model_lib.copy_tokenizer(self.init, context.directory / model_lib.TOKENIZER_FOLDER)
    model_lib.describe(
      context.directory, self.init.config, family=self.init.family,
      params=f"params/{self.num_steps}", original=self.init.original,
    )

  def _flops_per_token(self) -> float:
    """Operations of scoring and updates for each position; decoding is not counted."""
    length = self.prompt_length + self.exploration.options.max_new_tokens
    per_pass = flops.forward_flops_per_token(self.init.config, length)
    return updates.num_passes(self.algorithm) * per_pass

  def _export(self, context: pipeline.StageContext) -> None:
    if jax.process_count() > 1:
      context.log("a model is exported by one process; run lmops export on the stage train.")
      return
    target = context.directory / MODEL
    shutil.rmtree(target, ignore_errors=True)  # of a killed attempt
    exporting.export(target, pretrained.load(context.input("train")))

  def _report(self, context: pipeline.StageContext) -> None:
    report.write(context, str(self.init.path), ROLLOUTS, self.num_shown)

  def table(self, summary: Mapping[str, Any]) -> str:
    """The scores of a finished run, for the terminal."""
    return report.table(summary)
