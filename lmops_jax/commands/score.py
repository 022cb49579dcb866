"""`lmops score`: a published model on a task, by scoring options or by generating open answers."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path

from lmops_jax.commands import scored_tasks
from lmops_jax.commands.outputs import check_writable
from lmops_jax.host import progress

SEEING = "take a model with an image encoder, such as one of the family kosmos-2"
_NORMALISATIONS = ("sum", "token", "first", "char", "null", "auto", "answer")
# What only tasks with options, or only those with open answers, read; as given by default.
_OF_OPTIONS = {"normalise": None, "balanced": False}
_OF_ANSWERS = {"only_names": False, "grammar": False, "beams": None, "max_new_tokens": None,
               "length_penalty": None, "no_repeat_ngram": None, "stop": None, "wordnet": None}
_MAX_NEW_TOKENS = 32


def add_options(parser) -> None:
  """The options of the command behind those of a model."""
  add = parser.add_argument
  add("--task", required=True, metavar="FILE", help="JSON lines with the template's fields and "
      "label; or, without a template, with images (paths), a prompt (or question, or phrase to be "
      "located), and options and label, or answers, or target (a box or several; x1, y1, x2, y2 in "
      "box_unit, fractions or pixels); or one of lmops list tasks")
  add("--template", help='such as "Review: {text}\\nSentiment: {label}"; the label comes last')
  add("--labels", help="label words in the order of the label ids, by commas; of a named task only "
      "where the numbers in --data have another order")
  add("--data", metavar="FOLDER", help="rows of a named task, train.jsonl and test.jsonl; default: "
      "tfds; of a task with pictures the folder that its data set comes in (which tfds has for "
      "refcoco, refcoco-plus and refcocog only)")
  add("--pictures", metavar="FOLDER", help="where paths of a named task's pictures start; default: "
      "--data")
  add("--split", help="of a named task with pictures; default: the paper's")
  add("--flavour", help="of a named task's templates: fs, hf, paper or plain")
  add("--template-index", type=int, default=0, help="within the flavour (default 0)")
  add("--shots", type=int, default=0, help="demonstrations in front of each row (default 0); those "
      "that have no room are left out, the first ones first, and told of")
  add("--train", metavar="FILE", help="rows to draw demonstrations from; default: the task's own")
  add("--balanced", action="store_true", help="as many demonstrations of each label")
  add("--limit", type=int, help="read the first rows only")
  add("--seed", type=int, default=0, help="of the demonstrations")
  add("--normalise", choices=_NORMALISATIONS, help="of an option's log-likelihood; default: the "
      "named task's, or sum")
  add("--metric", help="of a file of rows with images: exact_match (default), f1, vqa, cider or "
      "meteor of answers, accuracy (default) or roc_auc of options, referring (default) or "
      "phrase_grounding of targets")
  add("--wordnet", metavar="FOLDER", help="WordNet's database files (index.noun, noun.exc, ...), "
      "by which meteor pairs synonyms; default: equal words and stems alone")
  add("--only-names", action="store_true", help="generate nothing but the task's names of classes, "
      "such as imagenet's")
  add("--grammar", action="store_true", help="let the model write well-formed boxes only")
  add("--beams", type=int, help="for open answers; default: the named task's, or no beam search")
  add("--max-new-tokens", type=int, help=f"of an open answer (default {_MAX_NEW_TOKENS})")
  add("--length-penalty", type=float, help="of beams (default 1)")
  add("--no-repeat-ngram", type=int, help="no n-gram of this size twice in an open answer and its "
      "prompt, 0 for any; default: the named task's, or 0")
  add("--stop", action="append", metavar="TEXT", help="ends an open answer")
  add("--batch-tokens", type=int, default=4096)
  add("--output", metavar="FILE", help="write every row's scores, or its answer, as JSON lines")
  add("--show-prompts", type=int, metavar="N", help="write the first N prompts with their "
      "demonstrations, as JSON lines, and score nothing")


def run(arguments, load) -> None:
  """Scores a model and prints what the task is measured by.

  Args:
    arguments: of the command line.
    load: `arguments -> (source, tokenizer, partitioner)`, which opens the model.

  Raises:
    ValueError: for what cannot be scored; before weights are read, if that can be told.
  """
  for name, least in (("batch_tokens", 1), ("show_prompts", 1)):
    value = getattr(arguments, name)
    if value is not None and value < least:
      raise ValueError(f"{_option(name)} {value} must be at least {least}.")
  opened = functools.cache(lambda: load(arguments))
  task, train = scored_tasks.chosen(arguments, lambda: _grid(opened()))
  way = (_Options if task.rows[0].options else _Answers)(arguments, task, train)
  if arguments.show_prompts is not None:
    _show_prompts(way.rows[: arguments.show_prompts], way.front)
    return
  if arguments.output:
    check_writable("--output", arguments.output)
  if task.skipped:
    print(f"{task.skipped} rows of {task.name} are left out: not the task's number of options, an "
          "empty or repeated one, or no answer or box.", file=sys.stderr)
  _warn_of_grounding(way.rows)
  source, tokenizer, partitioner = opened()
  new_encoder = _encoding(way, task, source, tokenizer, partitioner)
  params = source.params(partitioner)
  engine = way.engine(source, params, tokenizer, partitioner)
  encoder = new_encoder(params)
  del params  # the engine has its own copy of the layers
  with progress.Progress(way.num_steps, way.steps, "scoring") as bar:
    found = way.measure(engine, source, tokenizer, encoder, bar.update)
  if arguments.output:
    with Path(arguments.output).expanduser().open("w", encoding="utf-8") as file:
      for i in range(len(way.rows)):
        file.write(json.dumps(way.record(found, i)) + "\n")
  if found.num_dropped.any():
    print(f"{found.num_dropped.sum()} demonstrations in front of {(found.num_dropped > 0).sum()} "
          f"rows, the first ones of each, had no room in the model's "
          f"{source.decoder.config.max_length} positions and are left out.", file=sys.stderr)
  way.tell(found)


def _grid(opened) -> int:
  """The side of the grid of a model's words for boxes."""
  from lmops_jax.data.boxes import box_tokens

  _, tokenizer, _ = opened
  return box_tokens(tokenizer.token_id)[1]


