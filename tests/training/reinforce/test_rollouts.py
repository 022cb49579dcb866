"""Rollouts: what a batch holds, that it is a function of (seed, step), and what ends a run."""

import json

import jax
import numpy as np
import pytest

from lmops_jax.training.reinforce.journal import Journal, read_journal
from lmops_jax.training.reinforce.rewards import RewardError, Rollout, judged
from lmops_jax.training.reinforce.rollouts import Answer, RolloutError
from tests.training.reinforce import setup
from tests.training.reinforce.setup import END, MODEL, QUESTIONS, P


def _fixed(answers):
  return lambda params, prompts, seed: [answers for _ in prompts]


def test_a_batch_holds_prompts_and_responses_in_their_places():
  answers = [Answer("5 6", [5, 6, END], False)]
  batch = setup.rollouts(respond=_fixed(answers)).batch(0, setup.params())
  by_id = {question.id: question for question in QUESTIONS}
  for row, example in enumerate(batch["example_id"]):
    ids = list(by_id[int(example)].ids)
    left = P - len(ids)
    assert batch["tokens"][row].tolist() == [END] * left + ids + [5, 6, END]
    assert batch["segment_ids"][row].tolist() == [0] * left + [1] * (len(ids) + 3)
    assert batch["positions"][row, left:].tolist() == list(range(len(ids) + 3))
    assert batch["targets"][row].tolist() == [5, 6, END, END]
    assert batch["loss_mask"][row].tolist() == [1, 1, 1, 0]
  np.testing.assert_array_equal(batch["score"], np.float32(1 - 0.2))
  assert not batch["is_cut"].any()


@pytest.mark.parametrize("answer, targets, mask", [
  (Answer("5 6 7", [5, 6, 7], True), [5, 6, 7, END], [1, 1, 1, 1]),
  (Answer("", [END], False), [END] * 4, [1, 0, 0, 0]),
  (Answer("4", [4, 9], False), [4, 9, END, END], [1, 1, 0, 0]),  # another end token
])
def test_every_response_has_an_end_slot(answer, targets, mask):
  seen = []

  def reward(rollouts):
    seen.extend(rollouts)
    return np.zeros(len(rollouts))

  batch = setup.rollouts(respond=_fixed([answer]), reward=reward).batch(0, setup.params())
  assert batch["targets"][0].tolist() == targets and batch["loss_mask"][0].tolist() == mask
  assert batch["is_cut"][0] == answer.is_cut
  content = answer.ids if answer.is_cut else answer.ids[:-1]
  assert seen[0].ids == tuple(content) and seen[0].response == answer.text


def test_log_probabilities_are_those_of_the_text_alone():
  """Without padding, from whole logits, token by token."""
  batch = setup.rollouts().batch(2, setup.params(1))
  logits = jax.jit(lambda p, t: MODEL.apply({"params": p}, t, method="logits"))
  prompts = {question.id: list(question.ids) for question in QUESTIONS}
  for row in range(3):
    prompt = prompts[int(batch["example_id"][row])]
    start, length = len(prompt), int(batch["loss_mask"][row].sum())
    ids = prompt + batch["targets"][row, :length].tolist()
    padded = np.array([ids + [0] * (9 - len(ids))], np.int32)
    for name, params in (("log_probs", setup.params(1)), ("reference", setup.params())):
      logs = np.asarray(jax.nn.log_softmax(logits(params, padded)[0]))
      for t in range(length):
        want = logs[start - 1 + t, batch["targets"][row, t]]
        assert batch[name][row, t] == pytest.approx(want, abs=1e-5)


def test_batches_are_a_function_of_seed_and_step():
  batches = [setup.rollouts().batch(step, setup.params()) for step in (4, 4, 5)]
  jax.tree.map(np.testing.assert_array_equal, batches[0], batches[1])
  assert np.any(batches[0]["targets"] != batches[2]["targets"])
  other = setup.rollouts(seed=4).batch(4, setup.params())
  assert np.any(batches[0]["example_id"] != other["example_id"])


def test_of_several_answers_some_are_taken_at_random():
  answers = [Answer(str(i), [i, END], False) for i in range(4, 10)]
  source = setup.rollouts(respond=_fixed(answers))
  taken = np.concatenate([source.batch(s, setup.params())["targets"][:, 0] for s in range(30)])
  counts = np.bincount(taken, minlength=10)[4:10]
  assert counts.sum() == 240 and counts.min() > 20 and counts.max() < 65
  batch = setup.rollouts(respond=_fixed(answers), group_size=4).batch(0, setup.params())
  groups = batch["targets"][:, 0].reshape(2, 4)
  assert all(len(set(group)) == 4 for group in groups.tolist())
  assert batch["example_id"].reshape(2, 4).std(axis=1).max() == 0


