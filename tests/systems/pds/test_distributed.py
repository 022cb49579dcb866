"""Stages on Beam workers write what they write in one process, byte for byte."""

import functools
import json
import re

import numpy as np
import pytest

from lmops_jax import pipeline
from lmops_jax.data import files, vocabularies
from lmops_jax.systems.pds import distributed, prepare

pytest.importorskip("apache_beam", reason="needs the extra `beam`")

from lmops_jax.data.distributed import Engine  # noqa: E402

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
    "vocabulary": vocabularies.TrainSentencePiece(vocab_size=320, sample_bytes=3000),
  } | kwargs)


def _run(stage, folder, inputs=None, name="stage"):
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  context = pipeline.StageContext(name, folder, inputs or {}, lines.append)
  distributed.finished(stage, context)
  return context


IN_PROCESS = Engine(num_buckets=5)
THREADS = Engine(
  options=["--direct_num_workers=3", "--direct_running_mode=multi_threading"], num_buckets=17
)


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


@pytest.mark.parametrize("name", ["plain", "sentences"])
@pytest.mark.parametrize(
  "engine", [IN_PROCESS, THREADS, Engine(num_buckets=1)], ids=["five", "threads", "one"]
)
def test_prepared_files_are_those_of_one_process(prepared, tmp_path, monkeypatch, engine, name):
  config, folder, context = prepared[name]
  got = _run(functools.partial(distributed.run_prepare, config=config, engine=engine), tmp_path)
  want = _tree(folder)
  assert _tree(tmp_path) == want and len(want) > 10
  assert got.extra == context.extra
  statistics = got.extra["statistics"]["corpus"]
  assert statistics["dropped"] == {"empty": 4, "undecodable": 1}
  assert len(statistics["overlaps_with_target"]) == 2