class _Options:
  """A task whose options are scored."""

  steps = "prompts"
  grammar = False

  def __init__(self, arguments, task, train):
    from lmops_jax.evaluation import in_context

    _refuse_given(arguments, _OF_ANSWERS, f"the task {task.name} has options, which are scored")
    self._arguments, self._task = arguments, task
    way = scored_tasks.way(arguments.task, arguments.flavour)
    self._how = dict(
      shots=arguments.shots, seed=arguments.seed, train=train, balanced=arguments.balanced,
      normalisation=arguments.normalise or way.normalisation)
    # What is wrong with them is told before a model is read.
    self.rows, self.front = in_context.rows_and_front(task, **self._how, sees=True)
    self.num_steps = sum(len(row.prompts) or len(row.option_images) or 1 for row in self.rows)

  def engine(self, source, params, tokenizer, partitioner):
    from lmops_jax.decoding.scoring import OptionScorer

    del tokenizer
    return OptionScorer(
      source.decoder, source.of_decoder(params), partitioner,
      batch_tokens=self._arguments.batch_tokens)

  def measure(self, engine, source, tokenizer, encoder, update):
    from lmops_jax.evaluation import in_context

    return in_context.evaluate(
      engine, tokenizer, self._task, **self._how, progress=update, encoder=encoder)

  def record(self, found, index: int):
    from lmops_jax.evaluation import in_context

    return in_context.record(self._task, found, index)

  def tell(self, found) -> None:
    from lmops_jax.evaluation import estimates, in_context

    figures = ", ".join(map(_shown, in_context.figures(self._task, found)))
    print(f"{figures}, {len(found.labels)} rows, {found.num_shots} shots, by "
          f"{self._how['normalisation']}")
    _tell(estimates.by_category(self.rows, found.labels == found.predictions))
    words = self._task.words
    if not words:
      return
    width = max(map(len, words))
    print(f"  {'label':{width}}  rows  predicted  right")
    for i, word in enumerate(words):
      print(f"  {word:{width}}  {found.confusion[i].sum():4}  {found.confusion[:, i].sum():9}  "
            f"{found.confusion[i, i]:5}")


class _Answers:
  """A task whose answers are generated."""

  steps = "rows"

  def __init__(self, arguments, task, train):
    from lmops_jax.decoding import GenerationOptions
    from lmops_jax.decoding.text import check_stop
    from lmops_jax.evaluation import open_answers

    _refuse_given(arguments, _OF_OPTIONS, f"the task {task.name} has no options to score")
    if arguments.only_names:
      _refuse_given(
        arguments, {"max_new_tokens": None, "stop": None, "grammar": False},
        "--only-names makes whole names")
    self._arguments, self._task = arguments, task
    self._stop = check_stop(arguments.stop)
    beams, penalty, ngram = arguments.beams, arguments.length_penalty, arguments.no_repeat_ngram
    way = scored_tasks.way(arguments.task)
    self._options = GenerationOptions(
      max_new_tokens=_MAX_NEW_TOKENS if arguments.max_new_tokens is None
      else arguments.max_new_tokens,
      num_beams=way.num_beams if beams is None else beams,
      no_repeat_ngram=way.no_repeat_ngram if ngram is None else ngram,
      **({} if penalty is None else {"length_penalty": penalty}))
    self._how = dict(
      shots=arguments.shots, seed=arguments.seed, train=train, only_names=arguments.only_names)
    self.grammar = arguments.grammar
    self._wordnet = _wordnet(arguments.wordnet, task)
    self.rows, self.front = open_answers.rows_and_front(task, **self._how, sees=True)
    self.num_steps = len(self.rows)

  def engine(self, source, params, tokenizer, partitioner):
    from lmops_jax.decoding import Generator

    return Generator(source.decoder, source.of_decoder(params), tokenizer, partitioner)

  def measure(self, engine, source, tokenizer, encoder, update):
    from lmops_jax.evaluation import open_answers

    return open_answers.evaluate(
      engine, tokenizer, self._task, **self._how, grammar=self.grammar, options=self._options,
      stop=self._stop, config=source.decoder.config, progress=update, encoder=encoder,
      wordnet=self._wordnet)

  def record(self, found, index: int):
    from lmops_jax.evaluation import open_answers

    return open_answers.record(found, index)

  def tell(self, found) -> None:
    beams = self._options.num_beams
    how = "greedy" if beams == 1 else f"{beams} beams"
    names = f", of {len(self._task.words)} names alone" if self._arguments.only_names else ""
    grammar = ", by the grammar of boxes" if self.grammar else ""
    synonyms = ", with synonyms" if self._wordnet else ""
    print(f"{_shown(found.figure)}, {len(found.answers)} rows, {found.num_shots} shots, "
          f"{how}{names}{grammar}{synonyms}")
    _tell(found.estimates)
    if found.located is not None:
      malformed = sum(of.num_malformed for of in found.located.located)
      if malformed:
        print(f"{malformed} groups of boxes in the answers are malformed and count for nothing.",
              file=sys.stderr)


