import collections
import io
import json
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from lmops_jax.pretrained.sources import open_source
from lmops_jax.pretrained.torch_pickle import map_torch_file

TORCH_DTYPES = [
  "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32",
  "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "complex64",
]


def archive(path, pickled, storages=(), byteorder=b"little", compression=zipfile.ZIP_STORED):
  """A file as `torch.save` lays it out, made without torch."""
  with zipfile.ZipFile(path, "w", compression) as file:
    file.writestr("archive/data.pkl", pickled)
    if byteorder is not None:
      file.writestr("archive/byteorder", byteorder)
    for key, data in dict(storages).items():
      file.writestr(f"archive/data/{key}", data)
  return path


def named(name, offset=0, shape=(2, 3), strides=(3, 1), kind="FloatStorage", key="0", count=6,
          more=b""):
  """Opcodes that put `name` and a tensor on the stack."""

  def number(n):
    return b"I%d\n" % n

  def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"

  return (
    b"V%s\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\n%s\nV%s\nVcpu\n"
    % (name.encode(), kind.encode(), key.encode())
    + number(count) + b"tQ" + number(offset) + numbers(shape) + numbers(strides)
    + b"I00\nccollections\nOrderedDict\n)R" + more + b"tR"
  )


def state_dict(*items):
  return b"\x80\x02(" + b"".join(items) + b"d."


NUMBERS = np.arange(6, dtype=np.float32)


# Files of torch


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch", reason="needs the parity extra")


def random_tensor(torch, name, shape):
  dtype = getattr(torch, name)
  generator = torch.Generator().manual_seed(len(name))
  if dtype == torch.bool:
    return torch.randint(0, 2, shape, generator=generator).bool()
  size = int(np.prod(shape)) * dtype.itemsize
  data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
  return data.view(dtype).reshape(shape)


def bits(array):
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


def torch_bits(torch, tensor):
  return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture(scope="module")
def content(torch):
  base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
  tensors = collections.OrderedDict(
    (name, random_tensor(torch, name, (3, 4))) for name in TORCH_DTYPES
  )
  tensors |= {
    "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "base": base,
    "transposed": base.permute(2, 0, 1), "part": base[1:, ::2, 1:4],
    "expanded": base[0, 0].expand(6, 5),
    "half part": torch.arange(8).to(torch.bfloat16)[3:],
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
  }
  tensors["tied"] = tensors["base"]
  return tensors


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_equal_those_of_torch(tmp_path, torch, content, legacy):
  path = tmp_path / "pytorch_model.bin"
  if legacy:  # torch itself cannot read these dtypes back from it
    later = {"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"}
    content = {name: tensor for name, tensor in content.items() if name not in later}
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  loaded = torch.load(path, weights_only=True)
  with open_source(tmp_path) as source:
    assert source.names() == list(content)
    for name, want in loaded.items():
      got = source.read(name)
      assert got.shape == tuple(want.shape) == source.shape(name)
      assert got.dtype.name == str(want.dtype).removeprefix("torch.")
      assert bits(got) == torch_bits(torch, want.detach())
      if got.size:
        assert type(got.base) is np.memmap and not got.flags.writeable
    assert source.read("transposed").strides == (4, 80, 20)  # views stay views
    assert np.shares_memory(source.read("base"), source.read("part"))
    assert np.shares_memory(source.read("base"), source.read("tied"))


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_of_a_module(tmp_path, torch, legacy):
  module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
  path = tmp_path / "x.pt"
  for saved in (module.state_dict(), {"state_dict": module.state_dict(), "epoch": 3}):
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    got = map_torch_file(path)
    assert got.keys() == module.state_dict().keys()  # num_batches_tracked is an int64 scalar
    for name, want in module.state_dict().items():
      np.testing.assert_array_equal(got[name], want.numpy())


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_is_refused(tmp_path, torch, legacy):
  path = tmp_path / "x.bin"
  torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
  with pytest.raises(ValueError, match=r"asks for torch.nn.modules.linear.Linear, which plain"):
    map_torch_file(path)


