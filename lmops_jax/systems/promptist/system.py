"""Promptist as stages: world, towers, quality, unet, fixed; by seed sft, rl, evaluate.

The stages of the generator do not depend on the policy's settings, so a second run with other ones
in the same workdir uses it again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from lmops_jax.config.setting_types import Seed, Seeds, component
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.sizing.budget import Phase
from lmops_jax.stages import pipeline, skeleton
from lmops_jax.systems.promptist import arms, generator, plan, policy, quality, report, world
from lmops_jax.systems.promptist.judging import STAGES as JUDGED_BY
from lmops_jax.systems.promptist.judging import Judge, Judging
from lmops_jax.systems.promptist.world import Prepared
from lmops_jax.training import language_models

_CACHE = "baselines"


@component(module="promptist")
@dataclasses.dataclass(frozen=True)
class Promptist:
  """Makes a world and a generator, and teaches a policy to write prompts for it.

  Attributes:
    world: pictures and prompts.
    generator: the text-to-image model and the towers.
    policy: the language model, and how it learns.
    judging: the reward that it learns from.
    evaluation: what it is asked.
    generator_seed: of initial numbers and order of the generator's networks.
    seeds: the same of the policy.

  Raises:
    ValueError: for models that do not fit together.
  """

  world: world.World
  generator: generator.Generator
  policy: policy.Policy
  judging: Judging
  evaluation: arms.Evaluation
  generator_seed: Seed = 0
  seeds: Seeds = (0, 1)

  name = "promptist"

  def __post_init__(self):
    self.generator.check(self.world.pictures.side)
    language_models.check_length(self.policy.model, self.policy.length)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = partitioner or meshes.single_device()
    for config in (self.policy.model, self.generator.towers.text):
      attention.check_platform(config.attention, partitioner.platform)
    bound = {"partitioner": partitioner}
    seed = self.generator_seed
    stages = [
      skeleton.Stage(world.STAGE, self._world, reads=("world",), together=False),
      skeleton.Stage(
        generator.TOWERS, functools.partial(self._towers, seed=seed), inputs=(world.STAGE,),
        seed=seed, reads=("generator.towers", "generator.towers_fit")),
      skeleton.Stage(
        quality.STAGE, functools.partial(self._quality, **bound),
        inputs=(world.STAGE, generator.TOWERS)),
      skeleton.Stage(
        generator.UNET, functools.partial(self._unet, seed=seed, **bound),
        inputs=(world.STAGE, generator.TOWERS), seed=seed,
        reads=("generator.unet", "generator.unet_fit", "generator.schedule", "generator.drop")),
      skeleton.Stage(
        arms.FIXED, functools.partial(self._fixed, **bound), inputs=JUDGED_BY,
        reads=("evaluation", *self._drawing)),
    ]
    runs: dict[int, report.Run] = {}
    for seed in self.seeds:
      own, runs[seed] = self._of_seed(seed, bound)
      stages += own
    names = tuple(stage.name for stage in stages)
    stages.append(skeleton.Stage(
      "report", functools.partial(self._report, runs=runs, stages=names, **bound), inputs=names,
      reads=self._drawing))
    return stages

  @property
  def _drawing(self) -> tuple[str, ...]:
    return "generator.sampler", "generator.guidance", "generator.batch_size"

  def _of_seed(self, seed: int, bound) -> tuple[list[skeleton.Stage], report.Run]:
    """The stages of a policy."""
    run = report.Run(*(f"{stage}/seed{seed}" for stage in ("sft", "rl", "evaluate")))
    return [
      skeleton.Stage(
        run.sft, functools.partial(self._sft, seed=seed, **bound), inputs=(world.STAGE,),
        seed=seed, reads=("policy.model", "policy.sft", "policy.eval_every", "policy.length")),
      skeleton.Stage(
        run.rl, functools.partial(self._rl, run=run, seed=seed, **bound),
        inputs=(*JUDGED_BY, run.sft), seed=seed, result="policy",
        reads=("policy", "judging", *self._drawing)),
      skeleton.Stage(
        run.evaluate, functools.partial(self._evaluate, run=run, **bound),
        inputs=(*JUDGED_BY, run.sft, run.rl), reads=("evaluation", *self._drawing)),
    ], run

  def phases(self, partitioner, memory, *, platform: str, **sizes) -> list[Phase]:
    """What training takes; see `commands.plans.Planned`. The vocabulary counts at its largest."""
    return plan.phases(
      self.generator, self.policy, self.judging, world.MOST_IDS, len(self.seeds), partitioner,
      platform)

  def _world(self, context: pipeline.StageContext) -> None:
    world.run(context, self.world)

  def _prepared(self, context: pipeline.StageContext) -> Prepared:
    return Prepared(context.input(world.STAGE))

  def _towers(self, context: pipeline.StageContext, seed) -> None:
    generator.fit_towers(context, self.generator, self._prepared(context), seed)
    fit = self.generator.towers_fit
    context.flops = fit.num_steps * plan.towers_flops(self.generator.towers, fit.batch_size)

  def _quality(self, context: pipeline.StageContext, partitioner) -> None:
    quality.run(context, generator.Parts(
      context.input(generator.TOWERS), self.generator, self._prepared(context), partitioner))

  def _unet(self, context: pipeline.StageContext, seed, partitioner) -> None:
    generator.fit_unet(
      context, self.generator, self._prepared(context), seed, partitioner)
    context.flops = self.generator.unet_fit.num_steps * plan.unet_flops(self.generator)

  def _judge(self, context: pipeline.StageContext, judging: Judging, partitioner) -> Judge:
    return Judge(context, self.generator, judging, partitioner, context.directory / _CACHE)

  def _fixed(self, context: pipeline.StageContext, partitioner) -> None:
    arms.run_fixed(
      context, self.evaluation, self.world,
      self._judge(context, self.evaluation.judging, partitioner))

  def _sft(self, context: pipeline.StageContext, seed, partitioner) -> None:
    policy.run_sft(context, self.policy, self.world, seed, partitioner)
    model = self.policy.built(self._prepared(context)).config
    context.flops = self.policy.sft.num_steps * plan.sft_flops(
      self.policy.sft.batch_size, self.policy.length, model)

  def _rl(self, context: pipeline.StageContext, run, seed, partitioner) -> None:
    policy.run_rl(
      context, self.policy, self._judge(context, self.judging, partitioner),
      context.input(run.sft), seed, partitioner)
    model = self.policy.built(self._prepared(context)).config
    context.flops = self.policy.num_updates * plan.rl_flops(
      self.policy, model, self.generator, self.judging)

  def _evaluate(self, context: pipeline.StageContext, run, partitioner) -> None:
    arms.run_policies(
      context, self.evaluation, self.world, self.policy,
      self._judge(context, self.evaluation.judging, partitioner),
      {arms.SFT: context.input(run.sft), arms.RL: context.input(run.rl)}, partitioner)

  def _report(self, context: pipeline.StageContext, runs, stages, partitioner) -> None:
    judge = Judge(context, self.generator, self.evaluation.judging, partitioner)
    report.run(context, runs=runs, stages=stages, images=judge.images)

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)
