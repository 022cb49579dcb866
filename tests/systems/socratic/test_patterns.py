"""Patterns of installed packages."""

import dataclasses

from lmops_jax.systems.socratic import Cast, Limits, Rules, patterns, runs
from tests.systems.socratic.rules import cooperative


class _Point:
  name = "terse"

  @staticmethod
  def load():
    return lambda: dataclasses.replace(
      patterns.default_patterns()["DED"], text="Briefly: {problem}\n\n{form}", persona="P")


def test_an_installed_pattern_replaces_ours(monkeypatch, tmp_path):
  monkeypatch.setattr(patterns.metadata, "entry_points",
                      lambda group: [_Point] if group == patterns.GROUP else [])
  asked = []

  def rule(messages, place, random):
    asked.append((place.pattern, messages))
    return cooperative()(messages, place, random)

  plan = runs.Plan("Why?", Limits(max_depth=0), Cast(), {"kind": "rules"}, named=("terse",))
  runs.run(tmp_path, plan, Rules(rule))
  (system, user), = (messages for name, messages in asked if name == "DED")
  assert system[1] == "You are a mathematician skilled in probability theory."
  assert user[1].startswith("Briefly: Why?\n\nEnd your reply with:")
  assert runs.plan_of(tmp_path) == plan