@pytest.mark.parity
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_of_torch(tmp_path, torch, legacy):
  path = tmp_path / "x.bin"
  torch.save({"a": torch.ones(100), "b": torch.ones(50)}, path,
             _use_new_zipfile_serialization=not legacy)
  whole = path.read_bytes()
  for size in [*range(1, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"x\.bin .*(fetch the file again|holds no dict)"):
      map_torch_file(path)


@pytest.mark.parity
def test_shards_of_torch(tmp_path, torch):
  parts = {
    "pytorch_model-00001-of-00002.bin": {"a": torch.ones(3)},
    "pytorch_model-00002-of-00002.bin": {"b": torch.arange(4).to(torch.bfloat16)},
  }
  for file, part in parts.items():
    torch.save(part, tmp_path / file)
  index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
  (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  source = open_source(tmp_path)
  assert source.names() == ["a", "b"]
  np.testing.assert_array_equal(source.read("b"), np.arange(4).astype(ml_dtypes.bfloat16))


# Files made by hand: the same layout without torch


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_made_by_hand(tmp_path, compression):
  path = archive(
    tmp_path / "x.bin",
    state_dict(named("a"), named("b", 1, (2,), (3,)), named("c", shape=(3, 2), strides=(1, 3))),
    {"0": NUMBERS.tobytes()}, None, compression,
  )
  got = map_torch_file(path)
  np.testing.assert_array_equal(got["a"], NUMBERS.reshape(2, 3))
  np.testing.assert_array_equal(got["b"], [1, 4])
  np.testing.assert_array_equal(got["c"], NUMBERS.reshape(2, 3).T)


def _declared(path, size, name="archive/data/0"):
  """Gives an entry another size in the directory of the archive and in its own header."""
  content = bytearray(path.read_bytes())
  for magic, at_size, at_name in ((b"PK\x03\x04", 22, 30), (b"PK\x01\x02", 24, 46)):
    at = -1
    while (at := content.find(magic, at + 1)) >= 0:
      if content[at + at_name:].startswith(name.encode()):
        content[at + at_size:at + at_size + 4] = struct.pack("<I", size)
  path.write_bytes(content)


def test_an_archive_that_inflates_to_more_than_it_may_is_refused_unread(tmp_path):
  """The directory says so already; one that lies is read no further than it says."""
  path = archive(tmp_path / "pytorch_model.bin", state_dict(named("a")),
                 {"0": NUMBERS.tobytes()}, compression=zipfile.ZIP_DEFLATED)
  _declared(path, 3_000_000_000, "archive/data.pkl")
  with pytest.raises(ValueError, match=(
      r"model.bin takes 3,000,000,\d+ bytes when it is inflated, its entry archive/data.pkl "
      "alone 3,000,000,000, and pretrained.load.max_inflated_bytes=268,435,456 is all")):
    open_source(tmp_path)
  archive(path, state_dict(named("a")), {"0": NUMBERS.tobytes()})
  with pytest.raises(ValueError, match="pretrained.load.max_inflated_bytes=99 is all that it may"):
    open_source(tmp_path, max_inflated_bytes=99)  # a stored pickle is held in memory as well
  assert open_source(tmp_path, max_inflated_bytes=999).shape("a") == (2, 3)


def test_a_compressed_storage_is_inflated_when_it_is_read_and_only_as_far_as_announced(tmp_path):
  big = np.zeros(1 << 20, np.float32)
  pickled = state_dict(named("a"), named("b", shape=(1 << 20,), strides=(1,), key="1",
                                         count=1 << 20))
  path = archive(tmp_path / "x.bin", pickled, {"0": NUMBERS.tobytes(), "1": big.tobytes()},
                 compression=zipfile.ZIP_DEFLATED)
  source = open_source(path)
  assert source.shape("b") == (1 << 20,) and source.dtype("b") == np.float32
  np.testing.assert_array_equal(source.read("b"), big)
  _declared(path, 24, "archive/data/1")
  with pytest.raises(ValueError, match="storage of its tensor b should have 4194304 bytes and has"):
    open_source(path)
  archive(path, state_dict(named("a")), {"0": big.tobytes()}, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="the storage of its tensor a 24 bytes, but it has 4194304"):
    open_source(path)
  _declared(path, 24)  # inflates to more: what is read is no more, and its checksum is wrong
  with pytest.raises(ValueError, match="x.bin has a damaged entry archive/data/0"):
    open_source(path).read("a")


def test_archives_that_say_two_things(tmp_path):
  path = archive(tmp_path / "x.bin", state_dict(named("a")), {"0": NUMBERS.tobytes()})
  _declared(path, 20)
  with pytest.raises(ValueError, match="gives its entry archive/data/0 two sizes, 24 and 20"):
    map_torch_file(path)
  for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    archive(path, state_dict(named("a")), {"0": NUMBERS.tobytes()}, compression=compression)
    with pytest.raises(ValueError, match="encrypted, or compressed in a way that torch does not"):
      map_torch_file(path)
  with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
    for pickled in (state_dict(named("a")), state_dict(named("b"))):
      file.writestr("m/data.pkl", pickled)
  with pytest.raises(ValueError, match="has two entries m/data.pkl"):
    map_torch_file(path)
  both = state_dict(named("a"), named("b", key="1", shape=(6,), strides=(1,)))
  archive(path, both, {"0": NUMBERS.tobytes(), "1": NUMBERS.tobytes()})
  content = path.read_bytes()
  at = content.index(b"PK\x01\x02", content.index(b"archive/data/1"))
  end = content.rindex(b"archive/data/0")
  size = struct.pack("<II", 60, 60)  # both sizes in the directory
  at = content.rindex(b"PK\x01\x02", 0, end)
  path.write_bytes(content[:at + 20] + size + content[at + 28:])
  with pytest.raises(ValueError, match="the entry data/0 reaches into the one behind it"):
    map_torch_file(path)


def _tuples_in_tuples(depth):
  """A key of a dict that holds the first tuple 2^depth times."""
  doubled = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))
  return b"\x80\x02}()q\x00" + doubled + b"I1\nu."


