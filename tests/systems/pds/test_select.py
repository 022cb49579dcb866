"""The selection stage: what is kept, and in which forms it leaves (spec section 4)."""

import functools
import json
import tracemalloc
import types

import numpy as np
import pytest

from lmops_jax.data import instances, packing, shards
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import scores, select, selection
from lmops_jax.text import vocabularies, vocabulary_sources

WORDS = ["".join(row) for row in np.random.default_rng(0).choice(list("etaoinshrd"), (99, 5))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("select")
  rng = np.random.default_rng(1)
  texts = [" ".join(rng.choice(WORDS, 20)) for _ in range(120)]
  train = vocabulary_sources.TrainSentencePiece(vocab_size=320, sample_bytes=50_000)
  vocabulary = train.build(iter(texts), root / "prepare" / "vocabulary")
  packed = packing.pack(
    ((i, vocabulary.encode(text)) for i, text in enumerate(texts)), length=24,
    bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
  )
  num = instances.write_instances(
    root / "prepare" / "corpus", packed, length=24, vocab_size=vocabulary.vocab_size,
    pad_id=vocabulary.pad_id, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
    vocabulary_fingerprint=vocabulary.fingerprint,
  )
  values = np.random.default_rng(2).normal(3.0, 0.01, num).astype(np.float32)
  (root / "annotate").mkdir()
  for shard, start in enumerate(range(0, num, 37)):
    scores.save_shard(root / "annotate", shard, start, values[start : start + 37])
  return root, values


def _select(folders, out, config):
  root, _ = folders
  out.mkdir()
  inputs = {"prepare": root / "prepare", "annotate": root / "annotate"}
  context = pipeline.StageContext("select/x", out, inputs, lambda text: None)
  select.run(context, config, "annotate")
  return np.load(out / select.IDS_FILE), context


def test_it_keeps_what_gumbel_top_k_keeps_on_the_standardised_scores(folders, tmp_path):
  ids, context = _select(folders, tmp_path / "out", select.Select(ratio=0.4, tau=0.1, seed=7))
  values = folders[1].astype(np.float64)
  want = selection.gumbel_top_k(
    (values - values.mean()) / values.std(), ratio=0.4, tau=0.1, seed=7
  )
  np.testing.assert_array_equal(ids, want)
  assert context.extra == {"num_selected": len(ids), "num_examples": len(values)}


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
  peaks, size = [], 50_000
  for num_shards in (4, 32):
    folder = tmp_path / str(num_shards)
    for name in ("annotate", "out"):
      (folder / name).mkdir(parents=True)
    for i in range(num_shards):
      values = selection.gumbel_noise(99, np.arange(i * size, (i + 1) * size))
      scores.save_shard(folder / "annotate", i, i * size, values)
    corpus = types.SimpleNamespace(corpus=range(num_shards * size), vocabulary=None)
    monkeypatch.setattr(select.prepare, "Prepared", lambda _: corpus)  # noqa: B023
    inputs = {"prepare": None, "annotate": folder / "annotate"}
    context = pipeline.StageContext("select/x", folder / "out", inputs, lambda text: None)
    stream = functools.partial(selection.select_stream, max_candidates=1 << 16)
    with monkeypatch.context() as small:
      small.setattr(selection, "select_stream", stream)
      tracemalloc.start()
      select.run(context, select.Select(), "annotate")
      peaks.append(tracemalloc.get_traced_memory()[1])
      tracemalloc.stop()
    assert len(np.load(folder / "out" / select.IDS_FILE)) == int(0.4 * num_shards * size)
  assert peaks[1] < 1.1 * peaks[0], peaks  # eight times the scores


def test_small_scores_drown_in_the_noise_unless_standardised(folders, tmp_path):
  values = folders[1]
  best = set(np.argsort(-values)[: int(0.4 * len(values))].tolist())

  def shared(name, **kwargs):
    ids, _ = _select(folders, tmp_path / name, select.Select(ratio=0.4, tau=0.1, **kwargs))
    return len(best & set(ids.tolist())) / len(best)

  assert shared("with", standardize=True) > 0.9
  assert shared("without", standardize=False) < 0.8


def test_exports_hold_the_selected_instances_in_corpus_order(folders, tmp_path):
  config = select.Select(ratio=0.25, tau=0.0, formats=select.FORMATS)
  ids, _ = _select(folders, tmp_path / "out", config)
  corpus = instances.open_instances(folders[0] / "prepare" / "corpus")
  copied = instances.open_instances(tmp_path / "out" / "tfds")
  np.testing.assert_array_equal(copied.tokens(np.arange(len(copied))), corpus.tokens(ids))
  (jsonl,) = (tmp_path / "out" / "jsonl").glob("*.jsonl")
  rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
  assert [row["id"] for row in rows] == ids.tolist()
  vocabulary = vocabularies.load_vocabulary(folders[0] / "prepare" / "vocabulary")
  first = corpus.instance(int(ids[0])).tokens.tolist()
  assert rows[0]["text"].replace("\n\n", "") == vocabulary.decode(first).replace("\n\n", "")
  index = next((tmp_path / "out" / "mmididx").glob("*.idx"))
  shard = shards.read_shard(index.with_suffix(""))
  assert len(shard) == len(ids)
  np.testing.assert_array_equal(shard[0], first)
  assert list((tmp_path / "out" / "parquet").glob("*.parquet"))
