"""The file that Kosmos-2's authors published, of fairseq: a fake one, with its settings beside."""

import argparse
import json
import os
import re
import sys
import types

import jax
import numpy as np
import pytest

from lmops_jax import cli
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained import sources
from lmops_jax.pretrained.torch_pickle import map_torch_file
from tests import model_folders
from tests.pretrained.test_torch_pickle import archive

# From the published names to fairseq's, as the notes on the file have them.
_THEIRS = (
  ("text_model.lm_head", "gpt_model.decoder.output_projection"),
  ("text_model.model", "gpt_model.decoder"),
  ("image_to_text_projection", "img_connector"),
  ("vision_model.model.embeddings.class_embedding", "img_model.visual.class_embedding"),
  ("vision_model.model.embeddings.position_embedding.weight",
   "img_model.visual.positional_embedding"),
  ("vision_model.model.embeddings.patch_embedding", "img_model.visual.conv1"),
  ("vision_model.model.pre_layrnorm", "img_model.visual.ln_pre"),
  ("vision_model.model.post_layernorm", "img_model.visual.ln_post"),
)


def _original_name(name):
  for published, original in _THEIRS:
    if name.startswith(published):
      return original + name.removeprefix(published)
  layer = re.fullmatch(r"vision_model\.model\.encoder\.layers\.(\d+)\.(.*)", name)
  rest = layer[2].replace("self_attn", "ts_attn").replace("layer_norm", "ln_")
  rest = rest.replace("fc1", "c_fc").replace("fc2", "c_proj")
  return f"img_model.visual.transformer.resblocks.{layer[1]}.{rest}"


class _Made:
  """Tells whether anything of the file's libraries was made, called or filled."""

  touched = []

  def __init__(self, *args):
    self.touched.append("made")

  def __setstate__(self, state):
    self.touched.append("filled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return model_folders.write_docked(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def tensors(folder):
  """The tensors of the folder under fairseq's names, with what its file has besides."""
  with sources.open_source(folder) as source:
    found = {_original_name(name): np.array(source.read(name)) for name in source.names()}
  embedding = found["gpt_model.decoder.embed_tokens.weight"]
  return found | {
    "gpt_model.decoder.output_projection.weight": embedding,
    "gpt_model.decoder.embed_positions._float_tensor": np.zeros(1, np.float32),
    "gpt_model.decoder.self_attn_sope.scale": np.zeros(8, np.float32)}


def _pickle(content):
  """The opcodes of nested dicts, texts, arrays (as tensors) and raw opcodes; and the storages."""
  storages = {}

  def write(value):
    if isinstance(value, bytes):
      return value
    if isinstance(value, str):
      return b"V%s\n" % value.encode()
    if isinstance(value, dict):
      return b"(" + b"".join(write(k) + write(v) for k, v in value.items()) + b"d"
    key, strides = str(len(storages)), [s // value.itemsize for s in value.strides]
    storages[key] = value.tobytes()

    def numbers(row):
      return b"(" + b"".join(b"I%d\n" % n for n in row) + b"t"

    return (
      b"ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV%s\nVcpu\nI%d\ntQI0\n"
      % (key.encode(), value.size) + numbers(value.shape) + numbers(strides)
      + b"I00\nccollections\nOrderedDict\n)RtR")

  return b"\x80\x02" + write(content) + b".", storages


def _settings(name, state=b"}(VWORD\nV1\nu"):
  """An object of a class, made and filled as pickle writes one."""
  module, _, kind = name.rpartition(".")
  return b"c%s\n%s\n)\x81" % (module.encode(), kind.encode()) + state + b"b"


def _write(path, tensors, **beside):
  content = {
    "args": b"N", "cfg": _settings("omegaconf.dictconfig.DictConfig"), "model": tensors,
    "criterion": b"N", "task_state": _settings("fairseq.data.Dictionary"), **beside}
  return archive(path, *_pickle(content))


def _calls(tmp_path):
  """Opcodes of what a file could ask for that would leave a trace: calls, items, attributes."""
  return {
    "system": b"cposix\nsystem\n(Vtouch %s/trace\ntR" % str(tmp_path).encode(),
    "made": b"cfairseq.fake\nMade\n(Vx\ntR",
    "filled": _settings("fairseq.fake.Made"),
    "listed": b"cfairseq.fake\nMade\n)R(Vx\nVy\ne",
    "items": b"ccollections\ndefaultdict\n(cbuiltins\nlist\ntR(Vx\nVy\nu",
    "nested": b"cfairseq.fake\nMade\n(c__builtin__\ngetattr\n(cfairseq.fake\nMade\nVtouched\ntRtR",
    "space": _settings("argparse.Namespace"),
  }


@pytest.fixture
def fairseq(monkeypatch):
  """Modules of the names that the file uses, which tell if they are touched."""
  for name in ("fairseq", "fairseq.fake", "fairseq.data", "omegaconf", "omegaconf.dictconfig"):
    module = types.ModuleType(name)
    module.Made = module.Dictionary = module.DictConfig = _Made
    monkeypatch.setitem(sys.modules, name, module)
  monkeypatch.setattr(argparse, "Namespace", _Made)
  _Made.touched.clear()
  return _Made.touched


def test_a_file_of_fairseq_is_the_published_model_and_runs_nothing(
  folder, tensors, fairseq, tmp_path
):
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  path = _write(tmp_path / "kosmos-2.pt", tensors, **_calls(tmp_path))
  with pytest.raises(ValueError, match=(
      r"asks for omegaconf.dictconfig.DictConfig, .* nothing was run; .*inert_objects")):
    model_lib.load(str(path))
  found = model_lib.load(str(path), inert_objects=True)
  want = model_lib.load(str(folder))
  assert found.config == want.config
  jax.tree.map(np.testing.assert_array_equal, found.params(), want.params())
  assert found.tokenizer().encode("a dog") == want.tokenizer().encode("a dog")
  assert not fairseq and not os.path.exists(tmp_path / "trace")


def test_a_file_is_converted_and_exported(folder, tensors, tmp_path, capsys):
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  path = _write(tmp_path / "kosmos-2.pt", tensors)
  want = model_lib.load(str(folder))
  for command, option in (("convert", "--model"), ("export", "--checkpoint")):
    to = tmp_path / command
    assert cli.main([command, option, str(path), "--to", str(to), "--inert-objects"]) == 0
    assert capsys.readouterr().out.startswith("kosmos-2, ")
    found = model_lib.load(str(to))
    jax.tree.map(np.testing.assert_array_equal, found.params(), want.params())
    assert found.tokenizer().encode("a dog") == want.tokenizer().encode("a dog")
  with sources.open_source(tmp_path / "export") as got, sources.open_source(folder) as published:
    assert set(got.names()) == set(published.names())


@pytest.mark.parametrize("change, message", [
  ({"img_model.visual.proj": np.zeros((2, 2), np.float32)},
   r"no place for its img_model.visual.proj \[2, 2\]"),
  ({"gpt_model.decoder.version": np.zeros(1, np.float32)}, "for its gpt_model.decoder.version"),
  ({"img_connector.latent_query": None}, "it lacks image_to_text_projection.latent_query"),
  ({"text_model.model.layer_norm.bias": np.zeros(16, np.float32)},
   "holds both gpt_model.decoder.layer_norm.bias and text_model.model.layer_norm.bias"),
])
def test_unknown_and_missing_names_are_refused(folder, tensors, tmp_path, change, message):
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  own = {name: value for name, value in (tensors | change).items() if value is not None}
  path = _write(tmp_path / "kosmos-2.pt", own)
  with pytest.raises(ValueError, match=message):
    model_lib.load(str(path), inert_objects=True).params()


def test_without_config_the_file_is_taken_for_the_published_sizes(tensors, tmp_path):
  path = _write(tmp_path / "kosmos-2.pt", tensors)
  with pytest.raises(ValueError, match=r"text_config.layers=24, but .*kosmos-2.pt holds 2 layers"):
    model_lib.load(str(path), inert_objects=True)
  other = archive(tmp_path / "other.pt", *_pickle({"a": np.zeros(3, np.float32)}))
  with pytest.raises(ValueError, match="config.json cannot be read"):
    model_lib.load(str(other))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "kosmos-2"}))
  with pytest.raises(ValueError, match="text_config.layers=24"):
    model_lib.load(str(path), inert_objects=True)