@pytest.mark.parametrize("pickled", [
  _tuples_in_tuples(60), b"\x80\x02(" + b"N0" * 2_000 + b"d.", b"\x80\x02N" + b"2" * 2_000 + b".",
])
def test_a_pickle_that_would_never_end_is_not_begun(tmp_path, pickled, monkeypatch):
  monkeypatch.setattr("lmops_jax.pretrained.pickle_bounds._MAX_VALUES", 1_000)
  path = archive(tmp_path / "x.bin", pickled)
  with pytest.raises(ValueError, match="x.bin .* asks for more than 1,000 values"):
    map_torch_file(path)
  path.write_bytes(legacy(pickled))
  with pytest.raises(ValueError, match="x.bin .* asks for more than 1,000 values"):
    map_torch_file(path)


def test_a_tensor_is_not_repeated_to_more_than_its_file_holds(tmp_path):
  path = tmp_path / "x.bin"
  for shape, strides in [((1 << 40,), (0,)), ((1 << 40,) * 3, (0,) * 3), ((1,) * 65, (0,) * 65)]:
    archive(path, state_dict(named("a", shape=shape, strides=strides)), {"0": NUMBERS.tobytes()})
    with pytest.raises(ValueError, match="repeats the 24 bytes of its tensor a so often"):
      map_torch_file(path)


@pytest.mark.parametrize("count", [-1, 5, 7, 1 << 62])
def test_an_old_file_whose_counts_do_not_fit(tmp_path, count):
  content = legacy(state_dict(named("a"))).removesuffix(pickle.dumps([], 2))
  path = tmp_path / "x.bin"

  def write(number):
    data = struct.pack("<q", number) + NUMBERS.tobytes()
    path.write_bytes(content + pickle.dumps(["0"], 2) + data + b"\0" * 8)

  write(6)
  np.testing.assert_array_equal(map_torch_file(path)["a"], NUMBERS.reshape(2, 3))
  write(count)
  with pytest.raises(ValueError, match="x.bin .*the storage of its tensor a"):
    map_torch_file(path)


def test_no_torch_is_imported(tmp_path):
  import subprocess
  import sys

  path = archive(tmp_path / "x.bin", state_dict(named("a")), {"0": NUMBERS.tobytes()})
  code = (
    "import sys; from lmops_jax.pretrained.sources import open_source; "
    f"print(open_source({str(path)!r}).read('a').sum()); "
    "assert not {'torch', 'gguf', 'safetensors', 'tensorflow'} & set(sys.modules)"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (result.returncode, result.stdout) == (0, "15.0\n"), result.stderr


# Pickles that ask for more


class Reduced:
  """Pickles as a call."""

  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


def legacy(pickled):
  return b"".join([
    pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2),
    pickle.dumps({"little_endian": True}, 2), pickled, pickle.dumps([], 2),
  ])


def malicious(marker):
  """Calls that would each leave a file, or lead to one."""
  import builtins
  import os
  import runpy
  import subprocess

  script = f"open({str(marker)!r}, 'w')"
  return [
    Reduced(os.system, f"touch {marker}"), Reduced(builtins.eval, script),
    Reduced(builtins.exec, script), Reduced(builtins.open, str(marker), "w"),
    Reduced(builtins.getattr, marker, "touch"), Reduced(builtins.__import__, "os"),
    Reduced(subprocess.Popen, ["touch", str(marker)]), Reduced(runpy.run_path, str(marker)),
    Reduced(pickle.loads, pickle.dumps(Reduced(os.system, f"touch {marker}"))),
  ]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", ["archive", "legacy", "first pickle"])
