"""What the small solver learns says what is true, and is what the engine asks and reads."""

import random
import re

import pytest

from lmops_jax.systems.socratic import Calls, Engine, NoLog, Rules, arms, expressions, skills
from lmops_jax.systems.socratic.patterns import View
from lmops_jax.systems.socratic.skills import Arithmetic, Skills

TEN = Arithmetic(modulus=10, levels=4, steps_levels=3)


def worked_out(expression, modulus):
  """Python's own arithmetic; the remainder may be taken at the end, as in any ring."""
  return eval(expression, {"__builtins__": {}}) % modulus


@pytest.mark.parametrize("modulus", [7, 100])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_expressions_have_their_values(modulus, levels):
  config = Arithmetic(modulus=modulus)
  for seed in range(20):
    text = config.expression(random.Random(seed), levels)
    assert sum(text.count(sign) for sign in "+-*") == 2**levels - 1
    assert config.value(text) == worked_out(text, modulus)
    steps = list(expressions.reductions(text, modulus))
    assert len(steps) == 2**levels - 1
    assert {worked_out(step, modulus) for step in steps} == {config.value(text)}


def test_sides_are_found_with_and_without_gaps_and_signs():
  assert expressions.sides("(3+(1-2))") == ("3", "+", "(1-2)")
  assert expressions.sides("((1 - 2) * -4)") == ("(1 - 2)", "*", "-4")
  assert expressions.sides("(-3 - -4)") == ("-3", "-", "-4")
  with pytest.raises(ValueError, match="no operator"):
    expressions.sides("12")


@pytest.fixture(scope="module")
def rows():
  maker, generator = Skills(TEN), random.Random(0)
  made = {}
  for skill in ("answer", "steps", "assess", "split", "plan", "solve", "join", "check", "mend"):
    for levels in (1, 2, 3, 4):
      found = [maker.row(skill, generator, levels) for _ in range(40)]
      made[skill, levels] = [row for row in found if row is not None]
  return made


def _one_is_true(text):
  left, sign, right, result = re.fullmatch(r"(\d+)([+*-])(\d+)=(\d+)", text).groups()
  return worked_out(left + sign + right, 10) == int(result)


@pytest.mark.parametrize("skill", ["answer", "steps", "solve"])
def test_answers_are_those_of_the_expression(rows, skill):
  for levels in (1, 2, 3):
    for row in rows[skill, levels]:
      assert row.reply.endswith(f"ANSWER: {worked_out(row.about, 10)}")


def test_splits_and_plans(rows):
  for row in rows["split", 3]:
    left, right = re.fullmatch(r"PART 1: (\S+)\nPART 2: (\S+)", row.reply).groups()
    assert any(row.about == f"({left}{sign}{right})" for sign in "+-*")
  for row in rows["plan", 3]:
    left, right = re.findall(r"\[S\d\] (\S+)", row.prompt)
    good = any(row.about == f"({left}{sign}{right})" for sign in "+-*")
    assert good == (row.reply == "VERDICT: OK")


def test_joins_and_checks_follow_what_the_parts_came_to(rows):
  for levels in (2, 4):
    for row in rows["join", levels]:
      parts = re.findall(r"\[S\d\] \S+=(\d+)", row.prompt)
      sign = expressions.sides(row.about).sign
      assert f"CONCLUSION: {parts[0]}{sign}{parts[1]}=" in row.reply
      assert _one_is_true(re.search(r"CONCLUSION: (\S+)", row.reply)[1])
  for levels in (1, 2, 4):
    for row in rows["check", levels]:
      claim = row.prompt.split("\n")[-1]
      parts = re.findall(r"\[S\d\] \S+=(\d+)", row.prompt)
      whole = f"({claim.partition('=')[0]})"
      fits = parts == list(expressions.sides(whole)[::2]) if parts else whole == row.about
      again, _, rest = row.reply.partition(" ")
      result, _, verdict = rest.partition("\n")
      assert fits and claim.endswith(f"={result}") and _one_is_true(again)
      assert (verdict == "VERDICT: OK") == _one_is_true(claim) == (again == claim)


def test_what_is_mended_was_wrong_and_is_right_afterwards(rows):
  for levels in (1, 3):
    for row in rows["mend", levels]:
      assert not _one_is_true(row.prompt.split("\n")[-1])
      assert _one_is_true(re.search(r"CONCLUSION: (\S+)", row.reply)[1])


def test_every_reply_is_read_by_its_pattern(rows):
  names = {word: name for name, word in skills.WORDS.items()} | {"answer": "DED", "steps": "DED"}
  patterns = skills.patterns()
  for (skill, _), found in rows.items():
    for row in found:
      pattern = patterns[names[skill]]
      view = View(row.about, words=("SOLVE", "SPLIT"), max_parts=2,
                  must_cite=frozenset({1, 2}) if skill == "join" else frozenset())
      result = pattern.parse(row.reply, view)
      assert type(result).__name__ == "Result", row
      if "ANSWER" in row.reply:
        assert result.answer == row.reply.rpartition(" ")[2]


class Oracle:
  """Replies as the rows do, worked out from the request's text alone; remembers the longest."""

  def __init__(self):
    self.longest, self.words = 0, set()

  def __call__(self, messages, place, unused):
    prompt = messages[-1][1]
    self.longest = max(self.longest, len(prompt) + 1)
    word, _, rest = prompt.partition(" ")
    self.words.add(word)
    about, *lines = rest.split("\n")
    if word == "assess":
      return f"DECISION: {'SPLIT' if about.count('(') > 1 else 'SOLVE'}"
    left, sign, right = expressions.sides(about)
    if word == "split":
      return f"PART 1: {left}\nPART 2: {right}"
    if word == "plan":
      return "VERDICT: OK"
    values = [line.rpartition("=")[2] for line in lines if line.startswith("[S")]
    left, right = values or (left, right)
    said = f"{left}{sign}{right}={worked_out(left + sign + right, 10)}" if word != "answer" else ""
    if word == "check":
      return "VERDICT: OK" if lines[-1] == said else "VERDICT: ISSUE\nISSUE: wrong"
    return f"[S1] [S2]\nCONCLUSION: {said}\nANSWER: {said.rpartition('=')[2]}"


def test_the_engine_asks_in_these_words_and_reads_these_replies():
  arithmetic, oracle = TEN, Oracle()
  config = arms.Solving(num_problems=2)
  for asked in arms.asked_problems(config, arithmetic):
    calls = Calls(Rules(oracle), NoLog(), config.limits(arms.CHECKED, arithmetic),
                  skills.patterns())
    root = Engine(asked.statement, calls).run()
    assert root.state == "verified" and root.conclusion.answer == str(asked.answer)
  assert oracle.words == {"assess", "split", "plan", "solve", "join", "check"}
  assert oracle.longest == arithmetic.longest_request


def test_longest_request_of_longer_numbers():
  longest = "plan (12+34)\n[S1] 12\n[S2] 34\n"
  assert Arithmetic(modulus=100, levels=1).longest_request == len(longest)
