"""The control loop against hostile models: it ends, within its limits, with its tree in order."""

import random

import pytest

from lmops_jax.systems.socratic import Limits
from tests.systems.socratic.rules import REPLIES, cooperative, engine


def _requests(rule, name):
  """A rule that also collects the requests of one pattern as (problem, text)."""
  seen = []

  def watching(messages, place, generator):
    if place.pattern == name:
      seen.append((place.problem, messages[-1][1]))
    return rule(messages, place, generator)

  return watching, seen


def test_a_cooperative_model_solves_all_levels():
  made, backend = engine(cooperative(), max_depth=2)
  root = made.run()
  assert root.state == "verified" and root.conclusion.uses == ("0.1", "0.2")
  assert len(made.tree.problems) == 7
  # 3 inner problems: assess, split, check, integrate, verify; 4 leaves: deduce, verify
  assert backend.num_calls == made.calls.spent.turns == 3 * 5 + 4 * 2


def _five(messages, place, generator):
  return "\n".join(f"PART {i}: {place.problem} {i} {generator.random()}" for i in range(1, 6))


@pytest.mark.parametrize("changes", [
  {"DEC": _five},
  {"ASSESS": "REPHRASE", "TRA": "PROBLEM: What is it?\nBRIDGE: same"},
  {"ASSESS": "REPHRASE", "TRA": lambda m, place, r: (
    f"PROBLEM: {'ping' if place.problem.count('.') % 2 else 'pong'}\nBRIDGE: b")},
  {"ASSESS": "?", "DED": "\x07", "VER": "?"},
  dict.fromkeys((*REPLIES, "DEC", "INT"), ""),
  dict.fromkeys((*REPLIES, "DEC", "INT"), "I'm sorry, I can't help with that."),
])
@pytest.mark.parametrize("limits", [{}, {"max_turns": 40}, {"max_tokens": 9000}])
def test_hostile_models_end_within_the_bound(changes, limits):
  made, backend = engine(cooperative(changes), max_depth=2, max_new_tokens=64, **limits)
  root = made.run()
  used = made.calls.limits
  assert root.conclusion is not None or root.reason
  assert backend.num_calls <= used.max_turns and made.calls.spent.tokens <= used.max_tokens
  assert len(made.tree.problems) <= used.most_problems
  for problem in made.tree.problems.values():
    assert problem.turns_used <= used.calls_per_problem


def _hostile(seed):
  """A model that replies at random, in the form or out of it."""
  chooser = random.Random(seed)
  words = [*REPLIES.values(), "", "SPLIT", "REPHRASE", "1. a\n2. b", "VERDICT: CHILD 1\nISSUE: x",
           "VERDICT: ISSUE\nISSUE: y", "PROBLEM: What is it?", "PART 1: (needs 1) x\nPART 2: y",
           "CONCLUSION: [S1]", "garbage\x00", "I'm sorry, no.", "KEY:", "PROBLEM: q\nBRIDGE: r"]

  def rule(messages, place, generator):
    if chooser.random() < 0.3:
      return cooperative(parts=chooser.randrange(2, 5))(messages, place, generator)
    return chooser.choice(words)

  return rule


def test_a_thousand_random_runs_end_within_their_limits():
  generator = random.Random(1)
  ended = set()
  for seed in range(1000):
    limits = {"max_turns": generator.randrange(1, 50),
              "max_tokens": generator.randrange(600, 30_000),
              "max_depth": generator.randrange(4), "attempts": generator.randrange(1, 4),
              "rounds": generator.randrange(4), "rephrases": generator.randrange(3),
              "samples": generator.randrange(1, 3), "max_new_tokens": 64}
    made, backend = engine(_hostile(seed), **limits)
    root = made.run()
    assert backend.num_calls == made.calls.spent.turns <= limits["max_turns"]
    assert made.calls.spent.tokens <= limits["max_tokens"]
    assert root.conclusion is not None or root.reason
    assert len(made.tree.problems) <= made.calls.limits.most_problems
    most = made.calls.limits.calls_per_problem
    assert all(p.turns_used <= most for p in made.tree.problems.values())
    for problem in made.tree.problems.values():
      assert problem.depth <= limits["max_depth"]
      assert problem.state in ("verified", "unverified", "abandoned", "failed")
    ended.add(root.state)
  assert ended == {"verified", "unverified", "abandoned", "failed"}


