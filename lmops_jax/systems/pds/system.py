"""PDS as stages: prepare, proxy, solve, scorer, annotate, select, pretrain, evaluate, report."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from lmops_jax.config.setting_types import NonEmpty, PositiveInt, Seed, Seeds, component
from lmops_jax.data.distributed.engine import Engine
from lmops_jax.mesh import meshes
from lmops_jax.models import attention
from lmops_jax.stages import skeleton
from lmops_jax.systems.pds import (
  distributed,
  evaluate,
  methods,
  plan,
  prepare,
  pretrain,
  programs,
  report,
  scorer,
  scores,
  select,
  selection,
)
from lmops_jax.training import language_models


@component(module="pds")
@dataclasses.dataclass(frozen=True)
class Pipeline:
  """The whole of PDS and its baselines.

  Attributes:
    prepare, proxy, proxy_set, scorer, select, pretrain, evaluate, report: settings of the stages.
    methods: the ways to score, `[@pds.PMP(), @pds.Random(), ...]`, each with a name of its own.
    seeds: a seed for each of a method's final pre-training runs.
    proxy_seed: seed of the proxy's initialisation and data order.
    proxy_runs: trainings of the proxy, R, with the seeds `R proxy_seed .. R proxy_seed + R - 1`.
      Scores of the proxy set are averaged over them, which lowers what of a selection is chance;
      the scorer and methods that train or read a proxy otherwise take the first.
    engine: `beam.Engine`, which spreads preparing, annotating, selecting and exporting over
      workers; None does all in this process. Results are the same, so a finished stage stays
      finished when the engine changes.
  """

  prepare: prepare.Prepare
  proxy: pretrain.Pretrain
  proxy_set: methods.ProxySet
  methods: Annotated[
    Sequence[methods.ProxyMethod | methods.ScorerMethod | methods.CorpusMethod], NonEmpty]
  scorer: scorer.Scorer
  select: select.Select
  pretrain: pretrain.Pretrain
  evaluate: evaluate.Evaluate
  report: report.Report
  seeds: Seeds = (0, 1)
  proxy_seed: Seed = 0
  proxy_runs: PositiveInt = 1
  engine: Engine | None = None

  name = "pds"

  def __post_init__(self):
    names = [m.name for m in self.methods]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
      raise ValueError(
        f"pds.Pipeline.methods holds the name {twice[0]!r} twice; give each method its own name."
      )
    for method in self.methods:
      starts = method.checkpoints if isinstance(method, methods.CheckpointsMethod) else None
      for step in starts or ():
        if step not in self.proxy.kept_steps():
          raise ValueError(
            f"method {method.name!r} starts from proxy step {step}, which is not kept "
            f"({self.proxy.kept_steps()}); add it to proxy/pds.Pretrain.keep_steps."
          )
    for name, config, vocabulary in (
      ("Pretrain", self.proxy, self.prepare.vocabulary),
      ("Pretrain", self.pretrain, self.prepare.vocabulary),
      ("Scorer", self.scorer, self.scorer.vocabulary or self.prepare.vocabulary),
    ):
      if config.init is not None:
        pretrain.check_vocabulary(config.init, vocabulary, name)
    for config in self._models():
      language_models.check_length(config, self.prepare.length)
    kind = self.proxy.model.attention
    for method in self.methods:
      forward = isinstance(method, methods.ForwardMethod) and method.needs_forward_mode()
      if forward and not attention.supports_forward_mode(kind):
        raise ValueError(
          f"method {method.name!r} differentiates the proxy in forward mode, which its "
          f"attention={kind!r} cannot; give PROXY_MODEL 'xla' or 'chunked'."
        )
    if self.proxy_methods:
      self._check_scorer(self.proxy_set.most, "raise PROXIES")

    most = self.prepare.max_target_instances
    if most is not None:
      why = f"pds.Prepare.max_target_instances={most} leaves no more of the target"
      for method in self.methods:
        methods.check_most_target(method, most, why)

  def _check_scorer(self, num_proxies: int, remedy: str) -> None:
    train, _ = scorer.split(num_proxies, self.scorer.validation_fraction, 0)
    if len(train) < self.scorer.batch_size:
      raise ValueError(
        f"pds.Scorer.batch_size={self.scorer.batch_size} is more than the {len(train)} of "
        f"{num_proxies} proxies that are left to train on; {remedy} or lower the batch size."
      )

  def _models(self):
    return self.proxy.model, self.pretrain.model, self.scorer.trunk(self.proxy)

  def stages(self, partitioner) -> list[skeleton.Stage]:
    """The run as stages.

    Args:
      partitioner: places parameters and batches on the mesh; None is one device.
    """
    partitioner = partitioner or meshes.single_device()
    for config in self._models():
      attention.check_platform(config.attention, partitioner.platform)
    for method in self.methods:
      methods.check_inner_size(method, self.proxy_set.most, partitioner.num_batch_shards)
      if isinstance(method, methods.SolvingMethod):
        method.check_optimizer(self.proxy, self.prepare.length, partitioner)

    stages = [
      skeleton.Stage(
        "prepare", self._stage(prepare.run, distributed.run_prepare, config=self.prepare),
        reads=("prepare",), together=False,
      ),
    ]
    proxies = tuple(map(pretrain.proxy_stage, range(self.proxy_runs)))
    for run, name in enumerate(proxies):
      seed = self.proxy_runs * self.proxy_seed + run
      stages.append(skeleton.Stage(
        name, functools.partial(self._train_proxy, partitioner=partitioner, seed=seed),
        inputs=("prepare",), reads=("proxy",), seed=seed,
        checks=("methods", "proxy_set", "scorer", "select", "pretrain"),
      ))
    runs: dict[tuple[str, int], str] = {}
    for i, method in enumerate(self.methods):
      own = f"methods[{i}]"
      solve, fit, annotate, choose = (
        f"{stage}/{method.name}" for stage in ("solve", "scorer", "annotate", "select")
      )
      if isinstance(method, methods.ProxyMethod):
        stages += [
          skeleton.Stage(
            solve,
            functools.partial(
              self._solve, method=method, partitioner=partitioner, proxy_runs=len(proxies)),
            inputs=("prepare", *proxies), reads=(own, "proxy_set"),
          ),
          skeleton.Stage(
            fit,
            functools.partial(
              scorer.fit, config=self.scorer, proxy=self.proxy, partitioner=partitioner,
              solve_stage=solve,
            ),
            inputs=("prepare", "proxy", solve),
            reads=("scorer",),
          ),
        ]
      elif isinstance(method, methods.ScorerMethod):
        stages.append(skeleton.Stage(
          fit, functools.partial(self._fit_scorer, method=method, partitioner=partitioner),
          inputs=("prepare", "proxy"), reads=(own, "proxy_set", "scorer"),
        ))
      if isinstance(method, methods.ProxyMethod | methods.ScorerMethod):
        stages.append(skeleton.Stage(
          annotate,
          self._stage(
            functools.partial(scorer.annotate, partitioner=partitioner), distributed.annotate,
            config=self.scorer, proxy=self.proxy, scorer_stage=fit,
          ),
          inputs=("prepare", fit), reads=("scorer",), together=self.engine is None,
        ))
      else:
        stages.append(skeleton.Stage(
          annotate, functools.partial(self._score_corpus, method=method, partitioner=partitioner),
          inputs=("prepare", "proxy"), reads=(own, "scorer.shard_size"),
        ))
      stages.append(skeleton.Stage(
        choose,
        self._stage(
          select.run, distributed.run_select, config=self.select, annotate_stage=annotate
        ),
        inputs=("prepare", annotate), reads=("select",), together=False,
      ))
      for seed in self.seeds:
        name = f"pretrain/{method.name}/seed{seed}"
        runs[method.name, seed] = name
        stages.append(skeleton.Stage(
          name,
          functools.partial(
            pretrain.run, config=self.pretrain, partitioner=partitioner, seed=seed,
            indices_of=functools.partial(select.selected_indices, stage=choose),
          ),
          inputs=("prepare", choose),
          reads=("pretrain",), seed=seed,
        ))
    stages.append(skeleton.Stage(
      "evaluate",
      functools.partial(
        evaluate.run, config=self.evaluate, model_config=self.pretrain, partitioner=partitioner,
        runs=runs,
      ),
      inputs=("prepare", *runs.values()), reads=("evaluate",),
    ))
    stages.append(skeleton.Stage(
      "report",
      functools.partial(
        report.run, config=self.report, stages=tuple(s.name for s in stages),
        method_names=tuple(m.name for m in self.methods),
      ),
      inputs=tuple(s.name for s in stages), reads=("report",), together=False,
    ))
    return stages

  def _stage(self, run, spread, **arguments):
    """A stage's function, in this process or by the engine's workers."""
    if self.engine is not None:
      run = functools.partial(spread, engine=self.engine)
    return functools.partial(distributed.finished, functools.partial(run, **arguments))

  @property
  def solves(self) -> list[methods.SolvingMethod]:
    """The methods that solve the control problem."""
    return [method for method in self.methods if isinstance(method, methods.SolvingMethod)]

  @property
  def proxy_methods(self) -> list[methods.ProxyMethod]:
    """The methods that score proxies, from which a scorer learns."""
    return [method for method in self.methods if isinstance(method, methods.ProxyMethod)]

  @property
  def scorer_methods(self) -> list[methods.ScorerMethod]:
    """The methods that train a scorer themselves."""
    return [method for method in self.methods if isinstance(method, methods.ScorerMethod)]

  def phases(self, partitioner, memory, *, num_target: int, num_corpus: int, platform: str):
    """What each phase takes, from shapes alone; see `plan.phases`."""
    return plan.phases(
      self, partitioner, memory, plan.Sizes(num_target, num_corpus), platform)

  def programs(self, partitioner, memory, *, num_target: int):
    """The programs to compile ahead of time: pre-training's step, the solve's segments."""
    length, vocabulary = self.prepare.length, self.prepare.vocabulary
    proxy_size = programs.vocabulary_size(self.proxy.model, vocabulary)
    size = programs.vocabulary_size(self.pretrain.model, vocabulary)
    found = []
    for method in self.solves:
      solve = (method, self.proxy, self.proxy_set, proxy_size, length, partitioner, num_target)
      parts = plan.solve_parts(*solve, partitioner.platform)
      policy = plan.planned_trajectory(method, parts, memory)
      found += programs.solve_programs(*solve, policy)
    return [
      *found,
      programs.pretrain_program(
        self.pretrain, size, length, partitioner, memory, "pretrain")]

  def _train_proxy(self, context, partitioner, seed: int) -> None:
    """Trains the proxy, once the prepared data are known to be large enough for every stage."""
    prepared = prepare.Prepared(context.input("prepare"))
    num_corpus, num_target = len(prepared.corpus), len(prepared.target_dev)
    told: dict[str, None] = {}
    for method in self.methods:
      sizes = {"num_corpus": num_corpus, "num_target": num_target}
      methods.check_sizes(
        method, self.proxy_set, **sizes, num_shards=partitioner.num_batch_shards)
      told |= dict.fromkeys(methods.fewer_than_most(method, self.proxy_set, **sizes))
    if self.proxy_methods:
      self._check_scorer(self.proxy_set.count(num_corpus), "enlarge the corpus")
    for sentence in told:
      context.log(sentence)
    num_selected = selection.num_selected(num_corpus, ratio=self.select.ratio)
    if num_selected < self.pretrain.batch_size:  # a selection may be wanted without a training
      context.log(
        f"pds.Select.ratio={self.select.ratio} of {num_corpus} instances selects {num_selected}, "
        f"fewer than pds.Pretrain.batch_size={self.pretrain.batch_size}: the stage pretrain will "
        "refuse them"
      )
    pretrain.run(context, config=self.proxy, partitioner=partitioner, seed=seed)

  def _bench(self, context, partitioner) -> methods.Bench:
    return methods.Bench(
      context, prepare.Prepared(context.input("prepare")), self.proxy, self.proxy_set, partitioner
    )

  def _gradient_bench(self, context, method, partitioner) -> methods.Bench:
    """The bench of a method of gradients, which is told if there is less data than it asks for."""
    bench = self._bench(context, partitioner)
    for sentence in methods.fewer_than_most(
      method, self.proxy_set, num_corpus=len(bench.corpus),
      num_target=len(bench.prepared.target_dev),
    ):
      context.log(sentence)
    return bench

  def _solve(self, context, method, partitioner, proxy_runs: int) -> None:
    bench = self._gradient_bench(context, method, partitioner)
    if isinstance(method, methods.SolvingMethod):
      method = method.decided(bench)
    ids, values = bench.proxies["example_id"], []
    for run in range(proxy_runs):
      bench.proxy_run = run  # the same bench, whose rows are read once
      rows = np.atleast_2d(method.score_proxies(bench))
      if rows.shape[1] != len(ids):
        raise ValueError(
          f"method {method.name!r} gave {rows.shape[1]} scores for {len(ids)} proxies; "
          "score_proxies must return one a proxy, [M] or [C,M]."
        )
      values.append(rows)
    if context.writes:
      proxy_scores = scores.ProxyScores(bench.proxy_indices, ids, np.concatenate(values))
      scores.save_proxy_scores(context.directory, proxy_scores)
      shutil.rmtree(context.directory / methods.UNFINISHED, ignore_errors=True)

  def _fit_scorer(self, context, method, partitioner) -> None:
    bench = self._gradient_bench(context, method, partitioner)
    method.fit_scorer(bench, self.scorer)

  def _score_corpus(self, context, method, partitioner) -> None:
    bench = self._bench(context, partitioner)
    scorer.write_scores(
      context, bench.corpus.ids, method.score_corpus(bench), self.scorer.shard_size
    )

  def table(self, summary: Mapping[str, Any]) -> str:
    """The figures of a finished run, for the terminal."""
    return report.table(summary)
