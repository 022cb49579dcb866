"""Groups of rows by kind, and batches that are made ahead."""

import threading

import jax
import numpy as np
import pytest

from lmops_jax.data.mixture import Mixture
from lmops_jax.training.sources import Ahead, Batches, Endless, Epochs, Groups, Part, part_of


class _Lines:
  """Rows of some length; row i of the source learns i % 5 + 1 tokens."""

  def __init__(self, num, length, kind):
    self.num, self.length, self.kind = num, length, kind

  def __len__(self):
    return self.num

  def batch(self, indices):
    mask = np.arange(self.length) < self.num_learned(indices)[:, None]
    return {"tokens": np.asarray(indices, np.int32)[:, None].repeat(self.length, axis=1),
            "loss_mask": mask.astype(np.float32),
            "example_id": self.kind * 1000 + np.asarray(indices, np.int64)}

  def num_learned(self, indices):
    return np.asarray(indices) % 5 + 1


def _groups(num_groups=4, seed=0):
  text, pairs = _Lines(30, 9, 1), _Lines(500, 6, 2)
  return Groups({
    "text": Part(Mixture({"books": text}, seed=seed), 2),
    "pairs": Part(Mixture({"web": pairs, "more": _Lines(7, 6, 3)}, {"web": 3, "more": 1}, seed), 8),
  }, num_groups)


def test_rows_of_a_kind_share_the_axis_of_the_groups():
  batch = _groups().batch(0)
  assert {name: value.shape for name, value in batch.items()} == {
    "text/tokens": (4, 2, 9), "text/loss_mask": (4, 2, 9), "pairs/tokens": (4, 8, 6),
    "pairs/loss_mask": (4, 8, 6), "weight": (4,), "example_id": (4,),
  }
  np.testing.assert_array_equal(batch["example_id"], 1000 + batch["text/tokens"][:, 0, 0])
  assert part_of(batch, "text").keys() == {"tokens", "loss_mask"}


def test_the_step_of_kosmos_1():
  """kosmos1 section 6: 256 text rows, 6,144 pairs and 128 interleaved documents."""
  kinds = {"text": 2, "pairs": 48, "interleaved": 1}
  groups = Groups(
    {name: Part(Mixture({name: _Lines(64, 5, 0)}), n) for name, n in kinds.items()}, 128)
  batch = groups.batch(3)
  rows = {name: part_of(batch, name)["tokens"].reshape(-1, 5).shape[0] for name in kinds}
  assert rows == {"text": 256, "pairs": 6144, "interleaved": 128}


def test_weights_make_the_mean_over_groups_one_over_tokens():
  batch = _groups().batch(2)
  losses = {name: np.random.default_rng(0).random(batch[f"{name}/loss_mask"].shape)
            for name in ("text", "pairs")}
  masks = {name: batch[f"{name}/loss_mask"] for name in losses}
  nats = sum((losses[name] * masks[name]).sum(axis=(1, 2)) for name in losses)
  tokens = sum(mask.sum(axis=(1, 2)) for mask in masks.values())
  np.testing.assert_allclose(np.mean(nats / tokens * batch["weight"]), nats.sum() / tokens.sum(),
                             rtol=1e-6)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_a_batch(monkeypatch, num_processes):
  want = [_groups().batch(step) for step in range(12)]
  monkeypatch.setattr(jax, "process_count", lambda: num_processes)
  for step in (11, 0, 5):  # in any order
    shares = []
    for index in range(num_processes):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      shares.append(_groups().batch(step))
    for name, value in want[step].items():
      np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), value)
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  with pytest.raises(ValueError, match="num_groups=4 is not a multiple of the number of proc"):
    _groups().batch(0)


def test_steps_go_through_the_sources():
  """Steps follow each other in the order of the mixture, without gap or repetition."""
  groups = _groups()
  mixture = groups.parts["pairs"].mixture
  got = np.concatenate([groups.batch(step)["pairs/tokens"].reshape(-1, 6) for step in range(5)])
  np.testing.assert_array_equal(got, mixture.batch(np.arange(5 * 32))["tokens"])
  other = _groups(seed=1).batch(0)
  assert not np.array_equal(other["pairs/tokens"], groups.batch(0)["pairs/tokens"])


def test_groups_are_checked():
  part = Part(Mixture({"a": _Lines(3, 4, 0)}), 0)
  with pytest.raises(ValueError, match="part 'a' of a group has rows_per_group=0"):
    Groups({"a": part}, 1)
  with pytest.raises(ValueError, match="num_groups=0 of 1 parts make no batch"):
    Groups({"a": part._replace(rows_per_group=1)}, 0)
  with pytest.raises(ValueError, match="num_groups=1 of 0 parts make no batch"):
    Groups({}, 1)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_endless_list_is_cut_into_batches(monkeypatch, num_processes):
  mixture = Mixture({"a": _Lines(5, 4, 1), "b": _Lines(3, 4, 2)}, seed=3)
  source = Endless(mixture.batch, 6)
  want = mixture.batch(np.arange(60))
  monkeypatch.setattr(jax, "process_count", lambda: num_processes)
  for step in (9, 0, 4):
    shares = []
    for index in range(num_processes):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      shares.append(source.batch(step))
    for name, value in want.items():
      np.testing.assert_array_equal(
        np.concatenate([share[name] for share in shares]), value[6 * step : 6 * step + 6])


def test_epochs_tell_their_number_to_rows_that_are_drawn_anew():
  source = Epochs(lambda index, epoch: {"epoch": np.full(len(index), epoch)}, 10, 4, 0,
                  by_epoch=True)
  assert [int(source.batch(step)["epoch"][0]) for step in range(6)] == [0, 0, 1, 1, 2, 2]


def _array(step):
  return {"x": np.array([step])}


def test_batches_made_ahead_are_the_same():
  groups = _groups()
  ahead = Ahead(groups, 2)
  for step in (0, 1, 2, 7, 8, 3, 3, 0):
    want = groups.batch(step)
    got = ahead.batch(step)
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_a_batch_is_made_while_the_one_before_is_used():
  made = {step: threading.Event() for step in range(4)}

  def at(step):
    made[step].set()
    return _array(step)

  ahead = Ahead(Batches(at))
  assert ahead.batch(0)["x"] == 0
  assert made[1].wait(60) and not made[2].is_set()
  assert ahead.batch(1)["x"] == 1 and made[2].wait(60)


def test_an_error_is_raised_where_its_batch_is_asked_for():
  def at(step):
    if step == 2:
      raise ValueError("a.png is damaged.")
    return _array(step)

  ahead = Ahead(Batches(at), 3)
  assert [int(ahead.batch(step)["x"][0]) for step in (0, 1)] == [0, 1]
  with pytest.raises(ValueError, match="a.png is damaged"):
    ahead.batch(2)
  assert ahead.batch(3)["x"] == 3


def test_what_cannot_be_made_ahead_is_refused():
  class Rollouts(Batches):
    reads_params = True

  with pytest.raises(ValueError, match="a source that reads parameters cannot be made ahead"):
    Ahead(Rollouts(_array))
  with pytest.raises(ValueError, match="num_ahead=0 must be 1 or more"):
    Ahead(Batches(_array), 0)
