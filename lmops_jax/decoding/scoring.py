"""Log-likelihoods of continuations: of answer options after a context, and of whole texts.

Requests that begin alike pay for their common beginning once: it is read into a cache of one row
that all batches attend to. All options of a request are scored in one pass, as branches after its
context. Requests whose options are one token each lie side by side in rows of one width, as
branches that do not see each other; others have a row each, sorted by length into a few widths.
Logits exist only where a continuation's token is predicted.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.decoding import prefixes, sampling
from lmops_jax.decoding.lengths import fine_bucket
from lmops_jax.decoding.prompts import Prompt, checked, common_length, numbered
from lmops_jax.mesh.meshes import activated, shards_of
from lmops_jax.models.cache import Prefix, empty_cache
from lmops_jax.models.cached_attention import shared_in_blocks
from lmops_jax.models.transformer import Transformer, unstack_layers

_MIN_SHARED = 16  # tokens; a shorter common beginning is not worth a cache of its own
_PACKED = 128  # tokens of a row that holds several requests
_LOGITS_TOKENS = 8  # how many tokens of the batch the logits of one predicted token weigh
_SCORE_BYTES = 1 << 28  # of attention scores in memory, at most, in one layer


class Request(NamedTuple):
  """A context and what may follow it.

  Attributes:
    context: token ids, at least one, or a `Prompt` with vectors, in front of all options.
    options: token ids of each continuation, at least one each.
  """

  context: Prompt | Sequence[int]
  options: Sequence[Sequence[int]]


class OptionScorer:
  """Scores continuations with one model; programs are compiled when first needed and kept.

  Attributes:
    params: the parameters as the programs take them.
  """

  def __init__(self, model: Transformer, params, partitioner=None, *, batch_tokens: int = 4096):
    """
    Args:
      model: a causal `Transformer`.
      params: its parameters, with stacked or unstacked layers.
      partitioner: a `mesh.meshes.Partitioner`; None is the default device.
      batch_tokens: most token positions of a batch.

    Raises:
      ValueError: for an encoder, or `batch_tokens` below 1.
    """
    if not model.config.causal:
      raise ValueError(
        "models.TransformerConfig.causal is False: an encoder has no likelihood of a continuation; "
        "load a decoder to score options."
      )
    if batch_tokens < 1:
      raise ValueError(f"batch_tokens={batch_tokens} must be at least 1.")
    self._model, self._partitioner, self._batch_tokens = model, partitioner, batch_tokens
    self.params = unstack_layers(nn.unbox(params))

  def score(
    self, requests: Sequence[Request], progress: Callable[[int], None] | None = None,
    prefix: Prefix | None = None,
  ) -> list[list[np.ndarray]]:
    """Log-probabilities of the tokens of every option, nats.

    Args:
      requests: in any order.
      progress: called with the number of requests done since the last call.
      prefix: made by `prefixes.read_groups`, in front of every context; contexts then have no BOS.

    Returns:
      For each request, for each option `[its tokens] float32`.

    Raises:
      ValueError: if a context or option is empty, an id is outside of the vocabulary, vectors do
        not fit (`prompts.checked`), or there are more tokens (but for an option's last) than the
        model has positions; the sentence names the request by its index.
    """
    return [[scores for scores, _ in row] for row in self.score_and_rank(
      requests, progress, prefix)]

  def score_and_rank(
    self, requests: Sequence[Request], progress: Callable[[int], None] | None = None,
    prefix: Prefix | None = None,
  ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """As `score`, and for each token whether greedy search takes it, `[its tokens] bool`."""
    requests = self._checked(requests, prefix)
    shared = 0 if prefix is not None else _common_prefix(requests)
    if shared:
      prefix = prefixes.read_text(
        self._model, self.params, requests[0].context.part(0, shared), self._partitioner)
    results: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in requests]
    with activated(self._partitioner):
      rows = self._pack([_Row.of(i, request, shared) for i, request in enumerate(requests)])
      for width, targets, part in self._batches(rows, prefix):
        found = self._run(prefix, part, width, targets)
        for row, *of_row in zip(part, *found):
          options = [(i, option) for i in row.requests for option in requests[i].options]
          ends = np.cumsum([len(option) for _, option in options])
          pieces = (np.split(x[: ends[-1]], ends[:-1]) for x in of_row)
          for (i, _), *of_option in zip(options, *pieces):
            results[i].append(tuple(of_option))
        if progress:
          progress(sum(len(row.requests) for row in part))
    return results

  def _pack(self, rows):
    """Puts requests whose options are one token each into common rows, short ones beside long ones.

    A row is wide enough for the longest request, and narrow enough that every device has a row.
    """
    alone = [row for row in rows if any(row.branch)]
    waiting = collections.deque(sorted(
      (row for row in rows if not any(row.branch)), key=lambda row: -row.width))
    if len(waiting) < 2:
      return rows
    shards = shards_of(self._partitioner)
    share = -(-sum(row.width for row in waiting) // shards)
    width = fine_bucket(max(waiting[0].width, min(_PACKED, share)))
    packed = []
    while waiting:
      row = waiting.popleft().as_branch(0, 1)
      while waiting and row.width + waiting[-1].width <= width:
        other = waiting.pop().as_branch(row.width, len(row.requests) + 1)
        row = row.beside(other)
      packed.append(row)
    return alone + packed

  def _checked(self, requests, prefix) -> list[Request]:
    """The requests, each context a `Prompt`."""
    config = self._model.config
    if prefix is not None:
      prefixes.check_model(config, prefix)
    requests = [
      request._replace(context=checked(request.context, config.token_width, f"request {i}"))
      for i, request in enumerate(requests)
    ]
    for i, request in enumerate(requests):
      if not len(request.context) or not request.options or not all(map(len, request.options)):
        raise ValueError(
          f"request {i} has an empty context or option; begin with the model's BOS token and give "
          "every option at least one token."
        )
      longest = len(request.context) + max(map(len, request.options))
      # An option's last token is predicted and never read.
      if prefix is not None:
        prefixes.check_length(config, int(prefix.end), longest - 1, f"request {i}")
      elif longest - 1 > config.max_length:
        raise ValueError(
          f"request {i} has {longest} tokens with its longest option, the model "
          f"{config.max_length} positions, for all but the last; give a shorter text or fewer "
          "demonstrations."
        )
      parts = (request.context.ids, *request.options)
      lowest, largest = min(map(min, parts)), max(map(max, parts))
      if largest >= config.vocab_size or lowest < 0:
        raise ValueError(
          f"request {i} holds id {lowest if lowest < 0 else largest}, outside of the model's "
          f"vocabulary of {config.vocab_size}; encode it with the model's own tokenizer."
        )
    return requests

  def _batches(self, rows, prefix):
    """Yields `(width, targets, rows)` with few shapes, similar rows together."""
    before = 0 if prefix is None else prefix.cache.num_slots
    score_bytes = 4 * self._model.config.num_heads
    shards = shards_of(self._partitioner)
    order = sorted(rows, key=lambda row: (row.width, row.targets))
    start = 0
    while start < len(order):
      width = fine_bucket(order[start].width)
      part = [row for row in order[start:] if row.width <= width]
      targets = fine_bucket(max(row.targets for row in part), 1)
      at_once = width if shared_in_blocks() else before + width
      tokens = min(self._batch_tokens, _SCORE_BYTES // (score_bytes * at_once))
      size = tokens // max(width, _LOGITS_TOKENS * targets)
      size = shards * 2 ** max(0, (size // shards).bit_length() - 1)
      for first in range(0, len(part), size):
        yield width, targets, part[first : first + size]
      start += len(part)

  def _run(self, prefix, rows, width, targets):
    shards = shards_of(self._partitioner)
    size = shards * fine_bucket(-(-len(rows) // shards), 1)
    batch = {
      name: np.zeros((size, length), np.int32)
      for name, length in (
        ("tokens", width), ("positions", width), ("branch", width), ("valid", width),
        ("queries", targets), ("targets", targets),
      )
    }
    for i, row in enumerate(rows):
      n = len(row.tokens)
      batch["tokens"][i, :n], batch["branch"][i, :n] = row.tokens, row.branch
      batch["positions"][i, :n] = row.positions
      batch["valid"][i, :n] = 1
      m = len(row.queries)
      batch["queries"][i, :m], batch["targets"][i, :m] = row.queries, row.answers
    slots = np.zeros((size, width), bool)
    for i, row in enumerate(rows):
      slots[i, : len(row.slots)] = row.slots
    if slots.any():
      parts = [row.contexts for row in rows]
      batch["vectors"], batch["vector_index"] = numbered(slots, parts)
    if self._partitioner is not None:
      batch = self._partitioner.place_batch(batch)
    found = _score(self._model, self.params, prefix, batch)
    return [np.asarray(x)[: len(rows)] for x in found]


class _Row(NamedTuple):
  """Requests without the common beginning: context, then options without their last tokens."""

  requests: list[int]  # their numbers
  tokens: list[int]
  positions: list[int]
  branch: list[int]
  queries: list[int]  # places whose logits predict an option's token
  answers: list[int]  # the tokens predicted there
  slots: list[bool]  # whether a vector stands there
  contexts: list[Prompt]  # one a request, with its vectors

  @classmethod
  def of(cls, index: int, request: Request, shared: int) -> _Row:
    own = request.context.part(shared)
    context = len(own)
    row = cls(
      [index], list(own.ids), list(range(context)), [0] * context, [], [], own.slots.tolist(), [own]
    )
    for number, option in enumerate(request.options, 1):
      row.queries.append(context - 1)
      row.queries.extend(range(len(row.tokens), len(row.tokens) + len(option) - 1))
      row.answers.extend(option)
      row.tokens.extend(option[:-1])
      row.positions.extend(range(context, context + len(option) - 1))
      row.branch.extend([number] * (len(option) - 1))
      row.slots.extend([False] * (len(option) - 1))
    return row

  def as_branch(self, start: int, number: int) -> _Row:
    """The same requests as a branch of a row, from the place `start` on."""
    return self._replace(
      branch=[number] * self.width, queries=[start + query for query in self.queries])

  def beside(self, other: _Row) -> _Row:
    return _Row(*(mine + theirs for mine, theirs in zip(self, other)))

  @property
  def width(self) -> int:
    return len(self.tokens)

  @property
  def targets(self) -> int:
    return len(self.answers)


def total(scores: Sequence[np.ndarray]) -> np.ndarray:
  """Log-likelihood of each option, `[options] float64`, from the tokens' log-probabilities."""
  return np.array([np.sum(score, dtype=np.float64) for score in scores])


def rolling_requests(ids: Sequence[int], first: int, max_length: int) -> list[Request]:
  """Windows that score every token of a text once, each with as much context as fits.

  Args:
    ids: the text's tokens.
    first: token in front of the text (BOS or EOS), which is not scored.
    max_length: positions of the model.

  Returns:
    Windows of up to `max_length` predicted tokens; after the first, a window's context is its
    predecessor's last token, or more if the last window is short.
  """
  whole, requests, done = [first, *ids], [], 0
  while done < len(ids):
    count = min(max_length, len(ids) - done)
    start = max(0, done + count - max_length)
    requests.append(Request(whole[start : done + 1], [whole[done + 1 : done + count + 1]]))
    done += count
  return requests


def _common_prefix(requests: Sequence[Request]) -> int:
  """Tokens and vectors that all contexts begin with; at least one of each one's own is left."""
  if len(requests) < 2:
    return 0
  first = requests[0].context
  length = min(len(request.context) for request in requests) - 1
  for request in requests:
    length = common_length(first, request.context, length)
  return length if length >= _MIN_SHARED else 0


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, shared, batch):
  """Log-probabilities `[R,T] float32` of the targets, and which of them greedy search takes."""
  cache = empty_cache(model.config, *batch["tokens"].shape)
  start = 0 if shared is None else shared.end
  hidden, _ = model.apply(
    {"params": params}, batch["tokens"], cache, positions=batch["positions"] + start,
    valid=batch["valid"] > 0, branch=batch["branch"], shared=shared,
    vectors=batch.get("vectors"), vector_index=batch.get("vector_index"), method="extend",
  )
  hidden = jnp.take_along_axis(hidden, batch["queries"][:, :, None], axis=1)
  logits = model.apply({"params": params}, hidden, method="unembed")
  chosen = jnp.take_along_axis(logits, batch["targets"][:, :, None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1), sampling.best(logits) == batch["targets"]
