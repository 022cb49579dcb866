"""Few-shot evaluation against a naive loop, on a tiny model with a byte tokenizer."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.data import tasks
from lmops_jax.decoding.scoring import OptionScorer
from lmops_jax.evaluation import in_context
from tests import model_folders

WORDS = ("no", "yes", "maybe")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  source = pretrained.load(str(model_folders.write(tmp_path_factory.mktemp("model"))))
  return source, source.params(), source.tokenizer()


@pytest.fixture(scope="module")
def task():
  rows = tuple(_row(i * 31, "ab" * (i % 5 + 1), i % 3) for i in range(12))
  return tasks.Task("toy", rows, words=WORDS, null_prompt="N/A is:")


def _row(identifier, text, label):
  return tasks.Example(identifier, f"{text} is:", tuple(f" {word}" for word in WORDS), label)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(model, params, tokens):
  return jax.nn.log_softmax(model.apply({"params": params}, tokens[None], method="logits")[0])


def _naive(loaded, prompt, word, first_only=False):
  """Log-likelihood of the word's tokens, from the whole text's own tokens."""
  source, params, tokenizer = loaded
  ids = tokenizer.encode(prompt + word)
  start = len(tokenizer.encode(prompt.rstrip(" ")))
  tokens = np.zeros(256, np.int32)  # one length for all: later tokens do not matter
  tokens[: len(ids)] = ids
  log_probs = np.asarray(_log_probs(source.model, params, tokens))
  stop = start + 1 if first_only else len(ids)
  return sum(log_probs[i - 1, ids[i]] for i in range(start, stop)), len(ids) - start


@pytest.mark.parametrize("normalisation", in_context.NORMALISATIONS)
def test_scores_equal_a_naive_loop(loaded, task, normalisation):
  source, params, tokenizer = loaded
  result = in_context.evaluate(
    OptionScorer(source.model, params), tokenizer, task, shots=2, seed=1,
    normalisation=normalisation,
  )
  drawn = tasks.demonstrations(task.rows, 2, 1)
  front = "".join(f"{row.prompt} {WORDS[row.label]}\n\n" for row in drawn)
  rest = [row for row in task.rows if row not in drawn]
  np.testing.assert_array_equal(result.row_ids, [row.id for row in rest])
  for scores, row in zip(result.scores, rest, strict=True):
    for score, word in zip(scores, WORDS):
      want, count = _naive(loaded, f"{front}{row.prompt} ", word)
      if normalisation in ("token", "auto"):
        want /= count
      elif normalisation == "first":
        want = _naive(loaded, f"{front}{row.prompt} ", word, first_only=True)[0]
      elif normalisation == "char":
        want /= len(word)
      elif normalisation == "null":
        want -= _naive(loaded, f"{front}N/A is: ", word)[0]
      elif normalisation == "answer":
        want -= _naive(loaded, "Answer: ", word)[0]
      assert score == pytest.approx(want, abs=1e-3)
  assert result.confusion.sum() == len(rest)
  assert result.accuracy == pytest.approx(np.trace(result.confusion) / len(rest))
  json.dumps(in_context.record(task, result, 0))


def test_demonstrations_come_from_the_train_rows_where_there_are_any(loaded, task):
  source, params, tokenizer = loaded
  scorer = OptionScorer(source.model, params)
  train = [_row(5, "zz", 0), _row(6, "yy", 1)]
  result = in_context.evaluate(scorer, tokenizer, task, shots=2, train=train)
  assert len(result.labels) == len(task.rows) and result.num_shots == 2
  own = dataclasses.replace(task, train=tuple(train))
  same = in_context.evaluate(scorer, tokenizer, own, shots=2)
  np.testing.assert_array_equal(same.scores, result.scores)
  with pytest.raises(ValueError, match="3 demonstrations are asked for and there are 2 rows"):
    in_context.evaluate(scorer, tokenizer, task, shots=3, train=train)
  with pytest.raises(ValueError, match="has 12 rows, all of them demonstrations"):
    in_context.evaluate(scorer, tokenizer, task, shots=12)
  with pytest.raises(ValueError, match="toy with 11 demonstrations: request 0 .* the model 256 "):
    long = tasks.Task(
      "toy", tuple(_row(row.id, "ab" * 20, row.label) for row in task.rows), words=WORDS
    )
    in_context.evaluate(scorer, tokenizer, long, shots=11)
  with pytest.raises(ValueError, match="normalisation='mean' is not one of"):
    in_context.evaluate(scorer, tokenizer, task, normalisation="mean")


def test_an_option_takes_the_tokens_that_the_whole_text_has():
  class Merging:
    """Joins a blank with the letter after it, and "a!" into one token; BOS in front."""

    def encode(self, text, add_special=True):
      ids, i = [0] if add_special else [], 0
      while i < len(text):
        pair = text[i : i + 2]
        joined = len(pair) == 2 and (pair[0] == " " or pair == "a!")
        ids.append(hash(pair) % 1000 + 1000 if joined else ord(text[i]))
        i += 2 if joined else 1
      return ids

  encoder = in_context.Encoder(Merging())
  assert encoder.start == [0]
  request = encoder.split("x: ", ["yes"])
  assert request.context == [0, ord("x"), ord(":")]
  assert request.options[0] == Merging().encode(" yes", False) and len(request.options[0]) == 3
  inside = encoder.split("xa", ["!"])  # the boundary falls inside a token
  assert inside.context == [0, ord("x"), ord("a")] and inside.options == [[ord("!")]]
  strict = in_context.Encoder(Merging(), strict=True)
  assert strict.split("x: ", ["yes", "no"]).options == encoder.split("x: ", ["yes", "no"]).options
  for context, options, message in [
    ("xa", ["?", "!"], "option '!' does not begin with a token of its own behind 'xa'"),
    ("x:", [" a", ""], "the option '' has no token"),
    ("x: ", ["a", "b", "a"], "the options 'a' and 'a' have the same tokens"),
  ]:
    with pytest.raises(ValueError, match=message):
      strict.split(context, options)


def test_a_prompt_that_writes_its_own_bos_has_it_once(loaded):
  encoder = in_context.Encoder(loaded[2])
  assert encoder.encode("<s>ab") == encoder.encode("ab") == [0, *loaded[2].encode("ab", False)]
  assert encoder.split("<s>ab is:", [" yes"]) == encoder.split("ab is:", [" yes"])


def test_labels_with_the_same_tokens_are_refused(loaded, task):
  source, params, tokenizer = loaded

  class Blind:
    def encode(self, text, add_special=True):
      return tokenizer.encode(text.replace("maybe", "yes"), add_special)

  with pytest.raises(ValueError, match="'yes' and 'maybe' have the same tokens"):
    in_context.evaluate(OptionScorer(source.model, params), Blind(), task)


def test_prompts_may_differ_by_option_and_options_by_row(loaded):
  source, params, tokenizer = loaded
  scorer = OptionScorer(source.model, params)
  blanks = (
    tasks.Example(1, "The ", (" ran.",) * 2, 1, prompts=("The cat", "The dog")),
    tasks.Example(2, "A ", (" sat on it.",) * 2, 0, prompts=("A hen", "A cow")),
  )
  result = in_context.evaluate(
    scorer, tokenizer, tasks.Task("blank", blanks), normalisation="auto"
  )
  for scores, row in zip(result.scores, blanks, strict=True):
    for score, prompt, option in zip(scores, row.prompts, row.options):
      want, count = _naive(loaded, prompt, option)
      assert score == pytest.approx(want / count, abs=1e-3)
  rows = (
    tasks.Example(1, "Q one", (" a", " bb"), 1), tasks.Example(2, "Q two", (" a", " c", " dd"), 0)
  )
  result = in_context.evaluate(scorer, tokenizer, tasks.Task("own", rows), shots=1)
  assert result.num_tokens and len(result.labels) == 1
  result = in_context.evaluate(scorer, tokenizer, tasks.Task("own", rows))
  assert result.scores.shape == (2, 3) and result.scores[0, 2] == -np.inf
  assert result.scores[1, 2] == pytest.approx(_naive(loaded, "Q two ", "dd")[0], abs=1e-3)
  assert len(in_context.record(tasks.Task("own", rows), result, 0)["scores"]) == 2
  with pytest.raises(ValueError, match="needs a prompt without content"):
    in_context.evaluate(scorer, tokenizer, tasks.Task("own", rows), normalisation="null")
  asked = in_context.evaluate(scorer, tokenizer, tasks.Task("own", rows), normalisation="answer")
  alone = _naive(loaded, "Answer: ", "dd")[0]
  assert asked.scores[1, 2] == pytest.approx(result.scores[1, 2] - alone, abs=1e-3)
  assert asked.scores[0, 2] == -np.inf
  with pytest.raises(ValueError, match="compares with a prompt for all options, and rows of the "):
    in_context.evaluate(scorer, tokenizer, tasks.Task("b", blanks), normalisation="answer")


def test_auto_sums_where_every_option_is_one_token(loaded):
  source, params, tokenizer = loaded
  scorer = OptionScorer(source.model, params)
  rows = tuple(tasks.Example(i, f"text {i}:", ("x", "y"), 0) for i in range(3))
  task = tasks.Task("one", rows, words=("x", "y"))
  found = [
    in_context.evaluate(scorer, tokenizer, task, normalisation=kind).scores
    for kind in ("auto", "sum")
  ]
  np.testing.assert_array_equal(*found)


def test_open_answers_are_not_scored(loaded):
  source, params, tokenizer = loaded
  task = tasks.Task("nq", (tasks.Example(1, "Q", (), -1, ("a",)),), metric="exact_match")
  with pytest.raises(ValueError, match="nq has open answers"):
    in_context.evaluate(OptionScorer(source.model, params), tokenizer, task)


def test_a_scorer_without_opinion_solves_matrices_by_chance(loaded):
  """The right candidate in each of six places: one of the six is the first."""
  class Indifferent:
    def score(self, requests, progress=None, prefix=None):
      return [[np.zeros(len(option)) for option in request.options] for request in requests]

  rows = tuple(
    tasks.Example(i, "Is it correct?", (" Yes",) * 6, i % 6,
                  prompts=tuple(f"{c} Is it correct?" for c in "abcdef")) for i in range(12))
  result = in_context.evaluate(Indifferent(), loaded[2], tasks.Task("raven", rows))
  assert result.accuracy == pytest.approx(1 / 6) and set(result.predictions) == {0}
