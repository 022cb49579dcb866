"""The closed form of errors against the engine, and against a plain simulation of one node."""

import random

import pytest

from lmops_jax.systems.socratic import simulate as simulate_lib
from lmops_jax.systems.socratic.simulate import expected, helps, simulate, standard_error

GRID = [(error, rounds) for error in (0.02, 0.05, 0.15) for rounds in (0, 1, 2)]


@pytest.mark.parametrize("s, rounds, whole", [
  (15, 0, 0.463), (15, 1, 0.805), (15, 2, 0.844), (31, 0, 0.204), (31, 1, 0.638), (31, 2, 0.704)])
def test_the_closed_form_gives_known_figures(s, rounds, whole):
  assert expected(0.05, rounds).node ** s == pytest.approx(whole, abs=5e-4)


def test_the_closed_form_is_that_of_a_node_played_out():
  generator, rounds, count = random.Random(0), 2, 100_000
  right = tries = 0
  for _ in range(count):
    for number in range(rounds + 1):
      good = generator.random() >= 0.3
      tries += 1
      if number == rounds or generator.random() < (0.9 if good else 0.4):
        break
    right += good
  want = expected(0.3, rounds, 0.9, 0.6)
  assert abs(right / count - want.node) < 3 * standard_error(want.node, count)
  assert tries / count == pytest.approx(want.tries, rel=0.02)


@pytest.mark.parametrize("accept, catch", [(0.9, 0.3), (0.5, 0.4), (0.5, 0.5), (0.2, 0.9)])
def test_verification_helps_if_and_only_if_the_critic_is_better_than_chance(accept, catch):
  gain = expected(0.2, 1, accept, catch).node - expected(0.2, 0, accept, catch).node
  assert (gain > 1e-12) == helps(accept, catch)


def _check(found, error, rounds):
  want = expected(error, rounds)
  whole = want.node**found.operators
  assert abs(found.all_right - whole) <= 3 * standard_error(whole, found.problems)
  nodes = found.problems * found.operators
  assert abs(found.nodes_right - want.node) <= 3 * standard_error(want.node, nodes)
  assert found.tries == pytest.approx(want.tries, rel=0.02)


def test_the_engine_is_what_the_closed_form_says():
  found = simulate(0.15, 1, levels=3, problems=150)
  _check(found, 0.15, 1)
  # an inner node: assess, split, check, integrate; a leaf: assess, deduce; and the rest of the
  # tries with their critiques
  critiques = found.calls - 150 * (3 * 4 + 4 * 2) - round((found.tries - 1) * 150 * 7)
  assert critiques == 150 * 7  # one round: each node is questioned once


@pytest.mark.slow
@pytest.mark.parametrize("error, rounds", GRID)
def test_the_gate_over_the_grid(error, rounds):
  """2,000 problems a cell."""
  _check(simulate(error, rounds, levels=3, problems=2000, seed=1), error, rounds)


def test_a_lost_part_would_show(monkeypatch):
  """The gate can fail: an engine that skips every second check is far from the closed form."""
  plain = simulate_lib.Engine._verify
  skipped = []

  def skipping(self, p):
    skipped.append(p)
    if len(skipped) % 2:
      plain(self, p)
    else:
      self._settle(p, "verified")
  monkeypatch.setattr(simulate_lib.Engine, "_verify", skipping)
  with pytest.raises(AssertionError):
    _check(simulate(0.15, 1, levels=3, problems=150), 0.15, 1)


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="simulate.error=1.5"):
    simulate(1.5)
