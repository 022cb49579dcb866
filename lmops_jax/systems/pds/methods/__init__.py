"""The ways to score data: PDS and what it is compared with (PDS, section 3).

Three kinds of method. A *proxy method* scores a small random proxy set by gradients; a scorer then
learns those scores and annotates the corpus. A *scorer method* trains the scorer itself, on the
same proxy set. A *corpus method* scores every instance directly. All share proxy set, scorer,
selection and pre-training, so that only the scores differ. A method is a frozen dataclass with a
`name`, bound in gin as `METHODS = [@pds.PMP(), @pds.Random(), ...]`; one of your own needs a `name`
and one of `score_proxies(bench)`, `fit_scorer(bench, config)` and `score_corpus(bench)`.
"""

from lmops_jax.systems.pds.methods.bench import Bench
from lmops_jax.systems.pds.methods.corpus_methods import DSIR, Length, Perplexity, Random, texts_of
from lmops_jax.systems.pds.methods.data_rater import DataRater
from lmops_jax.systems.pds.methods.directions import InfluenceScores, OneStep
from lmops_jax.systems.pds.methods.in_run import InRun
from lmops_jax.systems.pds.methods.kinds import (
  CheckpointsMethod,
  CorpusMethod,
  ForwardMethod,
  ProxyMethod,
  ScorerMethod,
  SolvingMethod,
)
from lmops_jax.systems.pds.methods.pmp import PMP, UNFINISHED
from lmops_jax.systems.pds.methods.proxy_set import ProxySet
from lmops_jax.systems.pds.methods.rho_loss import RhoLoss
from lmops_jax.systems.pds.methods.sizes import (
  check_inner_size,
  check_most_target,
  check_sizes,
  fewer_than_most,
)

__all__ = [
  "DSIR",
  "PMP",
  "UNFINISHED",
  "Bench",
  "CheckpointsMethod",
  "CorpusMethod",
  "DataRater",
  "ForwardMethod",
  "InRun",
  "InfluenceScores",
  "Length",
  "OneStep",
  "Perplexity",
  "ProxyMethod",
  "ProxySet",
  "Random",
  "RhoLoss",
  "ScorerMethod",
  "SolvingMethod",
  "check_inner_size",
  "check_most_target",
  "check_sizes",
  "fewer_than_most",
  "texts_of",
]
