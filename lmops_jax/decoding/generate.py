"""Generation from prompts, on the host: batches, buckets of lengths, streaming, results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.data.supervised import encode_behind, front_ids
from lmops_jax.decoding import beam as beam_lib
from lmops_jax.decoding import loop as loop_lib
from lmops_jax.decoding import prefixes
from lmops_jax.decoding import text as text_lib
from lmops_jax.decoding.lengths import bucket
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.mesh.meshes import Partitioner, activated, shards_of
from lmops_jax.models.cache import Prefix
from lmops_jax.models.transformer import unstack_layers

GREEDY = GenerationOptions()


class Generated(NamedTuple):
  """The tokens that follow one prompt.

  Attributes:
    ids: new tokens, with the end token if one ended them.
    logprobs: log-probability of each id under the model's own distribution, `log_softmax(logits)`
      in float32 before temperature and filters, in nats.
    finish_reason: "eos" (an end token), "stop" (the caller ended it) or "length".
    score: what beam search ranks hypotheses by; None without beam search.
  """

  ids: list[int]
  logprobs: list[float]
  finish_reason: str
  score: float | None = None


class Generator:
  """Generates with one model. Programs are compiled when first needed and kept.

  A program serves all prompts of a bucket of lengths and all values of numeric options; a new one
  is compiled for another number of rows (in powers of two), another bucket, and for other kinds of
  options (which filters, k of top-k, how many beams, which end tokens).

  Attributes:
    params: the parameters as the programs take them.
  """

  def __init__(
    self,
    model,
    params,
    tokenizer=None,
    partitioner: Partitioner | None = None,
    *,
    batch_size: int = 64,
    padding: str = "left",
    chunk: int = 8,
  ):
    """
    Args:
      model: `Transformer`.
      params: its parameters, with stacked or unstacked layers, boxed or not.
      tokenizer: needed by `generate`, and for the BOS token of empty prompts and the end tokens.
      partitioner: mesh to run on; None is the default device.
      batch_size: most rows at a time, beams and sampled answers included.
      padding: side on which shorter prompts are padded; the results are the same.
      chunk: tokens between two looks at the text, when streaming or with stop strings.

    Raises:
      ValueError: for arguments that make no sense.
    """
    if padding not in ("left", "right"):
      raise ValueError(f'Generator has padding={padding!r}, which is neither "left" nor "right".')
    for name, value in (("batch_size", batch_size), ("chunk", chunk)):
      if value < 1:
        raise ValueError(f"Generator has {name}={value}, which must be at least 1.")
    if not model.config.causal:
      raise ValueError(
        "models.TransformerConfig.causal is False: an encoder cannot continue a text; load a "
        "decoder to generate."
      )
    self._model = model
    self._tokenizer = tokenizer
    self._partitioner = partitioner
    self._batch_size = batch_size
    self._padding = padding
    self._chunk = chunk
    self.params = _for_decoding(model, nn.unbox(params), partitioner)
    self._prefill = jax.jit(
      functools.partial(loop_lib.prefill, model), static_argnums=(0, 1)
    )
    self._decode = jax.jit(
      functools.partial(loop_lib.decode, model), static_argnums=0, donate_argnums=3
    )

  @property
  def num_programs(self) -> int:
    """Programs compiled so far."""
    return self._prefill._cache_size() + self._decode._cache_size()

  def generate(
    self,
    texts: Sequence[str],
    options: GenerationOptions = GREEDY,
    stop: str | Sequence[str] = (),
    callback: Callable[[int, str], bool | None] | None = None,
    row_ids: Sequence[int] | None = None,
    *,
    add_special: bool = True,
    prefix: Prefix | None = None,
  ) -> list[text_lib.Generation]:
    """Continues texts.

    Args:
      texts: prompts.
      options: how tokens are chosen.
      stop: strings that end a text, which is cut before them. Beam search does not end at them;
        only its texts are cut.
      callback: called as `callback(i, piece)` with the text of result `i` as it comes; the pieces
        together are its text. It returns True to end this result. Beam search has one piece.
      row_ids: see `generate_ids`.
      add_special: put in front of every text what the tokenizer puts there, such as a BOS: once,
        even if the text begins with it, and never behind a prefix. False leaves texts as they are,
        which suits what a chat template wrote.
      prefix: see `generate_ids`.

    Returns:
      As `generate_ids`, with texts.

    Raises:
      ValueError: as `generate_ids`; or without tokenizer.
    """
    if self._tokenizer is None:
      raise ValueError("Generator has no tokenizer; give it one, or call generate_ids with ids.")
    stop = text_lib.check_stop(stop)
    front = front_ids(self._tokenizer) if add_special and prefix is None else []
    prompts = [encode_behind(front, self._tokenizer, text) for text in texts]
    streams = [
      text_lib.TextStream(self._tokenizer, stop, prompt)
      for prompt in prompts for _ in range(options.num_return_sequences)
    ]

    def watch(i, ids):
      piece = streams[i].add(ids)
      wanted = callback(i, piece) if callback and piece else None
      return bool(wanted) or streams[i].stopped

    live = (stop or callback) and options.num_beams == 1
    results = self.generate_ids(prompts, options, watch if live else None, row_ids, prefix)
    generations = []
    for i, (result, stream) in enumerate(zip(results, streams, strict=True)):
      piece = "" if live else stream.add(result.ids)
      piece += stream.finish()
      if callback and piece:
        callback(i, piece)
      n = len(stream.ids)
      reason = "stop" if stream.stopped else result.finish_reason
      generations.append(
        text_lib.Generation(stream.text, stream.ids, result.logprobs[:n], reason, result.score)
      )
    return generations

  def generate_ids(
    self,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions = GREEDY,
    callback: Callable[[int, list[int]], bool | None] | None = None,
    row_ids: Sequence[int] | None = None,
    prefix: Prefix | None = None,
  ) -> list[Generated]:
    """Continues prompts of token ids.

    Args:
      prompts: of any lengths; an empty one becomes the tokenizer's BOS token.
      options: how tokens are chosen.
      callback: called as `callback(i, ids)` with the new ids of result `i` as they come, some at a
        time; it returns True to end this result. Beam search, which may change all tokens until the
        end, calls it once.
      row_ids: a number for each prompt; its random numbers derive from that and the seed, and not
        from the other prompts. None counts from 0.
      prefix: made by `prefixes.read_groups`, in front of every prompt. Repetition penalty and
        n-grams do not look at it.

    Returns:
      For each prompt in order its `num_return_sequences` results.

    Raises:
      ValueError: see `checked_prompts`; or if the model's logits are not finite.
    """
    bos_id = None if self._tokenizer is None else self._tokenizer.bos_id
    prompts = checked_prompts(self._model.config, prompts, options, bos_id, prefix)
    row_ids = list(range(len(prompts))) if row_ids is None else list(row_ids)
    if len(row_ids) != len(prompts):
      raise ValueError(f"{len(row_ids)} row_ids are given for {len(prompts)} prompts.")
    plan = loop_lib.plan_of(options, self._eos_ids(options))
    at_once = max(1, self._batch_size // plan.copies)
    # Rows of like length together; results go back to the order of the prompts.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[Generated | None] = [None] * (len(prompts) * options.num_return_sequences)
    for first in range(0, len(order), at_once):
      rows = order[first : first + at_once]
      for place, generated in self._batch(
        prompts, row_ids, rows, plan, options, callback, prefix):
        results[place] = generated
    return results

  def _eos_ids(self, options):
    if options.eos_ids is not None:
      return tuple(sorted(set(options.eos_ids)))
    stop_ids = () if self._tokenizer is None else self._tokenizer.stop_ids
    return tuple(sorted(set(stop_ids)))

  def _batch(self, prompts, row_ids, rows, plan, options, callback, prefix):
    """Generates for some of the prompts; yields places among the results, and results."""
    longest = max(len(prompts[i]) for i in rows)
    width = min(bucket(longest), self._model.config.max_length)
    num_new = bucket(options.max_new_tokens)
    size = self._num_rows(len(rows), plan.copies)
    tokens, valid = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
    valid[:, -1] = True
    for row, i in enumerate(rows):
      n = len(prompts[i])
      place = slice(width - n, None) if self._padding == "left" else slice(n)
      valid[row] = False
      tokens[row, place], valid[row, place] = prompts[i], True
    identifiers = np.zeros(size, np.int32)
    identifiers[: len(rows)] = [row_ids[i] for i in rows]
    exists = np.arange(size) < len(rows)
    knobs = loop_lib.knobs_of(options, num_new)
    with activated(self._partitioner):
      arrays = [self._put(x) for x in (tokens, valid, identifiers, exists)]
      state = self._prefill(plan, num_new, self.params, knobs, *arrays, prefix)
      watched = _Watched(callback, rows, plan, options) if callback and not plan.beam else None
      stopped = np.zeros((size, plan.copies), bool)
      step = 1
      if watched:
        stopped |= watched.look(state)
      while step < options.max_new_tokens and not self._all_done(state, stopped):
        step = options.max_new_tokens
        if watched:
          step = min(watched.seen + self._chunk, step)
        state = self._decode(
          plan, self.params, knobs, state, np.int32(step), self._put(stopped), prefix
        )
        if watched:
          stopped |= watched.look(state)
    prompt_lengths = [len(prompts[i]) for i in rows]
    read = _read_beams if plan.beam else _read_rows
    places = []
    for row, answers in enumerate(read(state, prompt_lengths, plan, options, stopped)):
      for j, generated in enumerate(answers):
        place = rows[row] * options.num_return_sequences + j
        if np.isnan(generated.logprobs).any():
          raise ValueError(
            f"the model's logits after prompt {rows[row]} are not finite; check its parameters, or "
            "use a wider models.TransformerConfig.dtype."
          )
        if plan.beam and callback:
          callback(place, generated.ids)
        places.append((place, generated))
    return places

  def _num_rows(self, num_prompts, copies):
    """How many prompts a batch holds: the next power of two, in a multiple of the mesh's shards."""
    size = 1 << (num_prompts - 1).bit_length()
    size = max(num_prompts, min(size, max(1, self._batch_size // copies)))
    shards = shards_of(self._partitioner)
    return -(-size // shards) * shards

  def _all_done(self, state, stopped):
    return bool(np.all(_host(state.done) | stopped))

  def _put(self, array):
    """The same array, known to every process, with its rows over the mesh's batch axes."""
    if self._partitioner is None:
      return jnp.asarray(array)
    sharding = self._partitioner.batch_sharding(array.ndim)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class _Watched:
  """Hands new tokens of a batch to the callback and remembers which rows it ended."""

  def __init__(self, callback, rows, plan, options):
    self._callback = callback
    self._rows = rows
    self._copies = plan.copies
    self._per_prompt = options.num_return_sequences
    self._given = np.zeros((len(rows), plan.copies), int)
    self._ended = np.zeros((len(rows), plan.copies), bool)
    self.seen = 0  # steps

  def look(self, state):
    """Calls back for what is new; returns which rows the callback has ended, `[B,c]`."""
    chosen = state.chosen
    size = state.prompt_length.shape[0]
    num_new = _host(chosen.num_new).reshape(size, self._copies)
    history = _host(chosen.history).reshape(size, self._copies, -1)
    lengths = _host(state.prompt_length)
    self.seen = int(_host(state.step))
    for row, i in enumerate(self._rows):
      for j in range(self._copies):
        given, there = self._given[row, j], num_new[row, j]
        if given < there and not self._ended[row, j]:
          ids = history[row, j, lengths[row] + given : lengths[row] + there].tolist()
          self._given[row, j] = there
          self._ended[row, j] = bool(self._callback(i * self._per_prompt + j, ids))
    ended = np.zeros((size, self._copies), bool)
    ended[: len(self._rows)] = self._ended
    return ended


def _read_rows(state, prompt_lengths, plan, options, stopped):
  """`Generated` for each prompt and answer, from the final state."""
  del options
  rows = jax.tree.map(_host, state.chosen)
  for b, length in enumerate(prompt_lengths):
    answers = []
    for j in range(plan.copies):
      r = b * plan.copies + j
      n = int(rows.num_new[r])
      ids = rows.history[r, length : length + n].tolist()
      reason = "stop" if stopped[b, j] else "eos" if ids[-1] in plan.eos_ids else "length"
      answers.append(Generated(ids, rows.log_probs[r, :n].tolist(), reason))
    yield answers


def _read_beams(state, prompt_lengths, plan, options, stopped):
  """As `_read_rows`: the best of all groups' finished hypotheses."""
  del stopped
  beams: beam_lib.Beams = jax.tree.map(_host, state.chosen)

  def flat(x):
    return x.reshape(x.shape[0], plan.beam.num_beams, *x.shape[3:])

  scores, lengths = flat(beams.finished_scores), flat(beams.finished_length)
  history, log_probs = flat(beams.finished_history), flat(beams.finished_log_probs)
  for b, length in enumerate(prompt_lengths):
    answers = []
    for k in np.argsort(-scores[b], kind="stable")[: options.num_return_sequences]:
      n = int(lengths[b, k])
      ids = history[b, k, length : length + n].tolist()
      reason = "eos" if ids[-1] in plan.eos_ids else "length"
      answers.append(Generated(ids, log_probs[b, k, :n].tolist(), reason, float(scores[b, k])))
    yield answers


def checked_prompts(
  config, prompts: Sequence[Sequence[int]], options: GenerationOptions, bos_id: int | None = None,
  prefix: Prefix | None = None,
) -> list[list[int]]:
  """The prompts as a model can continue them, an empty one as BOS; needs no parameters.

  The last new token is not read, so a prompt with its new tokens may have one token more than the
  model has positions.

  Raises:
    ValueError: for an empty prompt without BOS token, ids that the model does not have, or a prompt
      that is too long with `max_new_tokens`; names the prompt by its index.
  """
  end = 0
  if prefix is not None:
    prefixes.check_model(config, prefix)
    end = int(prefix.end)
  checked = []
  for i, prompt in enumerate(prompts):
    prompt = [int(t) for t in prompt]
    if not prompt:
      if bos_id is None or prefix is not None:
        raise ValueError(
          f"prompt {i} is empty and there is no BOS token to begin with; give it some text."
        )
      prompt = [bos_id]
    num_read = len(prompt) + options.max_new_tokens - 1
    prefixes.check_length(config, end, num_read, f"prompt {i}")
    if prefix is None and num_read > config.max_length:
      together = "" if len(prompt) > config.max_length else (
        f" and decoding.GenerationOptions.max_new_tokens={options.max_new_tokens} more"
      )
      raise ValueError(
        f"prompt {i} has {len(prompt)} tokens{together}, and the model's context is "
        f"{config.max_length} tokens; shorten the prompt or ask for fewer new tokens."
      )
    worst = max(prompt) if min(prompt) >= 0 else min(prompt)
    if not 0 <= worst < config.vocab_size:
      raise ValueError(
        f"prompt {i} has token id {worst}, which is not among the model's {config.vocab_size} "
        "ids; use the model's own tokenizer."
      )
    checked.append(prompt)
  return checked


def _for_decoding(model, params, partitioner):
  """Parameters placed on the mesh, layers apart, matrices in the dtype of the products."""
  if partitioner is not None and not isinstance(params["layers"], tuple):
    abstract = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    )
    params = jax.device_put(params, partitioner.shardings(abstract))
  params = unstack_layers(params)
  dtype = jnp.dtype(model.config.dtype)

  def cast(leaf):
    # The model would cast matrices at each use; vectors of norms are used in float32.
    leaf = jnp.asarray(leaf)
    return leaf.astype(dtype) if leaf.ndim > 1 and leaf.dtype != dtype else leaf

  return jax.tree.map(cast, params)


def _host(array) -> np.ndarray:
  """A copy on the host, of an array of this or of all processes."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)
  return np.array(array)