def test_code_is_refused_by_name_and_never_run(tmp_path, layout, protocol):
  marker, path = tmp_path / "marker", tmp_path / "x.bin"
  for thing in malicious(marker):
    name = thing.function.__name__
    for content in (thing, {"a": thing}, collections.OrderedDict(a=[thing])):
      pickled = pickle.dumps(content, protocol)
      if layout == "archive":
        archive(path, pickled)
      else:
        path.write_bytes(legacy(pickled) if layout == "legacy" else pickled)
      with pytest.raises(ValueError, match=rf"{path} asks for \w+\.{name}, .* nothing was run"):
        open_source(path)
      assert not marker.exists()


@pytest.mark.parametrize("opcodes, name", [
  (b"cos\nsystem\n(Vtouch x\ntR.", "os.system"),
  (b"(ios\nsystem\n.", "os.system"),  # INST
  (b"(cos\nsystem\nVtouch x\no.", "os.system"),  # OBJ
  (b"\x80\x04\x8c\x05torch\x8c\x0bSize.__call\x93.", "torch.Size.__call"),  # STACK_GLOBAL
  (b"ctorch.storage\n_load_from_bytes\n(B\x00\x00\x00\x00tR.", "torch.storage._load_from_bytes"),
  (b"ctorch\nload\n.", "torch.load"),
  (b"ctorch._utils\n_rebuild_qtensor\n.", "torch._utils._rebuild_qtensor"),
  (b"ccollections\nnamedtuple\n.", "collections.namedtuple"),
  (b"ccollections\nOrderedDict.fromkeys\n.", "collections.OrderedDict.fromkeys"),
])
def test_names_beyond_the_list_are_refused(tmp_path, opcodes, name):
  path = archive(tmp_path / "x.bin", opcodes)
  with pytest.raises(ValueError, match=f"asks for {name}, which plain tensors do not need"):
    map_torch_file(path)


def test_a_refused_name_hides_behind_a_good_tensor(tmp_path):
  path = archive(
    tmp_path / "x.bin", state_dict(named("a"), b"Vb\ncos\nsystem\n"), {"0": NUMBERS.tobytes()})
  with pytest.raises(ValueError, match="asks for os.system"):
    map_torch_file(path)


@pytest.mark.parametrize("target", [
  b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n",
  b"ccollections\nOrderedDict\n",
])
@pytest.mark.parametrize("state", [b"}V_make\nNs", b"(N}V_make\nNst", b"(N}Vkeys\nNst"])
def test_a_pickle_cannot_change_what_it_may_call(tmp_path, target, state):
  """BUILD sets attributes: on a shared function they would outlive the file."""
  good = archive(tmp_path / "good.bin", state_dict(named("a")), {"0": NUMBERS.tobytes()})
  path = archive(tmp_path / "x.bin", b"(Va\n" + target + state + b"bd.")
  with pytest.raises(ValueError, match="not a readable file of torch.save|holds no dict"):
    map_torch_file(path)
  assert map_torch_file(good)["a"].shape == (2, 3)


def test_attributes_of_a_dict_do_not_stand_for_its_methods(tmp_path):
  """As torch keeps `_metadata` there."""
  thing = b"ccollections\nOrderedDict\n)R(%su}(Vitems\nI3\nVget\nI4\nub." % named("a")
  path = archive(tmp_path / "x.bin", b"\x80\x02" + thing, {"0": NUMBERS.tobytes()})
  assert map_torch_file(path)["a"].shape == (2, 3)


