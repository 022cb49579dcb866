"""Generation from prompts, on the host: batches, buckets of lengths, streaming, results."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.data.supervised import encode_behind, front_ids
from lmops_jax.decoding import loop as loop_lib
from lmops_jax.decoding import prefixes
from lmops_jax.decoding import text as text_lib
from lmops_jax.decoding.constraints import Constraint
from lmops_jax.decoding.lengths import bucket
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt, checked, padded
from lmops_jax.decoding.results import Generated, Watched, on_host, read_beams, read_rows
from lmops_jax.mesh.meshes import Partitioner, activated, shards_of
from lmops_jax.models.cache import Prefix
from lmops_jax.models.transformer import unstack_layers

GREEDY = GenerationOptions()


class Generator:
  """Generates with one model. Programs are compiled when first needed and kept.

  A program serves all prompts of a bucket of lengths and all values of numeric options; a new one
  is compiled for another number of rows (in powers of two), another bucket, also of the number of
  vectors in prompts, and for other kinds of options (which filters, k of top-k, how many beams,
  which end tokens).

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
    count_padding: bool = False,
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
      count_padding: let positions of new tokens count the padding that stood in front of a prompt
        if all prompts of a call were one batch padded on the left, as Hugging Face's port of
        Kosmos-2 does with a cache. A short prompt then gets other answers than alone; the default
        counts real tokens.

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
    self._count_padding = count_padding
    self.params = for_decoding(model, nn.unbox(params), partitioner)
    self._prefill = jax.jit(
      functools.partial(loop_lib.prefill, model), static_argnums=(0, 1)
    )
    self._decode = jax.jit(
      functools.partial(loop_lib.decode, model), static_argnums=0, donate_argnums=3
    )

  @property
  def vocab_size(self) -> int:
    """V of the model."""
    return self._model.config.vocab_size

  def with_params(self, params) -> Generator:
    """The same generator for other parameters of its model; the two share their programs."""
    other = copy.copy(self)
    other.params = for_decoding(self._model, nn.unbox(params), self._partitioner)
    return other

  @property
  def num_programs(self) -> int:
    """Programs compiled so far."""
    return self._prefill._cache_size() + self._decode._cache_size()

  def generate(
    self,
    texts: Sequence[str | Prompt],
    options: GenerationOptions = GREEDY,
    stop: str | Sequence[str] = (),
    callback: Callable[[int, str], bool | None] | None = None,
    row_ids: Sequence[int] | None = None,
    *,
    add_special: bool = True,
    prefix: Prefix | None = None,
    constraint: Constraint | None = None,
    capacity: int = 0,
  ) -> list[text_lib.Generation]:
    """Continues texts.

    Args:
      texts: prompts; those with vectors as `Prompt`.
      options: how tokens are chosen.
      stop: strings that end a text, which is cut before them. Beam search does not end at them;
        only its texts are cut.
      callback: called as `callback(i, piece)` with the text of result `i` as it comes; the pieces
        together are its text. It returns True to end this result. Beam search has one piece.
      row_ids: see `generate_ids`.
      add_special: put in front of every text what the tokenizer puts there, such as a BOS: once,
        even if the text begins with it, and never behind a prefix. False leaves texts as they are,
        which suits what a chat template wrote. A `Prompt` is left as it is in any case.
      prefix, constraint, capacity: see `generate_ids`.

    Returns:
      As `generate_ids`, with texts.

    Raises:
      ValueError: as `generate_ids`; or without tokenizer.
    """
    if self._tokenizer is None:
      raise ValueError("Generator has no tokenizer; give it one, or call generate_ids with ids.")
    stop = text_lib.check_stop(stop)
    front = front_ids(self._tokenizer) if add_special and prefix is None else []
    prompts = [
      text if isinstance(text, Prompt) else Prompt(encode_behind(front, self._tokenizer, text))
      for text in texts
    ]
    streams = [
      text_lib.TextStream(self._tokenizer, stop, _words_at_the_end(prompt))
      for prompt in prompts for _ in range(options.num_return_sequences)
    ]

    def watch(i, ids):
      piece = streams[i].add(ids)
      wanted = callback(i, piece) if callback and piece else None
      return bool(wanted) or streams[i].stopped

    live = (stop or callback) and options.num_beams == 1
    results = self.generate_ids(
      prompts, options, watch if live else None, row_ids, prefix, constraint, capacity
    )
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
    prompts: Sequence[Prompt | Sequence[int]],
    options: GenerationOptions = GREEDY,
    callback: Callable[[int, list[int]], bool | None] | None = None,
    row_ids: Sequence[int] | None = None,
    prefix: Prefix | None = None,
    constraint: Constraint | None = None,
    capacity: int = 0,
  ) -> list[Generated]:
    """Continues prompts of token ids, and vectors in the place of some.

    Args:
      prompts: of any lengths and numbers of vectors; an empty one becomes the tokenizer's BOS
        token.
      options: how tokens are chosen.
      callback: called as `callback(i, ids)` with the new ids of result `i` as they come, some at a
        time; it returns True to end this result. Beam search, which may change all tokens until the
        end, calls it once.
      row_ids: a number for each prompt; its random numbers derive from that and the seed, and not
        from the other prompts. None counts from 0.
      prefix: made by `prefixes.read_groups`, in front of every prompt. Repetition penalty and
        n-grams do not look at it.
      constraint: what all answers keep to, see `constraints`.
      capacity: new tokens to have room for if `options.max_new_tokens` is less, so that one program
        serves calls with different numbers of them.

    Returns:
      For each prompt in order its `num_return_sequences` results.

    Raises:
      ValueError: see `checked_prompts` and `Constraint.check`; or if the constraint leaves fewer
        answers than are asked for, or the model's logits are not finite.
    """
    bos_id = None if self._tokenizer is None else self._tokenizer.bos_id
    prompts = checked_prompts(self._model.config, prompts, options, bos_id, prefix)
    row_ids = list(range(len(prompts))) if row_ids is None else list(row_ids)
    if len(row_ids) != len(prompts):
      raise ValueError(f"{len(row_ids)} row_ids are given for {len(prompts)} prompts.")
    plan = loop_lib.plan_of(options, self._eos_ids(options))
    if constraint is not None:
      constraint.check(self._model.config, options, plan.eos_ids)
    at_once = max(1, self._batch_size // plan.copies)
    # Rows of like length together; results go back to the order of the prompts.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[Generated | None] = [None] * (len(prompts) * options.num_return_sequences)
    for first in range(0, len(order), at_once):
      rows = order[first : first + at_once]
      for place, generated in self._batch(
        prompts, row_ids, rows, plan, options, callback, prefix, constraint, capacity):
        results[place] = generated
    return results

  def _eos_ids(self, options):
    if options.eos_ids is not None:
      return tuple(sorted(set(options.eos_ids)))
    stop_ids = () if self._tokenizer is None else self._tokenizer.stop_ids
    return tuple(sorted(set(stop_ids)))

  def _batch(
    self, prompts, row_ids, rows, plan, options, callback, prefix, constraint, capacity,
  ):
    """Generates for some of the prompts; yields places among the results, and results."""
    of_rows = [prompts[i] for i in rows]
    width = min(bucket(max(map(len, of_rows))), self._model.config.max_length)
    num_new = bucket(max(options.max_new_tokens, capacity))
    size = self._num_rows(len(rows), plan.copies)
    batch = padded(of_rows, size, width, self._padding)
    batch.valid[len(rows) :, -1] = True  # a row has at least one token
    identifiers = np.zeros(size, np.int32)
    identifiers[: len(rows)] = [row_ids[i] for i in rows]
    exists = np.arange(size) < len(rows)
    padding = None
    if self._count_padding:
      padding = np.zeros(size, np.int32)
      padding[: len(rows)] = max(map(len, prompts)) - np.array([len(prompt) for prompt in of_rows])
    knobs = loop_lib.knobs_of(options, num_new, width)
    with activated(self._partitioner):
      batch, identifiers, exists, padding = jax.tree.map(
        self._put, (batch, identifiers, exists, padding))
      state = self._prefill(
        plan, num_new, self.params, knobs, batch.tokens, batch.valid, identifiers, exists, prefix,
        batch.vectors, batch.vector_index, constraint, padding,
      )
      watched = Watched(callback, rows, plan, options) if callback and not plan.beam else None
      stopped = np.zeros((size, plan.copies), bool)
      step = 1
      if watched:
        stopped |= watched.look(state)
      while step < options.max_new_tokens and not self._all_done(state, stopped):
        step = options.max_new_tokens
        if watched:
          step = min(watched.seen + self._chunk, step)
        state = self._decode(
          plan, self.params, knobs, state, np.int32(step), self._put(stopped), prefix, constraint
        )
        if watched:
          stopped |= watched.look(state)
    prompt_lengths = list(map(len, of_rows))
    read = read_beams if plan.beam else read_rows
    places = []
    for row, answers in enumerate(read(state, prompt_lengths, plan, options, stopped)):
      if len(answers) < options.num_return_sequences:
        raise ValueError(
          f"the constraint leaves {len(answers)} answers to prompt {rows[row]}, and decoding."
          f"GenerationOptions.num_return_sequences={options.num_return_sequences}; ask for fewer, "
          "or search with more beams."
        )
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
    return bool(np.all(on_host(state.done) | stopped))

  def _put(self, array):
    """The same array, known to every process, with its rows over the mesh's batch axes."""
    if self._partitioner is None:
      return jnp.asarray(array)
    sharding = self._partitioner.batch_sharding(array.ndim)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _words_at_the_end(prompt: Prompt) -> list[int]:
  """The ids behind the last vector."""
  slots = np.flatnonzero(prompt.slots)
  return [int(token) for token in prompt.ids[slots[-1] + 1 if slots.size else 0 :]]


def checked_prompts(
  config, prompts: Sequence[Prompt | Sequence[int]], options: GenerationOptions,
  bos_id: int | None = None, prefix: Prefix | None = None,
) -> list[Prompt]:
  """The prompts as a model can continue them, an empty one as BOS; needs no parameters.

  The last new token is not read, so a prompt with its new tokens may have one token more than the
  model has positions.

  Raises:
    ValueError: for an empty prompt without BOS token, ids that the model does not have, vectors
      that do not fit (`prompts.checked`), or a prompt that is too long with `max_new_tokens`; names
      the prompt by its index.
  """
  end = 0
  if prefix is not None:
    prefixes.check_model(config, prefix)
    end = int(prefix.end)
  ready = []
  for i, prompt in enumerate(prompts):
    prompt = checked(prompt, config.token_width, f"prompt {i}")
    if not len(prompt):
      if bos_id is None or prefix is not None:
        raise ValueError(
          f"prompt {i} is empty and there is no BOS token to begin with; give it some text."
        )
      prompt = Prompt([bos_id])
    num_read = len(prompt) + options.max_new_tokens - 1
    if prefix is not None:
      prefixes.check_length(config, end, num_read, f"prompt {i}")
    elif num_read > config.max_length:
      together = "" if len(prompt) > config.max_length else (
        f" and decoding.GenerationOptions.max_new_tokens={options.max_new_tokens} more"
      )
      raise ValueError(
        f"prompt {i} has {len(prompt)} tokens{together}, and the model's context is "
        f"{config.max_length} tokens; shorten the prompt or ask for fewer new tokens."
      )
    worst = max(prompt.ids) if min(prompt.ids) >= 0 else min(prompt.ids)
    if not 0 <= worst < config.vocab_size:
      raise ValueError(
        f"prompt {i} has token id {worst}, which is not among the model's {config.vocab_size} "
        "ids; use the model's own tokenizer."
      )
    ready.append(prompt)
  return ready


def for_decoding(model, params, partitioner: Partitioner | None = None):
  """Parameters placed on the mesh, layers apart, matrices in the dtype of the products.

  Args:
    model: `Transformer`.
    params: its parameters, unboxed, with stacked or unstacked layers.
    partitioner: the mesh; None is the default device.
  """
  if partitioner is not None and not isinstance(params["layers"], tuple):
    abstract = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    )
    params = jax.device_put(params, partitioner.shardings(abstract, uneven="whole"))
  params = unstack_layers(params)
  dtype = jnp.dtype(model.config.dtype)

  def cast(leaf):
    # The model would cast matrices at each use; vectors of norms are used in float32.
    leaf = jnp.asarray(leaf)
    return leaf.astype(dtype) if leaf.ndim > 1 and leaf.dtype != dtype else leaf

  return jax.tree.map(cast, params)
