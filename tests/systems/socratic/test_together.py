"""Runs side by side: one batch at a time, of all that wait, in the order of runs."""

import pytest

from lmops_jax.systems.socratic.backends import Place, Reply, Sampling, Usage, WindowExceeded
from lmops_jax.systems.socratic.in_process import InProcess
from lmops_jax.systems.socratic.together import run_together
from tests import model_folders

PLACE = Place("0", "DED", 1)


class Echo:
  """Answers with what it is asked; keeps the batches."""

  model, window, can_score = "echo", 100, True

  def __init__(self):
    self.batches = []

  def count_tokens(self, messages):
    return len(messages)

  def complete_many(self, asked):
    self.batches.append([messages[0][1] for messages, _ in asked])
    return [WindowExceeded("long") if messages[0][1] == "long" else
            Reply(f"re {messages[0][1]}", "stop", Usage(1, 1)) for messages, _ in asked]

  def score_many(self, asked):
    self.batches.append(["score"] * len(asked))
    return [[float(len(choice)) for choice in choices] for _, choices in asked]


def _asking(name, times):
  def run(backend):
    return [backend.complete((("user", f"{name}{i}"),), Sampling(), PLACE).text
            for i in range(times)]
  return run


def test_all_that_wait_are_answered_in_one_batch():
  model = Echo()
  found = run_together(model, [_asking("a", 3), _asking("b", 1), _asking("c", 2)], 3)
  assert found == [["re a0", "re a1", "re a2"], ["re b0"], ["re c0", "re c1"]]
  assert model.batches == [["a0", "b0", "c0"], ["a1", "c1"], ["a2"]]


def test_a_run_begins_when_another_ends():
  model = Echo()
  run_together(model, [_asking("a", 1), _asking("b", 3), _asking("c", 2), _asking("d", 1)], 2)
  assert model.batches == [["a0", "b0"], ["b1", "c0"], ["b2", "c1"], ["d0"]]


def test_replies_and_scores_in_one_meeting():
  model = Echo()
  found = run_together(model, [
    _asking("a", 1), lambda backend: backend.score((("user", "?"),), ("SOLVE", "NO"))], 8)
  assert found == [["re a0"], [5.0, 2.0]] and model.batches == [["a0"], ["score"]]


def test_an_error_of_one_request_reaches_its_run_alone():
  def run(backend):
    with pytest.raises(WindowExceeded):
      backend.complete((("user", "long"),), Sampling(), PLACE)
    return "told"

  assert run_together(Echo(), [run, _asking("a", 2)], 2) == ["told", ["re a0", "re a1"]]


@pytest.mark.parametrize("where", ["run", "model"])
def test_a_failure_ends_all_runs_and_is_raised(where):
  class Failing(Echo):
    def complete_many(self, asked):
      raise OSError("no model")

  def run(backend):
    backend.count_tokens(())
    raise OSError("no run")

  runs, model = [_asking("a", 5), _asking("b", 5)], Echo()
  if where == "run":
    runs.append(run)
  else:
    model = Failing()
  with pytest.raises(OSError, match=f"no {where}"):
    run_together(model, runs, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return InProcess(str(model_folders.write(tmp_path_factory.mktemp("models") / "model")))


def test_a_reply_depends_on_its_call_and_not_on_its_batch(model):
  def asked(text, seed, temperature=1.0):
    return (("user", text),), Sampling(6, temperature, 0.95, seed)

  one, other, again = asked("Hm?", 1), asked("Well?", 2), asked("Hm?", 3)
  few = model.complete_many([one, other, again])
  assert few[0] != few[2] and few[0].usage == few[0].usage
  turned = model.complete_many([again, *([other] * 9), one])  # a batch of the other size
  assert turned[-1] == few[0] and turned[0] == few[2] and turned[1] == few[1]
  greedy = asked("Hm?", 1, 0.0)
  assert model.complete_many([one, greedy])[1] == model.complete(*greedy, PLACE)


def test_what_does_not_fit_is_an_error_in_its_place(model):
  found = model.complete_many([
    ((("user", "x" * 400),), Sampling(6, 0.0)), ((("user", "x"),), Sampling(6, 0.0))])
  assert isinstance(found[0], WindowExceeded) and found[1].usage.reply <= 6


def test_scores_of_several_are_those_of_each(model):
  asked = [((("user", text),), ("SOLVE", "NO")) for text in ("Hm?", "Well, what?")]
  for one, scores in zip(asked, model.score_many(asked)):
    assert scores == pytest.approx(model.score(*one), rel=1e-4)
