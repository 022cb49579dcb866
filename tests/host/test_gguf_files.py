import struct

import gguf
import ml_dtypes
import numpy as np
import pytest

from lmops_jax.pretrained.sources import GGUFSource, open_source

Kind = gguf.GGMLQuantizationType

QUANTIZED = [
  "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
]
METADATA = {
  "name": "ein Modell", "count": 7, "ratio": 0.5, "flag": True, "off": False, "negative": -3,
  "tokens": ["a", "Ġb", "", "漢字"], "scores": [0.5, -1.0], "types": [1, 3, 6],
  "flags": [True, False],
}


def blocks(kind, shape, seed=0):
  """Bytes of a tensor: any bits, but each float16 and float32 in them finite and moderate."""
  block_size, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
  count = int(np.prod(shape)) // block_size
  data = np.random.default_rng(seed).integers(0, 256, (count, block_bytes), np.uint8)
  if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
              "IQ4_NL"):
    data[:, 1::2] &= 0xBF  # clears the highest exponent bit where a scale's high byte may lie
  return data.reshape(*shape[:-1], shape[-1] // block_size * block_bytes)


@pytest.fixture(scope="module")
def tensors():
  generator = np.random.default_rng(0)
  plain = {
    "f32": generator.normal(size=(3, 5)).astype(np.float32),
    "f16": generator.normal(size=(2, 3, 4)).astype(np.float16),
    "vector": np.arange(7, dtype=np.float32),
    "i32": np.arange(6, dtype=np.int32).reshape(2, 3),
    "f64": generator.normal(size=(2, 2)),
  }
  return plain


@pytest.fixture(scope="module")
def path(tmp_path_factory, tensors):
  path = tmp_path_factory.mktemp("gguf") / "model.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_string("name", METADATA["name"])
  writer.add_uint32("count", 7)
  writer.add_float32("ratio", 0.5)
  writer.add_bool("flag", True)
  writer.add_bool("off", False)
  writer.add_int16("negative", -3)
  for key in ("tokens", "scores", "types", "flags"):
    writer.add_array(key, METADATA[key])
  for name, array in tensors.items():
    writer.add_tensor(name, array)
  bf16 = np.arange(8, dtype=np.float32).reshape(2, 4).astype(ml_dtypes.bfloat16)
  writer.add_tensor("bf16", bf16.view(np.uint8), raw_dtype=Kind.BF16)
  for kind in QUANTIZED:
    writer.add_tensor(kind, blocks(kind, (3, 512)), raw_dtype=Kind[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_metadata_is_plain_python(path):
  with open_source(path) as source:
    assert isinstance(source, GGUFSource)
    assert source.metadata == {"general.architecture": "llama", **METADATA}
    assert [type(source.metadata[k]) for k in ("count", "ratio", "flag")] == [int, float, bool]
    assert [type(v) for v in source.metadata["flags"]] == [bool, bool]


def test_plain_tensors_are_views(path, tensors):
  source = open_source(path)
  for name, want in tensors.items():
    got = source.read(name)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype == source.dtype(name) and source.shape(name) == want.shape
    assert type(got.base) is np.memmap and not got.flags.writeable
  bf16 = source.read("bf16")
  assert bf16.dtype == ml_dtypes.bfloat16 and type(bf16.base) is np.memmap
  np.testing.assert_array_equal(bf16.astype(np.float32), np.arange(8).reshape(2, 4))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantised_tensors_equal_those_of_the_package(path, kind):
  source = open_source(path)
  want = gguf.dequantize(blocks(kind, (3, 512)), Kind[kind])
  assert np.isfinite(want).any() and want.std() > 0
  got = source.read(kind)
  assert got.dtype == source.dtype(kind) == np.float32 and got.shape == source.shape(kind)
  np.testing.assert_array_equal(got, want.reshape(3, 512))


def test_the_packages_own_reader_sees_the_same(path):
  reader, source = gguf.GGUFReader(path), open_source(path)
  assert [t.name for t in reader.tensors] == source.names()
  for tensor in reader.tensors:
    assert source.shape(tensor.name) == tuple(reversed(tensor.shape.tolist()))
  for key, field in reader.fields.items():
    if not key.startswith("GGUF."):
      assert field.contents() == source.metadata[key]


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_numbers_are_near_the_original(tmp_path, quantization):
  """Independent of the dequantisers: rounding to 8 bits, or 4, of the largest in 32."""
  want = np.random.default_rng(1).normal(size=(40, 4096)).astype(np.float32)
  write(tmp_path / "x.gguf", {"w": (gguf.quantize(want, Kind[quantization]), Kind[quantization])})
  got = open_source(tmp_path / "x.gguf").read("w")
  largest = np.abs(want).reshape(40, -1, 32).max(-1).repeat(32, -1)
  step = {"Q8_0": 1 / 127, "Q4_0": 1 / 8, "Q4_1": 2 / 15}[quantization]
  assert np.all(np.abs(got - want) <= 1.02 * step * largest)


def write(path, tensors, **keys):
  writer = gguf.GGUFWriter(path, "llama")
  for key, value in keys.items():
    writer.add_uint32(key.replace("__", "."), value)
  for name, (data, kind) in tensors.items():
    writer.add_tensor(name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_alignment_of_the_file_is_kept_to(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
  writer.add_custom_alignment(256)
  writer.add_tensor("a", np.arange(3, dtype=np.float32))
  writer.add_tensor("b", np.arange(5, dtype=np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  source = open_source(tmp_path / "x.gguf")
  assert source.metadata["general.alignment"] == 256
  np.testing.assert_array_equal(source.read("b"), np.arange(5))


# Bad files, written field by field


def text(value):
  value = value if isinstance(value, bytes) else value.encode()
  return struct.pack("<Q", len(value)) + value


def tensor(name="w", shape=(4,), kind=0, offset=0):
  return (
    text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    + struct.pack("<IQ", kind, offset)
  )


def key(name, kind, value):
  return text(name) + struct.pack("<I", kind) + value


def header(tensors=(), keys=(), version=3, data=b""):
  content = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
  content += b"".join(keys) + b"".join(tensors)
  return content + b"\0" * (-len(content) % 32) + data


@pytest.mark.parametrize("content, match", [
  (b"", "is empty"),
  (b"GG", "is not a GGUF file"),
  (b"ggml" * 10, "is not a GGUF file"),
  (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
  (header(version=1), "GGUF file of version 1, but little-endian versions 2 and 3"),
  (header(version=3 << 24), "GGUF file big-endian"),
  (header([tensor()], data=b"\0" * 15), "truncated: its tensor w ends at byte"),
  (header([tensor(offset=1 << 62)], data=b"\0" * 16), "truncated: its tensor w ends at byte"),
  (header([tensor()] * 2, data=b"\0" * 16), "gives the tensor w twice"),
  (header([tensor(kind=4)], data=b"\0" * 99), "tensor w in the quantisation number 4, which"),
  (header([tensor(kind=999)], data=b"\0" * 99), "tensor w in the quantisation number 999, which"),
  (header([tensor(shape=(32,), kind=9)], data=b"\0" * 99), "w in the quantisation Q8_1, which"),
  (header([tensor(shape=(256,), kind=15)], data=b"\0" * 999), "w in the quantisation Q8_K, which"),
  (header([tensor(shape=(33, 2), kind=8)], data=b"\0" * 99), "rows of 33 .* w in Q8_0.* hold 32"),
  (header([tensor(shape=(1,) * 5)], data=b"\0" * 99), "tensor w 5 dimensions"),
  (header([tensor(shape=(0, 1 << 63))]), "which no array can have"),
  (header(keys=[key("k", 77, b"")]), "key k a value of the unknown kind 77"),
  (header(keys=[key("k", 9, struct.pack("<IQ", 9, 1))]), "nests lists in its key k"),
  (header(keys=[key("k", 4, b"\1\0\0\0")] * 2), "gives the key k twice"),
  (header(keys=[key("k", 9, struct.pack("<IQ", 4, 1 << 60))]), "truncated: its header goes on"),
  (header(keys=[key("k", 9, struct.pack("<IQ", 8, 1 << 60))]), "truncated: its header goes on"),
  (header(keys=[struct.pack("<Q", 1 << 63)]), "truncated: its header goes on"),
  (b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0), "truncated: its header goes on"),
  (header(keys=[key("general.alignment", 4, b"\0\0\0\0")]), "general.alignment as 0"),
  (header(keys=[key("split.count", 2, b"\3\0")]), "one of 3 parts of a model; join them"),
  (header(keys=[key("split.count", 8, text("x"))]), "one of x parts of a model; join them"),
  (header([tensor(), tensor("v")], data=b"\0" * 64), "the tensors [vw] and [vw] on the same"),
  (header([tensor("a", (16,)), tensor("b", offset=32)], data=b"\0" * 64), "a and b on the same"),
  (header([tensor(), tensor("v", offset=16)], data=b"\0" * 64), "v at byte 16 .*alignment, 32"),
  (header([tensor(offset=8)], keys=[key("general.alignment", 4, b"\x10\0\0\0")],
          data=b"\0" * 64), "w at byte 8 of the data.* no multiple of its alignment, 16"),
  (header([tensor(), tensor("v", offset=64)], data=b"\0" * 96), "48 bytes before its tensor v"),
  (header(keys=[key("general.alignment", 4, b"\x18\0\0\0")]), "alignment as 24, not as a power"),
  (header(keys=[key("general.alignment", 4, b"\1\0\0\0")]), "alignment as 1, not as a power"),
  (header(keys=[key("general.alignment", 8, text("32"))]), "general.alignment as '32'"),
  (header([tensor(shape=(1 << 31, 1 << 31, 1 << 31, 0))]), "which no array can have"),
  (header([tensor(shape=(1 << 62, 0), kind=8)]), "which no array can have"),
  (header([tensor("n" * 70_000)], data=b"\0" * 99), "of 70000 bytes, more than GGUF's 65535"),
  (header([tensor("a\n\x1b[1mb")], data=b"\0" * 99), r"has the name 'a\\n\\x1b\[1mb', no text"),
  (header(keys=[key(b"\xff", 4, b"\0\0\0\0")]), r"has the name '\\udcff', no text"),
  (header(keys=[key("n" * 70_000, 4, b"\0\0\0\0")]), "a name of 70000 bytes"),
  (b"GGUF" + struct.pack("<IQQ", 3, 0, 10**12) + b"\0" * 999, "1000000000000 keys and 0 tensors"),
])
def test_bad_files(tmp_path, content, match):
  path = tmp_path / "x.gguf"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=match) as caught:
    open_source(path)
  assert str(path) in str(caught.value)


def test_what_a_header_announces_is_held_against_the_file_before_it_is_read(tmp_path):
  """Sparse files: long, and without anything in them."""
  path = tmp_path / "x.gguf"
  announced = {
    "is truncated: its header goes on .* 0 keys and 1000000000000 tensors":
      b"GGUF" + struct.pack("<IQQ", 3, 10**12, 0),
    "gives the tensor  twice": b"GGUF" + struct.pack("<IQQ", 3, 10**8, 0),
    "gives the key  twice": b"GGUF" + struct.pack("<IQQ", 3, 0, 10**8),
    "a header of more than 134,217,728 bytes":
      b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("k", 9, struct.pack("<IQ", 0, 10**9)),
    r"a header of more than 134,217,728":
      b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("k", 9, struct.pack("<IQ", 8, 10**8)),
    r"a header of more than 134,217,728 ":
      b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("k", 8, struct.pack("<Q", 10**9)),
  }
  for match, content in announced.items():
    path.write_bytes(content)
    with path.open("r+b") as file:
      file.truncate(4 * 10**9)
    with pytest.raises(ValueError, match=match):
      open_source(path)


def test_tensors_may_lie_in_any_order(tmp_path):
  path = tmp_path / "x.gguf"
  data = np.arange(16, dtype=np.float32)
  path.write_bytes(header([tensor("b", (4,), offset=32), tensor("a", (5,))], data=data.tobytes()))
  source = open_source(path)
  np.testing.assert_array_equal(source.read("b"), data[8:12])
  np.testing.assert_array_equal(source.read("a"), data[:5])


def test_every_truncation_is_noticed(path, tmp_path):
  whole, copy = path.read_bytes(), tmp_path / "x.gguf"
  source = open_source(path)
  last = source.names()[-1]
  for size in [*range(1, 600, 7), len(whole) // 2, len(whole) - 40]:
    copy.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="is truncated|is not a GGUF file"):
      open_source(copy)
  assert source.shape(last) == (3, 512)


def test_a_token_may_be_any_bytes(tmp_path):
  path = tmp_path / "x.gguf"
  value = struct.pack("<IQ", 8, 2) + text(b"\xff\xfe") + text("ok")
  path.write_bytes(header(keys=[key("tokens", 9, value)], version=2))
  tokens = open_source(path).metadata["tokens"]
  assert tokens[1] == "ok" and tokens[0].encode("utf-8", "surrogateescape") == b"\xff\xfe"
