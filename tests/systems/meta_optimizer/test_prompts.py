"""Demonstrations and queries as tokens."""

import dataclasses

import numpy as np
import pytest

from lmops_jax.systems.meta_optimizer import prompts
from lmops_jax.systems.meta_optimizer.prompts import Prompts, draw
from tests.systems.meta_optimizer.examples import WORDS, Example, Task, WordTokenizer, make_task

OPTIONS = tuple(f" {w}" for w in WORDS)
ROWS = (Example(5, "a b:", OPTIONS, 1), Example(6, "c:", OPTIONS, 0))
TASK = Task("toy", ROWS, ROWS, WORDS)


def _text(tokenizer, ids):
  return tokenizer.decode([int(i) for i in ids])


def test_a_context_and_the_same_tokens_as_rows():
  tokenizer = WordTokenizer()
  made = Prompts(tokenizer, TASK).demonstrations(ROWS, 99, 5)
  assert _text(tokenizer, made.context_ids) == "<a b: bad>c: good>"
  assert [_text(tokenizer, ids[of]) for ids, of in zip(made.ids, made.mask)] == [
    "<a b: bad", "<c: good"]
  assert _text(tokenizer, made.context_ids[made.context_kept]) == "a b: badc: good"
  np.testing.assert_array_equal(made.ids[made.kept], made.context_ids[made.context_kept])
  np.testing.assert_array_equal(made.groups, [0, 0, 0, 1, 1])


def test_models_without_bos_or_eos():
  tokenizer = WordTokenizer(bos=False, eos=False)
  made = Prompts(tokenizer, TASK).demonstrations(ROWS, 99, 5)
  assert _text(tokenizer, made.context_ids) == "a b: bad\n\nc: good\n\n"
  assert _text(tokenizer, made.ids[0][made.mask[0]]) == "a b: bad"
  assert made.kept.sum() == made.context_kept.sum() == 5
  with pytest.raises(ValueError, match="newline='eos' needs a tokenizer with an EOS"):
    Prompts(tokenizer, TASK, "eos")


def test_queries_are_rows_without_bos():
  tokenizer = WordTokenizer()
  found = Prompts(tokenizer, TASK).queries(ROWS)
  assert [_text(tokenizer, ids[of]) for ids, of in zip(found.ids, found.mask)] == ["a b:", "c:"]
  np.testing.assert_array_equal(found.gold, [1, 0])
  assert found.part([1]).ids.shape == (1, found.ids.shape[1])


@pytest.mark.parametrize("newline, want", [
  ("space", "<a b c: bad>"), ("eos", "<a b>c: bad>")])
def test_line_breaks(newline, want):
  tokenizer = WordTokenizer()
  row = Example(0, "a b\nc:", OPTIONS, 1)
  made = Prompts(tokenizer, TASK, newline).demonstrations([row], 99, 5)
  assert _text(tokenizer, made.context_ids) == want
  assert _text(tokenizer, made.ids[0]) == want[:-1]
  assert made.kept.sum() == 4 and len(made.groups) == 4


def test_blanks_at_a_prompts_end_go_to_the_option():
  tokenizer = WordTokenizer()
  row = Example(0, "a: ", WORDS, 1)
  made = Prompts(tokenizer, Task("t", (row,), (row,), WORDS)).demonstrations([row], 99, 5)
  assert _text(tokenizer, made.context_ids) == "<a: bad>"


def test_no_demonstrations():
  made = Prompts(WordTokenizer(), TASK).demonstrations([], 99, 5)
  np.testing.assert_array_equal(made.context_ids, [1])
  assert made.ids.shape == (0, 2) and not len(made.groups)


def test_the_draw_is_the_scripts():
  chosen, others = draw(20, 6, 3)
  np.testing.assert_array_equal(chosen, np.random.default_rng(3).permutation(20)[:6])
  assert sorted([*chosen, *others]) == list(range(20))
  orders = [tuple(draw(20, 6, 3, order)[0]) for order in range(5)]
  assert len(set(orders)) == 5 and len({tuple(sorted(order)) for order in orders}) == 1
  np.random.seed(3)
  drawn = [np.random.permutation(6) for _ in range(5)]
  np.testing.assert_array_equal(draw(20, 6, 3, 2)[0], chosen[drawn[2]])
  with pytest.raises(ValueError, match="21 demonstrations are wanted .* at most 20"):
    draw(20, 21, 0)
  with pytest.raises(ValueError, match="order=5"):
    draw(20, 2, 0, 5)


def test_labels_must_be_single_tokens():
  words = ("good", "not bad", "new")
  row = Example(0, "a:", tuple(f" {w}" for w in words), 0)
  with pytest.raises(ValueError, match="task toy: the label word 'not bad' is 2 tokens"):
    Prompts(WordTokenizer(), Task("toy", (row,), (row,), words))
  with pytest.raises(ValueError, match="has no label words"):
    Prompts(WordTokenizer(), dataclasses.replace(TASK, words=()))
  same = Example(0, "a:", (" good", " good", " new"), 0)
  with pytest.raises(ValueError, match="the same token"):
    Prompts(WordTokenizer(), Task("toy", (same,), (same,), WORDS))
  with pytest.raises(ValueError, match="newline='cut' is not one of"):
    Prompts(WordTokenizer(), TASK, "cut")


@pytest.mark.parametrize("row, match", [
  (Example(0, "a:", OPTIONS, -1), "row 1 has the label -1, not one of 0 to 2"),
  (Example(0, "a:", OPTIONS, 3), "row 1 has the label 3"),
  (Example(0, " \n", OPTIONS, 0), "row 1 is empty"),
  (Example(0, "a:", (" yes", " no", " new"), 0), "row 1 has the options"),
])
def test_bad_rows_are_named(row, match):
  made = Prompts(WordTokenizer(), TASK)
  with pytest.raises(ValueError, match=match):
    made.queries([ROWS[0], row])
  with pytest.raises(ValueError, match=match.replace("row", "demonstration")):
    made.demonstrations([ROWS[0], row], 99, 5)
  with pytest.raises(ValueError, match="no rows to predict"):
    made.queries([])


def test_a_context_that_does_not_fit_says_what_does():
  task = make_task()
  made = Prompts(WordTokenizer(), task)
  whole = made.demonstrations(task.train[:4], 999, 5)
  length = len(whole.context_ids) + 5
  assert len(made.demonstrations(task.train[:4], length, 5).ids) == 4
  with pytest.raises(ValueError, match="3 of 4 demonstrations fit .* at most 3"):
    made.demonstrations(task.train[:4], length - 1, 5)
  with pytest.raises(ValueError, match="longest query has 5 tokens"):
    made.demonstrations([], 5, 5)


def test_tokens_that_differ_are_refused():
  made = Prompts(WordTokenizer(), TASK).demonstrations(ROWS, 99, 5)
  kept = made.context_kept.copy()
  kept[2] = False
  with pytest.raises(ValueError, match="5 tokens as training rows and 4 .* from token 1 on"):
    prompts.check_alignment(made._replace(context_kept=kept))