@pytest.mark.parametrize("pickled, match", [
  (state_dict(named("a", offset=1)), "lets its tensor a reach beyond the end"),
  (state_dict(named("a", shape=(2, 1 << 62), strides=(3, 1 << 62))), "tensor a reach beyond"),
  (state_dict(named("a", strides=(-3, 1))), "without valid offset, shape and strides"),
  (state_dict(named("a", offset=-1)), "without valid offset, shape and strides"),
  (state_dict(named("a", shape=(2,))), "without valid offset, shape and strides"),
  (state_dict(named("a", count=7)), "truncated: the storage of its tensor a should have 28 bytes"),
  (state_dict(named("a", count=-1)), "storage 0 without valid size"),
  (state_dict(named("a", key="1")), "no entry data/1"),
  (state_dict(named("a", key="../data.pkl")), r"no entry data/\.\./data.pkl"),
  (state_dict(named("a", more=b"}Vneg\nI01\ns")), "flags .'neg'"),
  (state_dict(named("a", kind="QInt8Storage")), "asks for torch.QInt8Storage"),
  (b"(dVa\nI1\ns.", "holds no dict from names to tensors"),
  (b"(lI1\na.", "holds no dict from names to tensors"),
  (b"(dI7\nI1\ns.", "holds no dict from names to tensors"),
  (b"(d", "not a readable file of torch.save"),
  (b"}r\xff\xff\xff\x7f.", "LONG_BINPUT, or its argument"),  # would take 32 GB
  (b"}p4294967295\n.", "PUT, or its argument"),
  (b"\x82\x01.", "the opcode EXT1"),
  (b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x00.", "the opcode BYTEARRAY8"),
  (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "not a readable file"),
  (b"", "not a readable file of torch.save"),
  (b"}q\x00Vmodel\nh\x00sVstate_dict\nh\x00s.", "holds no dict"),  # inside itself
])
def test_damaged_archives(tmp_path, pickled, match):
  path = archive(tmp_path / "x.bin", pickled, {"0": NUMBERS.tobytes()})
  with pytest.raises(ValueError, match=match) as caught:
    map_torch_file(path)
  assert str(path) in str(caught.value)


def test_big_endian_files_are_refused(tmp_path):
  path = archive(tmp_path / "x.bin", state_dict(named("a")), {"0": NUMBERS.tobytes()}, b"big")
  with pytest.raises(ValueError, match="x.bin was written on a big-endian machine"):
    map_torch_file(path)
  old = legacy(b"}.").replace(pickle.dumps({"little_endian": True}, 2),
                              pickle.dumps({"little_endian": False}, 2))
  path.write_bytes(old)
  with pytest.raises(ValueError, match="x.bin was written on a big-endian machine"):
    map_torch_file(path)


def test_other_files(tmp_path):
  path = tmp_path / "x.bin"
  path.write_bytes(b"\x00" * 50)
  with pytest.raises(ValueError, match="is not a file of torch.save .*fetch the file again"):
    map_torch_file(path)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("word/document.xml", "x")
  with pytest.raises(ValueError, match="zip archive without the one data.pkl"):
    map_torch_file(path)


def test_flipped_bytes_never_run_anything_and_always_end_in_a_sentence(tmp_path):
  """A coarse fuzz of the pickle: what comes is a tensor or a ValueError."""
  pickled = state_dict(named("a"), named("b", 1, (2,), (3,)))
  assert list(pickletools.genops(pickled))
  generator = np.random.default_rng(0)
  path = tmp_path / "x.bin"
  for _ in range(400):
    damaged = bytearray(pickled)
    for i in generator.integers(2, len(pickled), 3):
      damaged[i] = generator.integers(0, 128)
    archive(path, bytes(damaged), {"0": NUMBERS.tobytes()})
    try:
      for tensor in map_torch_file(path).values():
        assert tensor.dtype.itemsize * tensor.size < 1 << 20 or 0 in tensor.strides
    except ValueError as error:
      assert str(path) in str(error)


def test_a_local_header_that_lies(tmp_path):
  path = archive(tmp_path / "x.bin", state_dict(named("a")), {"0": NUMBERS.tobytes()})
  content = path.read_bytes()
  at = content.index(b"PK\x03\x04", content.index(b"archive/byteorder"))
  path.write_bytes(content[:at + 28] + struct.pack("<H", 60_000) + content[at + 30:])
  with pytest.raises(ValueError, match="truncated: the storage of its tensor a should have 24"):
    map_torch_file(path)


def test_archives_written_as_streams(tmp_path):
  """The local headers of such an archive hold no sizes; its directory does."""

  class Stream(io.RawIOBase):
    def __init__(self, file):
      self.file = file

    def writable(self):
      return True

    def write(self, data):
      return self.file.write(data)

  path = tmp_path / "x.bin"
  with path.open("wb") as file, zipfile.ZipFile(Stream(file), "w") as out:
    out.writestr("m/data.pkl", state_dict(named("a")))
    out.writestr("m/data/0", NUMBERS.tobytes())
  np.testing.assert_array_equal(map_torch_file(path)["a"], NUMBERS.reshape(2, 3))
