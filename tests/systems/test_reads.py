"""Each packaged system: a changed binding re-runs the stages that read it and those behind them."""

import dataclasses
import json
import re
from typing import Any

import gin
import pytest

from lmops_jax.config import resolve
from lmops_jax.data.installed_text import InstalledText
from lmops_jax.host.manifests import StageError
from lmops_jax.stages import pipeline, skeleton
from tests import model_folders
from tests.systems import conftest

FINETUNE, REINFORCE = "train/finetune.gin", "train/reinforce.gin"
SFT, PROMPTIST = "promptist/sft.gin", "promptist/smoke.gin"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Bindings that a system cannot do without, by gin file."""
  folder = tmp_path_factory.mktemp("files")
  rows = folder / "rows.jsonl"
  rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
  model = model_folders.write(folder / "model")
  return {
    FINETUNE: [f"MODEL = '{model}'", f"TRAIN = '{rows}'", "LENGTH = 32"],
    REINFORCE: [f"MODEL = '{model}'", f"PROMPTS = '{rows}'"],
    SFT: [f"MODEL = '{model}'", f"PAIRS = '{rows}'", "LENGTH = 32"],
  }


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(InstalledText, "fingerprint", lambda self: f"text {self}")  # reads all of it


def _identities(file, bindings):
  """What determines each stage, and the settings of the system."""
  resolved = resolve.load([file], bindings)
  system = resolved.run().system
  stages = skeleton.resolve_stages(system, system.stages(None), resolved.settings)
  return pipeline.identities(stages, system.name), resolved.settings


def _behind(identities, names):
  """The stages and all that read them, however far behind."""
  found = set()
  for name, identity in identities.items():  # inputs come first
    if name in names or found & set(identity["inputs"]):
      found.add(name)
  return found


@pytest.mark.parametrize("file, binding, readers", [
  ("pds/smoke.gin", "pds.Prepare.sentence_ends = True", "prepare"),
  ("pds/smoke.gin", "data.InstalledText.min_bytes = 77", "prepare"),
  ("pds/smoke.gin", "pds.Pipeline.proxy_seed = 5", "proxy"),
  ("pds/smoke.gin", "proxy/pds.Pretrain.checkpoint_every = 7", "proxy"),
  ("pds/smoke.gin", "PROXIES = 40", "solve/.*"),
  ("pds/smoke.gin", "pds.PMP.micro_batch_size = 33", "solve/pds"),
  ("pds/smoke.gin", "pds.Scorer.shard_size = 100", "scorer/.*|annotate/.*"),
  ("pds/smoke.gin", "pds.Select.seed = 3", "select/.*"),
  ("pds/smoke.gin", "pds.Pretrain.loss_chunk = 8", "proxy|pretrain/.*"),
  ("pds/smoke.gin", "pds.Evaluate.max_held_out = 5", "evaluate"),
  ("pds/smoke.gin", "pds.Report.num_examples = 2", "report"),
  ("learning_law/default.gin", "learning_law.Perceptron.dim = 64", "data/.*"),
  ("learning_law/default.gin", "learning_law.PolicyOptimizer.num_epochs = 3", "policy/.*"),
  ("learning_law/default.gin", "optim.sgd.learning_rate = 0.2", "policy/.*|evaluate/.*"),
  ("learning_law/default.gin", "learning_law.Curriculum.start = 0.5", "evaluate/.*"),
  ("learning_law/default.gin", "learning_law.Report.fit_from = 3", "report"),
  ("meta_optimizer/default.gin", "tasks.choose.rows_seed = 3", "task/.*"),
  ("meta_optimizer/default.gin", "meta_optimizer.Study.rates = [0.5]", "study/.*"),
  ("meta_optimizer/default.gin", "meta_optimizer.Report.picture_tokens = 7", "report"),
  ("meta_optimizer/momentum.gin", "momentum.Pairs.eta = 0.25", "train/momentum/.*"),
  ("meta_optimizer/momentum.gin", "momentum.Texts.seed = 4", "texts"),
  ("meta_optimizer/momentum.gin", "momentum.Training.batch_size = 4", "train/.*"),
  ("meta_optimizer/momentum.gin", "SHOTS = (0, 2)", "evaluate/.*"),
  ("metalm/smoke.gin", "metalm.Texts.seed = 3", "texts"),
  ("metalm/smoke.gin", "metalm.Tasks.pair_chars = 33", "tasks"),
  ("metalm/smoke.gin", "metalm.ReaderTraining.rate = 0.2", "encoder"),
  ("metalm/smoke.gin", "metalm.Training.batch_size = 2", "encoder|train/.*"),
  ("metalm/smoke.gin", "data.RandomSpans.proportion = 0.2", "train/.*|report"),
  ("metalm/smoke.gin", "tuned/optim.warmup_cosine.peak = 1e-2", "finetune/.*"),
  ("metalm/smoke.gin", "metalm.Evaluate.shots = (0,)", "evaluate/.*"),
  ("structured_prompting/default.gin", "tasks.choose.rows_seed = 3", "task/.*"),
  ("structured_prompting/default.gin", "COUNTS = (0, 7)", "prompt/.*"),
  ("structured_prompting/default.gin", "RETRIEVAL = @structured_prompting.Retrieval()",
   "prompt/.*"),
  ("structured_prompting/default.gin", "structured_prompting.Report.log_counts = False", "report"),
  ("socratic/smoke.gin", "socratic.Arithmetic.modulus = 9", "problems|train/.*|solve/.*|report"),
  ("socratic/smoke.gin", "LEARNING_RATE = 1e-3", "train/.*"),
  ("socratic/smoke.gin", "socratic.Solving.rounds = 1", "problems|solve/.*|report"),
  (FINETUNE, "finetune.Finetune.pack = False", "prepare"),
  (FINETUNE, "LEARNING_RATE = 1e-3", "train"),
  (FINETUNE, "pretrained.load.attention = 'chunked'", "prepare|train"),
  (REINFORCE, "reinforce.PPO.clip = 0.3", "train"),
  (REINFORCE, "reinforce.ShareOf.characters = 'a'", "train"),
  (REINFORCE, "reinforce.Reinforce.num_shown = 3", "report"),
  (SFT, "data.PairFiles.completion_field = 'text'", "prepare"),
  (SFT, "promptist.SFT.select_step = 7", "train"),
  (SFT, "LEARNING_RATE = 1e-3", "train"),
])
def test_a_changed_binding_reaches_its_readers_and_what_lies_behind(file, binding, readers, files):
  bindings = files.get(file, [])
  before, _ = _identities(file, bindings)
  after, _ = _identities(file, [*bindings, binding])
  assert list(before) == list(after)
  read = {name for name in before if after[name]["settings"] != before[name]["settings"]}
  assert read == {name for name in before if re.fullmatch(readers, name)}
  changed = {n for n in before if after[n]["fingerprint"] != before[n]["fingerprint"]}
  assert changed == _behind(before, read)


@pytest.mark.parametrize("file, free", [
  ("pds/smoke.gin", {"engine", "seeds", "proxy_seed", "proxy_runs"}),
  ("learning_law/default.gin", {"seeds"}),
  ("meta_optimizer/default.gin", {"seeds"}),
  ("meta_optimizer/momentum.gin", {"seeds"}),
  ("metalm/smoke.gin", {"arms", "seeds"}),
  ("structured_prompting/default.gin", {"seeds"}),
  (FINETUNE, set()), (REINFORCE, set()), (SFT, set()),
  (PROMPTIST, {"generator_seed", "seeds"}),
  ("prototypes/smoke.gin", {"seeds", "sizes"}),
  ("socratic/smoke.gin", {"seeds"}),
])
def test_every_setting_is_read_by_a_stage(file, free, files):
  """Seeds show as `seed` of the stages; the engine changes no result."""
  bindings = files.get(file, [])
  resolved = resolve.load([file], bindings)
  read = {name for stage in resolved.run().system.stages(None) for name in stage.reads}
  roots = {re.match(r"\w+", name)[0] for name in read}
  assert set(resolved.settings.params) - roots == free
  seeds = resolved.settings.params.get("seeds", ())
  identities, _ = _identities(file, bindings)
  assert {str(seed) for seed in seeds} <= {i["settings"].get("seed") for i in identities.values()}


def test_a_changed_file_re_runs_what_reads_it(files, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text("{}\n")
  bindings = [*files[FINETUNE], f"TRAIN = '{rows}'"]
  before, _ = _identities(FINETUNE, bindings)
  rows.write_text("{}\n{}\n")
  after, _ = _identities(FINETUNE, bindings)
  changed = {key for key, value in after["prepare"]["settings"].items()
             if before["prepare"]["settings"][key] != value}
  assert changed == {"rows['train'].fingerprint"}
  assert after["train"]["settings"] == before["train"]["settings"]


# ------------------------------------------------------------------------------- names of a system


@gin.register(module="reads")
@dataclasses.dataclass(frozen=True)
class Part:
  size: int = 1
  mark: str = ""

  def fingerprint(self):
    return self.mark


@gin.register(module="reads")
@dataclasses.dataclass(frozen=True)
class System:
  parts: Any = ()
  names: Any = ()
  name = "reads"

  def stages(self, partitioner):
    return [skeleton.Stage("work", print, reads=self.names, seed=3)]

  def table(self, summary):
    return ""


def _settings(tmp_path, names, parts="@a/reads.Part(), @reads.Part()"):
  path = tmp_path / "own.gin"
  path.write_text(f"run.system = @reads.System()\nreads.System.names = {names!r}\n"
                  f"reads.System.parts = [{parts}]\n"
                  "a/reads.Part.size = 4\na/reads.Part.mark = 'x'\n")
  return _identities(path, [])[0]["work"]["settings"]


def test_an_item_goes_by_the_singular_whatever_its_place(tmp_path):
  first = _settings(tmp_path, ["parts[0]"])
  assert first == {"part.component": "reads.Part", "part.size": "4", "part.mark": "'x'",
                   "part.fingerprint": "x", "seed": "3"}
  assert _settings(tmp_path, ["parts[1]"], "@reads.Part(), @a/reads.Part()") == first
  assert _settings(tmp_path, ["parts[0].fingerprint"]) == {"part.fingerprint": "x", "seed": "3"}
  assert _settings(tmp_path, ["parts[0].size"]) == {"part.size": "4", "seed": "3"}
  assert _settings(tmp_path, ["parts"])["parts[0].fingerprint"] == "x"


@pytest.mark.parametrize("name", ["part", "parts[2]", "parts[0].sizes", "parts.size",
                                  "parts[0].size.fingerprint.x", "nothing.fingerprint"])
def test_a_name_that_the_system_does_not_have_is_refused(tmp_path, name):
  with pytest.raises(StageError, match=re.escape(f"stage 'work' reads {name!r}, which reads.Sys")):
    _settings(tmp_path, [name])


@dataclasses.dataclass(frozen=True)
class _Part:
  size: int = 1
  rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class _System:
  part: _Part
  parts: tuple[_Part, ...]


def test_the_watch_over_stages_sees_what_they_read():
  shared = _Part()
  system = _System(shared, (_Part(2), shared))
  with conftest.recorded(system) as reads:
    assert system.part.size + system.parts[0].rate == 1.5
  assert _Part.__getattribute__ is object.__getattribute__  # and stops watching
  assert sorted(reads.values()) == [["part.size", "parts[1].size"], ["parts[0].rate"]]
  assert conftest.is_covered("part.size", "part") and conftest.is_covered("parts[0].rate", "parts")
  assert not conftest.is_covered("parts[0].rate", "part")
