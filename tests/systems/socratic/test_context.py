"""Requests: what they hold, in which order it is cut, and that they never exceed the budget."""

import random

import pytest

from lmops_jax.systems.socratic import Pin, context
from lmops_jax.systems.socratic.context import ContextOverflow, Past
from lmops_jax.systems.socratic.patterns import Known, View, default_patterns

PATTERNS = default_patterns()


def count(messages):
  return sum(len(content) // 4 + 4 for _, content in messages)


def _words(generator, most):
  return " ".join(f"w{generator.randrange(10**6)}" for _ in range(1 + generator.randrange(most)))


def test_random_histories_keep_to_the_budget_and_keep_what_is_protected():
  generator = random.Random(0)
  overflows = cut = excerpts = 0
  for _ in range(1000):
    view = View(
      _words(generator, 20), tuple(_words(generator, 20) for _ in range(generator.randrange(5))),
      tuple(Pin(f"p{i}", "Definition", _words(generator, 30))
            for i in range(generator.randrange(3))),
      tuple(Known(f"S{i}", "s", "verified", _words(generator, 30))
            for i in range(1, 1 + generator.randrange(4))))
    past = [Past(i, _words(generator, 30),
                 "\n\n".join(_words(generator, 40) for _ in range(1 + generator.randrange(4))))
            for i in range(1, 1 + generator.randrange(5))]
    budget = generator.randrange(150, 900)
    try:
      built = context.build(PATTERNS["DED"], view, past, budget, count)
    except ContextOverflow:
      least = context.build(PATTERNS["DED"], View(view.problem, (), view.pins, view.children), [],
                            10**9, count)
      assert least.tokens > budget
      overflows += 1
      continue
    assert built.tokens == count(built.messages) <= budget
    final = built.messages[-1][1]
    assert built.messages[0] == ("system", "You are an expert mathematician collaborator who is "
                                 "good at proving theorems.")
    protected = [view.problem, *(p.text for p in view.pins), *(k.text for k in view.children)]
    assert all(text in final for text in protected)
    shown = [text for text in view.ancestors if text in final]
    assert tuple(shown) == view.ancestors[: len(shown)]  # the nearest ones
    turns = [r for r in built.references if "turn" in r]
    assert len(built.messages) == 2 + 2 * len(turns)
    for reference, reply in zip(turns, built.messages[2:-1:2]):
      whole = past[reference["turn"] - 1].reply
      if reference["mode"] == "whole":
        assert reply == ("assistant", whole)
      else:
        excerpts += 1
        assert reply[1] == " ... ".join(whole[a:b] for a, b in reference["span"]) != whole
    left_out = len(past) - len(turns) + len(view.ancestors) - len(shown)
    assert len(built.cuts) == left_out + sum(r["mode"] == "excerpt" for r in turns)
    kept = [r["turn"] for r in turns]
    assert kept == list(range(len(past) - len(kept) + 1, len(past) + 1))  # the newest ones
    cut += bool(built.cuts)
  assert min(overflows, cut, excerpts) > 50  # the cases do occur


def test_a_selected_passage_goes_before_the_whole_reply():
  past = [Past(3, "q", "long reply", ((0, 4),))]
  built = context.build(PATTERNS["DED"], View("p"), past, 10**6, count)
  assert built.messages[2] == ("assistant", "long")
  assert built.references == ({"turn": 3, "mode": "excerpt", "span": [[0, 4]]},)


@pytest.mark.parametrize("name, view, text", [
  ("ASSESS", View("Is 7 prime?", words=("SOLVE", "SPLIT")),
   "We are working on this problem:\n\nIs 7 prime?\n\nDo not solve it yet. Decide how to go on:\n"
   "SOLVE if you can reach its conclusion in one reply and no question stays open;\n"
   "REPHRASE if the wording or the viewpoint is the obstacle, and a similar, more general or "
   "better posed problem would be easier;\nSPLIT if it is really several problems.\n\n"
   "End your reply with:\nDECISION: SOLVE or SPLIT\nREASON: one sentence"),
  ("INT", View("P", ("Q", "R"), (Pin("d", "Definition", "x"),),
               (Known("S1", "a", "verified", "A"), Known("S2", "b", "abandoned"))),
   "The problem:\n\nP\n\nIt is part of:\n- Q\n- R\n\nDefinitions and results to build on:\n"
   "Definition: x\n\nIts parts were worked on one by one:\n\n[S1] a\nStatus: verified\n"
   "Conclusion: A\n\n[S2] b\nStatus: abandoned\n\nJoin them into a conclusion for the whole "
   "problem. Use each conclusion and cite it as [S1], [S2] and so on; say what stays open where "
   "a part has none.\n\nEnd your reply with:\nCONCLUSION: the conclusion, complete in itself\n"
   "ANSWER: the short value that was asked for, or none"),
  ("REFINE", View("P", conclusion="C", critique="wrong sign"),
   "The problem:\n\nP\n\nThe conclusion so far:\n\nC\n\nThis was objected to it:\n\nwrong sign\n\n"
   "Decide whether the objection is right, correct what has to be corrected, and give the whole "
   "conclusion again.\n\nEnd your reply with:\nCONCLUSION: the conclusion, complete in itself\n"
   "ANSWER: the short value that was asked for, or none"),
])
def test_requests_as_they_are_sent(name, view, text):
  assert PATTERNS[name].build(view) == text


def test_what_stands_in_a_slot_is_not_read_as_a_template():
  assert "a {form} and {problem} b" in PATTERNS["DED"].build(View("a {form} and {problem} b"))
