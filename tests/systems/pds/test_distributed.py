"""Stages on Beam workers write what they write in one process, byte for byte."""

import functools
import json
import re
import shutil
from collections import Counter

import flax.linen as nn
import jax
import numpy as np
import pytest

from lmops_jax.data import files, packing
from lmops_jax.data.distributed import engine as engine_lib
from lmops_jax.host import seals
from lmops_jax.mesh import checkpoints, meshes
from lmops_jax.models import transformer
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import distributed, prepare, scorer, scores, select
from lmops_jax.text import vocabulary_sources
from lmops_jax.training import optimizers

pytest.importorskip("apache_beam", reason="needs the extra `beam`")

Engine = engine_lib.Engine

LETTERS = np.array(list("etaoinshrdlucmfw"))


def _texts(num, seed):
  rng = np.random.default_rng(seed)
  words = ["".join(rng.choice(LETTERS, 6)) for _ in range(300)]
  return [
    " ".join(rng.choice(words, rng.integers(1, 60))) + rng.choice([".", "", "! So.", "\n"])
    for _ in range(num)
  ]


def _jsonl(path, texts):
  path.write_text("".join(json.dumps({"text": t, "kind": "abc"[len(t) % 3]}) + "\n" for t in texts))


def _tree(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
  }


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  """A corpus in files of different sizes, one without a usable line, and a target."""
  root = tmp_path_factory.mktemp("raw")
  (root / "corpus").mkdir()
  target = _texts(12, 100)
  for i, num in enumerate((40, 1, 75, 0, 9)):
    _jsonl(root / "corpus" / f"part{i}.jsonl", _texts(num, i) + (target[:2] if i == 2 else [" "]))
  with (root / "corpus" / "part1.jsonl").open("ab") as file:
    file.write(b'{"text": "\xff\xfe broken"}\n')
  _jsonl(root / "target.jsonl", target)
  return root


def _config(raw, **kwargs):
  return prepare.Prepare(**{
    "corpus": files.Jsonl(str(raw / "corpus"), kind_field="kind"),
    "target": files.Jsonl(str(raw / "target.jsonl")), "length": 32, "num_held_out": 10,
    "vocabulary": vocabulary_sources.TrainSentencePiece(vocab_size=320, sample_bytes=3000),
  } | kwargs)


def _run(stage, folder, inputs=None, name="stage"):
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  context = pipeline.StageContext(name, folder, inputs or {}, lines.append)
  distributed.finished(stage, context)
  return context


class Backwards(Engine):
  """Takes everything from the last to the first."""

  def _run(self, build, items):
    super()._run(build, items[::-1])


THREADS = ["--direct_num_workers=3", "--direct_running_mode=multi_threading"]
ENGINES = {
  "five": Engine(num_buckets=5), "one": Engine(num_buckets=1),
  "threads": Engine(options=THREADS, num_buckets=17), "backwards": Backwards(num_buckets=8),
}


def _prepare(config, engine):
  return functools.partial(distributed.run_prepare, config=config, engine=engine)


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
  """Settings, and the folder and context of each in one process."""
  root = tmp_path_factory.mktemp("prepared")
  result = {}
  for name, settings in {
    "plain": {}, "sentences": {"sentence_ends": True, "num_held_out": 0},
  }.items():
    config = _config(raw, **settings)
    context = _run(functools.partial(prepare.run, config=config), root / name)
    result[name] = config, root / name, context
  return result


@pytest.mark.parametrize(
  ("name", "engine"),
  [("plain", "threads"), ("plain", "one"), ("sentences", "five"), ("sentences", "backwards")],
)
def test_prepared_files_are_those_of_one_process(prepared, tmp_path, engine, name):
  engine = ENGINES[engine]
  config, folder, context = prepared[name]
  got = _run(_prepare(config, engine), tmp_path)
  want = _tree(folder)
  assert _tree(tmp_path) == want and len(want) > 10
  assert got.extra == context.extra
  statistics = got.extra["statistics"]["corpus"]
  assert statistics["dropped"] == {"empty": 4, "undecodable": 1}
  assert len(statistics["overlaps_with_target"]) == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_in_processes_of_their_own_prepare_the_same(prepared, tmp_path):
  config, folder, _ = prepared["sentences"]
  options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
  _run(_prepare(config, Engine(options, num_buckets=6)), tmp_path)
  assert _tree(tmp_path) == _tree(folder)


