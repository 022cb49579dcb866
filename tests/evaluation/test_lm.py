"""Held-out loss: the mean of document means, one compilation, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.evaluation import lm
from lmops_jax.mesh import meshes

VOCAB, LENGTH = 11, 6


def _example_losses(params, batch):
  """A bigram model's masked token mean."""
  logits = params["table"][batch["tokens"]]
  logp = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logp, batch["targets"][..., None], axis=-1)[..., 0]
  return (nll * batch["loss_mask"]).sum(-1) / jnp.maximum(batch["loss_mask"].sum(-1), 1)


def _documents(n, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(VOCAB, size=(n, LENGTH + 1))
  lengths = rng.integers(1, LENGTH + 1, size=n)
  return {
    "tokens": tokens[:, :-1].astype(np.int32),
    "targets": tokens[:, 1:].astype(np.int32),
    "loss_mask": (np.arange(LENGTH) < lengths[:, None]).astype(np.float32),
    "example_id": np.arange(n) + 100,
  }


def _batches(documents, size):
  n = len(documents["tokens"])
  for start in range(0, n, size):
    yield {k: v[start : start + size] for k, v in documents.items()}


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(3)
  return {"table": jnp.asarray(rng.normal(size=(VOCAB, VOCAB)), jnp.float32)}


def test_mean_loss_is_the_mean_of_document_means(params):
  documents = _documents(10)
  table = np.asarray(params["table"], np.float64)
  logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
  means = []
  for tokens, targets, mask in zip(*(documents[k] for k in ("tokens", "targets", "loss_mask"))):
    used = mask > 0
    means.append(-logp[tokens[used], targets[used]].mean())
  got = lm.mean_loss(_example_losses, params, _batches(documents, 4))
  assert got == pytest.approx(np.mean(means), rel=1e-6)
  # A mean over tokens, or over batches of unequal size, would be another number.
  tokens_mean = np.average(means, weights=documents["loss_mask"].sum(-1))
  assert abs(got - tokens_mean) > 1e-3


@pytest.mark.parametrize("size", [1, 3, 10])
def test_mean_loss_does_not_depend_on_the_batch_size(params, size):
  documents = _documents(10)
  want = lm.mean_loss(_example_losses, params, _batches(documents, 4))
  got = lm.mean_loss(_example_losses, params, _batches(documents, size))
  assert got == pytest.approx(want, rel=1e-6)


def test_compiles_once_also_with_a_smaller_last_batch_and_over_calls(params):
  traces = []

  def counted(params, batch):
    traces.append(batch["tokens"].shape)
    return _example_losses(params, batch)

  for seed in range(3):
    lm.mean_loss(counted, params, _batches(_documents(10, seed), 4))
  assert traces == [(4, LENGTH)]


def test_sharded_evaluation_gives_the_same_number(params):
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  size = 2 * jax.device_count()
  documents = _documents(size + 3)
  want = lm.mean_loss(_example_losses, params, _batches(documents, size))
  got = lm.mean_loss(
    _example_losses, params, _batches(documents, size),
    place=lambda batch: jax.device_put(batch, sharding),
  )
  assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("num", [1, 5, 11, 17])
def test_any_number_of_documents_on_any_mesh(params, num):
  """Fewer documents than a batch, than the devices, or not a multiple of them."""
  partitioner = meshes.MeshConfig(data=4, fsdp=2).build()
  documents = _documents(num)
  want = lm.mean_loss(_example_losses, params, _batches(documents, num))
  for size in (6, 8, 64):
    got = lm.mean_loss(
      _example_losses, params, _batches(documents, size), place=partitioner.place_batch,
      multiple_of=partitioner.num_batch_shards,
    )
    assert got == pytest.approx(want, rel=1e-6)


def test_refusals(params):
  with pytest.raises(ValueError, match="no batches"):
    lm.mean_loss(_example_losses, params, [])
  documents = _documents(6)
  with pytest.raises(ValueError, match="more than the first one's 2"):
    lm.mean_loss(
      _example_losses, params, [*_batches(_documents(2), 2), *_batches(documents, 6)]
    )
  masked = dict(documents, loss_mask=documents["loss_mask"] * (np.arange(6) != 4)[:, None])
  with pytest.raises(ValueError, match="example 104 has no token that counts"):
    lm.mean_loss(_example_losses, params, _batches(masked, 6))
  broken = {"table": params["table"].at[0, 0].set(jnp.nan)}
  with pytest.raises(FloatingPointError, match="batch 0 is nan"):
    lm.mean_loss(_example_losses, broken, _batches(documents, 6))


def test_perplexity():
  assert lm.perplexity(np.log(50.0)) == pytest.approx(50.0)
  assert lm.perplexity(0.0) == 1.0
  for bad in (-0.1, float("nan")):
    with pytest.raises(ValueError, match="not negative"):
      lm.perplexity(bad)