def _wordnet(folder: str | None, task):
  """The synonyms of a folder that is given, for a task that METEOR is told of."""
  from lmops_jax.evaluation import open_answers, wordnet

  if folder is None:
    return None
  if not {"meteor", "explanation_meteor"} & set(open_answers.told_of(task.metric)):
    raise ValueError(
      f"the task {task.name} is measured by {task.metric} and not by meteor, so that --wordnet "
      "changes nothing; leave it out, or give another --metric.")
  return wordnet.read(folder)


def _encoding(way, task, source, tokenizer, partitioner):
  """`params -> encoder` of the rows' prompts; what needs no weights is checked at once."""
  from lmops_jax.decoding import image_prompts
  from lmops_jax.evaluation import grounding, in_context, seeing

  grounding.check_words(
    [row.prompt for row in way.rows] + [way.front.text], tokenizer, task.grid, way.grammar)
  length = source.decoder.config.max_length
  paths = [
    *way.front.images,
    *(path for row in way.rows for path in (*row.images, *row.option_images))]
  if not paths:
    return lambda params: in_context.Encoder(tokenizer, max_length=length)
  settings = source.image_settings()
  if settings is None:
    raise ValueError(
      f"the task {task.name} has pictures, and {source.path} is a language model of the family "
      f"{source.family}, which reads texts only; {SEEING}."
    )
  ids = image_prompts.image_tokens(tokenizer, source.config.vectors_per_image)
  image_prompts.check_pictures(map(seeing.picture_at, paths), settings)

  def new(params):
    pictures = image_prompts.PictureEncoder(source.model, params, settings, partitioner)
    return seeing.SeeingEncoder(tokenizer, ids, pictures, length)

  return new


def _warn_of_grounding(rows) -> None:
  """Tells of prompts that ask for boxes and do not say so."""
  from lmops_jax.data.boxes import GROUNDING

  num = sum(bool(row.boxes) and GROUNDING not in row.prompt for row in rows)
  if num:
    print(f"lmops: warning: {num} prompts that ask for boxes have no {GROUNDING}, without which a "
          f'model seldom writes them; begin them with "{GROUNDING}".', file=sys.stderr)


def _tell(found) -> None:
  """A line for each estimate."""
  from lmops_jax.evaluation.estimates import line

  width = max((len(of.name) for of in found), default=0)
  for of in found:
    print(line(of, width))


def _shown(figure) -> str:
  error = figure.standard_error
  return f"{figure.name} {figure.value:.4f}" + (
    f" (standard error {error:.4f})" if math.isfinite(error) else "")


def _show_prompts(rows, front) -> None:
  """A JSON object a row: its prompt behind the demonstrations, with what belongs to it."""
  for row in rows:
    found = {"id": row.id, "prompt": front.text + row.prompt}
    if row.prompts:
      found["prompts"] = [front.text + prompt for prompt in row.prompts]
    images = [image if isinstance(image, str) else image.where
              for image in (*front.images, *row.images)]
    more = {"images": images, "option_images": row.option_images, "options": row.options}
    found |= {name: list(value) for name, value in more.items() if value}
    found |= {"label": row.label} if row.options else {"answers": list(row.answers)}
    print(json.dumps(found, ensure_ascii=False))


def _option(name: str) -> str:
  return "--" + name.replace("_", "-")


def _refuse_given(arguments, defaults: dict, why: str) -> None:
  """Refuses options of the other kind of task, which would change nothing."""
  for name, default in defaults.items():
    if getattr(arguments, name) != default:
      raise ValueError(f"{why}, so that {_option(name)} changes nothing; leave it out.")
