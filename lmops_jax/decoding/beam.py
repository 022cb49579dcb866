"""Beam search and diverse beam search, pure functions on log-probabilities.

A row (a prompt) has `num_beams` running hypotheses and as many finished ones. A step takes the
`max(2, 1 + number of end tokens) * num_beams` best continuations of the running ones. Those that
end, by an end token or at `max_new_tokens`, enter the finished ones if they are among the first
`num_beams`, with the score

    sum of log-probabilities / length ** length_penalty

where the length counts generated tokens, the end token included; the best that do not end run on.
Sums are those of the filtered scores (repetition penalty and so on), not renormalised. A search
ends as `GenerationOptions.early_stopping` says. All this is what transformers' `generate` does for
a prompt on its own; rows do not influence each other here.

With the length basis "total_unpadded" the length counts the prompt and the generated tokens without
the end token, the bound on what is running takes the best continuation, an end token too, at the
length before it, and at `max_new_tokens` all running hypotheses enter. That is transformers 4.23,
with which Promptist was published, for a prompt without padding.

Diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424, Hamming diversity): the beams are
G groups, each a beam search of its own with its own finished hypotheses. Within a step groups go in
order, and in group g every token's log-probability is lowered by `diversity_penalty` for each beam
of an earlier group that runs on with this token at this step. The penalties stay in the sums. A
group that was done before penalises nothing. The answers are the best of all groups' finished
hypotheses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GENERATED, TOTAL = "generated", "total_unpadded"
LENGTH_BASES = (GENERATED, TOTAL)
_NEVER = -1e9  # as transformers: finite, so that an order remains among those ruled out


class BeamPlan(NamedTuple):
  """What a compiled search is made for.

  Attributes:
    num_beams: the beams of all groups together.
    num_groups: a divisor of `num_beams`.
    eos_ids: tokens that end a hypothesis.
    early_stopping, length_basis: as in `GenerationOptions`.
  """

  num_beams: int
  num_groups: int
  eos_ids: tuple[int, ...]
  early_stopping: bool | str
  length_basis: str = GENERATED

  @property
  def group_size(self) -> int:
    """Beams in a group."""
    return self.num_beams // self.num_groups

  @property
  def num_candidates(self) -> int:
    """Continuations that a step looks at in a group."""
    return max(2, 1 + len(self.eos_ids)) * self.group_size


class BeamKnobs(NamedTuple):
  """Numbers that change without a new program.

  Attributes:
    norms: `[N+1] float32`, what the sum of a hypothesis of n tokens is divided by; n counts up to
      the prompts' and the new ones if lengths are total.
    longer_is_better: `[] bool`, a positive length penalty.
    max_new_tokens: `[] int32`.
    diversity_penalty: `[] float32`.
  """

  norms: jax.Array
  longer_is_better: jax.Array
  max_new_tokens: jax.Array
  diversity_penalty: jax.Array


class Beams(NamedTuple):
  """Hypotheses of B rows, G groups, n beams a group.

  Attributes:
    history: `[B,G,n,M] int32`, prompt and generated tokens of the running ones, then anything.
    log_probs: `[B,G,n,N] float32` of the generated tokens, unfiltered.
    scores: `[B,G,n] float32` sums.
    finished_history, finished_log_probs, finished_scores: the same for finished ones, best first.
    finished_length: `[B,G,n] int32` generated tokens.
    is_finished: `[B,G,n] bool`, whether there is a hypothesis.
    done: `[B,G] bool`.
  """

  history: jax.Array
  log_probs: jax.Array
  scores: jax.Array
  finished_history: jax.Array
  finished_log_probs: jax.Array
  finished_scores: jax.Array
  finished_length: jax.Array
  is_finished: jax.Array
  done: jax.Array


def knobs(length_penalty, diversity_penalty, max_new_tokens, num_slots) -> BeamKnobs:
  """`BeamKnobs` for lengths up to `num_slots`, on the host."""
  lengths = np.maximum(np.arange(num_slots + 1), 1).astype(np.float64)
  with np.errstate(over="ignore", under="ignore"):
    norms = (lengths**length_penalty).astype(np.float32)
  return BeamKnobs(
    norms, np.bool_(length_penalty > 0), np.int32(max_new_tokens), np.float32(diversity_penalty)
  )


def start(plan: BeamPlan, history, num_new: int, done) -> Beams:
  """The beams before the first token.

  Args:
    plan: what the search is.
    history: `[B,M] int32`, the prompts.
    num_new: N.
    done: `[B] bool`, rows that are no prompts.
  """
  shape = (history.shape[0], plan.num_groups, plan.group_size)
  history = jnp.broadcast_to(history[:, None, None], (*shape, history.shape[1]))
  log_probs = jnp.zeros((*shape, num_new), jnp.float32)
  first = jnp.arange(plan.group_size) == 0  # else all beams would go the same way
  return Beams(
    history, log_probs, jnp.broadcast_to(jnp.where(first, 0.0, _NEVER), shape),
    history, log_probs, jnp.full(shape, _NEVER, jnp.float32), jnp.zeros(shape, jnp.int32),
    jnp.zeros(shape, bool), jnp.broadcast_to(done[:, None], shape[:2]),
  )


def advance(
  plan: BeamPlan, knobs: BeamKnobs, beams: Beams, scores, log_probs, lengths, step
) -> tuple[Beams, jax.Array, jax.Array]:
  """One token more for every hypothesis.

  Args:
    plan, knobs: what the search is.
    beams: the beams before that token.
    scores: `[B,G,n,V] float32` filtered log-probabilities of the next token.
    log_probs: like `scores`, unfiltered.
    lengths: `[B] int32`, tokens in each history.
    step: `[] int32`, generated tokens so far.

  Returns:
    The beams after; `tokens [B,num_beams] int32` that the running ones end with, and `parents
    [B,num_beams] int32`, the beam that each one continues.
  """
  groups, tokens, parents = [], [], []
  taken = None
  for g in range(plan.num_groups):
    group = Beams(*(leaf[:, g] for leaf in beams))
    score = scores[:, g]
    if taken is not None:
      score = score - knobs.diversity_penalty * taken[:, None]
    after, token, parent = _advance_group(
      plan, knobs, group, score, log_probs[:, g], lengths, step
    )
    groups.append(after)
    tokens.append(token)
    parents.append(parent + g * plan.group_size)
    if g + 1 < plan.num_groups:
      add = jnp.broadcast_to(jnp.where(group.done, 0.0, 1.0)[:, None], token.shape)
      taken = jnp.zeros(score[:, 0].shape) if taken is None else taken
      taken = jax.vmap(lambda row, i, n: row.at[i].add(n))(taken, token, add)
  stacked = Beams(*(jnp.stack(leaves, axis=1) for leaves in zip(*groups)))
  return stacked, jnp.concatenate(tokens, axis=1), jnp.concatenate(parents, axis=1)


def _advance_group(plan, knobs, group: Beams, scores, log_probs, lengths, step):
  """`advance` for one group; leaves are `[B,n,...]`, `done` is `[B]`."""
  b, n, vocab_size = scores.shape
  total = (scores + group.scores[..., None]).reshape(b, n * vocab_size)
  best, index = jax.lax.top_k(total, plan.num_candidates)
  parent, token = index // vocab_size, (index % vocab_size).astype(jnp.int32)
  is_eos = jnp.isin(token, jnp.asarray(plan.eos_ids, jnp.int32))
  is_last = step + 1 >= knobs.max_new_tokens
  ends = is_eos if plan.length_basis == TOTAL else is_eos | is_last

  own = jnp.take_along_axis(log_probs.reshape(b, n * vocab_size), index, axis=1)
  history = _put(_rows(group.history, parent), token, lengths[:, None])
  own = _put(_rows(group.log_probs, parent), own, step[None, None])

  running_scores = best + jnp.where(is_eos, _NEVER, 0.0)
  running = jax.lax.top_k(running_scores, n)[1]
  running_scores = _rows(running_scores, running)

  def with_entering(pool: Beams, enters, norm) -> Beams:
    final = best / norm + jnp.where(enters, 0.0, _NEVER)
    finished_scores, kept = jax.lax.top_k(jnp.concatenate([pool.finished_scores, final], axis=1), n)

    def merge(old, new):
      return _rows(jnp.concatenate([old, new], axis=1), kept)

    length = jnp.full(token.shape, step + 1, jnp.int32)
    return pool._replace(
      finished_history=merge(pool.finished_history, history),
      finished_log_probs=merge(pool.finished_log_probs, own), finished_scores=finished_scores,
      finished_length=merge(pool.finished_length, length),
      is_finished=merge(pool.is_finished, enters))

  is_first = jnp.arange(plan.num_candidates) < n
  so_far = step + 1
  if plan.length_basis == TOTAL:
    so_far = lengths  # of each row, before this token
  pool = with_entering(group, ends & is_first[None], _column(knobs.norms[so_far]))
  reference = so_far
  if plan.early_stopping == "never":
    longest = so_far + knobs.max_new_tokens - (step + 1)
    if plan.length_basis == TOTAL:
      longest = longest + 1
    reference = jnp.where(knobs.longer_is_better, longest, so_far)
  highest = best[:, 0] if plan.length_basis == TOTAL else running_scores[:, 0]
  possible = highest / knobs.norms[reference]
  worst = jnp.where(jnp.all(pool.is_finished, axis=1), pool.finished_scores[:, -1], _NEVER)
  done = (possible <= worst) | jnp.all(ends, axis=1)
  if plan.early_stopping is True:
    done = done | jnp.all(pool.is_finished, axis=1)
  if plan.length_basis == TOTAL:
    runs_on = ~is_eos & (jnp.cumsum(~is_eos, axis=1) <= n)
    enters = runs_on & is_last & ~done[:, None]
    pool = with_entering(pool, enters, _column(knobs.norms[lengths + 1]))
    done = done | is_last

  after = pool._replace(
    history=_rows(history, running), log_probs=_rows(own, running), scores=running_scores,
    done=done | group.done)
  frozen = Beams(*(
    jnp.where(group.done.reshape(-1, *(1,) * (new.ndim - 1)), old, new)
    for old, new in zip(group, after)
  ))
  return frozen, _rows(token, running), _rows(parent, running)


def _column(norms):
  """One norm, or one of each row, beside the row's candidates."""
  return norms[:, None] if norms.ndim else norms


def reorder(cache_part, parents):
  """Rows `[B*n,...]` of a cache in the order of `parents [B,n]`, each below n."""
  b, n = parents.shape
  return _rows(cache_part.reshape(b, n, *cache_part.shape[1:]), parents).reshape(cache_part.shape)


def _rows(x, index):
  """`x[b, index[b, i]]`, for `x [B,n,...]` and `index [B,i]`."""
  return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def _put(x, value, at):
  """`x [B,n,M]` with `value [B,n]` at the last axis' index `at`."""
  here = jnp.arange(x.shape[-1]) == at[..., None]
  return jnp.where(here, value[..., None], x)
