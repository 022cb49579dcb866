"""What replies say: markers, JSON, lists, citations, and no more than linear time for garbage."""

import random

import pytest

from lmops_jax.systems.socratic import replies
from lmops_jax.systems.socratic.patterns import View, default_patterns
from lmops_jax.systems.socratic.problems import Conclusion
from lmops_jax.systems.socratic.replies import Result, Unreadable

PATTERNS = default_patterns()


def read(name, text, **view):
  return PATTERNS[name].parse(text, View(**view))


@pytest.mark.parametrize("text, conclusion, answer", [
  ("CONCLUSION: a\nANSWER: 7", "a", "7"),
  ("conclusion: old\n\n**Conclusion:** new\nlines\nAnswer : 8", "new\nlines", "8"),
  ("ANSWER: 9", "ANSWER: 9", "9"),
  ('Here:\n```json\n{"conclusion": "c", "answer": 4}\n```', "c", "4"),
  ("```\nCONCLUSION: fenced\n```", "fenced", None),
  ("just text", "just text", None),
])
def test_conclusions(text, conclusion, answer):
  for name in ("DED", "REFINE", "INT"):
    found = read(name, text)
    assert (found.text, found.answer) == (conclusion, answer)
    assert found.fallback == ("onclusion" not in text and "CONCLUSION" not in text)


@pytest.mark.parametrize("name, text, text_read", [
  ("DED", "CONCLUSION: The conclusion, complete in itself\n\nANSWER: 243", "ANSWER: 243"),
  ("REFINE", "CONCLUSION: the short value that was asked for, or none", None),
  ("VER", "VERDICT: OK or ISSUE or CHILD k, if part k is at fault", None),
  ("VER", "**VERDICT:** ISSUE: what is wrong, if anything.", None),
  ("ASSESS", "DECISION: SOLVE or REPHRASE or SPLIT\nREASON: one sentence", None),
  ("DEC", "PART 1: the first part\nPART 2: (needs 1) a part that builds on part 1", None),
])
def test_lines_of_the_form_say_nothing(name, text, text_read):
  found = read(name, text)
  assert getattr(found, "text", None) == text_read
  assert isinstance(found, Unreadable) == (text_read is None)


@pytest.mark.parametrize("text, answer, shown", [
  ("the sum", "8", "the sum\nANSWER: 8"), ("3 + 5 = **8**.", "8.", "3 + 5 = **8**."),
  ("it is 18", "8", "it is 18\nANSWER: 8"), ("it is -8", "8", "it is -8\nANSWER: 8"),
  ("the sum", None, "the sum"), ("the sum", "8\nmore", "the sum\nANSWER: 8"),
])
def test_conclusions_are_shown_with_their_answer(text, answer, shown):
  assert Conclusion(text, answer).shown == shown


@pytest.mark.parametrize("text, word", [
  ("DECISION: split\nREASON: big", "SPLIT"), ("SOLVE", "SOLVE"),
  ("I would REPHRASE it.", "REPHRASE"),
  ("DECISION: **SOLVE**", "SOLVE"), ("SOLVE or SPLIT?", "SOLVE"),
  ("SOLUTION: Solve.", "SOLVE"), ("To solve it, I would SPLIT it.", "SPLIT"),
])
def test_decisions(text, word):
  assert read("ASSESS", text).word == word


@pytest.mark.parametrize("text", [
  "", "Either to SOLVE or to SPLIT.", "To solve or split?", "perhaps", "DECISION:"])
def test_no_single_decision_is_unreadable(text):
  assert isinstance(read("ASSESS", text), Unreadable)


def test_a_decision_that_is_not_offered_is_unreadable():
  assert isinstance(read("ASSESS", "REPHRASE", words=("SOLVE", "SPLIT")), Unreadable)


@pytest.mark.parametrize("text, parts", [
  ("PART 1: a\nPART 2: (needs 1) b", (("a", ()), ("b", (1,)))),
  ("PART 1: old\nPART 2: x\nPART 1: a\nmore\nPART 2 (needs 1): b", (("a more", ()), ("b", (1,)))),
  ("Plan:\n1. a\n2) b", (("a", ()), ("b", ()))),
  ("PART 1: a\nPART 2: (needs 2, 3) b", (("a", ()), ("b", ()))),  # itself and later ones
])
def test_parts(text, parts):
  assert read("DEC", text).parts == parts


@pytest.mark.parametrize("text", [
  "PART 1: alone", "PART 1: a\nPART 3: c", "nothing", "PART 1:\nPART 2: b",
  "\n".join(f"PART {i}: x" for i in range(1, 7)),
])
def test_other_numbers_of_parts_are_unreadable(text):
  assert isinstance(read("DEC", text), Unreadable)


@pytest.mark.parametrize("text, word, child, issue", [
  ("VERDICT: OK", "OK", 0, ""), ("VERDICT: ISSUE\nISSUE: sign", "ISSUE", 0, "sign"),
  ("VERDICT: CHILD 2\nISSUE: it", "CHILD", 2, "it"),
  ("Verdict: child S1\nissue: it", "CHILD", 1, "it"),
  ("VERDICT: CHILD 9\nISSUE: no such", "ISSUE", 0, "no such"),
  ("VERDICT: OK\nVERDICT: ISSUE\nISSUE: late", "ISSUE", 0, "late"),
])
def test_verdicts(text, word, child, issue):
  from lmops_jax.systems.socratic.patterns import Known
  found = read("VER", text, children=(Known("S1", "a", "verified"), Known("S2", "b", "verified")))
  assert (found.word, found.child, found.text) == (word, child, issue)


def test_transforms_and_unreadable_ones():
  assert read("TRA", "PROBLEM: q\nBRIDGE: b") == Result("q", bridge="b")
  assert isinstance(read("TRA", "a new problem"), Unreadable)
  assert isinstance(read("VER", "looks fine"), Unreadable)


def test_citations():
  assert replies.cited("see [S1], [S2, s3] and [4]") == {1, 2, 3}
  found = read("INT", "CONCLUSION: by [S1]", must_cite=frozenset({1, 2}))
  assert found.reason == "it does not cite [S2]" and found.result.text == "by [S1]"


def test_key_passages():
  def key(text):
    return [text[a:b] for a, b in replies.key_span(text)]
  assert key("a\n\nKEY: the idea\nof it\n\nrest") == ["the idea\nof it"]
  assert key("first\n\nmiddle\n\nlast\n") == ["first", "last"]
  assert key("one") == ["one"]


def test_refusals():
  assert replies.is_refusal("I'm sorry, but no.") and replies.is_refusal("I cannot help with that")
  assert not replies.is_refusal("I cannot see a gap in the proof.")


def test_garbage_is_never_an_error_and_takes_linear_work():
  """What a weak model writes instead of the form: loops, echoes, half markers, noise."""
  generator = random.Random(0)
  pieces = ["PART", "1", ":", "\n", "VERDICT", "*" * 9, "[S", "]", "(needs", "```", "{", '"',
            "KEY:", "ANSWER", " ", "\x07", "\ud800", "é", "CONCLUSION", "1.", "OK", "\\"]
  texts = ["".join(generator.choices(pieces, k=generator.randrange(60))) for _ in range(500)]
  texts += [piece * 20_000 for piece in pieces]
  for text in texts:
    for pattern in PATTERNS.values():
      found = pattern.parse(text, View())
      assert isinstance(found, Result | Unreadable)
    replies.key_span(text), replies.is_refusal(text)
