"""Tools for verification: exact on what they take, and nothing that a model writes is run."""

import builtins
import itertools
import json
import random
import sys
from fractions import Fraction

import pytest

from lmops_jax.systems.socratic import Calls, Engine, Limits, NoLog, Rules, default_patterns, tools
from lmops_jax.systems.socratic.formulas import Refused
from lmops_jax.systems.socratic.journal import Journal
from lmops_jax.systems.socratic.patterns import View
from tests.systems.socratic.rules import cooperative

pytest.importorskip("sympy")


@pytest.fixture(scope="module")
def arithmetic():
  made = tools.Arithmetic()
  for names in ("a", "a+b", "a+b+c", "a+b+c+d"):  # sympy writes code for that many variables once
    made.check(f"({names})^2 = {names}")
  return made


@pytest.fixture(scope="module")
def satisfiability():
  pytest.importorskip("pysat")
  return tools.Satisfiability()


@pytest.mark.parametrize("claim, said", [
  ("3*(4+5)^2 = 243", "true: 243 on the left, 243 on the right"),
  ("2 + 2 = 5", "false: 4 on the left, 5 on the right"),
  ("0.1 + 0.2 = 0.3", "true: 3/10 on the left, 3/10 on the right"),
  ("2^-3 < 1/7", "true: 1/8 on the left, 1/7 on the right"),
  ("-2^2 = 4", "false: -4 on the left, 4 on the right"), ("2^3^2", "it is 512"),
  ("10 - 3 - 2", "it is 5"), ("2*-3", "it is -6"), ("-7 % 3", "it is 2"),
  ("floor(-7/2)", "it is -4"),
  ("factorial(20) != binomial(40, 20)", "true: 2432902008176640000 on the left, 137846528820 on "
   "the right"),
  ("gcd(12, 18) * lcm(12, 18) = 12*18", "true: 216 on the left, 216 on the right"),
  ("(x+y)^3 = x^3 + 3*x^2*y + 3*x*y^2 + y^3", "true for all x, y for which both sides are defined"),
  ("1/(n*(n+1)) = 1/n - 1/(n+1)", "true for all n for which both sides are defined"),
  ("(x+y)^2 = x^2 + y^2", "false: at x = 1, y = 1 it is 4 on the left, 2 on the right"),
  ("1/x = 1/x^2", "false: at x = 2 it is 1/2 on the left, 1/4 on the right"),
  ("(a^2 - b^2)/(a - b)", "it is a + b"), ("abs(-3/4)", "it is 3/4"),
])
def test_arithmetic_is_exact(arithmetic, claim, said):
  assert arithmetic.check(claim) == said


def _random_sum(generator, depth):
  if depth == 0:
    return str(generator.randrange(-9, 10))
  sides = _random_sum(generator, depth - 1), _random_sum(generator, generator.randrange(depth))
  return f"({sides[0]} {generator.choice('+-*')} {sides[1]})"


def test_arithmetic_against_python(arithmetic):
  generator = random.Random(0)
  for _ in range(200):
    text = _random_sum(generator, 5)
    assert arithmetic.check(text) == f"it is {eval(text, {'__builtins__': {}})}"


@pytest.mark.parametrize("claim, reason", [
  ("9^9^9^9", "exponent 387420489 is beyond 1000"), ("(2^1000)^1000", "become too large"),
  ("((10^900)^9)", "become too large"), ("10^-1001", "exponent -1001 is beyond"),
  ("factorial(10^9)", "takes numbers from 0 to 500"), ("binomial(5, -1)", "takes numbers from 0"),
  ("(1+x+y+z+w)^40", "become too large"), ("((x+1)^300)*((x+2)^300)", "too much work"),
  ("1/0", "divides by zero"), ("1/(x-x)", "divides by zero"), ("0^-1", "divides by zero"),
  ("5 % 0", "remainder by zero"), ("2^0.5", "takes whole numbers"), ("x^y", "takes whole numbers"),
  ("x < 1", "only equations are decided"), ("a+b+c+d+e", "5 variables"),
  ("1 = 2 = 3", "compares"), ("(1 = 1)", "compares"), ("f(1)", "there is no function f"),
  ("gcd(1)", "takes 2 arguments and has 1"), ("gcd", "has no arguments"),
  ("__import__('os').system('true')", "the character '_'"), ("x.__class__", "the character '.'"),
  ("()", "stands where"), ("open('/etc/passwd')", "the character \"'\""),
  ("import os", "'os' is one too many"), ("lambda: 1", "the character ':'"), ("x := 1", "':'"),
  ("[1 for a in b]", "the character '['"), ("\u0663 + 1", "the character"),
  ("\uff11+1", "the character"),
  ("x\u00b2", "the character"), ("1_000", "the character '_'"), ("1e999", "'e999' is one too many"),
  ("0x10", "'x10' is one too many"), ("9" * 61, "61 digits"), ("x" * 17, "more than 16"),
  ("(" * 10_000 + "1" + ")" * 10_000, "20001 characters"), ("(" * 400 + "1", "nested more than 50"),
  ("-" * 400 + "1", "nested more than 50"), ("2^" * 300 + "1", "nested more than 50"),
  ("abs(" * 200 + "1", "nested more than 50"),
  ("", "it is empty"), ("  ", "it is empty"), ("1 +", "ends too early"), ("(1", "is missing"),
  ("1)", "one too many"), ("\x00", "the character"), ("1\n+\r2;", "the character ';'"),
])
def test_hostile_arithmetic_is_refused(arithmetic, claim, reason, monkeypatch):
  def forbidden(*unused, **also):
    raise AssertionError("a claim reached an evaluator")

  for name in ("eval", "exec"):
    monkeypatch.setattr(builtins, name, forbidden)
  import sympy
  for name in ("sympify", "parse_expr", "S"):
    monkeypatch.setattr(sympy, name, forbidden)
  with pytest.raises(Refused) as caught:
    arithmetic.check(claim)
  assert reason in str(caught.value)


