"""Few-shot evaluation against a naive loop, on a tiny model with a byte tokenizer."""

import json

import jax
import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.data import classification_tasks as tasks
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
  rows = tuple(tasks.Row(i * 31, {"text": "ab" * (i % 5 + 1)}, i % 3) for i in range(12))
  return tasks.Task("toy", rows, WORDS, tasks.Template("{text} is: {label}"))


def _naive(loaded, prompt, word):
  """Log-likelihood of the word's tokens, from the whole text's own tokens."""
  source, params, tokenizer = loaded
  ids = tokenizer.encode(prompt + word)
  start = len(tokenizer.encode(prompt.rstrip(" ")))
  logits = source.model.apply({"params": params}, np.array([ids], np.int32), method="logits")
  log_probs = np.asarray(jax.nn.log_softmax(logits[0]))
  return sum(log_probs[i - 1, ids[i]] for i in range(start, len(ids))), len(ids) - start


@pytest.mark.parametrize("normalisation", in_context.NORMALISATIONS)
def test_scores_equal_a_naive_loop(loaded, task, normalisation):
  source, params, tokenizer = loaded
  result = in_context.evaluate(
    OptionScorer(source.model, params), tokenizer, task, shots=2, seed=1,
    normalisation=normalisation,
  )
  drawn = tasks.demonstrations(task.rows, 2, 1)
  front = "".join(f"{row.fields['text']} is: {WORDS[row.label]}\n\n" for row in drawn)
  rest = [row for row in task.rows if row not in drawn]
  np.testing.assert_array_equal(result.row_ids, [row.id for row in rest])
  for scores, row in zip(result.scores, rest, strict=True):
    for score, word in zip(scores, WORDS):
      want, count = _naive(loaded, f"{front}{row.fields['text']} is: ", word)
      if normalisation == "token":
        want /= count
      elif normalisation == "char":
        want /= len(word)
      elif normalisation == "null":
        want -= _naive(loaded, f"{front}N/A is: ", word)[0]
      assert score == pytest.approx(want, abs=1e-3)
  assert result.confusion.sum() == len(rest)
  assert result.accuracy == pytest.approx(np.trace(result.confusion) / len(rest))
  json.dumps(in_context.record(task, result, 0))


def test_demonstrations_come_from_the_train_rows_where_there_are_any(loaded, task):
  source, params, tokenizer = loaded
  scorer = OptionScorer(source.model, params)
  train = [tasks.Row(5, {"text": "zz"}, 0), tasks.Row(6, {"text": "yy"}, 1)]
  result = in_context.evaluate(scorer, tokenizer, task, shots=2, train=train)
  assert len(result.labels) == len(task.rows) and result.num_shots == 2
  with pytest.raises(ValueError, match="3 demonstrations are asked for and there are 2 rows"):
    in_context.evaluate(scorer, tokenizer, task, shots=3, train=train)
  with pytest.raises(ValueError, match="has 12 rows, all of them demonstrations"):
    in_context.evaluate(scorer, tokenizer, task, shots=12)
  with pytest.raises(ValueError, match="toy with 11 demonstrations: request 0 .* the model 256 "):
    long = tasks.Task(
      "toy", tuple(r._replace(fields={"text": "ab" * 20}) for r in task.rows), WORDS, task.template
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


def test_labels_with_the_same_tokens_are_refused(loaded, task):
  source, params, tokenizer = loaded

  class Blind:
    def encode(self, text, add_special=True):
      return tokenizer.encode(text.replace("maybe", "yes"), add_special)

  with pytest.raises(ValueError, match="'yes' and 'maybe' have the same tokens"):
    in_context.evaluate(OptionScorer(source.model, params), Blind(), task)
