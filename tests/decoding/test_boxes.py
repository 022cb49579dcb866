"""The grammar of boxes against a list of all its short texts, and in generation."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lmops_jax.data.boxes import BoxTokens
from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.boxes import Place, box_grammar, end_of

END, PAD = 2, 1


def _texts(length):
  """All texts of so many tokens: `w` a word, `<w>` a phrase, `[ab,cd]` boxes of cells 0..3."""
  boxes = [f"{a}{b}" for a in range(4) for b in range(4) if b // 2 >= a // 2 and b % 2 >= a % 2]
  assert len(boxes) == 9
  groups = {n: [] for n in range(length + 1)}

  def add(text):
    if len(text) <= length:
      groups[len(text)].append(text)

  for num in range(1, length):
    together = boxes
    for _ in range(num - 1):
      together = [f"{x},{box}" for x in together if len(x) + 5 <= length for box in boxes]
    for inner in together:
      for words in range(length):
        add((f"<{'w' * words}>" if words else "") + f"[{inner}]")
  texts = [[""]]
  for n in range(1, length + 1):
    texts.append([text + "w" for text in texts[n - 1]] + [
      text + group for k in range(1, n + 1) for text in texts[n - k] for group in groups[k]])
  return texts


def _in_parts(function, size=2048):
  """`function` of one row for any number of rows, by one program."""
  program = jax.jit(jax.vmap(function))

  def run(*args):
    num = len(jax.tree.leaves(args)[0])
    rows = np.minimum(np.arange(-(-num // size) * size).reshape(-1, size), num - 1)
    parts = [program(*(jax.tree.map(lambda x, at=at: x[at], arg) for arg in args)) for at in rows]
    return jax.tree.map(lambda *x: np.concatenate(x)[:num], *parts)

  return run


def test_the_grammar_is_all_its_texts():
  alphabet = ".$w<>[],0123"  # the first never comes, the second ends a text
  grammar = box_grammar(
    BoxTokens(*(alphabet.index(c) for c in "<>[],0")), 2, len(alphabet), [1], [0])
  texts, state = [""], jax.tree.map(lambda x: np.asarray(x)[None], grammar.start())
  mask, advance = _in_parts(grammar.mask), _in_parts(grammar.advance)
  for length, wanted in enumerate(_texts(7)):
    allowed = mask(state)
    ended = {text for text, mask in zip(texts, allowed) if mask[1]}
    assert ended == set(wanted) and allowed.any(axis=1).all(), length
    row, token = np.nonzero(allowed & (np.arange(len(alphabet)) != 1))
    texts = [texts[r] + alphabet[t] for r, t in zip(row, token)]
    state = advance(tuple(x[row] for x in state), token)
    assert len(set(texts)) == len(texts)
    # A prompt that ends there is gone on with in the same way.
    for text, place, corner in zip(texts[::499], *(np.asarray(x)[::499] for x in state)):
      own = end_of(grammar.tokens, 2, [*map(alphabet.index, text)])
      assert own == (place, corner if place == Place.CORNER else 0), text


@pytest.mark.parametrize("text, end", [
  ("", (Place.TEXT, 0)), ("w<w>w", (Place.TEXT, 0)), ("w<", (Place.PHRASE, 0)),
  ("[w", (Place.TEXT, 0)), ("<w>[ab", (Place.BOX, 0)), ("[ab,c", (Place.CORNER, 2)),
  ("[abc", (Place.TEXT, 0)), ("[ab]ab", (Place.TEXT, 0)), ("w>", (Place.NAMED, 0)),
])
def test_where_a_prompt_of_any_kind_ends(text, end):
  ids = [5 if c == "w" else "<>[],".find(c) + 10 if c in "<>[]," else 16 + "abcd".index(c)
         for c in text]
  assert end_of(TOKENS, 4, ids) == end


TOKENS = BoxTokens(10, 11, 12, 13, 14, 16)  # and 16 locations
GRAMMAR = box_grammar(TOKENS, 4, 32, [END], [PAD, 0])
GROUP = re.compile(r"(<w+>)?\[([a-p]{2})(,[a-p]{2})*\]")


def _shown(ids):
  shown = dict(zip(TOKENS[:-1], "<>[],")) | {END: "$"}
  return "".join(shown.get(i) or ("w" if i < 16 else chr(ord("a") + i - 16)) for i in ids)


@pytest.mark.parametrize("options", [
  GenerationOptions(
    max_new_tokens=24, eos_ids=(END,), temperature=6.0, num_return_sequences=8, no_repeat_ngram=2),
  GenerationOptions(max_new_tokens=24, eos_ids=(END,), num_beams=4, num_return_sequences=4),
], ids=["sampled", "beams"])
def test_generated_texts_hold_well_formed_boxes(tiny, options):
  generator = Generator(tiny.model, tiny.params)
  grammar = dataclasses.replace(GRAMMAR, begins=int(Place.NAMED))
  boxes = 0
  for got in generator.generate_ids([[5, 9, 3], [7], [30, 4]], options, constraint=grammar):
    assert not {PAD, 0} & set(got.ids)
    text = "<w>" + _shown(got.ids)
    for group in GROUP.finditer(text):
      for first, second in re.findall("([a-p])([a-p])", group.group()):
        a, b = ord(first) - ord("a"), ord(second) - ord("a")
        assert b // 4 >= a // 4 and b % 4 >= a % 4
        boxes += 1
    rest = GROUP.sub("", text)
    if got.finish_reason == "eos":
      assert re.fullmatch(r"w*\$", rest)
    else:  # cut, perhaps within a group
      assert re.fullmatch(r"w*((<w*>?)?(\[([a-p]{2},)*[a-p]{0,2})?|<w*>?)", rest)
  assert boxes > 3


def test_what_does_not_fit_is_refused(tiny):
  for tokens, side, message in [
    (TOKENS._replace(first_location=17), 4, "token id 32, outside of the model's vocabulary of 32"),
    (TOKENS, 5, "token id 32, outside"),
    (TOKENS._replace(delimiter=13), 4, "token id 13 as two things"),
    (TOKENS._replace(phrase=END), 4, "token id 2 as two things"),
  ]:
    with pytest.raises(ValueError, match=message):
      box_grammar(tokens, side, 32, [END])
  generator = Generator(tiny.model, tiny.params)
  with pytest.raises(ValueError, match=r"end with \[2\], and generation with \[3\]"):
    generator.generate_ids(
      [[5]], GenerationOptions(max_new_tokens=4, eos_ids=(3,)), constraint=GRAMMAR)
  with pytest.raises(ValueError, match="made for 40 tokens, and the model has 32"):
    generator.generate_ids(
      [[5]], GenerationOptions(max_new_tokens=4, eos_ids=(END,)),
      constraint=box_grammar(TOKENS, 4, 40, [END]))
