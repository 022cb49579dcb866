import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from lmops_jax.data import InstalledText, PythonReference, Tfds, named_datasets
from lmops_jax.data.documents import document_id


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
  root = tmp_path_factory.mktemp("packages")
  for i in range(12):
    text = " ".join(f"w{i}x{j * j}" for j in range(60))
    (root / f"notes{i}.md").write_text(text)
  return root


@pytest.fixture(scope="module")
def prepared(heap, tmp_path_factory):
  """`installed_text` written through tfds as ArrayRecord."""
  from lmops_jax.data import tfds_builders

  data_dir = tmp_path_factory.mktemp("tfds")
  config = tfds_builders.InstalledTextConfig(name="test", roots=(str(heap),))
  builder = tfds_builders.InstalledText(config=config, data_dir=data_dir)
  builder.download_and_prepare(file_format="array_record")
  return builder


def test_builder_stores_the_corpus(heap, prepared):
  want = list(InstalledText(roots=(str(heap),)).documents())
  assert len(want) == 12
  corpus = Tfds(str(prepared.data_dir), id_field="id", kind_field="kind")
  got = list(corpus.documents())
  assert [(d.id, d.text, d.kind) for d in got] == [(d.id, d.text, d.kind) for d in want]
  example = prepared.as_data_source("train")[0]
  assert {d.source: d.text for d in want}[example["source"].decode()] == example["text"].decode()


def test_ids_come_from_rows_where_the_data_has_none(prepared):
  documents = {d.source: d for d in Tfds(str(prepared.data_dir)).documents()}
  assert len(documents) == 12
  first = prepared.as_data_source("train")[0]["text"].decode()
  assert documents["installed_text/test/1.0.0[train]:0"].text == first
  half = list(Tfds(str(prepared.data_dir), split="train[:50%]").documents())
  assert len(half) == 6


def test_pieces_hold_the_rows_of_the_whole(prepared, monkeypatch):
  monkeypatch.setattr(named_datasets, "_PIECE", 5)
  corpus = Tfds(str(prepared.data_dir))
  pieces = pickle.loads(pickle.dumps(corpus.pieces()))  # as they travel to workers
  assert [(piece.start, piece.stop) for piece in pieces] == [(0, 5), (5, 10), (10, 12)]
  documents = [d for piece in pieces for d in piece.read(Counter())]
  assert documents == list(corpus.read(Counter()))


def test_fingerprint(prepared):
  corpus = Tfds(str(prepared.data_dir))
  assert corpus.fingerprint() == Tfds(str(prepared.data_dir)).fingerprint()
  assert corpus.fingerprint() != Tfds(str(prepared.data_dir), split="train[:50%]").fingerprint()


def test_python_reference_builder(tmp_path):
  from lmops_jax.data import tfds_builders

  builder = tfds_builders.PythonReference(data_dir=tmp_path)
  builder.download_and_prepare(file_format="array_record")
  got = Tfds(str(builder.data_dir), id_field="id", kind_field="kind").documents()
  want = PythonReference().documents()
  assert [(d.id, d.text) for d in got] == [(d.id, d.text) for d in want]


def test_missing_dataset_is_prepared_on_request(tmp_path):
  from lmops_jax.data import tfds_builders

  corpus = Tfds(tfds_builders.PythonReference.name, data_dir=str(tmp_path), download=True)
  want = PythonReference().documents()
  assert sorted(d.text for d in corpus.documents()) == sorted(d.text for d in want)
  again = Tfds("python_reference", data_dir=str(tmp_path))
  assert list(again.documents()) == list(corpus.documents())
  assert list(tmp_path.glob("*/*/*.array_record*"))


