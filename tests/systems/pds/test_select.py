"""The selection stage: what is kept, and in which forms it leaves (spec section 4)."""

import functools
import json
import shutil
import tracemalloc
import types

import numpy as np
import pytest

from lmops_jax.data import instance_writing, instances, packing, shards
from lmops_jax.stages import pipeline
from lmops_jax.systems.pds import parallel_selection, scores, select, selection
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
  num = instance_writing.write_instances(
    root / "prepare" / "corpus", packed, length=24, vocab_size=vocabulary.vocab_size,
    pad_id=vocabulary.pad_id, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
    vocabulary_fingerprint=vocabulary.fingerprint,
  )
  values = np.random.default_rng(2).normal(3.0, 0.01, num).astype(np.float32)
  (root / "annotate").mkdir()
  ids = instances.open_instances(root / "prepare" / "corpus").ids
  for number, start in enumerate(range(0, num, 37)):
    rows = slice(start, start + 37)
    scores.save_shard(root / "annotate", number, scores.Shard(start, ids[rows], values[rows]))
  return root, values


def _select(folders, out, config):
  root, _ = folders
  out.mkdir()
  inputs = {"prepare": root / "prepare", "annotate": root / "annotate"}
  context = pipeline.StageContext("select/x", out, inputs, lambda text: None)
  select.run(context, config, "annotate")
  indices, ids = (np.load(out / name) for name in (select.INDICES_FILE, select.IDS_FILE))
  corpus = instances.open_instances(root / "prepare" / "corpus")
  np.testing.assert_array_equal(ids, corpus.ids[indices])
  return indices, context


def test_it_keeps_what_gumbel_top_k_keeps_on_the_standardised_scores(folders, tmp_path):
  indices, context = _select(
    folders, tmp_path / "out", select.Select(ratio=0.4, tau=0.1, seed=7))
  values = folders[1].astype(np.float64)
  ids = instances.open_instances(folders[0] / "prepare" / "corpus").ids
  want = selection.gumbel_top_k(
    (values - values.mean()) / values.std(), ratio=0.4, tau=0.1, seed=7, ids=ids
  )
  np.testing.assert_array_equal(indices, np.flatnonzero(np.isin(ids, want)))
  assert context.extra == {"num_selected": len(indices), "num_examples": len(values)}


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
  peaks, size = [], 50_000
  for num_shards in (4, 32):
    folder = tmp_path / str(num_shards)
    for name in ("annotate", "out"):
      (folder / name).mkdir(parents=True)
    for i in range(num_shards):
      ids = np.arange(i * size, (i + 1) * size)
      shard = scores.Shard(i * size, ids, selection.gumbel_noise(99, ids))
      scores.save_shard(folder / "annotate", i, shard)
    corpus = types.SimpleNamespace(corpus=range(num_shards * size), vocabulary=None)
    monkeypatch.setattr(select.prepare, "Prepared", lambda _: corpus)  # noqa: B023
    inputs = {"prepare": None, "annotate": folder / "annotate"}
    context = pipeline.StageContext("select/x", folder / "out", inputs, lambda text: None)
    in_process = functools.partial(parallel_selection.select_in_process, max_candidates=1 << 16)
    with monkeypatch.context() as small:
      small.setattr(parallel_selection, "select_in_process", in_process)
      tracemalloc.start()
      select.run(context, select.Select(), "annotate")
      peaks.append(tracemalloc.get_traced_memory()[1])
      tracemalloc.stop()
    for name in (select.INDICES_FILE, select.IDS_FILE):
      assert len(np.load(folder / "out" / name)) == int(0.4 * num_shards * size)
  assert peaks[1] < 1.1 * peaks[0], peaks  # eight times the scores


def test_small_scores_drown_in_the_noise_unless_standardised(folders, tmp_path):
  values = folders[1]
  best = set(np.argsort(-values)[: int(0.4 * len(values))].tolist())

  def shared(name, **kwargs):
    indices, _ = _select(folders, tmp_path / name, select.Select(ratio=0.4, tau=0.1, **kwargs))
    return len(best & set(indices.tolist())) / len(best)

  assert shared("with", standardize=True) > 0.9
  assert shared("without", standardize=False) < 0.8


def test_exports_hold_the_selected_instances_in_corpus_order(folders, tmp_path):
  config = select.Select(ratio=0.25, tau=0.0, formats=select.FORMATS)
  indices, _ = _select(folders, tmp_path / "out", config)
  corpus = instances.open_instances(folders[0] / "prepare" / "corpus")
  copied = instances.open_instances(tmp_path / "out" / "tfds")
  np.testing.assert_array_equal(copied.tokens(np.arange(len(copied))), corpus.tokens(indices))
  (jsonl,) = (tmp_path / "out" / "jsonl").glob("*.jsonl")
  rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
  assert [row["id"] for row in rows] == corpus.ids[indices].tolist()
  vocabulary = vocabularies.load_vocabulary(folders[0] / "prepare" / "vocabulary")
  first = corpus.instance(int(indices[0])).tokens.tolist()
  assert rows[0]["text"].replace("\n\n", "") == vocabulary.decode(first).replace("\n\n", "")
  index = next((tmp_path / "out" / "mmididx").glob("*.idx"))
  shard = shards.read_shard(index.with_suffix(""))
  assert len(shard) == len(indices)
  np.testing.assert_array_equal(shard[0], first)
  assert list((tmp_path / "out" / "parquet").glob("*.parquet"))


def test_a_new_document_changes_neither_noise_nor_choice_of_the_others(folders, tmp_path):
  """It stands in front of the corpus and fills two instances, which get the lowest scores."""
  root, values = folders
  old = instances.open_instances(root / "prepare" / "corpus")
  new = packing.pack([(777, [9] * 47)], length=24, bos_id=old.bos_id, eos_id=old.eos_id)
  before = [old.instance(i) for i in range(len(old))]
  (tmp_path / "annotate").mkdir()
  num = instance_writing.write_instances(
    tmp_path / "prepare" / "corpus", [*new, *before], length=24, vocab_size=old.vocab_size,
    pad_id=old.pad_id, bos_id=old.bos_id, eos_id=old.eos_id,
  )
  ids = instances.open_instances(tmp_path / "prepare" / "corpus").ids
  np.testing.assert_array_equal(ids[2:], old.ids)
  np.testing.assert_array_equal(
    selection.gumbel_noise(7, ids[2:]), selection.gumbel_noise(7, old.ids))
  shard = scores.Shard(0, ids, np.concatenate([[-9.0, -9.0], values]))
  scores.save_shard(tmp_path / "annotate", 0, shard)
  shutil.copytree(root / "prepare" / "vocabulary", tmp_path / "prepare" / "vocabulary")
  settings = {"tau": 0.01, "seed": 7, "standardize": False}
  want, _ = _select(folders, tmp_path / "old", select.Select(ratio=30 / len(old), **settings))
  got, _ = _select(
    (tmp_path, None), tmp_path / "new", select.Select(ratio=30 / num, **settings))
  assert len(want) == len(got) == 30
  np.testing.assert_array_equal(got, want + 2)