def test_long_sums_are_no_deep_recursion(arithmetic):
  assert arithmetic.check("1" + "+1" * 499) == "it is 500"
  assert arithmetic.check("2^1000 - 2^1000 + " + "(" * 49 + "7" + ")" * 49) == "it is 7"


def test_long_numbers_are_shown_by_their_ends(arithmetic):
  assert arithmetic.check("factorial(100)").endswith("(158 digits)")


def _random_formula(generator, depth):
  if depth == 0:
    return generator.choice("abcd")
  if generator.random() < 0.2:
    return f"~{_random_formula(generator, depth - 1)}"
  left, right = (_random_formula(generator, depth - 1) for _ in range(2))
  return f"({left} {generator.choice(['&', '|', 'xor', '->', '<->'])} {right})"


_PYTHON = {"&": "and", "|": "or", "xor": "!=", "<->": "=="}


def _truths(formula):
  """By Python on all values; `p -> q` is `p <= q` of truth values."""
  text = formula.replace("<->", " == ").replace("->", " <= ").replace("xor", " != ")
  text = text.replace("~", " 1 ^ ")
  return [bool(eval(text, {"__builtins__": {}}, dict(zip("abcd", values))))
          for values in itertools.product((0, 1), repeat=4)]


def _bracketed(formula):
  """`~x` as `(1 ^ x)`, so that Python's precedence does not matter."""
  while "~" in formula:
    at = formula.rindex("~")
    end, depth = at + 1, 0
    while True:
      depth += {"(": 1, ")": -1}.get(formula[end], 0)
      end += 1
      if depth == 0:
        break
    formula = f"{formula[:at]}(1 ^ {formula[at + 1 : end]}){formula[end:]}"
  return formula


def test_satisfiability_against_all_values(satisfiability):
  generator = random.Random(0)
  found = set()
  for _ in range(300):
    formula = _random_formula(generator, 4)
    truths = _truths(_bracketed(formula))
    assert satisfiability.check(f"satisfiable: {formula}").startswith(
      "true" if any(truths) else "false")
    assert satisfiability.check(f"unsatisfiable: {formula}").startswith(
      "false" if any(truths) else "true")
    assert satisfiability.check(f"valid: {formula}").startswith("true" if all(truths) else "false")
    found.add((any(truths), all(truths)))
  assert found == {(True, True), (True, False), (False, False)}


def test_examples_are_examples(satisfiability):
  assert satisfiability.check("satisfiable: (a | b) & ~a") == (
    "true: it can be true, as with a=0, b=1")
  assert satisfiability.check("valid: a -> b") == "false: it can be false, as with a=1, b=0"
  assert satisfiability.check("valid: a -> b -> a") == "true: it is valid"  # groups to the right
  assert satisfiability.check("satisfiable: false or true") == "true: it can be true"


def _pigeons(holes):
  """More pigeons than holes, which resolution needs exponentially many steps for."""
  sits = [[f"p{i}h{j}" for j in range(holes)] for i in range(holes + 1)]
  parts = [f"({'|'.join(row)})" for row in sits]
  parts += [f"~({sits[i][j]}&{sits[k][j]})" for j in range(holes)
            for i, k in itertools.combinations(range(holes + 1), 2)]
  return "&".join(parts)


def test_hard_formulas_end_by_counted_work(satisfiability, monkeypatch):
  assert satisfiability.check(f"unsatisfiable: {_pigeons(4)}").startswith("true")
  monkeypatch.setattr("lmops_jax.systems.socratic.satisfiability._MAX_CONFLICTS", 5)
  with pytest.raises(Refused, match="not decided within 5 conflicts"):
    satisfiability.check(f"unsatisfiable: {_pigeons(4)}")


@pytest.mark.parametrize("claim, reason", [
  ("a & b", "does not begin with"), ("satisfiable: 1", "holds the number 1"),
  ("satisfiable: a.b", "the character '.'"), ("satisfiable: " + "~" * 300 + "a", "nested more"),
  ("satisfiable: " + "&".join(f"v{i}" for i in range(61)), "61 variables"),
  ("satisfiable: a b", "one too many"), ("satisfiable: f(a)", "no function f"),
  ("satisfiable:", "it is empty"), ("satisfiable: \u0430 & \u00e9", "the character"),
])
def test_hostile_formulas_are_refused(satisfiability, claim, reason):
  with pytest.raises(Refused, match=reason.replace("(", r"\(")):
    satisfiability.check(claim)


