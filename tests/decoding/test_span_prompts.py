"""Spans in rows and prompts stand where their words stood.

An encoder that looks the decoder's own word embeddings up makes no difference: with its vectors in
the places that the index tells, the model gives what it gives for words.
"""

import jax
import numpy as np
import pytest

from lmops_jax.data.multimodal import Record
from lmops_jax.data.span_examples import Read, SpanExample, behind, encoded_prompts, lay_out
from lmops_jax.data.span_rows import SpanRows
from lmops_jax.data.spans import PrefixSpan, RandomSpans
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.scoring import OptionScorer, Request
from lmops_jax.training.losses import lm_example_losses


class Ids:
  pad_id, bos_id, eos_id = 0, 1, 2


class Packed(Ids):
  """Packed rows of random words, of which some end documents."""

  length = 24

  def __len__(self):
    return 8

  def batch(self, indices):
    stored = np.random.default_rng(3).integers(2, 32, (8, self.length + 1)).astype(np.int32)
    stored[:, 0] = self.bos_id
    stored = stored[indices]
    return {"tokens": stored[:, :-1], "targets": stored[:, 1:], "example_id": np.asarray(indices),
            "loss_mask": (stored[:, :-1] != self.eos_id).astype(np.float32)}


@pytest.mark.parametrize("sampler", [RandomSpans(4, 0.5, 2), PrefixSpan()])
def test_rows(tiny, sampler):
  batch = SpanRows(Packed(), sampler).batch(np.arange(8))
  losses = lm_example_losses(tiny.model)
  want = jax.jit(losses)(tiny.params, {k: batch[k] for k in ("tokens", "targets", "loss_mask")})
  inside = batch["vector_index"] >= 0
  assert inside.sum() > 30
  got = jax.jit(losses)(tiny.params, {
    "tokens": np.where(inside, 0, batch["tokens"]), "targets": batch["targets"],
    "loss_mask": batch["loss_mask"], "vector_index": batch["vector_index"],
    "vectors": np.asarray(tiny.params["embedding"])[batch["encoder_tokens"]]})
  np.testing.assert_array_equal(got, want)


def _example(rng, *, end) -> SpanExample:
  parts = (Read("input"), "answer") if end else (Read("input"),)
  texts = [rng.integers(3, 32, rng.integers(1, 7)).tolist() for _ in parts]
  return lay_out(Record(0, parts, 1, "row"), texts, Ids(), end=end)


def test_prompts(tiny):
  rng = np.random.default_rng(0)
  shots = [_example(rng, end=True) for _ in range(2)]
  prompts = [behind(shots[:n], _example(rng, end=False), Ids()) for n in (0, 1, 2, 2)]
  options = [[3], [4, 5]]
  made = encoded_prompts(prompts, Ids())
  vectors = np.asarray(tiny.params["embedding"])[made.inputs["encoder_tokens"]]
  scorer = OptionScorer(tiny.model, tiny.params)
  got = scorer.score([
    Request(Prompt(*parts), options) for parts in zip(made.ids, vectors, made.index)])
  want = scorer.score([Request(prompt.tokens.tolist(), options) for prompt in prompts])
  for a, b in zip(got, want, strict=True):
    for one, other in zip(a, b, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
  assert sum((index >= 0).sum() for index in made.index) > 20