def test_errors(prepared, tmp_path):
  folder = str(prepared.data_dir)
  with pytest.raises(ValueError, match=r"no field 'body' \(there are id, kind, source, text\)"):
    list(Tfds(folder, text_field="body").documents())
  with pytest.raises(ValueError, match="expected, but the field holds a int"):
    list(Tfds(folder, text_field="id").documents())
  with pytest.raises(ValueError, match=r"data\.Tfds\.split='dev' is no split.*splits are train"):
    list(Tfds(folder, split="dev").documents())
  with pytest.raises(ValueError, match=r"data\.Tfds\.name='no_such_data'"):
    Tfds("no_such_data", data_dir=str(tmp_path)).fingerprint()
  with pytest.raises(ValueError, match="is not prepared in"):
    Tfds("python_reference", data_dir=str(tmp_path)).fingerprint()


def test_ids_and_kinds_of_bytes(prepared, monkeypatch):
  rows = [{"text": b"a", "id": b"\xff", "kind": b"law"}, {"text": b"b", "id": b"\xfe", "kind": "x"},
          {"text": b"c", "id": b"c", "kind": b"\xff"}]
  monkeypatch.setattr(Tfds, "examples", lambda self: rows)
  corpus, counts = Tfds(str(prepared.data_dir), id_field="id", kind_field="kind"), Counter()
  found = {d.text: (d.id, d.kind) for d in corpus.documents(counts)}
  assert found == {"a": (document_id(b"\xff"), "law"), "b": (document_id(b"\xfe"), "x")}
  assert counts == {"undecodable": 1}
  for value in (np.float32(1), np.arange(2)):
    rows[0]["id"] = value
    with pytest.raises(ValueError, match=r"\[train\]:0: field 'id' holds .*, which is no id"):
      list(corpus.documents())


def test_array_record_needs_no_tensorflow(prepared):
  program = (
    "import sys\n"
    "from lmops_jax.data import Tfds\n"
    "assert len(list(Tfds(sys.argv[1]).documents())) == 12\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", program, str(prepared.data_dir)], check=True)


@pytest.mark.slow
def test_tfrecord_datasets_are_read_in_storage_order(heap, tmp_path):
  from lmops_jax.data import tfds_builders

  config = tfds_builders.InstalledTextConfig(name="records", roots=(str(heap),))
  builder = tfds_builders.InstalledText(config=config, data_dir=tmp_path)
  builder.download_and_prepare(file_format="tfrecord")
  got = list(Tfds(str(builder.data_dir), id_field="id", kind_field="kind").documents())
  want = list(InstalledText(roots=(str(heap),)).documents())
  assert [(d.id, d.text, d.kind) for d in got] == [(d.id, d.text, d.kind) for d in want]


@pytest.mark.slow
def test_seqio_task(tmp_path):
  import seqio
  import tensorflow as tf

  from lmops_jax.data import SeqioTask, TrainSentencePiece, as_seqio

  texts = [f"text number {i} of a task" for i in range(20)]
  vocabulary = TrainSentencePiece(vocab_size=300).build(texts, tmp_path)

  def source(split, shuffle_files=False, seed=None):
    del shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"text": texts if split == "train" else texts[:3]})

  seqio.TaskRegistry.add(
    "lmops_test_task",
    source=seqio.FunctionDataSource(source, splits=("train", "validation")),
    preprocessors=[
      lambda ds: ds.map(lambda e: {"targets": e["text"], "text": e["text"]}),
      seqio.preprocessors.tokenize,
    ],
    output_features={"targets": seqio.Feature(as_seqio(vocabulary), add_eos=False)},
  )
  decoded = SeqioTask("lmops_test_task")
  assert sorted(d.text for d in decoded.documents()) == sorted(texts)
  assert list(decoded.documents()) == list(SeqioTask("lmops_test_task").documents())
  plain = SeqioTask("lmops_test_task", split="validation", text_feature="text")
  assert sorted(d.text for d in plain.documents()) == sorted(texts[:3])
  assert plain.fingerprint() != decoded.fingerprint()
  with pytest.raises(ValueError, match="its splits are train, validation"):
    list(SeqioTask("lmops_test_task", split="test").documents())
  with pytest.raises(ValueError, match="name='lmops_no_task'"):
    list(SeqioTask("lmops_no_task").documents())