def test_claims_are_found_in_replies_and_taken_out():
  text = ("I think.\n**CLAIM arithmetic:** `1+1 = 2`\nclaim other: x\n- CLAIM Arithmetic: 2 < 1\n"
          "CONCLUSION: two\nANSWER: 2\nCLAIM arithmetic: 3")
  found, rest = tools.claims_of(text, ("arithmetic",))
  assert [claim.text for claim in found] == ["1+1 = 2", "2 < 1", "3"]
  assert "claim other: x" in rest and "1+1" not in rest
  assert tools.claims_of("CLAIM arithmetic: 1" * 100_000, ())[0] == ()


def test_of_many_claims_the_first_are_checked(arithmetic):
  claims = [tools.Claim("arithmetic", str(i)) for i in range(11)]
  found = tools.checked({"arithmetic": arithmetic}, claims)
  assert len(found) == 9 and found[-1].startswith("3 further claims were not checked")


@pytest.mark.parametrize("names, message", [
  (["calculator"], "no tool 'calculator'; there are arithmetic, satisfiability"),
  (["arithmetic", "arithmetic"], "named twice")])
def test_tools_that_are_not(names, message):
  with pytest.raises(ValueError, match=message):
    tools.named_tools(names)


@pytest.mark.parametrize("name, module, package", [
  ("arithmetic", "sympy", "sympy"), ("satisfiability", "pysat.solvers", "python-sat")])
def test_a_missing_library_names_the_extra(monkeypatch, name, module, package):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match=rf"needs the package {package}.*lmops_jax\[socratic\]"):
    tools.named_tools([name])


def _claiming(seen):
  def verify(messages, place, unused):
    seen.append(messages[-1][1])
    return "VERDICT: ISSUE\nISSUE: it is 5" if "false" in messages[-1][1] else "VERDICT: OK"

  return cooperative({
    "ASSESS": "DECISION: SOLVE",
    "DED": "CLAIM arithmetic: 2+2 = 5\nCONCLUSION: five\nANSWER: 5\nCLAIM arithmetic: 1 < 2",
    "REFINE": "CLAIM arithmetic: 2+2 = 4\nCONCLUSION: four\nANSWER: 4", "VER": verify})


def test_verification_sees_what_tools_found_and_the_log_holds_it(arithmetic, tmp_path):
  def run(rule):
    with Journal(tmp_path) as journal:
      engine = Engine("What is 2+2?", Calls(
        Rules(rule), journal, Limits(), default_patterns(), tools={"arithmetic": arithmetic}))
      return engine.run()

  seen = []
  root = run(_claiming(seen))
  assert root.state == "verified" and root.conclusion.answer == "4"
  assert "arithmetic: 2+2 = 5: false: 4 on the left, 5 on the right" in seen[0]
  assert "1 < 2: true" in seen[0] and "2+2 = 4: true" in seen[1] and "false" not in seen[1]
  lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
  found = [line["found"] for line in lines if line["kind"] == "tool"]
  assert [len(one) for one in found] == [2, 1] and "false" in found[0][0]
  before = (tmp_path / "log.jsonl").read_bytes()
  assert run(None).conclusion.answer == "4"  # from the log alone
  assert (tmp_path / "log.jsonl").read_bytes() == before


def test_without_tools_nothing_changes():
  seen = []
  engine = Engine("What is 2+2?", Calls(
    Rules(_claiming(seen)), NoLog(), Limits(), default_patterns()))
  root = engine.run()
  assert root.state == "verified" and root.conclusion.answer.startswith("5")
  assert "Exact tools" not in seen[0] and "CLAIM" not in seen[0]


def test_requests_show_how_to_claim(arithmetic):
  asked = []

  def deduce(messages, place, unused):
    asked.append(messages[-1][1])
    return None

  Engine("What is 2+2?", Calls(
    Rules(cooperative({"ASSESS": "DECISION: SOLVE", "DED": deduce})), NoLog(), Limits(),
    default_patterns(), tools={"arithmetic": arithmetic})).run()
  assert "CLAIM arithmetic: LEFT = RIGHT" in asked[0] and "satisfiability" not in asked[0]


@pytest.mark.parametrize("name", ["arithmetic", "satisfiability"])
def test_a_form_repeated_is_no_claim(name):
  ded, view = default_patterns()["DED"], View("What is 2+2?", tools=(name,))
  echo = tools.form_of(name).partition("\n")[0]
  found = ded.parse(f"**{echo.lower()}**\nCLAIM {name}: 1\nCONCLUSION: four", view)
  assert [claim.text for claim in found.claims] == ["1"] and found.text == "four"
  assert ded.parse(ded.form(view), view).reason == "it only repeats the form"


def test_fractions_of_the_algebra_are_pythons(arithmetic):
  assert arithmetic.check("7/3 - 1/6") == f"it is {Fraction(7, 3) - Fraction(1, 6)}"
