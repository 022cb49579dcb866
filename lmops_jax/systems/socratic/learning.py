"""Stage `train/seed<k>`: a small decoder of characters learns the engine's skills from fresh rows.

The stage is a model folder, which `pretrained.load` opens. It knows the requests of its rows alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import optax

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data import supervised as rows_lib
from lmops_jax.host.whole_files import write_json
from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained import model as model_lib
from lmops_jax.sizing import flops
from lmops_jax.stages import pipeline
from lmops_jax.systems.socratic import skills
from lmops_jax.systems.socratic.skills import Arithmetic, Row
from lmops_jax.text.tokenizer import Tokenizer, load_tokenizer
from lmops_jax.training import loop, losses
from lmops_jax.training.language_models import check_length, language_model
from lmops_jax.training.learner import supervised
from lmops_jax.training.sources import Epochs

SHARES = {  # of rows; what depends on results that vary gets more of them
  skills.TABLE: 2.5, skills.ANSWER: 2.0, skills.STEPS: 1.2, "assess": 0.3, "split": 3.0,
  "plan": 0.7, "solve": 0.7, "join": 1.2, "check": 2.0, "mend": 0.7}
_END = "<|end|>"
_TEMPLATE = (  # without the persona, which no row has
  "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['content'] }}\n"
  "{% endif %}{% endfor %}")


@component(module="socratic")
@dataclasses.dataclass(frozen=True)
class Learning:
  """The solver, and how it is trained.

  Attributes:
    model: a decoder; its vocabulary is bytes.
    optimizer: an optax transformation.
    num_rows: rows that are drawn, of all skills.
    num_steps: optimizer steps.
    batch_size: sequences of a step.
    length: predicted positions of a sequence, which holds several rows.
    checkpoint_every: steps between two checkpoints to resume from; None: only at the end.

  Raises:
    ValueError: if the sequences are longer than the model's positions.
  """

  model: TransformerConfig
  optimizer: optax.GradientTransformation
  num_rows: PositiveInt = 24_000
  num_steps: PositiveInt = 2_500
  batch_size: PositiveInt = 8
  length: PositiveInt = 128
  checkpoint_every: PositiveInt | None = 500

  def __post_init__(self):
    check_length(self.model, self.length)


def drawn_rows(
  arithmetic: Arithmetic, seed: int, is_kept: Callable[[Row], bool]
) -> Iterator[Row]:
  """Endless rows of all skills; the smaller an expression, the more often it occurs."""
  maker, generator = skills.Skills(arithmetic), random.Random(seed)
  levels = range(1, arithmetic.levels + 1)
  while True:
    skill, = generator.choices(list(SHARES), SHARES.values())
    level, = generator.choices(levels, [0.6**i for i in levels])
    row = maker.row(skill, generator, level)
    if row is not None and is_kept(row):
      yield row


def run(
  context: pipeline.StageContext, config: Learning, arithmetic: Arithmetic, held_out: set[str],
  seed: int, partitioner,
) -> None:
  """Trains, and leaves a model folder.

  Args:
    held_out: expressions that no row is about.
  """
  folder = context.directory / model_lib.TOKENIZER_FOLDER
  tokenizer = load_tokenizer(folder) if folder.is_dir() else write_tokenizer(folder)
  rows = drawn_rows(arithmetic, seed, lambda row: row.about not in held_out)
  examples = [example_of(tokenizer, row, i) for i, row in zip(range(config.num_rows), rows)]
  data = rows_lib.build(
    examples, config.length, pad_id=tokenizer.eos_id, too_long="error", name="skills")
  context.log(f"{data.counts['rows']} rows in {len(data)} sequences of {config.length}")
  model = language_model(config.model, tokenizer.vocab_size, config.length)
  loss = losses.weighted_example_losses(losses.lm_example_losses(model))
  result = loop.train(
    supervised(loop.initializer(model), loss, config.optimizer, check_batch=loss.check_batch,
               partitioner=partitioner),
    Epochs(data.batch, len(data), config.batch_size, seed, whole=True), config.num_steps, seed,
    context.directory, partitioner, records=loop.Records(
      checkpoint_every=config.checkpoint_every, params_at=(config.num_steps,),
      flops_per_token=3 * flops.forward_flops_per_token(model.config, config.length),
      description=context.name, progress=context.progress))
  context.flops = result.flops
  context.extra |= {"counts": dict(data.counts)}
  if context.writes:
    model_lib.describe(context.directory, model.config, params=f"params/{config.num_steps}")


def example_of(tokenizer: Tokenizer, row: Row, identifier: int) -> rows_lib.Example:
  """A row as tokens: its reply is learned, of a table only the results, as the rest is chance."""
  made = rows_lib.encode_row(
    tokenizer, {"prompt": f"{row.prompt}\n", "completion": row.reply}, identifier,
    f"row {identifier}")
  if row.skill != skills.TABLE:
    return made
  results = [i > 0 and before == "=" for i, before in enumerate(f" {row.prompt}\n{row.reply}")]
  return made._replace(learned=results)


def write_tokenizer(folder: Path) -> Tokenizer:
  """A token a byte, and one that ends a reply; its chat template leaves the persona out."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  ids = {token: i for i, token in enumerate(
    [_END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
  made = tokenizers.Tokenizer(models.BPE(ids, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([_END])
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / "tokenizer.json"))
  write_json(folder / "tokenizer_config.json", {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END,
    "chat_template": _TEMPLATE})
  return load_tokenizer(folder)
