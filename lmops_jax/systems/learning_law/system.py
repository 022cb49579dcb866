"""The learning law as stages: texts, data, policy, evaluate, report; and saved policies again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax

from lmops_jax.config.setting_types import Distinct, NonEmpty, Seeds, Text, component
from lmops_jax.mesh import meshes
from lmops_jax.stages import skeleton
from lmops_jax.systems.learning_law import evaluate, optimise, report, report_text
from lmops_jax.systems.learning_law.inner import Training
from lmops_jax.systems.learning_law.policies import PracticalPolicy
from lmops_jax.systems.learning_law.tasks import LearningTask, TextTask, fresh_params, load_task
from lmops_jax.training import language_models


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Optimises policies for tasks and compares them with practical ones.

  Attributes:
    tasks: `[@learning_law.Perceptron(), @learning_law.Language()]`, each with a name of its own.
    training: the inner run.
    optimizers: `[@learning_law.PolicyOptimizer(), ...]`, each with a name of its own.
    practical: policies of local signals, such as `[@learning_law.RHO()]`.
    evaluate, report: settings of these stages.
    seeds: of data and initialisation.
  """

  tasks: Annotated[Sequence[LearningTask], NonEmpty]
  training: Training
  optimizers: Sequence[optimise.PolicyOptimizer]
  practical: Sequence[PracticalPolicy]
  evaluate: evaluate.Evaluate
  report: report.Report
  seeds: Seeds = (0, 1, 2)

  name = "learning_law"

  def __post_init__(self):
    _check_names("tasks", self.tasks)
    _check_names("optimizers and practical", [*self.optimizers, *self.practical])
    if not self.seeds or len(set(self.seeds)) != len(self.seeds):
      raise ValueError(
        f"learning_law.Pipeline.seeds={list(self.seeds)}; name one or more different seeds."
      )
    for optimizer in self.optimizers:
      optimizer.check_steps(self.training.num_steps)
    self.report.check(self.training.num_steps)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = _in_one_process(partitioner)
    for task in self.tasks:
      fresh = functools.partial(fresh_params, task.config)
      self.training.check_optimizer(language_models.abstract_params(fresh, partitioner))
    stages, evaluated = [], {}
    for i, task in enumerate(self.tasks):
      bound, texts = (f"tasks[{i}]",), ()
      if isinstance(task, TextTask):
        texts = (f"texts/{task.name}",)
        stages.append(skeleton.Stage(texts[0], task.texts, reads=bound))
      for seed in self.seeds:
        data = f"data/{task.name}/seed{seed}"
        stages.append(skeleton.Stage(
          data, functools.partial(_make_data, task=task, seed=seed), inputs=texts, reads=bound,
          seed=seed,
        ))
        names = {}
        for j, optimizer in enumerate(self.optimizers):
          names[optimizer.name] = f"policy/{task.name}/{optimizer.name}/seed{seed}"
          stages.append(skeleton.Stage(
            names[optimizer.name],
            functools.partial(
              self._optimise, data=data, optimizer=optimizer, seed=seed, partitioner=partitioner,
            ),
            inputs=(data,), reads=("training", f"optimizers[{j}]"),
          ))
        stage = f"evaluate/{task.name}/seed{seed}"
        evaluated[task.name, seed] = report.Run(stage, data, names)
        stages.append(skeleton.Stage(
          stage,
          functools.partial(
            self._evaluate, data=data, names=names, seed=seed, partitioner=partitioner),
          inputs=(data, *names.values()), reads=("training", "practical", "evaluate"),
        ))
    stages.append(_report_stage(self.report, evaluated, stages))
    return stages

  def _optimise(self, context, data, **kwargs) -> None:
    optimise.run(
      context, task=load_task(context.input(data)), training=self.training,
      described=context.settings, **kwargs)

  def _evaluate(self, context, data, names, **kwargs) -> None:
    task = load_task(context.input(data))
    optimised = {
      name: optimise.load_policy(context.input(stage), task).weights
      for name, stage in names.items()
    }
    evaluate.run(
      context, config=self.evaluate, task=task, training=self.training, optimised=optimised,
      practical=self.practical, **kwargs,
    )

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report_text.table(summary)


