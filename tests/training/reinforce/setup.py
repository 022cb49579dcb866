"""A tiny policy, and rollouts of it that need no decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training.reinforce.rollouts import Answer, Question, Rollouts

V, END, P, LONGEST = 12, 1, 4, 3
MODEL = Transformer(TransformerConfig(
  vocab_size=V, num_layers=2, width=8, num_heads=2, mlp_width=16, max_length=12,
  dtype="float32"))
QUESTIONS = [Question(100 + i, f"q{i}", [2 + i % 5, *([3] * (i % 3))]) for i in range(20)]


@functools.cache
def params(seed=0):
  found = jax.jit(MODEL.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
  return jax.tree.map(lambda p: p * (3 if np.std(p) > 0 else 1), nn.unbox(found))


@jax.jit
def _first_logits(params, tokens, last):
  return MODEL.apply({"params": params}, tokens, method="logits")[jnp.arange(len(last)), last]


def respond(params, prompts, seed):
  """Tokens drawn from the policy's own first distribution; some answers are cut, some empty."""
  tokens = np.zeros((len(prompts), P), np.int32)
  for row, ids in enumerate(prompts):
    tokens[row, : len(ids)] = ids
  last = np.array([len(ids) - 1 for ids in prompts])
  logits = np.asarray(_first_logits(params, tokens, last), np.float64)
  answers = []
  for row in range(len(prompts)):
    rng = np.random.default_rng((seed, row))
    p = np.exp(logits[row] - logits[row].max())
    of_prompt = []
    for _ in range(4):
      length = int(rng.integers(0, LONGEST + 1))
      ids = rng.choice(V, length, p=p / p.sum()).tolist()
      is_cut = length == LONGEST
      text = " ".join(map(str, ids))
      of_prompt.append(Answer(text, ids if is_cut else [*ids, END], is_cut))
    answers.append(of_prompt)
  return answers


def reward(rollouts):
  """Likes the token 5, and short answers."""
  return {"fives": np.array([list(r.ids).count(5) for r in rollouts], float),
          "length": np.array([-0.1 * len(r.ids) for r in rollouts])}


def rollouts(reference=None, reward=reward, respond=respond, **changes):
  settings = dict(batch_size=8, seed=3, prompt_length=P, response_length=LONGEST, end_id=END)
  return Rollouts(MODEL, params() if reference is None else reference, QUESTIONS, respond, reward,
                  **{**settings, **changes})
