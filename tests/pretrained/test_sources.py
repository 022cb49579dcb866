import json
import os
import resource
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest

from lmops_jax.pretrained.sources import open_source, write_safetensors

DTYPES = [
  "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
  "float8_e5m2fnuz", "float8_e8m0fnu", "int64", "int32", "int16", "int8", "uint64", "uint32",
  "uint16", "uint8", "bool", "complex64",
]


def dtype_of(name):
  return np.dtype(getattr(ml_dtypes, name, name))


def random_bits(dtype, shape, seed=0):
  """Every bit pattern may come, NaNs and infinities too."""
  dtype = dtype_of(dtype)
  size = int(np.prod(shape)) * dtype.itemsize
  high = 2 if dtype.kind == "b" else 256
  data = np.random.default_rng(seed).integers(0, high, size, np.uint8)
  return data.view(dtype).reshape(shape)


def bits(array):
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


def planned(arrays):
  return [(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]


def mapped(array):
  """Whether an array is a view of a mapped file."""
  while array is not None and not isinstance(array, np.memmap):
    array = getattr(array, "base", None)
  return array is not None


@pytest.fixture(scope="module")
def arrays():
  shapes = [(3, 5), (), (7,), (0, 4), (2, 3, 2)]
  return {
    f"{dtype}.{i}": random_bits(dtype, shape, i)
    for dtype in DTYPES for i, shape in enumerate(shapes)
  }


def raw_file(path, header, data=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)
  return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# Safetensors: both ways


def test_every_dtype_survives_bit_for_bit(tmp_path, arrays):
  path = tmp_path / "model.safetensors"
  assert write_safetensors(path, planned(arrays)) == [path]
  with open_source(path) as source:
    assert sorted(source.names()) == sorted(arrays) and source.where == str(path)
    for name, array in arrays.items():
      got = source.read(name)
      assert (source.shape(name), source.dtype(name)) == (array.shape, array.dtype)
      assert (got.shape, got.dtype) == (array.shape, array.dtype) and bits(got) == bits(array)
      assert got.flags.aligned and not got.flags.writeable
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tensors_are_views_of_the_mapped_file(tmp_path):
  path = tmp_path / "model.safetensors"
  array = np.arange(12, dtype=np.float32).reshape(3, 4)
  write_safetensors(path, planned({"a": array}))
  with open_source(path) as source:
    got = source.read("a")
    assert type(got.base) is np.memmap and mapped(got[1:, 2])
    with path.open("r+b") as file:  # nothing was copied: a later change of the file is seen
      file.seek(-4, 2)
      file.write(np.float32(99).tobytes())
    assert got[2, 3] == 99
  np.testing.assert_array_equal(got[0], array[0])  # a view outlives its source
  with pytest.raises(ValueError, match="was closed; open it again"):
    source.read("a")


def test_unaligned_tensors_can_be_used(tmp_path):
  want = random_bits("bfloat16", (5,))
  data = b"\x07" + bits(want)
  header = {"byte": entry("U8", (1,), (0, 1)), "odd": entry("BF16", (5,), (1, 11))}
  got = open_source(raw_file(tmp_path / "x.safetensors", header, data)).read("odd")
  np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


def test_the_safetensors_package_reads_what_is_written_and_writes_what_is_read(tmp_path, arrays):
  numpy_io = pytest.importorskip("safetensors.numpy", reason="needs the parity extra")
  known = {
    name: a for name, a in arrays.items() if "float8" not in name and "bfloat16" not in name
  }
  write_safetensors(tmp_path / "ours.safetensors", planned(known), {"format": "pt", "more": "ü"})
  got = numpy_io.load_file(tmp_path / "ours.safetensors")
  assert got.keys() == known.keys() and all(bits(got[n]) == bits(known[n]) for n in known)
  numpy_io.save_file(known, tmp_path / "theirs.safetensors")
  source = open_source(tmp_path / "theirs.safetensors")
  assert all(bits(source.read(n)) == bits(known[n]) for n in known)


@pytest.mark.parity
def test_torch_reads_bfloat16_and_float8(tmp_path, arrays):
  torch = pytest.importorskip("torch", reason="needs the parity extra")
  from safetensors.torch import load_file, save_file

  known = {name: a for name, a in arrays.items() if "float" in name and 0 not in a.shape}
  write_safetensors(tmp_path / "ours.safetensors", planned(known))
  loaded = load_file(tmp_path / "ours.safetensors")
  for name, array in known.items():
    assert str(loaded[name].dtype) == f"torch.{array.dtype.name}"
    assert bits(loaded[name].reshape(-1).view(torch.uint8).numpy()) == bits(array)
  save_file(loaded, tmp_path / "theirs.safetensors")
  source = open_source(tmp_path / "theirs.safetensors")
  assert all(bits(source.read(n)) == bits(a) for n, a in known.items())


# Shards


@pytest.fixture
def sharded(tmp_path):
  arrays = {f"layer.{i}": random_bits("bfloat16", (4, 8), i) for i in range(5)}
  paths = write_safetensors(tmp_path / "model.safetensors", planned(arrays), max_shard_bytes=130)
  assert [p.name for p in paths] == [
    *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json",
  ]
  return tmp_path, arrays


def test_shards_are_read_through_their_index(sharded):
  folder, arrays = sharded
  with open_source(folder) as source:
    assert source.names() == list(arrays)
    assert all(bits(source.read(n)) == bits(a) for n, a in arrays.items())
    assert mapped(source.read("layer.4"))
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  assert index["metadata"] == {"total_parameters": 160, "total_size": 320}
  assert index["weight_map"]["layer.2"] == "model-00002-of-00003.safetensors"


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
  arrays = {name: np.zeros(n, np.uint8) for name, n in [("a", 3), ("b", 50), ("c", 4), ("d", 6)]}
  paths = write_safetensors(tmp_path / "m.safetensors", planned(arrays), max_shard_bytes=10)
  assert [open_source(p).names() for p in paths[:-1]] == [["a"], ["b"], ["c", "d"]]


@pytest.mark.parity
@pytest.mark.parametrize("max_shard_bytes", [None, 5_000])
def test_transformers_loads_the_folder(tmp_path, max_shard_bytes):
  torch = pytest.importorskip("torch", reason="needs the parity extra")
  transformers = pytest.importorskip("transformers", reason="needs the parity extra")
  config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, dtype="bfloat16",
  )
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
  config.save_pretrained(tmp_path)
  arrays = {
    name: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    for name, t in model.state_dict().items()
  }
  write_safetensors(
    tmp_path / "model.safetensors", planned(arrays), max_shard_bytes=max_shard_bytes)
  assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes is None)
  loaded, info = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True)
  assert not any(info.values()), info
  for name, tensor in loaded.state_dict().items():
    assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, model.state_dict()[name])


