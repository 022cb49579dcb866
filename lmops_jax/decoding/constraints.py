"""What generation may choose: state machines over tokens, and the tree of a list of answers.

A machine has a state for each row, which says what may come next and changes with what came. It is
a pytree whose arrays are arguments of the compiled programs, so one program serves all machines of
the same shapes; its methods are pure functions of one row that are mapped over rows. States follow
their hypotheses through beam search.

The mask acts on the filtered scores: greedy search takes the best allowed token, sampling draws
among the allowed ones (before top-k and the filters behind it), and beam search adds up the model's
own log-probabilities, not renormalised. So a search as wide as a list of answers ranks them as
scoring each one does. Where repeated n-grams and `min_new_tokens` would leave nothing of what is
allowed, they are set aside for that token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding.lengths import fine_bucket
from lmops_jax.decoding.options import GenerationOptions

_DEAD = -2  # the state after a token that was not allowed


class Constraint(Protocol):
  """A machine that rules tokens out; a pytree."""

  def check(self, config, options: GenerationOptions, eos_ids: Sequence[int]) -> None:
    """Raises ValueError, before a search, where its answers could not be kept to.

    Args:
      config: of the model.
      options: of the search.
      eos_ids: the tokens that end an answer.
    """

  def start(self) -> Any:
    """The state before the first new token, a pytree of arrays of fixed shapes."""

  def mask(self, state: Any) -> jax.Array:
    """`[V] bool`, what may come next: at least one token, unless an end token came."""

  def advance(self, state: Any, token: jax.Array) -> Any:
    """The state after a token `[] int32`, of the same shapes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PrefixTree:
  """Allows the answers of a list; see `prefix_tree`.

  Node 0 is the root and edge i leads to node i + 1, which is the state of a row that took it.

  Attributes:
    parents: `[E] int32`, the node that each edge leaves; -1 for edges that only fill the array.
    tokens: `[E] int32`, of the edges.
    vocab_size: V.
  """

  parents: jax.Array | np.ndarray
  tokens: jax.Array | np.ndarray
  vocab_size: int = dataclasses.field(metadata={"static": True})

  def start(self) -> jax.Array:
    """The root."""
    return jnp.zeros((), jnp.int32)

  def mask(self, state: jax.Array) -> jax.Array:
    """The tokens of the node's edges."""
    next_tokens = jnp.where(self.parents == state, self.tokens, self.vocab_size)
    return jnp.zeros(self.vocab_size, bool).at[next_tokens].set(True, mode="drop")

  def advance(self, state: jax.Array, token: jax.Array) -> jax.Array:
    """The node behind the edge of the token."""
    taken = (self.parents == state) & (self.tokens == token)
    return jnp.where(jnp.any(taken), jnp.argmax(taken) + 1, _DEAD).astype(jnp.int32)

  def check(self, config, options: GenerationOptions, eos_ids: Sequence[int]) -> None:
    """See `Constraint`."""
    parents = np.asarray(self.parents)
    edges = int((parents >= 0).sum())
    tokens, depths = np.asarray(self.tokens)[:edges], np.zeros(edges + 1, int)
    for edge, parent in enumerate(parents[:edges].tolist()):
      depths[edge + 1] = depths[parent] + 1
    is_last = ~np.isin(np.arange(1, edges + 1), parents)
    if self.vocab_size != config.vocab_size:
      raise ValueError(
        f"the tree of answers is made for {self.vocab_size} tokens, and the model has "
        f"{config.vocab_size}; make it with the model's own tokenizer."
      )
    ends = np.isin(tokens, eos_ids)
    if (ends != is_last).any():
      raise ValueError(
        f"answers of the tree end with the token {int(tokens[is_last][0])}, and generation with "
        f"{', '.join(map(str, eos_ids)) or 'none'} (decoding.GenerationOptions.eos_ids); make the "
        "tree with an end token of the options, and answers without any."
      )
    if options.max_new_tokens < depths.max():
      raise ValueError(
        f"decoding.GenerationOptions.max_new_tokens={options.max_new_tokens} would cut answers of "
        f"the tree, the longest of which has {depths.max()} tokens with its end; allow as many."
      )
    for name in ("min_new_tokens", "no_repeat_ngram"):
      if getattr(options, name):
        raise ValueError(
          f"decoding.GenerationOptions.{name}={getattr(options, name)} may forbid all tokens that "
          "the tree of answers allows; set it to 0."
        )
    if options.num_beams > 1 and options.num_return_sequences > is_last.sum():
      raise ValueError(
        f"decoding.GenerationOptions.num_return_sequences={options.num_return_sequences} is more "
        f"than the {is_last.sum()} answers of the tree; ask for fewer."
      )


def prefix_tree(answers: Sequence[Sequence[int]], end_id: int, vocab_size: int) -> PrefixTree:
  """The tree that allows these answers alone, each followed by the end token.

  The end token makes an answer that is the beginning of another one an answer of its own.

  Args:
    answers: token ids as they follow the prompt (`evaluation.in_context.Encoder.split`).
    end_id: one of the tokens that end generation.
    vocab_size: V of the model.

  Raises:
    ValueError: no answer, an empty one, two of the same tokens, or a token outside of the
      vocabulary; names them by their index.
  """
  if not answers:
    raise ValueError("the list of answers is empty; give the tree at least one.")
  nodes: dict[tuple[int, ...], int] = {(): 0}
  parents, tokens, seen = [], [], {}
  for i, answer in enumerate(answers):
    answer = tuple(int(token) for token in answer)
    if not answer:
      raise ValueError(f"answer {i} of the tree has no token; leave it out, or give it a text.")
    if answer in seen:
      raise ValueError(
        f"answers {seen[answer]} and {i} of the tree have the same tokens; give each one once."
      )
    seen[answer] = i
    outside = [t for t in (*answer, end_id) if not 0 <= t < vocab_size]
    if outside:
      raise ValueError(
        f"answer {i} of the tree holds token id {outside[0]}, outside of the model's vocabulary of "
        f"{vocab_size}; encode it with the model's own tokenizer."
      )
    whole = (*answer, end_id)
    for n in range(1, len(whole) + 1):
      if whole[:n] not in nodes:
        parents.append(nodes[whole[: n - 1]])
        tokens.append(whole[n - 1])
        nodes[whole[:n]] = len(tokens)
  fill = fine_bucket(len(tokens)) - len(tokens)
  return PrefixTree(
    np.array(parents + [-1] * fill, np.int32), np.array(tokens + [0] * fill, np.int32), vocab_size
  )
