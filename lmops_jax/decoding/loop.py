"""The two compiled programs of generation: `prefill` reads the prompts, `decode` goes on.

`decode` is one `lax.while_loop` over tokens: the model with its cache, the filters, the choice. It
ends when all rows are done or `stop_at` tokens are there; all three are values, not shapes, so that
the same program serves any number of tokens and any temperature. The state that it takes is
donated: the cache is updated in place.

Letters: R rows of the model's batch, which are B prompts times c copies (beams, or answers sampled
for one prompt); M slots for prompt and new tokens, N of them for new ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding import beam as beam_lib
from lmops_jax.decoding import sampling
from lmops_jax.decoding.constraints import Constraint
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.models.cache import KVCache, Prefix, constrain_heads, empty_cache
from lmops_jax.models.partitioning import constrain


class Plan(NamedTuple):
  """What a program is compiled for; hashable.

  Attributes:
    copies: c.
    eos_ids: tokens that end a row.
    repetition, min_new, scaled, top_p, min_p: which filters there are.
    ngram: `no_repeat_ngram`.
    top_k: as in the options.
    sampled: whether tokens are drawn; else the best ones are taken.
    beam: the plan of beam search, or None.
    mixed: whether rows differ in what they need of `sampled`, `scaled` and `top_p`, as their own
      temperature and top_p say; a row gets what it would without `mixed`.
  """

  copies: int
  eos_ids: tuple[int, ...]
  repetition: bool
  ngram: int
  min_new: bool
  sampled: bool
  scaled: bool
  top_k: int
  top_p: bool
  min_p: bool
  beam: beam_lib.BeamPlan | None
  mixed: bool = False


class Knobs(NamedTuple):
  """Numbers of the options that change without a new program."""

  repetition_penalty: jax.Array
  min_new_tokens: jax.Array
  temperature: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  seed: jax.Array
  beam: beam_lib.BeamKnobs | None


class Rows(NamedTuple):
  """Tokens chosen so far, without beam search.

  Attributes:
    history: `[R,M] int32`, prompt and new tokens, then anything.
    log_probs: `[R,N] float32` of new tokens, unfiltered.
    num_new: `[R] int32`.
    done: `[R] bool`.
  """

  history: jax.Array
  log_probs: jax.Array
  num_new: jax.Array
  done: jax.Array


class State(NamedTuple):
  """The state between two tokens.

  Attributes:
    cache: keys and values of all tokens but the last, R rows.
    token: `[R] int32`, the last one.
    prompt_length: `[B] int32`.
    row_id: `[B] int32`, from which random numbers derive.
    step: `[] int32`, tokens chosen.
    chosen: `Rows` or `beam.Beams`.
    machine: of a constraint, its states, leaves `[R,...]`; None without one.
    padding: `[B] int32`, columns of padding that count into the positions of new tokens; None if
      none do.
  """

  cache: KVCache
  token: jax.Array
  prompt_length: jax.Array
  row_id: jax.Array
  step: jax.Array
  chosen: Rows | beam_lib.Beams
  machine: Any = None
  padding: jax.Array | None = None

  @property
  def done(self) -> jax.Array:
    """`[B,c] bool`; with beams, whether the whole search is done."""
    if isinstance(self.chosen, Rows):
      return self.chosen.done.reshape(self.prompt_length.shape[0], -1)
    done = jnp.all(self.chosen.done, axis=1, keepdims=True)
    return jnp.broadcast_to(done, (done.shape[0], self.token.shape[0] // done.shape[0]))


def plan_of(options: GenerationOptions, eos_ids: tuple[int, ...]) -> Plan:
  """The program that the options need."""
  beam = None
  if options.num_beams > 1:
    beam = beam_lib.BeamPlan(
      options.num_beams, options.num_beam_groups, eos_ids, options.early_stopping,
      options.length_basis,
    )
  return Plan(
    copies=options.num_beams if beam else options.num_return_sequences,
    eos_ids=eos_ids,
    repetition=options.repetition_penalty != 1,
    ngram=options.no_repeat_ngram,
    min_new=options.min_new_tokens > 0 and bool(eos_ids),
    sampled=options.temperature > 0,
    scaled=options.temperature not in (0, 1),
    top_k=options.top_k,
    top_p=options.top_p < 1,
    min_p=options.min_p > 0,
    beam=beam,
  )


def knobs_of(options: GenerationOptions, num_new: int, width: int = 0) -> Knobs:
  """The numbers of the options on the host, for N new slots behind prompts of at most `width`."""
  beam = None
  if options.num_beams > 1:
    beam = beam_lib.knobs(
      options.length_penalty, options.diversity_penalty, options.max_new_tokens,
      num_new if options.length_basis == beam_lib.GENERATED else width + num_new,
    )
  return Knobs(
    np.float32(options.repetition_penalty), np.int32(options.min_new_tokens),
    np.float32(options.temperature), np.float32(options.top_p), np.float32(options.min_p),
    np.uint32(options.seed), beam,
  )


def prefill(
  model, plan: Plan, num_new: int, params, knobs, tokens, valid, row_id, exists,
  prefix: Prefix | None = None, vectors=None, vector_index=None,
  constraint: Constraint | None = None, padding=None,
) -> State:
  """Reads the prompts and chooses the first token.

  Args:
    model: `Transformer`, or an object with `config` and the same `apply`.
    plan: static.
    num_new: N, static.
    params: the model's parameters.
    knobs: see `knobs_of`.
    tokens: `[B,P] int32`.
    valid: `[B,P] bool`, False for padding on either side; a row has at least one token.
    row_id: `[B] int32`.
    exists: `[B] bool`, False for a row that only fills the batch.
    prefix: what stands in front of every row.
    vectors, vector_index: of the prompts, see `prompts.Padded`.
    constraint: that new tokens keep to.
    padding: see `State`.
  """
  b, p = tokens.shape
  cache = empty_cache(model.config, b, p + num_new)
  positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
  hidden, cache = model.apply(
    {"params": params}, tokens, cache, positions=positions + _start(prefix), valid=valid,
    fresh=True, shared=prefix, vectors=vectors, vector_index=vector_index, method="extend",
  )
  length = jnp.sum(valid, axis=1).astype(jnp.int32)
  last = p - 1 - jnp.argmax(valid[:, ::-1], axis=1)
  hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  logits = model.apply({"params": params}, hidden, method="unembed")

  # Tokens without the padding between them, new ones to follow right behind.
  where = jnp.where(valid, positions, p + num_new)
  if vector_index is not None:  # no vector is a word, nor are two of them the same
    tokens = jnp.where(vector_index < 0, tokens, model.config.vocab_size + positions)
  history = jnp.zeros((b, p + num_new), jnp.int32)
  history = jax.vmap(lambda row, i, t: row.at[i].set(t, mode="drop"))(history, where, tokens)
  if plan.beam:
    chosen = beam_lib.start(plan.beam, history, num_new, ~exists)
  else:
    chosen = Rows(
      _repeat(history, plan.copies), jnp.zeros((b * plan.copies, num_new), jnp.float32),
      jnp.zeros(b * plan.copies, jnp.int32), _repeat(~exists, plan.copies),
    )
  cache = cache._replace(**{
    name: jax.tree.map(lambda x: _repeat(x, plan.copies), getattr(cache, name))
    for name in ("keys", "values", "positions", "valid", "branch")
  })
  machine = None if constraint is None else jax.tree.map(
    lambda x: jnp.broadcast_to(x, (b * plan.copies, *jnp.shape(x))), constraint.start()
  )
  state = State(
    cache, jnp.zeros(b * plan.copies, jnp.int32), length, row_id, jnp.zeros((), jnp.int32), chosen,
    machine, padding,
  )
  logits = _repeat(logits, plan.copies)
  return _placed(_choose(plan, knobs, state, logits, constraint, reorder=False))


def decode(
  model, plan: Plan, params, knobs, state: State, stop_at, stopped, prefix: Prefix | None = None,
  constraint: Constraint | None = None,
) -> State:
  """Chooses tokens until all rows are done or there are `stop_at` of them.

  Args:
    model, plan, params, knobs: as in `prefill`.
    state: donated.
    stop_at: `[] int32`, at most N.
    stopped: `[B,c] bool`, rows that the caller ends.
    prefix, constraint: as in `prefill`.
  """
  if isinstance(state.chosen, Rows):
    done = state.chosen.done | stopped.reshape(-1)
    state = state._replace(chosen=state.chosen._replace(done=done))

  return jax.lax.while_loop(
    lambda state: (state.step < stop_at) & ~jnp.all(state.done),
    lambda state: advance(model, plan, params, knobs, state, prefix, constraint), _placed(state)
  )


def advance(
  model, plan: Plan, params, knobs, state: State, prefix: Prefix | None = None,
  constraint: Constraint | None = None,
) -> State:
  """Reads the last token of every row and chooses the next; arguments as in `decode`."""
  length = state.prompt_length if state.padding is None else state.prompt_length + state.padding
  position = _repeat(length, plan.copies) + state.step - 1 + _start(prefix)
  # A row that is done goes on without effect; its positions stay within the tables.
  hidden, cache = model.apply(
    {"params": params}, state.token[:, None], state.cache, positions=position[:, None],
    shared=prefix, method="extend",
  )
  logits = model.apply({"params": params}, hidden[:, 0], method="unembed")
  state = state._replace(cache=cache)
  return _placed(_choose(plan, knobs, state, logits, constraint, reorder=True))


def _start(prefix):
  """The position at which rows begin."""
  return 0 if prefix is None else prefix.end


def _choose(plan, knobs, state: State, logits, constraint, reorder) -> State:
  """The next token of every row from its logits `[R,V]`."""
  choose = _choose_beams if plan.beam else _choose_tokens
  allowed = None if constraint is None else jax.vmap(constraint.mask)(state.machine)
  state = choose(plan, knobs, state, logits, allowed, reorder)._replace(step=state.step + 1)
  if constraint is None:
    return state
  return state._replace(machine=jax.vmap(constraint.advance)(state.machine, state.token))


def _choose_tokens(plan, knobs, state, logits, allowed, reorder):
  del reorder  # rows stay where they are
  rows = state.chosen
  lengths = _repeat(state.prompt_length, plan.copies) + rows.num_new
  if allowed is not None:
    allowed = allowed | rows.done[:, None]  # which may have come to an end without any token
  scores = _forbidding(plan, knobs, logits, rows.history, lengths, rows.num_new, allowed)
  token = _drawn(plan, knobs, state, scores) if plan.sampled else sampling.best(scores)
  alive = ~rows.done
  here = alive[:, None] & (jnp.arange(rows.history.shape[1])[None] == lengths[:, None])
  column = alive[:, None] & (jnp.arange(rows.log_probs.shape[1])[None] == state.step)
  log_probs = sampling.token_log_probs(logits, token)
  ended = rows.done
  if plan.eos_ids:
    ended = ended | jnp.isin(token, jnp.asarray(plan.eos_ids, jnp.int32))
  chosen = Rows(
    jnp.where(here, token[:, None], rows.history),
    jnp.where(column, log_probs[:, None], rows.log_probs),
    rows.num_new + alive, ended,
  )
  return state._replace(token=token, chosen=chosen)


def _drawn(plan, knobs, state, scores):
  """Tokens `[R] int32` drawn from filtered scores; in a mixed plan the best at temperature 0."""
  temperature = knobs.temperature
  if plan.mixed:
    temperature = jnp.where(knobs.temperature > 0, knobs.temperature, 1)
  filtered = scores / temperature if plan.scaled else scores
  filtered = sampling.top_k(filtered, plan.top_k) if plan.top_k else filtered
  if plan.top_p:
    kept = sampling.top_p(filtered, knobs.top_p)
    # Rounded, all probabilities but the least may make 1.
    filtered = jnp.where(knobs.top_p < 1, kept, filtered) if plan.mixed else kept
  filtered = sampling.min_p(filtered, knobs.min_p) if plan.min_p else filtered
  token = sampling.sample(_keys(plan, knobs, state), filtered)
  return jnp.where(knobs.temperature > 0, token, sampling.best(scores)) if plan.mixed else token


def _choose_beams(plan, knobs, state, logits, allowed, reorder):
  beams = state.chosen
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  lengths = state.prompt_length + state.step
  history = beams.history.reshape(-1, beams.history.shape[-1])
  scores = _forbidding(
    plan, knobs, log_probs, history, _repeat(lengths, plan.copies),
    jnp.broadcast_to(state.step, history.shape[:1]), allowed,
  )
  shape = (*beams.scores.shape, logits.shape[-1])
  beams, token, parents = beam_lib.advance(
    plan.beam, knobs.beam, beams, scores.reshape(shape), log_probs.reshape(shape), lengths,
    state.step,
  )
  cache = state.cache
  if reorder:
    keys, values = jax.tree.map(
      lambda part: beam_lib.reorder(part, parents), (cache.keys, cache.values)
    )
    cache = cache._replace(keys=keys, values=values)
  machine = jax.tree.map(lambda part: beam_lib.reorder(part, parents), state.machine)
  return state._replace(cache=cache, token=token.reshape(-1), chosen=beams, machine=machine)


def _forbidding(plan, knobs, scores, history, lengths, num_new, allowed):
  """The filters that greedy search and beam search have too.

  Where they leave nothing of what a constraint allows, it goes before them.
  """
  unfiltered = scores
  if plan.repetition:
    scores = sampling.repetition_penalty(scores, history, lengths, knobs.repetition_penalty)
  if plan.ngram:
    scores = sampling.no_repeat_ngram(scores, history, lengths, plan.ngram)
  if plan.min_new:
    scores = sampling.forbid_while(scores, plan.eos_ids, num_new < knobs.min_new_tokens)
  if allowed is None:
    return scores
  nothing = ~jnp.any(allowed & (scores > -jnp.inf), axis=-1, keepdims=True)
  return jnp.where(allowed, jnp.where(nothing, unfiltered, scores), -jnp.inf)


def _keys(plan, knobs, state):
  """A key `[R]` for each row, from (seed, row id, copy, step)."""
  seed = jax.random.key(knobs.seed)

  def key(row_id, copy):
    key = jax.random.fold_in(jax.random.fold_in(seed, row_id), copy)
    return jax.random.fold_in(key, state.step)

  copy = jnp.tile(jnp.arange(plan.copies), state.row_id.shape[0])
  return jax.vmap(key)(_repeat(state.row_id, plan.copies), copy)


def _repeat(x, copies):
  """Each of the rows `copies` times, one after the other."""
  return x if copies == 1 else jnp.repeat(x, copies, axis=0)


def _placed(state: State) -> State:
  """Keeps the batch over the mesh's batch axes and heads over its tensor axis."""

  def rows(x):
    return constrain(x, ("batch",) + (None,) * (x.ndim - 1)) if x.ndim else x

  cache = state.cache
  keys, values = jax.tree.map(constrain_heads, (cache.keys, cache.values))
  rest = jax.tree.map(rows, state._replace(cache=cache._replace(keys=(), values=())))
  return rest._replace(cache=rest.cache._replace(keys=keys, values=values))
