"""One evaluation: demonstrations to groups, groups to a prefix, and all rows behind it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lmops_jax.config.setting_types import Positive, PositiveInt, Text, component
from lmops_jax.data.tasks import Example, Task
from lmops_jax.decoding import GenerationOptions, Generator, prefixes
from lmops_jax.decoding.group_store import GroupStore
from lmops_jax.decoding.scoring import OptionScorer
from lmops_jax.evaluation import answers, in_context
from lmops_jax.host.progress import Progress
from lmops_jax.models.cache import Prefix
from lmops_jax.systems.structured_prompting import grouping

EOS = "eos"


@component(module="structured_prompting")
@dataclasses.dataclass(frozen=True)
class Prompting:
  """How demonstrations and rows are put before the model.

  Attributes:
    strategy: one of `grouping.STRATEGIES`.
    group_tokens: the most tokens of a group, BOS included; None is what the model's positions leave
      beside the longest row, which also bounds a larger number.
    separator: text behind each demonstration, or "eos" for the end token (the published separator
      if groups have a common BOS).
    bos: whether groups and rows have a common BOS; None: if the tokenizer puts one before texts.
    front: text in front of every group, behind BOS; rows see it once.
    scale: the weight of a row's own tokens; None is the number of groups.
    temperature: divides the scores of the groups' tokens (APE, arXiv 2502.05431), front apart.
    group_scale: times the temperature the factor of the logarithm of their summed exponentials.
    balanced: take equally many demonstrations of each label.
    normalisation: that of options' scores, see `in_context.evaluate`; "auto" is the papers'.
    spread: leave the groups spread over the mesh's data axis.
    store: a folder for keys and values, so that groups that were read once are not read again; None
      keeps nothing.
    batch_tokens: the most token positions of a batch of rows.
    max_new_tokens, num_beams, length_penalty: settings of the search for open answers.

  Raises:
    ValueError: for values out of range.
  """

  strategy: Literal[grouping.STRATEGIES] = "even"
  group_tokens: PositiveInt | None = None
  separator: Text = in_context.SEPARATOR
  bos: bool | None = None
  front: str = ""
  scale: Positive | None = None
  temperature: Positive = 1.0
  group_scale: Positive = 1.0
  balanced: bool = False
  normalisation: Literal[tuple(n for n in in_context.NORMALISATIONS if n != "null")] = "auto"
  spread: bool = False
  store: Text | None = None
  batch_tokens: PositiveInt = 4096
  max_new_tokens: PositiveInt = 30
  num_beams: PositiveInt = 3
  length_penalty: float = 0.6


class Measured(NamedTuple):
  """What one evaluation found.

  Attributes:
    metric: accuracy, or exact match or F1 of open answers, between 0 and 1.
    predictions: `[N]`, indices of options or texts.
    num_groups, num_tokens, drawn, used, skipped: as in `grouping.Groups`.
    window: tokens of the longest group.
    read_seconds, rows_seconds: time for the groups and for all rows, compilation included.
    cache_bytes: bytes of the groups' keys and values.
  """

  metric: float
  predictions: list[Any]
  num_groups: int
  window: int
  num_tokens: int
  drawn: int
  used: int
  skipped: int
  read_seconds: float
  rows_seconds: float
  cache_bytes: int


class Prompter:
  """A model with its tokenizer, ready to be prompted; programs are compiled once and kept."""

  def __init__(self, model, params, tokenizer, prompting: Prompting, partitioner=None):
    """
    Raises:
      ValueError: for a tokenizer without the BOS or end token that `prompting` asks for.
    """
    self.prompting, self._model, self._tokenizer = prompting, model, tokenizer
    self._partitioner = partitioner
    self._rows = prefixes.rows_partitioner(partitioner, prompting.spread)
    start = in_context.Encoder(tokenizer).start
    if prompting.bos is not False and len(start) > 1:
      raise ValueError(
        f"this tokenizer puts {len(start)} tokens in front of a text, and groups share one; set "
        "structured_prompting.Prompting.bos to False."
      )
    if prompting.bos is True and not start and tokenizer.bos_id is None:
      raise ValueError(
        "structured_prompting.Prompting.bos is True and this tokenizer has no BOS token; set it to "
        "None or False."
      )
    wanted = bool(start) if prompting.bos is None else prompting.bos
    self.bos_id = (start[0] if start else tokenizer.bos_id) if wanted else None
    if prompting.separator == EOS and tokenizer.eos_id is None:
      raise ValueError(
        'structured_prompting.Prompting.separator is "eos" and this tokenizer has no end token; '
        "give a text."
      )
    self._encoder = in_context.Encoder(tokenizer, start=())
    self._front = self._encoder.encode(prompting.front) if prompting.front else []
    self.scorer = OptionScorer(model, params, self._rows, batch_tokens=prompting.batch_tokens)
    self._generator, self._store = None, None
    if prompting.store is not None:
      self._store = GroupStore(prompting.store, model, self.scorer.params)

  @property
  def config(self):
    """The model's configuration."""
    return self._model.config

  @property
  def num_front(self) -> int:
    """Tokens in front of every group: BOS, if there is one, and `Prompting.front`."""
    return (self.bos_id is not None) + len(self._front)

  def demonstrations(self, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of each example, tokenised on its own, with the separator behind."""
    if self.prompting.separator == EOS:
      end = [self._tokenizer.eos_id]
      return [self._encoder.encode(example.demonstration) + end for example in examples]
    return [
      self._encoder.encode(example.demonstration + self.prompting.separator)
      for example in examples]

  def budget(self, rows: Sequence[Example]) -> int:
    """The most tokens of a group, BOS and front included, with which every row fits behind it.

    Raises:
      ValueError: if the longest row leaves no room; it names the row.
    """
    lengths = [self._length(row) for row in rows]
    longest = int(np.argmax(lengths))
    room = self._model.config.max_length - lengths[longest]
    if room < 1 + self.num_front:
      raise ValueError(
        f"row {rows[longest].id} has {lengths[longest]} tokens with its answer, which leaves no "
        f"room for a demonstration in the model's {self._model.config.max_length} positions; take "
        "it out, or ask for no demonstrations."
      )
    asked = self.prompting.group_tokens
    return room if asked is None else min(asked, room)

  def in_one_window(self, demos: Sequence[Sequence[int]], budget: int) -> int:
    """How many of the demonstrations fit into one group: ordinary prompting's limit."""
    room = budget - self.num_front
    return int(np.sum(np.cumsum([len(demo) for demo in demos]) <= room))

  def groups(self, demos: Sequence[Sequence[int]], budget: int) -> grouping.Groups:
    """See `grouping.pack`."""
    blank = self._tokenizer.encode(" ", False)
    return grouping.pack(
      demos, budget - len(self._front), self.prompting.strategy, bos_id=self.bos_id,
      space_id=blank[0] if len(blank) == 1 else None)

  def read(
    self, groups: grouping.Groups, progress: Callable[[int], None] | None = None) -> Prefix:
    """The groups as the prefix of every row; `progress` as in `prefixes.read_groups`."""
    prompting = self.prompting
    return prefixes.read_groups(
      self._model, self.scorer.params, groups.ids, groups.mask, bos_id=self.bos_id,
      front=self._front, scale=prompting.scale if groups.num_groups else None,
      temperature=prompting.temperature, group_scale=prompting.group_scale,
      partitioner=self._partitioner, spread=prompting.spread, progress=progress,
      store=self._store if groups.num_groups else None)

  def evaluate(
    self, task: Task, rows: Sequence[Example], demos: Sequence[Sequence[int]], budget: int | None,
    progress: Callable[[int, str], Progress] | None = None,
  ) -> Measured:
    """Reads the demonstrations and answers all rows.

    Args:
      task: the task that the rows belong to.
      rows: the rows to answer, at least one.
      demos: from `demonstrations`; none for zero-shot.
      budget: from `budget`; None without demonstrations.
      progress: takes a total and its unit ("groups", then "rows"); None shows nothing.

    Raises:
      ValueError: for no rows, equal label tokens, or what `grouping.pack` and `prefixes` refuse.
    """
    if not rows:
      raise ValueError(f"the task {task.name} has no rows to evaluate on.")
    start = time.monotonic()
    groups = self.groups(demos, budget if demos else 1 + self.num_front)
    if demos and not groups.num_groups:
      raise ValueError(
        f"all {len(demos)} demonstrations are longer than a group of {budget} tokens; raise "
        "structured_prompting.Prompting.group_tokens or take shorter ones."
      )
    progress = progress or functools.partial(Progress, quiet=True)
    with progress(groups.num_groups, "groups") as bar:
      prefix = jax.block_until_ready(self.read(groups, bar.update))
    between = time.monotonic()
    with progress(len(rows), "rows") as bar:
      metric, predictions = self._predictions(task, rows, prefix, len(demos), bar.update)
    end = time.monotonic()
    window = groups.ids.shape[1]
    keys = prefix.cache.keys
    return Measured(
      metric, predictions, groups.num_groups, window, groups.num_tokens, groups.drawn, groups.used,
      groups.skipped, between - start, end - between,
      2 * sum(layer.nbytes for layer in keys) if demos else 0)

  def _predictions(self, task, rows, prefix, num_demos, progress):
    if task.metric == "accuracy":
      scored = in_context.score_rows(
        self.scorer, self._encoder, task, rows, normalisation=self.prompting.normalisation,
        prefix=prefix, progress=progress)
      result = in_context.outcome(rows, scored.values, num_demos, 0)
      return result.accuracy, result.predictions.tolist()
    texts, of_one = self._answers(rows, prefix), answers.METRICS[task.metric]
    progress(len(rows))
    return float(np.mean([of_one(text, row.answers) for text, row in zip(texts, rows)])), texts

  def _answers(self, rows, prefix) -> list[str]:
    if self._generator is None:
      self._generator = Generator(
        self._model, self.scorer.params, self._tokenizer, partitioner=self._rows)
    options = GenerationOptions(
      max_new_tokens=self.prompting.max_new_tokens, num_beams=self.prompting.num_beams,
      length_penalty=self.prompting.length_penalty)
    stop = () if self.prompting.separator == EOS else (self.prompting.separator,)
    found = self._generator.generate(
      [row.prompt for row in rows], options, stop=stop, prefix=prefix)
    return [generation.text.strip() for generation in found]

  def num_row_tokens(self, row: Example) -> int:
    """Tokens that are read for a row, without those before it."""
    if not row.options:
      return len(self._encoder.encode(row.prompt)) + self.prompting.max_new_tokens
    requests = in_context.requests_of(self._encoder, row)
    return sum(len(r.context) + sum(map(len, r.options)) for r in requests)

  def _length(self, row: Example) -> int:
    """Positions that a row takes, and one to spare: its last token is not read."""
    if not row.options:
      return self.num_row_tokens(row)
    requests = in_context.requests_of(self._encoder, row)
    return max(len(r.context) + max(map(len, r.options)) for r in requests)
