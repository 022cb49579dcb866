"""Examples, what a task refuses, and demonstrations by (seed, id)."""

import collections

import pytest

from lmops_jax.data import tasks
from lmops_jax.data.tasks import Example, Task


def _rows(n=30):
  return tuple(Example(i * 7919, f"text {i} is", (" x", " y", " z"), i % 3) for i in range(n))


def test_a_demonstration_is_the_text_with_the_right_answer():
  assert Example(0, "Q:", (" a", " b"), 1).demonstration == "Q: b"
  assert Example(0, "Q:", (), -1, ("first", "last")).demonstration == "Q: last"
  own = Example(0, "The ", (" runs.", " runs."), 1, prompts=("The cat", "The dog"))
  assert own.demonstration == "The dog runs."


@pytest.mark.parametrize("row,message", [
  (Example(7, " ", (" a", " b"), 0), "row 7 of the task t has an empty prompt"),
  (Example(7, "p", (" a", " b"), -1), "has the label -1; its 2 options have 0 to 1"),
  (Example(7, "p", (" a", " b"), 2), "has the label 2"),
  (Example(7, "p", (" a",), 0), "has one option only"),
  (Example(7, "p", (" a", " "), 0), "has an empty option"),
  (Example(7, "p", (" a", " a"), 0), "has the same option twice"),
  (Example(7, "p", (" a", " a"), 0, prompts=("p",)), "has 1 prompts for 2 options"),
  (Example(7, "p", (" a", " a"), 0, prompts=("p", "p")), "has the same option twice"),
  (Example(7, "p", (), -1), "has neither options nor an answer"),
  (Example(7, "p", (), -1, ("a",)), "does not fit metric='accuracy'"),
  (Example(7, "p", (" a", " b"), 0, images=("x",)), "has 0 <image> in its prompt and 1 pictures"),
  (Example(7, "<image>", (" a", " b"), 0, images=("x",), option_images=("y", "z")),
   "has 1 <image> in its prompt and 2 pictures for them"),
  (Example(7, "<image>", (" a", " b"), 0, option_images=("y",)), "has 1 pictures for 2 options"),
  (Example(7, "<image>", (" a", " a"), 0, option_images=("y", "y")), "has the same option twice"),
])
def test_rows_that_cannot_be_evaluated_are_named(row, message):
  for rows, train in (((row,), ()), (_rows(2), (row,))):
    with pytest.raises(ValueError, match=message):
      Task("t", rows, train)


def test_impossible_tasks_are_refused():
  with pytest.raises(ValueError, match=r"t has no rows \(3 were left out\)"):
    Task("t", (), skipped=3)
  with pytest.raises(ValueError, match="has 3 options for 2 label words"):
    Task("t", _rows(1), words=("x", "y"))
  with pytest.raises(ValueError, match="metric='bleu' is not one of"):
    Task("t", _rows(1), metric="bleu")


def test_demonstrations_depend_on_seed_and_id_alone():
  rows = _rows()
  first = tasks.demonstrations(rows, 6, seed=0)
  assert first == tasks.demonstrations(rows[::-1], 6, seed=0)
  assert first == tasks.demonstrations(rows, 9, seed=0)[:6]
  assert first != tasks.demonstrations(rows, 6, seed=1)
  without = [row for row in rows if row not in first[:1]]
  assert tasks.demonstrations(without, 5, seed=0) == first[1:]


def test_balanced_demonstrations_hold_each_label_alike():
  for count, each in ((6, {2}), (7, {2, 3}), (2, {1})):
    drawn = tasks.demonstrations(_rows(), count, seed=3, balanced=True)
    assert set(collections.Counter(row.label for row in drawn).values()) == each
    assert len(drawn) == count
  with pytest.raises(ValueError, match="31 demonstrations are asked for and there are 30 rows"):
    tasks.demonstrations(_rows(), 31, seed=0)
  with pytest.raises(ValueError, match="-1 demonstrations are asked for"):
    tasks.demonstrations(_rows(), -1, seed=0)
  rare = [row for row in _rows() if row.label] + [_rows()[0]]
  with pytest.raises(ValueError, match="more rows of label 0"):
    tasks.demonstrations(rare, 9, seed=0, balanced=True)


def test_pictures_stand_for_their_places():
  differing = Example(0, "<image> or <image>", (" a", " a"), 1, images=("x",),
                      option_images=("y", "z"))
  own = Example(1, "", (" a", " a"), 0, prompts=("see <image>", "<image> sees"), images=("x",))
  task = Task("t", (differing, own))
  with pytest.raises(ValueError, match="row 0 of the task t has pictures, and the model reads"):
    task.require_text()
  plain = Task("t", (Example(0, "what <image> means", (" a", " b"), 0),))  # a word as any other
  plain.require_text()


def test_open_answers_may_have_names_to_be_chosen_from():
  row = Example(0, "It is", (), -1, ("a",))
  assert Task("t", (row,), words=("a", "b", "c"), metric="exact_match").words == ("a", "b", "c")
