"""How the small solver is taught: rows as tokens, what of them is learned, and its tokenizer."""

import collections
import itertools
import random

import pytest

from lmops_jax.systems.socratic import learning, skills
from lmops_jax.systems.socratic.skills import Arithmetic, Skills


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return learning.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def test_every_text_is_bytes_and_comes_back(tokenizer):
  text = "solve (3+4)\nVERDICT: ISSUE \u00e9 \u4e2d"
  ids = tokenizer.encode(text)
  assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
  assert tokenizer.vocab_size == 257 and tokenizer.eos_id == 0


def test_a_request_is_its_last_message_without_the_persona(tokenizer):
  messages = [{"role": "system", "content": "You are a wise philosopher."},
              {"role": "user", "content": "solve (3+4)"}]
  assert tokenizer.apply_chat_template(messages) == "solve (3+4)\n"


def _learned(tokenizer, row):
  example = learning.example_of(tokenizer, row, 3)
  assert example.id == 3 and len(example.tokens) == len(example.learned)
  assert tokenizer.decode(example.tokens) == f"{row.prompt}\n{row.reply}"
  assert example.tokens[-1] == tokenizer.eos_id
  return [token for token, learned in zip(example.tokens, example.learned) if learned]


def test_replies_are_learned_with_their_end(tokenizer):
  row = Skills(Arithmetic()).row("join", random.Random(0), 2)
  assert _learned(tokenizer, row) == [*tokenizer.encode(row.reply), tokenizer.eos_id]


def test_of_a_table_the_results_are_learned(tokenizer):
  row = Skills(Arithmetic()).row(skills.TABLE, random.Random(0), 1)
  facts = row.reply.split(" ")
  assert tokenizer.decode(_learned(tokenizer, row)) == "".join(fact[-1] for fact in facts)
  assert all(eval(fact.partition("=")[0]) % 7 == int(fact[-1]) for fact in facts)


def test_rows_are_of_all_skills_and_about_nothing_held_out():
  rows = list(itertools.islice(learning.drawn_rows(Arithmetic(), 0, lambda row: True), 4000))
  counts = collections.Counter(row.skill for row in rows)
  assert set(counts) == set(learning.SHARES)
  held_out = {row.about for row in rows[:200] if row.about.count("(") > 1}
  others = itertools.islice(learning.drawn_rows(
    Arithmetic(), 0, lambda row: row.about not in held_out), 4000)
  assert not held_out & {row.about for row in others} and len(held_out) > 50
  assert rows == list(itertools.islice(
    learning.drawn_rows(Arithmetic(), 0, lambda row: True), 4000))
