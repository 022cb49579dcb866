"""Topologies by name."""

import pytest

from lmops_jax.config.refusals import ConfigError
from lmops_jax.sizing import chips


@pytest.mark.parametrize("name, kind, shape, num", [
  ("v5e:16x16", "v5e", (16, 16), 256), ("v4:2x2x1", "v4", (2, 2, 1), 4),
  ("h100:8", "h100", (8,), 8)])
def test_topologies(name, kind, shape, num):
  found = chips.topology(name)
  assert (found.kind, found.shape, found.num_devices) == (kind, shape, num)
  assert found.chip is chips.CHIPS[kind]


@pytest.mark.parametrize("name, words", [
  ("v5e", "not of the form"), ("v5e:axb", "not of the form"), ("v5x:4x4", "nearest valid name"),
  ("v5e:0x4", "without chips")])
def test_refused(name, words):
  with pytest.raises(ConfigError, match=words):
    chips.topology(name)


def test_peaks_are_those_of_the_data_sheets():
  """TFLOP/s in bfloat16, and GiB that programs get of the chip's memory."""
  sheets = {"v4": (275, 32), "v5e": (197, 16), "v5p": (459, 95), "v6e": (918, 32)}
  for kind, (tflops, gib) in sheets.items():
    chip = chips.CHIPS[kind]
    assert chip.flops_per_sec == tflops * 1e12
    assert 0.95 * gib <= chip.memory_bytes / 2**30 < gib and not chip.is_gpu