@pytest.mark.parametrize("max_turns", range(1, 61))
def test_every_budget_is_kept_and_all_above_are_integrated(max_turns):
  rule, integrated = _requests(cooperative(parts=3), "INT")
  made, backend = engine(rule, max_turns=max_turns, max_depth=3)
  root = made.run()
  assert backend.num_calls <= max_turns and (root.conclusion is not None or root.reason)
  parents = [p for p in made.tree.problems.values() if p.children]
  assert {p.id for p in parents} == {name for name, _ in integrated}
  assert all(p.conclusion is not None for p in parents)
  if any(p.reason == "budget" for p in made.tree.problems.values()) and root.children:
    assert root.conclusion.status == "partial"


def test_cost_is_limited():
  made, _ = engine(cooperative(), max_cost=0.01, price_in=1.0, price_out=10.0, max_new_tokens=100)
  made.run()
  spent = made.calls.spent
  assert 0.005 < spent.cost <= 0.01
  assert spent.cost == pytest.approx(
    (spent.prompt_tokens + 10 * spent.reply_tokens) / 1e6, rel=1e-9)


def test_integration_shows_every_part_of_random_trees():
  generator = random.Random(2)
  abandoned = 0
  for seed in range(200):
    own = random.Random(seed)

    def rule(messages, place, unused, own=own):
      if place.pattern == "ASSESS":
        return own.choice(["SOLVE", "SPLIT", "SPLIT"])
      if place.pattern == "DED":
        return "" if own.random() < 0.2 else f"CONCLUSION: found {place.problem} {own.random()}"
      if place.pattern == "DEC":
        return cooperative(parts=own.randrange(2, 5))(messages, place, unused)
      return cooperative()(messages, place, unused)

    watching, integrated = _requests(rule, "INT")
    made, _ = engine(watching, max_turns=generator.randrange(10, 120), max_depth=3, rounds=0)
    made.run()
    for name, text in integrated:
      children = made.tree.children(made.tree.problems[name])
      for i, child in enumerate(children, 1):
        assert f"[S{i}] {child.statement}\nStatus: " in text
        if child.conclusion is None:
          abandoned += 1
          assert f"Status: {child.state}, no conclusion ({child.reason})" in text
        else:
          assert f"Conclusion: {child.conclusion.text}" in text
      uses = made.tree.problems[name].conclusion.uses
      assert uses == tuple(c.id for c in children if c.conclusion is not None)
  assert abandoned > 50


def test_an_uncited_part_is_asked_for_once():
  rule, integrated = _requests(cooperative({"INT": "CONCLUSION: by [S1]"}), "INT")
  made, _ = engine(rule, max_depth=1)
  assert made.run().conclusion.text == "by [S1]"
  assert len(integrated) == 2 and "it does not cite [S2]" in integrated[1][1]


def _verdicts(*verdicts):
  said = iter(verdicts)
  return lambda m, place, r: next(said)


def test_issue_then_ok_refines_once():
  rule, refined = _requests(cooperative({
    "ASSESS": "SOLVE", "VER": _verdicts("VERDICT: ISSUE\nISSUE: sign", "VERDICT: OK")}), "REFINE")
  made, _ = engine(rule)
  root = made.run()
  assert root.state == "verified" and root.conclusion.text == "better"
  assert root.conclusion.critiques == ("sign",)
  (_, text), = refined
  assert "leaf" in text and "sign" in text and "Think." not in text  # conclusion and issue only


def test_rounds_of_issues_leave_it_unverified():
  made, _ = engine(cooperative({"ASSESS": "SOLVE", "VER": "VERDICT: ISSUE\nISSUE: no"}), rounds=3)
  root = made.run()
  assert root.state == root.conclusion.status == "unverified"
  assert root.attempts == {"ASSESS": 1, "DED": 1, "VER": 3, "REFINE": 3}


def test_a_faulty_part_is_reopened_once_and_integrated_again():
  def verdict(messages, place, generator):
    return "VERDICT: CHILD 2\nISSUE: part" if place.problem == "0" else "VERDICT: OK"
  rule, refined = _requests(cooperative({"VER": verdict}), "REFINE")
  made, _ = engine(rule, max_depth=1)
  root = made.run()
  assert [name for name, _ in refined] == ["0.2", "0"]  # the second time it counts as an issue
  assert root.attempts["INT"] == 2 and made.tree.problems["0.2"].conclusion.text == "better"
  assert made.tree.problems["0.1"].conclusion.text == "leaf"


