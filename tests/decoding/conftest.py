"""A tiny model with decided opinions, one that recites a script, and a tokenizer of bytes."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
  vocab_size=32, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=48,
)


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A model, its parameters, and next-token log-probabilities without any cache."""

  model: Transformer
  params: Any

  @functools.cached_property
  def _forward(self):
    return jax.jit(lambda tokens: jax.nn.log_softmax(
      self.model.apply({"params": self.params}, tokens, method="logits")
    ))

  def log_probs(self, ids) -> np.ndarray:
    """`[V]` after `ids`; computed at one length, later positions do not matter."""
    tokens = np.zeros((1, self.model.config.max_length), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(self._forward(tokens))[0, len(ids) - 1]


@pytest.fixture(scope="session")
def make_tiny():
  @functools.cache
  def make(seed=1, **changes):
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    params = nn.unbox(
      jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    )
    # Far from uniform attention and distributions; vectors of norms stay.
    return Tiny(model, jax.tree.map(lambda p: p * (20 if p.std() > 0 else 1), params))

  return make


@pytest.fixture(scope="session")
def tiny(make_tiny):
  return make_tiny()


class ByteTokenizer:
  """UTF-8 bytes from id 3 on; 0 is padding, 1 BOS, 2 EOS."""

  bos_id, eos_id, pad_id = 1, 2, 0
  stop_ids = (2,)

  def encode(self, text, add_special=True):
    return [byte + 3 for byte in text.encode()]

  def decode(self, ids, skip_special=True):
    return bytes(i - 3 for i in ids if i >= 3).decode(errors="replace")


@pytest.fixture(scope="session")
def byte_tokenizer():
  return ByteTokenizer()


@dataclasses.dataclass(frozen=True)
class Reciter:
  """Stands for a model: after n tokens the next is the n-th of the script."""

  script: tuple[int, ...]
  config: TransformerConfig

  def apply(
    self, variables, *args, method, positions=None, fresh=False, valid=None, shared=None,
    vectors=None, vector_index=None,
  ):
    if method == "unembed":
      ids = jnp.asarray(self.script)[args[0][:, 0].astype(jnp.int32)]
      return 9 * jax.nn.one_hot(ids, self.config.vocab_size)
    tokens, cache = args
    return (positions[..., None] + 1).astype(jnp.float32), cache._replace(
      length=cache.length + tokens.shape[1]
    )


@pytest.fixture(scope="session")
def recite():
  """`recite(text) -> (model, params)` that continues any beginning of the text, then EOS."""

  def make(text):
    ids = [byte + 3 for byte in text.encode()]
    config = TransformerConfig(vocab_size=260, num_layers=1, width=2, num_heads=1, max_length=256)
    return Reciter(tuple(ids + [2] * (256 - len(ids))), config), {"layers": ()}

  return make