def rewrite_index(folder, change):
  index = folder / "model.safetensors.index.json"
  content = json.loads(index.read_text())
  change(content["weight_map"])
  index.write_text(json.dumps(content))


def test_an_index_names_an_absent_file(sharded):
  folder, _ = sharded
  (folder / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match="layer.2 and others in model-00002.* no such file"):
    open_source(folder)


def test_an_index_names_an_absent_tensor(sharded):
  folder, _ = sharded
  rewrite_index(folder, lambda m: m.update(ghost="model-00001-of-00003.safetensors"))
  with pytest.raises(ValueError, match="the tensor ghost in model-00001.* it is in no file"):
    open_source(folder)


def test_an_index_places_a_tensor_in_another_file(sharded):
  folder, _ = sharded
  rewrite_index(folder, lambda m: m.update({"layer.0": m["layer.4"]}))
  with pytest.raises(ValueError, match="layer.0 in model-00003.* it is in model-00001"):
    open_source(folder)


def test_a_tensor_lies_in_two_shards(sharded):
  folder, arrays = sharded
  second = folder / "model-00002-of-00003.safetensors"
  second.unlink()
  two = {name: arrays[name] for name in ("layer.1", "layer.2", "layer.3")}
  write_safetensors(folder / "new.safetensors", planned(two))
  (folder / "new.safetensors").rename(second)
  with pytest.raises(ValueError, match="layer.1 twice, in model-00001.* and in model-00002"):
    open_source(folder)