def test_questions_rotate():
  rule, asked = _requests(cooperative(), "VER")
  made, _ = engine(rule, max_depth=2)
  made.run()
  from lmops_jax.systems.socratic.patterns import QUESTIONS
  assert [next(i for i, q in enumerate(QUESTIONS) if q in text) for _, text in asked] == [
    i % len(QUESTIONS) for i in range(7)]


def test_the_majority_of_samples_wins():
  def sampled(messages, place, generator):
    return f"CONCLUSION: c{place.sample}\nANSWER: {[4, 5, '5.'][place.sample]}"
  made, backend = engine(cooperative({"ASSESS": "SOLVE", "DED": sampled}), samples=3, rounds=0)
  assert made.run().conclusion.text == "c1" and backend.num_calls == 4


def test_without_a_majority_a_critique_chooses():
  def sampled(messages, place, generator):
    return f"CONCLUSION: c{place.sample}\nANSWER: {place.sample}"
  def verdict(messages, place, generator):
    return "VERDICT: OK" if "c1" in messages[-1][1] else "VERDICT: ISSUE\nISSUE: x"
  made, _ = engine(cooperative({"ASSESS": "SOLVE", "DED": sampled, "VER": verdict}), samples=2)
  assert made.run().conclusion.text == "c1"


def test_long_conclusions_are_shortened_and_then_it_fails():
  long = "CONCLUSION: " + "word " * 1200
  made, backend = engine(cooperative({"DED": long}), max_depth=1, window=3600, rounds=0)
  root = made.run()
  assert root.state == "unverified" and root.attempts["SUMMARISE"] == 2
  hopeless = cooperative({"DED": long, "SUMMARISE": long})
  made, _ = engine(hopeless, max_depth=1, window=3600, rounds=0)
  assert made.run().state == "failed" and "context_overflow" in made.tree.root.reason


@pytest.mark.parametrize("first, rest", [
  ("CON", "CLUSION: done"), ("it is 3", "CONCLUSION: done"), ("so", " **Conclusion:** done")])
def test_a_reply_that_was_cut_off_is_continued_once(first, rest):
  from lmops_jax.systems.socratic import Reply, Usage
  def cut(messages, place, generator):
    ends = messages[-1][1].startswith("Continue")
    return Reply(rest if ends else first, "stop" if ends else "length", Usage(5, 5))
  made, backend = engine(cooperative({"ASSESS": "SOLVE", "DED": cut}), rounds=0)
  assert made.run().conclusion.text == "done" and backend.num_calls == 3


def test_needed_siblings_are_shown():
  rule, asked = _requests(cooperative({"DEC": "PART 1: a\nPART 2: (needs 1) b\nPART 3: c"}), "DED")
  made, _ = engine(rule, max_depth=1)
  made.run()
  assert ["[S1] a" in text for _, text in asked] == [False, True, False]


@pytest.mark.parametrize("statement, message", [
  ("  ", "the problem is empty"), ("a\x07b", r"control character '\\x07' at character 1"),
  ("x" * 200_001, "has 200,001 characters"),
])
def test_bad_problems_are_refused_before_any_call(statement, message):
  with pytest.raises(ValueError, match=message):
    engine(cooperative(), statement=statement)


def test_a_small_model_that_ignores_every_form_still_ends_with_what_it_said():
  """As models of 135M parameters reply: chat, echoes of the form, "yes" to every check."""
  said = {"ASSESS": "Sure! To SOLVE or to SPLIT, this is the question. Let me SOLVE or SPLIT it.",
          "DED": "The answer to the question is 42.\n\nI hope that this helps!",
          "VER": "Yes, the conclusion is correct.", "CHECK": "Yes."}
  made, backend = engine(cooperative(said))
  root = made.run()
  assert root.conclusion.text.startswith("The answer to the question is 42.")
  assert root.state == "unverified" and backend.num_calls == 2 + 1 + 2 * 2


def test_limits_are_checked():
  with pytest.raises(ValueError, match="socratic.Limits.max_turns=-1"):
    Limits(max_turns=-1)
  assert Limits().calls_per_problem == 28 and Limits().most_problems == 781
