"""Main content and modifiers: the split by hand, and draws that are functions of (seed, id)."""

from collections import Counter

import numpy as np
import pytest

from lmops_jax.data import EngineeredPrompts, TextLines
from lmops_jax.data.prompt_pairs import read_pairs
from lmops_jax.data.prompt_parts import Parts, parts_of, some_modifiers

PROMPT = "a castle on a hill, at night, Trending  on ArtStation, by Monet,, 4k"


def test_prompts_come_apart_at_the_first_modifier():
  assert parts_of(PROMPT) == ("a castle on a hill, at night",
                              ("Trending on ArtStation", "by Monet", "4k"))
  assert parts_of("a cat, in a hat") == ("a cat", ("in a hat",))
  assert parts_of("4k, 8k") == ("4k", ("8k",))
  assert parts_of("a cat") == ("a cat", ()) and parts_of(",") == (",", ())
  assert parts_of(PROMPT, {"at night"}).main == "a castle on a hill"
  assert parts_of(PROMPT).joined() == PROMPT.replace("  ", " ").replace(",,", ",")


def test_modifiers_stay_by_chance_and_in_both_orders():
  whole = Parts("a", tuple("bcdefghijk"))
  drawn = [some_modifiers(whole, i, seed=0) for i in range(2000)]
  assert drawn[7] == some_modifiers(whole, 7, seed=0)
  assert drawn != [some_modifiers(whole, i, seed=1) for i in range(2000)]
  assert all(set(d.modifiers) <= set(whole.modifiers) and d.main == "a" for d in drawn)
  kept = np.array([len(d.modifiers) for d in drawn])
  # The share is uniform, so each number from 0 to 10 is as likely: mean 5, variance 10.
  assert abs(kept.mean() - 5) < 0.25 and abs(kept.var() - 10) < 0.8
  many = [d.modifiers for d in drawn if len(d.modifiers) > 5]
  in_order = np.mean([list(m) == sorted(m) for m in many])
  assert abs(in_order - 0.5) < 0.06


@pytest.fixture
def corpus(tmp_path):
  lines = [PROMPT, "a plain cat", "a dog, highly detailed, sharp focus"]
  (tmp_path / "targets.txt").write_text("\n".join(lines))
  return TextLines(str(tmp_path / "targets.txt"))


def test_pairs_are_made_of_each_prompt(corpus):
  counts = Counter()
  pairs = read_pairs([EngineeredPrompts(corpus)], counts)
  mains = {pair.completion: pair.prompt for pair in pairs if pair.kind == "MC"}
  assert mains == {PROMPT: "a castle on a hill, at night",
                   "a dog, highly detailed, sharp focus": "a dog"}
  assert counts["same"] >= 2  # the plain cat, twice
  assert pairs == read_pairs([EngineeredPrompts(corpus)])
  assert all(pair.prompt.startswith(mains[pair.completion]) for pair in pairs)
  assert [p.kind for p in read_pairs([EngineeredPrompts(corpus, kinds=("MC",))])] == ["MC"] * 2


def test_a_lexicon_of_ones_own(corpus, tmp_path):
  path = tmp_path / "lexicon.txt"
  path.write_text("At  Night\n")
  own = EngineeredPrompts(corpus, kinds=("MC",), lexicon=path)
  assert {p.prompt for p in read_pairs([own])} == {"a castle on a hill", "a dog"}
  before = own.fingerprint()
  path.write_text("4k\n")
  assert own.fingerprint() != before != EngineeredPrompts(corpus, kinds=("MC",)).fingerprint()


def test_an_unusable_target_is_named_or_counted(tmp_path):
  (tmp_path / "t.txt").write_text("a cat, 4k\na dog Rephrase: b, 4k\n")
  corpus = TextLines(str(tmp_path / "t.txt"))
  with pytest.raises(ValueError, match=r"t\.txt:2 holds the words"):
    read_pairs([EngineeredPrompts(corpus)])
  counts = Counter()
  read_pairs([EngineeredPrompts(corpus, strict=False, kinds=("MC",))], counts)
  assert counts["unusable"] == 1
