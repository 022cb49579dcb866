"""Open answers of texts, without a model: prompts, trees of names, figures and refusals."""

import json

import numpy as np
import pytest

from lmops_jax.data.tasks import Example, Task
from lmops_jax.decoding import GenerationOptions
from lmops_jax.decoding.text import Generation
from lmops_jax.evaluation import captions, open_answers
from lmops_jax.models.transformer import TransformerConfig

CONFIG = TransformerConfig(vocab_size=300, num_layers=1, width=8, num_heads=1, max_length=40)
GREEDY = GenerationOptions(max_new_tokens=6)


class _Letters:
  """A token for each character, behind 1; 2 ends a text."""

  path, eos_id = "letters", 2

  def encode(self, text, add_special=True):
    return [1] * add_special + [ord(letter) for letter in text]


class _Asked:
  """Answers by the last letters of prompts, and keeps what it is asked."""

  def __init__(self, answers):
    self.answers, self.asked = answers, []

  def generate(self, prompts, options, stop=(), *, constraint=None):
    texts = ["".join(map(chr, prompt.ids[1:])) for prompt in prompts]
    self.asked.append((texts, options, constraint))
    return [Generation(self.answers[text[-2:]], [], [], "eos") for text in texts]


def _row(number, prompt, *answers):
  return Example(number, prompt, (), -1, answers)


ROWS = (_row(1, "the sky is", "blue", "light blue"), _row(2, "a rose is", "red"))


def _evaluate(task, generator=None, options=GREEDY, **how):
  generator = generator or _Asked({"is": " blue\n"})
  return open_answers.evaluate(
    generator, _Letters(), task, options=options, config=CONFIG, **how), generator.asked


def test_answers_are_measured_by_the_metric_of_the_task():
  done = []
  found, ((texts, options, tree),) = _evaluate(
    Task("colors", ROWS, metric="exact_match"), progress=done.append)
  assert texts == [row.prompt for row in ROWS] and options == GREEDY and tree is None
  assert found.answers == ["blue", "blue"] and found.scores.tolist() == [1, 0] and done == [2]
  assert found.figure == ("exact_match", 0.5, 0.5)  # both rows are half from the mean
  assert json.loads(json.dumps(open_answers.record(found, 0))) == {
    "id": 1, "answer": "blue", "answers": ["blue", "light blue"], "score": 1}
  alone, _ = _evaluate(Task("colors", ROWS[:1], metric="f1"))
  assert alone.figure.value == 1 and np.isnan(alone.figure.standard_error)


def test_demonstrations_stand_in_front_while_they_have_room():
  train = tuple(_row(i, f"{i} is", "x") for i in range(10, 15))
  rows = _row(1, "the sky it is", "blue"), ROWS[1], _row(3, "q" * 28 + "is", "y")
  task = Task("colors", rows, train, metric="exact_match")
  found, ((texts, *_),) = _evaluate(task, shots=3, separator="|")
  _, front = open_answers.rows_and_front(task, shots=3, separator="|")
  shown = [shot.text for shot in front.shots]
  assert all(len(text) == len("10 is x|") for text in shown)
  # 40 positions: one for the start, five for new tokens that are read
  assert texts[0] == "".join(shown[1:]) + rows[0].prompt
  assert texts[1] == "".join(shown) + rows[1].prompt and texts[2] == rows[2].prompt
  assert found.num_dropped.tolist() == [1, 0, 3] and found.num_shots == 3


def test_names_make_a_tree_for_each_prompt():
  names = ("red", "redder", "blue")
  rows = (*ROWS[:1], ROWS[1], ROWS[0]._replace(id=5))
  generator = _Asked({"is": "red"})
  task = Task("colors", rows, words=names, metric="exact_match")
  found, asked = _evaluate(task, generator, only_names=True)
  assert [texts for texts, *_ in asked] == [["the sky is"] * 2, ["a rose is"]]
  assert found.scores.tolist() == [0, 1, 0]
  for _, options, tree in asked:
    assert options.max_new_tokens == len(" redder") + 1
    edges = [i for i, parent in enumerate(tree.parents) if parent >= 0]
    ends = [i for i in edges if tree.tokens[i] == 2]
    assert len(ends) == 3 and len(edges) == len(" redder") + len("blue") + 3


@pytest.mark.parametrize("task, how, message", [
  (Task("t", (Example(1, "a", (" x", " y"), 0),)), {}, "the task t has options, to be scored and"),
  (Task("t", ROWS, metric="f1"), {"only_names": True}, "answers to the task t are free texts, not"),
  (Task("t", (ROWS[0]._replace(prompt="q" * 40),), metric="f1"), {},
   "row 1 of the task t has 41 tokens without any demonstration, and with 6 new ones they exceed"),
  (Task("t", (ROWS[0]._replace(prompt="<image>", images=("a.png",)),), metric="f1"), {},
   "row 1 of the task t has pictures, and the model reads text alone"),
  (Task("t", ROWS, metric="f1"), {"shots": 2}, "has 2 rows, all of them demonstrations"),
])
def test_what_cannot_be_answered_is_refused(task, how, message):
  with pytest.raises(ValueError, match=message):
    _evaluate(task, **how)


def test_a_tokenizer_without_end_cannot_tell_names(monkeypatch):
  monkeypatch.setattr(_Letters, "eos_id", None)
  task = Task("colors", ROWS, words=("red", "blue"), metric="exact_match")
  with pytest.raises(ValueError, match="tokenizer of letters has no end token, which tells a name"):
    _evaluate(task, only_names=True)


def test_what_is_told_beside_a_metric():
  golds = "a dog on grass here", "two cars in a street", "a cat on a mat", "one tall tree"
  rows = [Example(i, "caption:", (), -1, (gold,), images=(f"{i // 2}.png",))
          for i, gold in enumerate(golds)]
  answers = ["a dog on grass here", "two cars in a road", "a cat on a mat", "a tall tree"]
  found, = open_answers.companions("cider", rows, answers)
  figures = dict(captions.caption_scores(answers, [row.answers for row in rows]))
  assert (found.name, found.num_rows) == ("bleu_4", 4)
  assert found.value == pytest.approx(figures["BLEU-4"].corpus)
  assert found.low < found.value < found.high
  told = [row._replace(answers=tuple(f"no because {gold}" for gold in row.answers)) for row in rows]
  beside = {of.name: of for of in open_answers.companions(
    "explained", told, [f"yes because {answer}" for answer in answers])}
  assert beside["explanation_bleu_4"] == found._replace(name="explanation_bleu_4")
  assert beside["explanation_bleu_1"].value == pytest.approx(figures["BLEU-1"].corpus)
  assert beside["explanation_cider"].value == pytest.approx(figures["CIDEr"].corpus)
  assert open_answers.companions("vqa", rows, answers) == []