def test_bundles_that_are_done_again_change_nothing(prepared, tmp_path, monkeypatch):
  """Runners repeat a bundle when a worker is lost, also after it has written."""
  from apache_beam.runners.portability.fn_api_runner import FnApiRunner

  config, folder, _ = prepared["plain"]
  encoded, calls = packing.encoded, Counter()

  def counting(documents, vocabulary):
    calls["encoded"] += 1
    return encoded(documents, vocabulary)

  monkeypatch.setattr(packing, "encoded", counting)
  monkeypatch.setattr(engine_lib, "_DEFAULT_RUNNER", FnApiRunner(bundle_repeat=1))
  _run(_prepare(config, Engine(num_buckets=4)), tmp_path)
  assert _tree(tmp_path) == _tree(folder)
  assert calls["encoded"] == 2 * 4 + 2  # every bucket twice, and the two parts of the target


def test_a_failed_stage_goes_on_where_it_was(prepared, tmp_path, monkeypatch):
  config, folder, _ = prepared["sentences"]
  encoded, done = packing.encoded, []

  def failing(documents, vocabulary):
    if len(done) == 3:
      next(documents)
      raise OSError("a worker was lost")
    done.append(1)
    yield from encoded(documents, vocabulary)

  engine = Engine(num_buckets=6)
  with monkeypatch.context() as broken:
    broken.setattr(packing, "encoded", failing)
    with pytest.raises(Exception, match="a worker was lost"):
      _run(_prepare(config, engine), tmp_path)
  finished = list((tmp_path / distributed.SCRATCH).rglob("totals-*"))
  assert len(finished) == 3
  written = {p: p.stat().st_mtime_ns for p in finished}
  before = Counter()

  def counting(documents, vocabulary):
    before["buckets"] += 1
    return encoded(documents, vocabulary)

  monkeypatch.setattr(packing, "encoded", counting)
  monkeypatch.setattr(distributed.shutil, "rmtree", lambda *args, **kwargs: None)
  distributed.run_prepare(
    pipeline.StageContext("prepare", tmp_path, {}, lambda text: None), config, engine
  )
  assert {p: p.stat().st_mtime_ns for p in written} == written
  assert before["buckets"] == 3 + 2  # what was missing, and the two parts of the target
  monkeypatch.undo()
  distributed.shutil.rmtree(tmp_path / distributed.SCRATCH)
  assert _tree(tmp_path) == _tree(folder)


def test_a_process_alone_takes_nothing_from_what_workers_left(prepared, tmp_path):
  config, folder, _ = prepared["plain"]
  left = tmp_path / distributed.SCRATCH / "buckets-4"
  left.mkdir(parents=True)
  (left / "documents-000000").write_bytes(b"half")
  _run(functools.partial(prepare.run, config=config), tmp_path)
  assert _tree(tmp_path) == _tree(folder)


@pytest.fixture(scope="module")
def fitted(prepared, tmp_path_factory):
  """A scorer with random parameters, and what it gives in one process."""
  root = tmp_path_factory.mktemp("fitted")
  config = scorer.Scorer(
    optimizer=optimizers.sgd(0.1), from_proxy=False, shard_size=13, inference_batch_size=4,
    model=transformer.TransformerConfig(
      num_layers=1, width=8, num_heads=2, mlp_width=16, max_length=32
    ),
  )
  inputs = {"prepare": prepared["plain"][1], "scorer": root / "scorer"}
  view = scorer.annotated_view(inputs["prepare"], inputs["scorer"])
  model = scorer.scorer_model(config, None, view)
  params = scorer.initializer(model)(jax.random.key(0))
  checkpoints.save_params(root / "scorer" / scorer.PARAMS_FOLDER, nn.unbox(params))
  stage = functools.partial(
    scorer.annotate, config=config, proxy=None, partitioner=meshes.single_device(),
    scorer_stage="scorer",
  )
  context = _run(stage, root / "annotate", inputs)
  return config, inputs | {"annotate": root / "annotate"}, context


@pytest.mark.parametrize("engine", ["threads", "backwards"])
def test_scores_are_those_of_one_process(fitted, tmp_path, engine):
  engine = ENGINES[engine]
  config, inputs, context = fitted
  stage = functools.partial(
    distributed.annotate, config=config, proxy=None, engine=engine, scorer_stage="scorer"
  )
  shutil.copy(scores.shard_path(inputs["annotate"], 1), tmp_path)  # of an earlier attempt
  seals.seal(scores.shard_path(tmp_path, 1))
  got = _run(stage, tmp_path, inputs)
  want = _tree(inputs["annotate"])
  assert _tree(tmp_path) == want and len(want) > 2
  num = len(prepare.Prepared(inputs["prepare"]).corpus)
  assert got.flops == pytest.approx(context.flops * (num - 13) / num)


