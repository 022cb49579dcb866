"""Methods under one protocol: each tells clusters apart, by rows that one encoder has read."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.systems.prototypes import classifier
from lmops_jax.systems.prototypes.contrast import Contrast
from lmops_jax.systems.prototypes.encoding import Encoded, Encoder, Encoding
from lmops_jax.systems.prototypes.learning import Growth
from lmops_jax.systems.prototypes.means import Means
from lmops_jax.systems.prototypes.methods import Frozen, Head, Material, Prototypical, told
from lmops_jax.training.optimizers import adamw

WIDTH, C = 16, 3
CONFIG = TransformerConfig(
  vocab_size=8, num_layers=2, width=WIDTH, num_heads=2, mlp_width=16, max_length=8, causal=False)
OPTIMIZER = adamw(1e-2, b2=0.999, eps=1e-8, weight_decay=0.0)


@pytest.fixture(scope="module")
def encoders():
  whole = Transformer(CONFIG, with_unembedding=False)
  params = nn.unbox(whole.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
  found = []
  for tuned in (0, 1):
    encoder = Encoder(CONFIG, Encoding(tuned_layers=tuned, max_tokens=8, dropout=0.1))
    found.append((encoder, encoder.split(params)[1]))
  return found


def clusters(rng, number, tokens):
  """Rows whose class is where their hidden states lie."""
  targets = rng.integers(C, size=number).astype(np.int32)
  hidden = rng.normal(size=(number, tokens, WIDTH)).astype(np.float32)
  hidden[..., :C] += 3 * np.eye(C, dtype=np.float32)[targets][:, None]
  return Encoded(hidden, np.full(number, tokens, np.int32), 0), targets


def material(encoders, tuned, directory, number=96, num_classes=C):
  encoder, top = encoders[tuned]
  rows, targets = clusters(np.random.default_rng(0), number, 4 if tuned else 1)
  if num_classes is None:
    targets = rows.hidden[:, 0, 0].astype(np.float32)
  return Material(encoder, top, rows, targets, num_classes, 0, directory)


@pytest.mark.parametrize("method", [
  Prototypical(OPTIMIZER, num_epochs=4), Head(OPTIMIZER, num_epochs=30),
  Prototypical(OPTIMIZER, "fixed", Growth(start="clusters", per_class=2, create=False),
               num_epochs=4),
  Means(OPTIMIZER), Means(OPTIMIZER, "imp", True, num_epochs=2), Contrast(OPTIMIZER),
  Frozen("logistic"), Frozen("discriminant"), Frozen("neighbours")], ids=lambda m: m.label)
def test_each_method_tells_clusters_apart(encoders, method, tmp_path):
  given = material(encoders, 0, tmp_path)
  fitted = method.fit(given)
  rows, targets = clusters(np.random.default_rng(1), 200, 1)
  said = fitted.predict(rows)
  np.testing.assert_allclose(np.exp(said).sum(axis=1), 1, rtol=1e-4)
  assert np.mean(np.argmax(said, axis=1) == targets) > 0.8  # chance is a third


@pytest.mark.parametrize("method", [
  Prototypical(adamw(1e-3, weight_decay=0.0), num_epochs=2),
  Head(adamw(1e-3, weight_decay=0.0), num_epochs=3, rate_of_head=20.0),
  Means(adamw(1e-3, weight_decay=0.0), num_epochs=3, num_support=32),
  Contrast(adamw(1e-3, weight_decay=0.0), num_epochs=3)],
  ids=lambda m: m.label)
def test_trained_layers_move_and_are_kept(encoders, method, tmp_path):
  given = material(encoders, 1, tmp_path / "run", number=64)
  fitted = method.fit(given)
  rows, _ = clusters(np.random.default_rng(1), 5, 4)
  said = fitted.predict(rows)
  assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
  again = method.fit(given)  # it stands in its directory
  np.testing.assert_array_equal(again.predict(rows), said)
  if fitted.params is None:
    return
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), fitted.params["encoder"], given.top)
  assert np.mean([x > 0 for x in jax.tree.leaves(moved)]) > 0.5, moved
  classifier.save(tmp_path / "kept", fitted.params)
  kept = classifier.load(tmp_path / "kept")
  np.testing.assert_array_equal(told(given.encoder, kept, rows, C), said)


def test_the_head_has_a_rate_of_its_own(encoders, tmp_path):
  rows, _ = clusters(np.random.default_rng(1), 50, 1)

  def said(rate, rate_of_head):
    optimizer = adamw(rate, b2=0.999, eps=1e-8, weight_decay=0.0)
    method = Head(optimizer, num_epochs=3, rate_of_head=rate_of_head)
    return method.fit(material(encoders, 0, tmp_path / f"{rate} {rate_of_head}")).predict(rows)

  np.testing.assert_allclose(said(1e-3, 10.0), said(1e-2, 1.0), rtol=1e-4, atol=1e-5)
  assert np.abs(said(1e-3, 1.0) - said(1e-2, 1.0)).max() > 0.1


@pytest.mark.parametrize("method", [
  Prototypical(OPTIMIZER, num_epochs=30), Head(OPTIMIZER, num_epochs=60), Frozen("logistic"),
  Frozen("neighbours")], ids=lambda m: m.label)
def test_numbers_are_predicted(encoders, method, tmp_path):
  given = material(encoders, 0, tmp_path, num_classes=None)
  rows, _ = clusters(np.random.default_rng(1), 100, 1)
  wanted = rows.hidden[:, 0, 0]
  errors = np.square(method.fit(given).predict(rows) - wanted)
  assert errors.mean() < 0.7 * wanted.var()


def test_prototypical_networks_tell_the_nearest_mean(encoders, tmp_path):
  given = material(encoders, 0, tmp_path)
  rows, _ = clusters(np.random.default_rng(1), 50, 1)
  x, y = given.train.hidden[:, 0], given.targets
  means = np.array([x[y == c].mean(axis=0) for c in range(C)])
  distances = np.square(rows.hidden[:, 0][:, None] - means).sum(axis=-1)
  said = Means(OPTIMIZER).fit(given).predict(rows)
  want = -distances - np.log(np.exp(-distances).sum(axis=1, keepdims=True))
  np.testing.assert_allclose(said, want, rtol=1e-3, atol=1e-3)


def test_contrast_brings_rows_of_a_class_together(encoders, tmp_path):
  """Classes that no line tells apart, one of which has two modes, are told after tuning."""
  encoder, top = encoders[1]
  rng = np.random.default_rng(0)
  targets = rng.integers(2, size=300).astype(np.int32)
  hidden = rng.normal(size=(300, 4, WIDTH)).astype(np.float32)
  hidden[..., 0] += (np.where(targets == 0, 0, 4) * rng.choice([-1, 1], size=300))[:, None]
  learned, held = (Encoded(hidden[i], np.full(150, 4, np.int32), 0)
                   for i in (slice(150), slice(150, None)))
  given = Material(encoder, top, learned, targets[:150], 2, 0, tmp_path)

  def right(method):
    return np.mean(np.argmax(method.fit(given).predict(held), axis=1) == targets[150:])

  assert right(Frozen("logistic")) < 0.75
  assert right(Contrast(adamw(1e-2, weight_decay=0.0), num_epochs=30)) > 0.9


def test_clusters_find_the_modes_of_a_class(encoders, tmp_path):
  """Means of classes that lie at both ends of an axis tell nothing."""
  encoder, top = encoders[0]
  rng = np.random.default_rng(0)
  targets = rng.integers(2, size=400).astype(np.int32)
  hidden = rng.normal(size=(400, 1, WIDTH)).astype(np.float32)
  hidden[np.arange(400), 0, targets] += rng.choice([-5, 5], size=400)
  parts = [(Encoded(hidden[i], np.ones(200, np.int32), 0), targets[i])
           for i in (slice(200), slice(200, None))]
  found = {}
  for clusters_too in (False, True):
    method = Means(OPTIMIZER, "m", clusters_too, Growth(quantile=0.5, capacity=64), num_epochs=3)
    fitted = method.fit(Material(encoder, top, *parts[0], 2, 0, tmp_path / str(clusters_too)))
    right = np.argmax(fitted.predict(parts[1][0]), axis=1) == parts[1][1]
    found[clusters_too] = right.mean()
  assert found[False] < 0.7 and found[True] > 0.9


def test_what_a_method_cannot_tell_is_refused(encoders, tmp_path):
  with pytest.raises(ValueError, match="'discriminant' tells classes"):
    Frozen("discriminant").fit(material(encoders, 0, tmp_path, num_classes=None))
  for method, label in ((Means(OPTIMIZER), "protonet"), (Contrast(OPTIMIZER), "setfit")):
    with pytest.raises(ValueError, match=f"'{label}' tells classes"):
      method.fit(material(encoders, 0, tmp_path, num_classes=None))