@component(module="learning_law")
@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Trains again under saved policies: from other initialisations, on batches, beside others.

  Attributes:
    policies: folders of finished `policy` stages, of one task and one number of steps.
    training: the inner run; its settings must be those that the policies were made under.
    practical, evaluate, report: as for `Pipeline`.
    other_training: accept other settings of the inner run than the policies' own.

  Raises:
    ValueError: for a folder that holds no policy, or policies that do not go together.
  """

  policies: Annotated[Sequence[Text], NonEmpty, Distinct] | Text
  training: Training
  practical: Sequence[PracticalPolicy]
  evaluate: evaluate.Evaluate
  report: report.Report
  other_training: bool = False

  name = "learning_law_evaluation"

  def __post_init__(self):
    if isinstance(self.policies, str):
      object.__setattr__(self, "policies", (self.policies,))
    loaded = [optimise.load_policy(folder) for folder in self.policies]
    object.__setattr__(self, "saved", dict(zip(self.policies, loaded)))
    for folder, saved in zip(self.policies, loaded):
      if saved.task.fingerprint != loaded[0].task.fingerprint:
        raise ValueError(
          f"the policies in {self.policies[0]} and {folder} weight different examples; evaluate "
          "them in two runs."
        )
      if saved.about["num_steps"] != self.training.num_steps:
        raise ValueError(
          f"the policy in {folder} has {saved.about['num_steps']} steps and "
          f"learning_law.Training.num_steps={self.training.num_steps}; set "
          f"--gin.STEPS={saved.about['num_steps']}."
        )
    names = [saved.about["name"] for saved in loaded]
    if len(set(names)) == len(names):
      object.__setattr__(self, "_names", names)
    else:  # the same optimizer several times: tell them apart by their folders
      object.__setattr__(self, "_names", [
        f"{name}-{i}" for i, name in enumerate(names)])
    self.report.check(self.training.num_steps)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages; arguments as for every system."""
    partitioner = _in_one_process(partitioner)
    first = next(iter(self.saved.values()))
    stage = skeleton.Stage(
      f"evaluate/{first.task.name}", functools.partial(self._evaluate, partitioner=partitioner),
      reads=("training", "practical", "evaluate", "other_training",
             "saved.fingerprint"))
    folders = dict(zip(self._names, self.policies))
    runs = {(first.task.name, first.about["init_seed"]): report.Run(stage.name, None, folders)}
    return [stage, _report_stage(self.report, runs, [stage])]

  def _evaluate(self, context, partitioner) -> None:
    for folder, saved in self.saved.items():
      for key, value in saved.about["settings"].items():
        own = context.settings.get(key, value)
        if not self.other_training and own != value and (
            "trajectory" not in key and "batch_size" not in key):
          raise ValueError(
            f"the policy in {folder} was made under {key} = {value}, this run has {own}; bind the "
            "same, or set OTHER_TRAINING = True to evaluate it under other training."
          )
    first = next(iter(self.saved.values()))
    evaluate.run(
      context, config=self.evaluate, task=first.task, training=self.training,
      seed=first.about["init_seed"], partitioner=partitioner, practical=self.practical,
      optimised={name: saved.weights for name, saved in zip(self._names, self.saved.values())},
    )

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report_text.table(summary)


def _make_data(context, task, seed: int) -> None:
  inputs = [context.input(f"texts/{task.name}")] if isinstance(task, TextTask) else []
  made = task.make(seed, *inputs)
  made.save(context.directory)
  noisy = f", {int(made.is_noise.sum())} of them spoilt" if made.is_noise.any() else ""
  context.log(f"{made.num_train} training examples{noisy}")


def _report_stage(config, runs, stages) -> skeleton.Stage:
  inputs = tuple(stage.name for stage in stages)
  return skeleton.Stage(
    "report", functools.partial(report.run, config=config, runs=runs, stages=inputs),
    inputs=inputs, reads=("report",),
  )


def _in_one_process(partitioner):
  if jax.process_count() > 1:
    raise ValueError(
      f"this job has {jax.process_count()} processes, and a policy is optimised in one; start it "
      "once, on a machine that holds all the devices."
    )
  return partitioner or meshes.single_device()


def _check_names(field: str, parts: Sequence[Any]) -> None:
  names = [part.name for part in parts]
  if not names and field == "tasks":
    raise ValueError("learning_law.Pipeline.tasks is empty; name at least one task.")
  for name in names:
    if names.count(name) > 1 or name == evaluate.UNIFORM:
      raise ValueError(
        f"learning_law.Pipeline: the name {name!r} among {field} is taken twice or reserved; give "
        "each part a name of its own."
      )