def test_the_journal_tells_of_every_rollout(tmp_path):
  source = setup.rollouts(journal=tmp_path / "new" / "rollouts.jsonl")
  batch = source.batch(3, setup.params(1))
  rows = list(read_journal(tmp_path / "new" / "rollouts.jsonl"))
  assert len(rows) == 8
  kl = ((batch["log_probs"] - batch["reference"]) * batch["loss_mask"]).sum(axis=1)
  for i, row in enumerate(rows):
    assert row["step"] == 3 and row["example_id"] == batch["example_id"][i]
    assert row["score"] == pytest.approx(sum(row["parts"].values()))
    assert row["score"] == pytest.approx(float(batch["score"][i]), rel=1e-6)
    assert set(row["parts"]) == {"fives", "length"}
    assert row["kl"] == pytest.approx(float(kl[i])) and row["is_cut"] == bool(batch["is_cut"][i])
    assert row["num_tokens"] == len(row["response"].split())


def test_a_journal_goes_on_where_the_run_does(tmp_path):
  path = tmp_path / "r.jsonl"
  first = Journal(path)
  for step in range(3):
    first.write(step, [{"prompt": "ä", "n": step}] * 2)
  whole = path.read_text()
  path.write_text(whole + '{"step": 3, "pro')
  again = Journal(path)
  again.write(2, [{"prompt": "ä", "n": 2}] * 2)
  assert path.read_text() == whole
  assert json.loads(whole.splitlines()[0]) == {"step": 0, "prompt": "ä", "n": 0}


def _rollouts(n):
  return [Rollout(f"prompt {i}", f"answer {i}", (i,), False) for i in range(n)]


def _fails_on_one(rollouts):
  if any(r.prompt == "prompt 2" for r in rollouts):
    raise KeyError("no such picture")
  return np.zeros(len(rollouts))


@pytest.mark.parametrize("reward, said", [
  (lambda rollouts: np.array([0.0, np.nan, np.inf]),
   "the reward is nan for the response 'answer 1' to the prompt 'prompt 1'"),
  (lambda rollouts: np.zeros(2), r"the shape \(2,\) for 3 rollouts, the first of .*answer 0"),
  (lambda rollouts: np.zeros((3, 1)), r"the shape \(3, 1\)"),
  (lambda rollouts: {"good": np.zeros(3), "bad": np.array([0.0, 0.0, -np.inf])},
   "part 'bad' of the reward is -inf for .* 'prompt 2'"),
  (_fails_on_one, "failed on the response 'answer 2' to the prompt 'prompt 2' .KeyError: 'no such"),
])
def test_a_reward_that_fails_names_the_prompt(reward, said):
  with pytest.raises(RewardError, match=said):
    judged(reward, _rollouts(3))


def test_a_policy_that_left_the_bounds_ends_the_run():
  with pytest.raises(RolloutError, match=r"nats a response from its reference, outside of min_kl="):
    setup.rollouts(max_kl=0.01, min_kl=-0.01).batch(0, setup.params(1))
  setup.rollouts(max_kl=0.01, min_kl=-0.01).batch(0, setup.params())  # itself
  broken = jax.tree.map(lambda p: p * np.nan, setup.params())
  with pytest.raises(RolloutError, match="the policy is nan nats"):
    setup.rollouts(respond=_fixed([Answer("5", [5, END], False)])).batch(0, broken)


@pytest.mark.parametrize("changes, said", [
  (dict(prompt_length=2), "'q2' has 3 tokens, and prompt_length=2"),
  (dict(response_length=20), "prompt_length=4 and 20 new tokens are beyond the 12 positions"),
  (dict(batch_size=10, group_size=4), "batch_size=10 is not a multiple of group_size=4"),
  (dict(batch_size=64), "20 examples are fewer than one batch"),
])
def test_settings_that_do_not_fit_are_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    setup.rollouts(**changes)


def test_answers_that_do_not_fit_are_refused():
  long = setup.rollouts(respond=_fixed([Answer("", [5] * 5, True)]))
  with pytest.raises(ValueError, match="has 6 tokens with its end, and response_length=3 leaves"):
    long.batch(0, setup.params())
  few = setup.rollouts(respond=_fixed([Answer("", [5], True)]), group_size=2)
  with pytest.raises(ValueError, match="has 1 answers and group_size=2"):
    few.batch(0, setup.params())
