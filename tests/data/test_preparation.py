"""Text to instances and back, all parts together."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmops_jax import data
from lmops_jax.data import packing

PROGRAM = """
import sys
from lmops_jax import data
from lmops_jax.data import packing
root, out, order = sys.argv[1:]
corpus = data.InstalledText(roots=(root,), max_bytes=60_000)
documents = list(corpus.documents())
vocabulary = data.TrainSentencePiece(vocab_size=600, sample_bytes=20_000).build(
  (d.text for d in documents), out + "/vocabulary")
encoded = zip((d.id for d in documents), vocabulary.encode_batch([d.text for d in documents]))
packed = packing.pack(encoded, length=32, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id,
                      sentence_end=packing.sentence_end_table(vocabulary))
data.write_instances(out + "/instances", packed, length=32, vocab_size=vocabulary.vocab_size,
  pad_id=vocabulary.pad_id, eos_id=vocabulary.eos_id, bos_id=vocabulary.bos_id,
  vocabulary_fingerprint=vocabulary.fingerprint, instances_per_shard=500)
assert "tensorflow" not in sys.modules
"""


def copy_tree(source: Path, target: Path, backwards: bool) -> None:
  """Files of a package, written in one order or the other."""
  names = sorted(p.relative_to(source) for p in source.rglob("*") if p.suffix in (".py", ".md"))
  for i, name in enumerate(names[::-1] if backwards else names):
    path = target / source.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((source / name).read_bytes())
    os.utime(path, (i, i))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The same text, installed in another order, prepared by two processes that hash differently."""
  import tqdm

  folders = []
  for seed in (1, 2):
    folder = tmp_path_factory.mktemp(f"run{seed}")
    copy_tree(Path(tqdm.__file__).parent, folder / "heap", backwards=seed == 2)
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "TZ": f"UTC+{seed}"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder / "heap"), str(folder), str(seed)],
                   check=True, env=environment)
    folders.append(folder)
  return folders


def test_two_preparations_are_byte_identical(prepared):
  digests = [
    {
      str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
      for part in ("vocabulary", "instances") for path in (folder / part).iterdir()
    }
    for folder in prepared
  ]
  assert digests[0] == digests[1] and len(digests[0]) >= 6


def test_documents_can_be_put_together_again(prepared):
  folder = prepared[0]
  corpus = data.InstalledText(roots=(str(folder / "heap"),), max_bytes=60_000)
  documents = {d.id: d.text for d in corpus.documents()}
  vocabulary = data.load_vocabulary(folder / "vocabulary")
  instances = data.open_instances(folder / "instances")
  assert instances.vocabulary_fingerprint == vocabulary.fingerprint
  tokens = {identifier: [] for identifier in documents}
  for index in range(len(instances)):
    instance = instances.instance(index)
    assert instance.tokens[0] == vocabulary.bos_id and len(instance.tokens) <= 33
    ends = np.cumsum(instance.document_num_tokens)
    for identifier, part in zip(
      instance.document_ids.tolist(), np.split(instance.tokens[1:], ends[:-1]), strict=True
    ):
      tokens[identifier].extend(part.tolist())
  for identifier, text in documents.items():
    assert tokens[identifier][-1] == vocabulary.eos_id
    assert vocabulary.decode(tokens[identifier]) == text


def test_the_target_is_not_in_the_corpus_unless_it_is(prepared):
  folder = prepared[0]
  corpus = list(data.InstalledText(roots=(str(folder / "heap"),)).documents())
  target = list(data.PythonReference().documents())
  assert data.overlapping_documents(corpus, target) == {}
  copied = corpus[0]._replace(text=target[3].text + "\nAnd more.")
  assert data.overlapping_documents([copied, *corpus[1:]], target) == {copied.id: target[3].id}


def test_one_per_document_target(prepared, tmp_path):
  vocabulary = data.load_vocabulary(prepared[0] / "vocabulary")
  dev, test = data.split_documents(data.PythonReference().documents(), 0.5, seed=0)
  assert not {d.id for d in dev} & {d.id for d in test}
  encoded = [(d.id, vocabulary.encode(d.text)) for d in test]
  special = {"length": 64, "bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id}
  count = data.write_instances(
    tmp_path, packing.one_per_document(encoded, **special), vocab_size=vocabulary.vocab_size,
    pad_id=vocabulary.pad_id, **special)
  assert count == len(test)
  batch = data.open_instances(tmp_path).batch(np.arange(count))
  assert (batch["loss_mask"].sum(axis=1) > 0).all()