def _select(engine, folder, inputs, **kwargs):
  config = select.Select(**kwargs)
  if engine is None:
    stage = functools.partial(select.run, config=config, annotate_stage="annotate")
  else:
    stage = functools.partial(
      distributed.run_select, config=config, annotate_stage="annotate", engine=engine
    )
  return _run(stage, folder, inputs)


@pytest.mark.parametrize(
  ("engine", "kwargs"),
  [
    ("threads", {"ratio": 0.4, "seed": 5, "formats": select.FORMATS}),
    ("backwards", {"ratio": 1.0, "tau": 0.0, "formats": ("tfds", "jsonl")}),
    ("one", {"ratio": 0.02, "standardize": False}),
  ],
  ids=["formats", "all", "one instance"],
)
def test_selections_and_exports_are_those_of_one_process(fitted, tmp_path, engine, kwargs):
  engine = ENGINES[engine]
  _, inputs, _ = fitted
  want = _select(None, tmp_path / "alone", inputs, **kwargs)
  got = _select(engine, tmp_path / "spread", inputs, **kwargs)
  assert got.extra == want.extra
  assert _tree(tmp_path / "spread") == _tree(tmp_path / "alone")


@pytest.mark.parametrize("shard_size", [3, 1000])
def test_the_selection_does_not_depend_on_the_size_of_score_shards(fitted, tmp_path, shard_size):
  _, inputs, _ = fitted
  num = len(prepare.Prepared(inputs["prepare"]).corpus)
  ids, values = map(np.concatenate, zip(*scores.read_shards(inputs["annotate"], num)))
  again = tmp_path / "annotate"
  again.mkdir()
  for number, start in enumerate(range(0, num, shard_size)):
    rows = slice(start, start + shard_size)
    scores.save_shard(again, number, scores.Shard(start, ids[rows], values[rows]))
  _select(None, tmp_path / "alone", inputs, ratio=0.3)
  for name, engine in (("spread", ENGINES["five"]), ("alone again", None)):
    _select(engine, tmp_path / name, inputs | {"annotate": again}, ratio=0.3)
    assert _tree(tmp_path / name) == _tree(tmp_path / "alone")


def test_damaged_scores_are_named_by_workers(fitted, tmp_path):
  _, inputs, _ = fitted
  annotated = shutil.copytree(inputs["annotate"], tmp_path / "annotate")
  path = scores.shard_path(annotated, 1)
  inputs = inputs | {"annotate": annotated}
  shard = scores.load_shard(annotated, 1)
  scores.save_shard(annotated, 1, shard._replace(scores=np.array([np.nan] * 13)))
  with pytest.raises(ValueError, match=f"^{re.escape(str(path))} holds a score that is not finite"):
    _select(ENGINES["one"], tmp_path / "a", inputs)
  path.unlink()
  with pytest.raises(ValueError, match="scores_000001.npz is missing: scores end at instance 13"):
    _select(ENGINES["one"], tmp_path / "b", inputs)


def test_bad_text_is_named_by_workers(raw, tmp_path):
  corpus = shutil.copytree(raw / "corpus", tmp_path / "corpus")
  with (corpus / "part3.jsonl").open("w") as file:
    file.write('{"text": 5}\n')
  config = _config(raw, corpus=files.Jsonl(str(corpus)))
  with pytest.raises(ValueError, match=r"^.*part3.jsonl:1: field 'text' holds a int, not a text.$"):
    _run(_prepare(config, ENGINES["five"]), tmp_path / "out")


def test_documents_with_one_id_are_refused(raw, tmp_path):
  (tmp_path / "corpus").mkdir()
  for name in ("a", "b"):
    (tmp_path / "corpus" / f"{name}.jsonl").write_text('{"text": "words", "id": 5}\n')
  config = _config(raw, corpus=files.Jsonl(str(tmp_path / "corpus"), id_field="id"))
  messages = []
  for stage in (functools.partial(prepare.run, config=config), _prepare(config, ENGINES["five"])):
    with pytest.raises(ValueError, match="both have id 5") as error:
      _run(stage, tmp_path / f"out{len(messages)}")
    messages.append(str(error.value))
  assert messages[0] == messages[1]


def test_an_empty_corpus_is_refused(raw, tmp_path):
  (tmp_path / "corpus.jsonl").write_text('{"text": " "}\n')
  config = _config(raw, corpus=files.Jsonl(str(tmp_path / "corpus.jsonl")))
  with pytest.raises(ValueError, match=r"empty: it has no usable document \(1 empty\)"):
    _run(_prepare(config, ENGINES["five"]), tmp_path / "out")
