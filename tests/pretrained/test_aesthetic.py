"""The aesthetic predictor's files: both formats, the hash, and what is refused."""

import hashlib
import os
import pickle

import numpy as np
import pytest

from lmops_jax.models.aesthetic import AestheticPredictor, fold, rate
from lmops_jax.pretrained.aesthetic import AestheticFile
from lmops_jax.pretrained.safetensors_files import write_safetensors

SIZES = (6, 5, 4, 3, 2, 1)
KEYS = (0, 2, 4, 6, 7)
REAL = "LMOPS_AESTHETIC_FILE"


def tensors():
  rng = np.random.default_rng(0)
  found = {}
  for key, inputs, outputs in zip(KEYS, SIZES, SIZES[1:]):
    found[f"layers.{key}.weight"] = rng.normal(size=(outputs, inputs)).astype(np.float32)
    found[f"layers.{key}.bias"] = rng.normal(size=outputs).astype(np.float32)
  return found


def safetensors(path, named):
  write_safetensors(path, [(n, x.shape, x.dtype, lambda x=x: x) for n, x in named.items()])
  return path


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path):
  return safetensors(tmp_path / "head.safetensors", tensors())


def test_the_tensors_come_transposed_and_give_the_chain(file):
  found = AestheticFile(file, sha256="any").params()
  x = np.random.default_rng(1).normal(size=(4, 6))
  want = x
  for key in KEYS:
    want = want @ tensors()[f"layers.{key}.weight"].T.astype(np.float64)
    want = want + tensors()[f"layers.{key}.bias"]
  got = AestheticPredictor((5, 4, 3, 2)).apply({"params": found}, x.astype(np.float32))
  np.testing.assert_allclose(got, want[:, 0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(rate(fold(found), x), want[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_a_file_of_torch_gives_the_same(file, tmp_path):
  torch = pytest.importorskip("torch")
  path = tmp_path / "head.pth"
  torch.save({name: torch.tensor(x) for name, x in tensors().items()}, path)
  want, got = (AestheticFile(p, sha256="any").params() for p in (file, path))
  assert want.keys() == got.keys()
  for name in want:
    for part in ("kernel", "bias"):
      np.testing.assert_array_equal(want[name][part], got[name][part])


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "ran"),)

  path = tmp_path / "head.pth"
  body = pickle.dumps({"layers.0.weight": Evil()}, 2)
  path.write_bytes(
    pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    + pickle.dumps({"little_endian": True}, 2) + body + pickle.dumps([], 2))
  with pytest.raises(ValueError, match="mkdir, which plain tensors do not need"):
    AestheticFile(path, sha256="any").params()
  assert not (tmp_path / "ran").exists()


def test_another_file_needs_its_own_digits(file):
  with pytest.raises(ValueError, match=f"has SHA-256 {sha256(file)} and .*'published' wants 21dd"):
    AestheticFile(file).params()
  assert AestheticFile(file).fingerprint() == sha256(file)
  assert AestheticFile(file, sha256=sha256(file)).folded().kernel.shape == (6,)
  with pytest.raises(ValueError, match="SHA-256"):
    AestheticFile(file, sha256="0" * 64).folded()
  with pytest.raises(ValueError, match="64 hex digits"):
    AestheticFile(file, sha256="21dd")


def test_all_that_does_not_fit_is_listed(tmp_path):
  wrong = tensors()
  del wrong["layers.2.bias"]
  wrong["layers.9.weight"] = np.zeros(3, np.float32)
  wrong["layers.6.weight"] = np.zeros((2, 7), np.float32)
  wrong["layers.7.bias"] = np.zeros(1, np.int32)
  path = safetensors(tmp_path / "wrong.safetensors", wrong)
  with pytest.raises(ValueError) as error:
    AestheticFile(path, sha256="any").params()
  for part in ("lacks layers.2.bias", "nothing takes its layers.9.weight",
               "layers.6.weight is [2, 7] and should be [2, 3]", "layers.7.bias holds int32"):
    assert part in str(error.value)


@pytest.mark.skipif(not os.environ.get(REAL), reason=f"needs {REAL}, the published weights' file")
def test_the_published_weights_fold_to_the_known_numbers():
  found = AestheticFile(os.environ[REAL])
  params, head = found.params(), found.folded()
  assert round(float(head.bias), 6) == 5.236646
  assert round(float(np.linalg.norm(head.kernel.astype(np.float64))), 4) == 17.9956
  x = np.random.default_rng(0).normal(size=(64, 768)).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  layered = AestheticPredictor().apply({"params": params}, x)
  np.testing.assert_allclose(rate(head, x), layered, rtol=1e-6)