@pytest.mark.parametrize("opcodes", [
  b"cfairseq\nX\n}(VWORD\nV1\nub",  # a state for the class itself
  b"cfairseq\nX\n(Vx\nVy\nu", b"cfairseq\nX\n(Vx\nVy\ne", b"cfairseq\nX\n(Vx\n\x90",
  b"ctorch._utils\n_rebuild_tensor_v2\n}(VWORD\nV1\nub",
  b"(Vstorage\ncfairseq\nX\nV0\nVcpu\nI6\ntQ",
])
def test_what_inert_objects_cannot_take_is_refused(tensors, tmp_path, opcodes):
  path = _write(tmp_path / "x.pt", tensors, beside=opcodes)
  with pytest.raises(ValueError, match="x.pt is not a readable file of torch.save"):
    map_torch_file(path, inert_objects=True)
  again = _write(tmp_path / "y.pt", tensors)
  assert map_torch_file(again, inert_objects=True).keys() == tensors.keys()


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_torch_with_namespaces(tmp_path, legacy):
  torch = pytest.importorskip("torch", reason="needs the parity extra")
  content = {
    "args": argparse.Namespace(arch="kosmos", lr=[1e-3]), "model": {"a": torch.arange(3.0)},
    "extra_state": {"train_iterator": {"epoch": 1}}}
  torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
  with pytest.raises(ValueError, match="asks for argparse.Namespace"):
    map_torch_file(tmp_path / "x.pt")
  found = map_torch_file(tmp_path / "x.pt", inert_objects=True)
  assert list(found) == ["a"]
  np.testing.assert_array_equal(found["a"], [0, 1, 2])