def test_a_truncated_shard_is_named(sharded):
  folder, _ = sharded
  shard = folder / "model-00003-of-00003.safetensors"
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(ValueError, match="model-00003.* is truncated: its tensor layer.4 ends at"):
    open_source(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "",
                                  "a\0.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(sharded, file):
  folder, _ = sharded
  rewrite_index(folder, lambda m: m.update({"layer.0": file}))
  with pytest.raises(ValueError, match="layer.0 in .*, outside of its folder"):
    open_source(folder)


@pytest.mark.parametrize("text, match", [
  ("", "is not valid JSON"), ("[]", r"holds \[\] and should hold an object"),
  ("{}", "has no field 'weight_map', which should be an object"),
  ('{"weight_map": {}}', "places no tensor in any file"),
  ('{"weight_map": {"a": 1}}', "weight_map: a=1 should be a text"),
  ('{"weight_map": 5}', "weight_map=5 should be an object"),
  ('{"weight_map": ' + "[" * 100_000, "is JSON nested too deeply"),
])
def test_an_unreadable_index(tmp_path, text, match):
  (tmp_path / "model.safetensors.index.json").write_text(text)
  with pytest.raises(ValueError, match=f"model.safetensors.index.json:? {match}"):
    open_source(tmp_path)


def test_special_files_are_refused_before_they_are_opened(tmp_path):
  for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.gguf"):
    folder = tmp_path / name.replace(".", "_")
    folder.mkdir()
    os.mkfifo(folder / name)
    path = folder / name if name == "x.gguf" else folder
    with pytest.raises(ValueError, match=f"{name} is a FIFO, not a regular file"):
      open_source(path)
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
  (tmp_path / "b.safetensors").symlink_to("/dev/zero")
  with pytest.raises(ValueError, match="b.safetensors is a device, not a regular file"):
    open_source(tmp_path)
  (tmp_path / "b.safetensors").unlink()
  (tmp_path / "b.safetensors").mkdir()
  with pytest.raises(ValueError, match="b.safetensors is a folder, where a file should be"):
    open_source(tmp_path)


# Bad files


@pytest.mark.parametrize("header, data, match", [
  ({"a": entry()}, b"\0" * 7, "is truncated: its tensor a ends at byte"),
  ({"a": entry(offsets=(0, 4))}, b"\0" * 4, r"a 4 bytes, but float32 \[2\] takes 8"),
  ({"a": entry("F4")}, b"\0" * 8, "stores the tensor a as F4, which is not one of F64"),
  ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "a and b on the same bytes"),
  ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "4 bytes before its tensor a that belong to no"),
  ({"a": entry()}, b"\0" * 10, "2 bytes after its last tensor"),
  ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "tensor a with 1 dimensions from byte 8 to 0"),
  ({"a": entry(shape=(1,) * 65)}, b"\0" * 8, "tensor a with 65 dimensions"),
  ({"a": entry(shape=(-2,))}, b"\0" * 8, r"tensor a: shape\[0\]=-2 should be a whole number of a"),
  ({"a": entry(shape=(True, 2))}, b"\0" * 8, r"tensor a: shape\[0\]=true should be a whole"),
  ({"a": entry(dtype=["F32"])}, b"\0" * 8, r'tensor a: dtype=\["F32"\] should be a text'),
  ({"a": entry(offsets=(0, 8, 8))}, b"\0" * 8, r"data_offsets=\[0, 8, 8\] should be a list of 2"),
  ({"a": {"dtype": "F32"}}, b"", "tensor a has no field 'shape', which should be a list"),
  ({"a": 3}, b"", "its tensor a holds 3 and should hold an object"),
  ({"a": entry(shape=(0, 1 << 70), offsets=(0, 0))}, b"", "which no array can have"),
  ([], b"", r"its header holds \[\] and should hold an object"),
  (b"{", b"", "its header is not valid JSON"),
  (b"\xff", b"", "its header is not UTF-8"),
  (b"[" * 100_000, b"", "its header is JSON nested too deeply"),
  (b'{"a": 1, "a": 2}', b"", "has a twice in its header"),
])
def test_damaged_safetensors(tmp_path, header, data, match):
  with pytest.raises(ValueError, match=match) as caught:
    open_source(raw_file(tmp_path / "x.safetensors", header, data))
  assert str(tmp_path / "x.safetensors") in str(caught.value)


@pytest.mark.parametrize("content, match", [
  (b"", "is empty"),
  (b"short", "is not a safetensors file"),
  (b"<!DOCTYPE html>" * 10, "is not a safetensors file"),
  (struct.pack("<Q", 50) + b"{}", "is truncated: its header ends at byte 58, the file at 10"),
  (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"),
])
def test_no_safetensors(tmp_path, content, match):
  path = tmp_path / "x.safetensors"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=match):
    open_source(path)


