"""Rewriting: the recipe against a plain search, what is cut, and what is refused."""

import numpy as np
import pytest

from lmops_jax import pretrained
from lmops_jax.data.prompt_pairs import ANCHOR
from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.text import Generation
from lmops_jax.systems.promptist import rewriting
from lmops_jax.systems.promptist.rewriting import RECIPE, beam_options, rewrite
from tests.systems.promptist import tiny_gpt2


class Told:
  """Answers what it was told to, and remembers what it was asked."""

  def __init__(self, *texts):
    self.texts, self.asked = texts, []

  def generate(self, texts, options):
    self.asked += texts
    assert len(self.texts) == len(texts) * options.num_return_sequences
    return [Generation(text, [1, 2], [-1.0, -1.0], "eos", -2.0) for text in self.texts]


def test_the_anchor_is_put_behind_and_cut_off():
  told = Told(" a cat, 4k ", f" a dog , art{ANCHOR} a dog", " ", f"{ANCHOR} x")
  found = rewrite(told, [" a cat\n", "a dog", "a bird", "a fish"], GenerationOptions())
  assert told.asked == [f"a {animal} Rephrase:" for animal in ("cat", "dog", "bird", "fish")]
  assert [own[0].text for own in found] == ["a cat, 4k", "a dog , art", "a bird", "a fish"]
  assert [own[0].is_unchanged for own in found] == [False, False, True, True]
  assert found[0][0].score == -2.0 and found[0][0].num_tokens == 2


def test_answers_go_to_their_prompts():
  options = beam_options(2, num_return=2)
  found = rewrite(Told("a", "b", "c", "d"), ["x", "y"], options)
  assert [[answer.text for answer in own] for own in found] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("prompt, why", [
  ("  ", "prompt 1 is empty"), (3, "prompt 1 is a int"), ("a\0", "prompt 1 holds a NUL"),
  ("a Rephrase: b", "prompt 1 holds the words 'Rephrase:'")])
def test_prompts_are_refused_before_the_model_runs(prompt, why):
  told = Told()
  with pytest.raises(ValueError, match=why):
    rewrite(told, ["a cat", prompt])
  assert not told.asked


def test_numbers_that_do_not_go_together():
  assert beam_options() == RECIPE
  assert beam_options(8, 4).diversity_penalty == 1.0 and beam_options(8, 4).num_beam_groups == 4
  for arguments, why in (((8, 4), "diversity=0"), ((8, 3), "not a multiple"),
                         ((2, 1, 3), "is more than num_beams")):
    with pytest.raises(ValueError, match=why):
      beam_options(*arguments, diversity=0 if arguments == (8, 4) else 1.0)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
  source = pretrained.load(tiny_gpt2.write(tmp_path_factory.mktemp("m") / "gpt2"))
  return Generator(source.model, source.params(), source.tokenizer())


def test_a_prompt_too_long_for_the_context_is_refused(generator):
  with pytest.raises(ValueError, match=r"prompt 0 has 40 tokens and .*max_new_tokens=75"):
    rewrite(generator, ["x" * 30])


@pytest.mark.slow
@pytest.mark.parity
def test_the_recipe_is_that_of_transformers(generator, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = tiny_gpt2.write(tmp_path / "gpt2")
  peer = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
  tokenizer = pretrained.load(folder).tokenizer()
  prompts = ["a cat", "dog"]
  options = beam_options(8, num_return=8, max_new_tokens=20)
  for prompt, own in zip(prompts, rewrite(generator, prompts, options)):
    ids = torch.tensor([tokenizer.encode(prompt + ANCHOR)])
    want = peer.generate(
      ids, num_beams=8, num_return_sequences=8, max_new_tokens=20, length_penalty=-1.0,
      do_sample=False, eos_token_id=0, pad_token_id=0, return_dict_in_generate=True,
      output_scores=True)
    texts = [rewriting.completion_text(tokenizer.decode(row[ids.shape[1] :].tolist()))
             for row in want.sequences]
    assert [answer.text for answer in own] == [text or prompt for text in texts]
    np.testing.assert_allclose(
      [answer.score for answer in own], want.sequences_scores, rtol=1e-4)
