"""The GPU benchmark at toy size on a CPU: it runs, and its accounting adds up."""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SPEC = importlib.util.spec_from_file_location("gpu_pds", Path(__file__).parent / "gpu_pds.py")
gpu_pds = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_pds"] = gpu_pds  # where dataclasses look for their module
SPEC.loader.exec_module(gpu_pds)

# 2 layers of width 32, mlp 48, vocabulary 64, length 16: operations of a token's forward pass.
TOKEN = 2 * (2 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 64) + 2 * 2 * 16 * 32


@pytest.fixture
def args():
  return argparse.Namespace(
    toy=True, repeats=1, groups=2, attention="chunked", chunk=8, remat="full", scan=True, rows=2,
    train_attention="xla", train_remat="dots", peak=2e9)


def test_phases_of_a_solve_run_and_are_counted(args):
  phases = gpu_pds.run_part("solve", args)
  assert {name: (p["flops"], p["times"], p["tokens"]) for name, p in phases.items()} == {
    "trajectory": (3 * 4 * 16 * TOKEN, 3, 64),
    "Hessian and batch scores": (8 * 4 * 16 * TOKEN, 3, 64),
    "target gradient": (3 * 4 * 16 * TOKEN, 3, 64),
    "proxies": (3 * 4 * 16 * TOKEN, 6, 64),  # 12 proxies, 4 at once, twice
  }
  assert all(p["seconds"] > 0 for p in phases.values())


def test_pretraining_runs_and_counts_three_forward_passes(args):
  (row,) = gpu_pds.run_part("pretrain_160m", args).values()
  assert row["flops"] == 3 * 2 * 16 * TOKEN and row["tokens"] == 32


@pytest.mark.slow
def test_pytorch_trains_the_same_network(args):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  (row,) = gpu_pds.run_part("torch_160m", args).values()
  assert row["flops"] == 3 * 2 * 16 * TOKEN and row["seconds"] > 0


@pytest.mark.parametrize(("name", "parameters"), [
  ("160m", 162_417_408), ("1.7b", 1_741_785_088)])
def test_models_are_the_published_ones(args, name, parameters):
  from lmops_jax.models.transformer import num_params

  args.toy = False
  config = gpu_pds.model_config(name, args, attention="chunked")
  assert num_params(config) == parameters
  assert (config.attention, config.dtype, config.max_length) == ("chunked", "bfloat16", 1024)


def test_the_table_extrapolates_and_names_what_failed(args):
  rows = {"trajectory": dict(seconds=0.5, flops=1e9, times=100, tokens=1000),
          "pre-training 160m": dict(seconds=2.0, flops=1e9, times=None, tokens=1000)}
  text = gpu_pds.table(rows, {"torch_1.7b": "out of memory"}, "gpu NVIDIA H100 0.10.2", args)
  assert "| trajectory | 0.5000 | 0.001 | 2,000 | 0.002 | 100.0% | 100 | 50.0 |" in text
  assert "A whole solve, from these: 0.8 minutes, 100.0% MFU." in text
  assert "torch_1.7b failed: out of memory" in text
  args.peak = None
  assert "peak 989 TFLOP/s" in gpu_pds.table(rows, {}, "gpu NVIDIA H100 0.10.2", args)


def test_medians_leave_the_first_two_calls_out(monkeypatch):
  clock = iter(np.cumsum([0, 100, 0, 50, 0, 1, 0, 2, 0, 9]).tolist())
  monkeypatch.setattr(gpu_pds.time, "perf_counter", lambda: next(clock))
  assert gpu_pds.timed(lambda: None, 3) == 2