def test_nothing_there(tmp_path):
  with pytest.raises(ValueError, match="should hold one of model.safetensors.*but it has none"):
    open_source(tmp_path)
  (tmp_path / "x.gguf").write_bytes(b"GGUF")
  with pytest.raises(ValueError, match="it holds x.gguf, of which one can be named"):
    open_source(tmp_path)
  with pytest.raises(ValueError, match="absent.safetensors cannot be read .No such file"):
    open_source(tmp_path / "absent.safetensors")
  with pytest.raises(ValueError, match="neither a folder nor a file that ends in"):
    open_source(tmp_path / "model.h5")
  path = tmp_path / "a.safetensors"
  write_safetensors(path, planned({"here": np.zeros(2)}))
  with pytest.raises(ValueError, match="holds no tensor gone; its 1 tensors are here"):
    open_source(path).read("gone")


# Writing that fails


def test_what_is_there_is_not_overwritten(tmp_path):
  one = planned({"a": np.zeros(3), "b": np.zeros(3)})
  (tmp_path / "model.safetensors").mkdir()
  with pytest.raises(ValueError, match="model.safetensors exists already; choose another"):
    write_safetensors(tmp_path / "model.safetensors", one)
  write_safetensors(tmp_path / "b.safetensors", one, max_shard_bytes=8)
  before = sorted(tmp_path.iterdir())
  for limit in (None, 8, 48):  # one file beside old shards would mix with them
    with pytest.raises(ValueError, match="b.* exists already"):
      write_safetensors(tmp_path / "b.safetensors", one, max_shard_bytes=limit)
  with pytest.raises(ValueError, match="absent is not a folder; make it first"):
    write_safetensors(tmp_path / "absent" / "x.safetensors", one)
  assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_noticed_before_writing(tmp_path):
  huge = [("a", (1 << 60,), np.float32, lambda: pytest.fail("was asked for"))]
  with pytest.raises(ValueError, match="needs .* bytes, but only .* are free there"):
    write_safetensors(tmp_path / "x.safetensors", huge)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [None, 1000])
def test_a_failed_write_leaves_nothing(tmp_path, max_shard_bytes):
  arrays = planned({"a": np.zeros(100), "b": np.zeros(100_000)})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as if the disk were full
  try:
    with pytest.raises(ValueError, match="cannot be written .*nothing was left"):
      write_safetensors(tmp_path / "x.safetensors", arrays, max_shard_bytes=max_shard_bytes)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [None, 1])
def test_a_failing_tensor_leaves_nothing(tmp_path, max_shard_bytes):
  def fail():
    raise KeyboardInterrupt

  tensors = [*planned({"a": np.zeros(3)}), ("b", (3,), np.float32, fail)]
  with pytest.raises(KeyboardInterrupt):
    write_safetensors(tmp_path / "x.safetensors", tensors, max_shard_bytes=max_shard_bytes)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor, match", [
  (("a", (2,), np.float32, lambda: np.zeros(3, np.float32)), r"float32 \[2\], but is float32 \[3"),
  (("a", (2,), np.float32, lambda: np.zeros(2)), r"float32 \[2\], but is float64 \[2\]"),
  (("a", (2,), "S3", lambda: np.zeros(2)), "a has dtype S3, which safetensors does not store"),
  (("ok", (2,), "f4", lambda: np.zeros(2)), "Two tensors are named ok"),
])
def test_wrong_tensors_are_not_written(tmp_path, tensor, match):
  with pytest.raises(ValueError, match=match):
    write_safetensors(
      tmp_path / "x.safetensors", [*planned({"ok": np.zeros(1)}), tensor], max_shard_bytes=1)
  assert not list(tmp_path.iterdir())


def test_tensors_are_made_one_at_a_time(tmp_path):
  """An array is let go before the next one is made, and `make` may give any memory order."""
  made = []

  def make(i):
    assert all(before() is None for before in made)
    array = np.full((4, 6), i, np.float32)
    made.append(weakref.ref(array))
    return array.T

  tensors = [(f"t{i}", (6, 4), np.float32, lambda i=i: make(i)) for i in range(4)]
  write_safetensors(tmp_path / "x.safetensors", tensors)
  source = open_source(tmp_path / "x.safetensors")
  assert [source.read(f"t{i}").mean() for i in range(4)] == [0, 1, 2, 3]
