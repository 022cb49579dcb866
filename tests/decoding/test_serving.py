"""Continuous batching without HTTP: the tokens of `Generator`, whoever comes and goes beside."""

import threading

import jax
import jax.numpy as jnp
import pytest

from lmops_jax.decoding import GenerationOptions, Generator
from lmops_jax.decoding.serving import Batcher, Full, Job
from lmops_jax.mesh.meshes import MeshConfig

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18],
           [30, 4, 4, 21, 0], [9, 9]]
LENGTHS = [9, 14, 7, 20, 1]


class Numbers:
  """A tokenizer whose text is the ids in words."""

  bos_id, stop_ids = None, ()

  def encode(self, text, add_special=True):
    return [int(word) for word in text.split()]

  def decode(self, ids, skip_special=True):
    return "".join(f"{i} " for i in ids)


@pytest.fixture(scope="module")
def batcher(tiny):
  """Two slots, whose programs are kept; it is idle between the tests."""
  return Batcher(tiny.model, tiny.params, Numbers(), num_slots=2, max_waiting=6)


def greedy(prompt, num_new, **options):
  return Job(prompt, GenerationOptions(max_new_tokens=num_new, **options))


def taken(job):
  """All pieces that have come."""
  found = []
  while not job.pieces.empty():
    found.append(job.pieces.get())
  return found


def finish(batcher, *jobs):
  """Steps until nothing is left; ids, log-probabilities and reason of each job."""
  while batcher.num_running or batcher.num_waiting:
    batcher.step()
  answers = []
  for job in jobs:
    pieces = taken(job)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].error is None
    answers.append((
      [i for piece in pieces for i in piece.ids], [x for piece in pieces for x in piece.logprobs],
      pieces[-1].finish_reason, "".join(piece.text for piece in pieces)))
  return answers


_GENERATORS = {}  # with their programs, by the tiny model, which the session keeps


def generator_of(tiny):
  if id(tiny) not in _GENERATORS:
    _GENERATORS[id(tiny)] = Generator(tiny.model, tiny.params)
  return _GENERATORS[id(tiny)]


def assert_as_generated(tiny, prompts, jobs, answers):
  generator = generator_of(tiny)
  for prompt, job, (ids, logprobs, reason, text) in zip(prompts, jobs, answers, strict=True):
    want, = generator.generate_ids([prompt], job.options, row_ids=[job.row_id], capacity=32)
    assert (ids, reason) == (want.ids, want.finish_reason)
    assert logprobs == pytest.approx(want.logprobs, rel=1e-4, abs=1e-4)
    assert text == "".join(f"{i} " for i in ids)


def test_greedy_ids_are_the_generators_however_jobs_arrive(tiny, batcher):
  jobs = [greedy(prompt, n) for prompt, n in zip(PROMPTS, LENGTHS)]
  batcher.submit(jobs[0])
  for _ in range(3):
    batcher.step()
  batcher.submit(*jobs[1:3])
  batcher.step()
  assert (batcher.num_running, batcher.num_waiting) == (2, 1)
  batcher.submit(*jobs[3:])
  assert_as_generated(tiny, PROMPTS, jobs, finish(batcher, *jobs))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
  dict(positions="learned", norm="layer"), dict(positions="alibi"), dict(sliding_window=4),
  dict(momentum=0.6),
])
def test_other_models(make_tiny, changes):
  tiny = make_tiny(**changes)
  jobs = [greedy(prompt, n) for prompt, n in zip(PROMPTS, LENGTHS)]
  batcher = Batcher(tiny.model, tiny.params, Numbers(), num_slots=2)
  batcher.submit(*jobs)
  assert_as_generated(tiny, PROMPTS, jobs, finish(batcher, *jobs))


def test_rows_up_to_the_last_position_harm_none_that_follow(make_tiny):
  """Learned positions end: a slot that went beyond would leave NaN behind."""
  tiny = make_tiny(positions="learned", max_length=20)
  batcher = Batcher(tiny.model, tiny.params, Numbers(), num_slots=2)
  prompts = [[3] * 15, [4], [5], [6] * 17]
  jobs = [greedy(prompt, n) for prompt, n in zip(prompts, (5, 19, 3, 3))]
  batcher.submit(*jobs)
  assert_as_generated(tiny, prompts, jobs, finish(batcher, *jobs))


@pytest.mark.slow
def test_a_growing_and_shrinking_cache(make_tiny):
  tiny = make_tiny(max_length=600)
  batcher = Batcher(tiny.model, tiny.params, Numbers(), num_slots=2)
  prompts = [[5, 9, 3], [i % 32 for i in range(270)], [8, 8]]
  jobs = [greedy(prompt, n) for prompt, n in zip(prompts, (12, 3, 70))]
  batcher.submit(jobs[0])
  batcher.step()
  batcher.submit(*jobs[1:])
  assert_as_generated(tiny, prompts, jobs, finish(batcher, *jobs))


SAMPLED = [
  dict(temperature=0.9, seed=3), dict(temperature=1.5, top_p=0.7, seed=2**32 - 1),
  dict(), dict(temperature=0.3, top_p=0.9, seed=3), dict(temperature=2.0, seed=5),
]


def test_what_a_seed_draws_does_not_depend_on_neighbours(tiny, batcher):
  alone = []
  for prompt, n, options in zip(PROMPTS, LENGTHS, SAMPLED):
    job = greedy(prompt, n, **options)
    batcher.submit(job)
    alone += finish(batcher, job)
  jobs = [greedy(prompt, n, **options) for prompt, n, options in zip(PROMPTS, LENGTHS, SAMPLED)]
  batcher.submit(*reversed(jobs))
  together = finish(batcher, *jobs)
  assert [answer[0] for answer in together] == [answer[0] for answer in alone]
  assert_as_generated(tiny, PROMPTS, jobs, together)
  other = Job(PROMPTS[0], jobs[0].options, row_id=1)
  batcher.submit(other)
  assert finish(batcher, other)[0][0] != alone[0][0]  # a further answer is another one


def test_who_hangs_up_leaves_the_slot_to_who_waits(tiny, batcher):
  first, second, third, fourth = (greedy([5, 9, 3], 30) for _ in range(4))
  batcher.submit(first, second, third, fourth)
  batcher.step()
  before = len(taken(first))
  first.cancelled.set()
  third.cancelled.set()  # which never starts
  batcher.step()
  assert not taken(first) and before == 2 and batcher.num_waiting == 0
  assert batcher.num_running == 2 and not fourth.pieces.empty()
  assert_as_generated(tiny, [[5, 9, 3]] * 2, [second, fourth], finish(batcher, second, fourth))
  assert not taken(third)


def test_end_tokens_and_stop_texts_end_a_job_and_no_other(tiny, batcher):
  whole, = generator_of(tiny).generate_ids(
    [PROMPTS[0]], GenerationOptions(max_new_tokens=20), capacity=32)
  at = next(i for i in range(3, 20) if whole.ids[i] not in whole.ids[:i])
  end = whole.ids[at]
  by_token = Job(PROMPTS[0], GenerationOptions(max_new_tokens=20, eos_ids=(end,)))
  spelled = "".join(f"{i} " for i in whole.ids)
  mark = f"{whole.ids[at - 1]} {end} "
  by_text = Job(PROMPTS[0], GenerationOptions(max_new_tokens=20), stop=(mark,))
  neither = greedy(PROMPTS[0], 20)
  batcher.submit(by_token, by_text, neither)
  a, b, c = finish(batcher, by_token, by_text, neither)
  assert (a[0], a[2]) == (whole.ids[: at + 1], "eos")
  cut = spelled.index(mark)
  assert (b[3], b[2]) == (spelled[:cut], "stop")
  assert (c[0], c[2]) == (whole.ids, "length")


def test_characters_arrive_whole(recite, byte_tokenizer):
  text = "größer als 日本語 und 🙂"
  batcher = Batcher(*recite(text), byte_tokenizer, num_slots=1)
  job = Job([text.encode()[0] + 3], GenerationOptions(max_new_tokens=60))
  batcher.submit(job)
  while batcher.num_running or batcher.num_waiting:
    batcher.step()
  pieces = taken(job)
  assert "".join(piece.text for piece in pieces) == text[1:]
  assert pieces[-1].finish_reason == "eos" and len(pieces) == len(text.encode())
  assert [piece.text for piece in pieces[:4]] == ["r", "", "ö", ""]


def test_a_full_queue_takes_all_jobs_or_none(batcher):
  jobs = [greedy([5], 2) for _ in range(9)]
  with pytest.raises(Full, match="0 answers wait already, and 0 of 2 slots"):
    batcher.submit(*jobs)
  assert batcher.num_waiting == 0
  batcher.submit(*jobs[:8])
  with pytest.raises(Full, match="8 answers wait already"):
    batcher.submit(jobs[8])
  finish(batcher, *jobs[:8])


@pytest.mark.parametrize("job, sentence", [
  (greedy([], 3), "prompt 0 is empty"),
  (greedy([5] * 40, 9), "has 40 tokens and 9 more .* limit is 48 tokens"),
  (greedy([5, 32], 3), "token id 32, which is not among the model's 32"),
  (greedy([5, -1], 3), "token id -1"),
  (greedy([5], 3, no_repeat_ngram=2), "no_repeat_ngram=2"),
  (greedy([5], 3, num_beams=2), "num_beams=2"),
  (Job([5], stop=("",)), "the stop string ''"),
])
def test_jobs_that_do_not_fit_are_refused_at_once(batcher, job, sentence):
  with pytest.raises(ValueError, match=sentence):
    batcher.submit(job)
  assert batcher.num_waiting == 0


@pytest.mark.parametrize("given, sentence", [
  (dict(num_slots=0), "num_slots=0"), (dict(max_waiting=-1), "max_waiting=-1"),
  (dict(max_length=1), "max_length=1"),
  (dict(partitioner=MeshConfig(data=2, tensor=4)), "into 2 parts"),
])
def test_a_batcher_that_makes_no_sense(tiny, given, sentence):
  if "partitioner" in given:
    given = dict(partitioner=given["partitioner"].build())
  with pytest.raises(ValueError, match=sentence):
    Batcher(tiny.model, tiny.params, Numbers(), **given)


@pytest.mark.slow
def test_on_a_mesh(tiny):
  mesh = MeshConfig(data=1, tensor=2).build(jax.devices()[:2])
  jobs = [greedy(prompt, n) for prompt, n in zip(PROMPTS[:3], (6, 5, 4))]
  batcher = Batcher(tiny.model, tiny.params, Numbers(), mesh, num_slots=2)
  batcher.submit(*jobs)
  assert_as_generated(tiny, PROMPTS[:3], jobs, finish(batcher, *jobs))


def test_logits_that_are_not_finite_end_their_job_only(make_tiny):
  tiny = make_tiny()
  params = dict(tiny.params, embedding=tiny.params["embedding"].at[31].set(jnp.nan))
  broken = Batcher(tiny.model, params, Numbers(), num_slots=1)
  bad, good = greedy([5, 31], 4), greedy([5, 9, 3], 4)
  broken.submit(bad, good)
  broken.step()
  piece, = taken(bad)
  assert piece.is_last and piece.error == "the model's logits are not finite."
  ids = finish(broken, good)[0][0]
  want, = generator_of(tiny).generate_ids([[5, 9, 3]], good.options, capacity=32)
  assert ids == want.ids


def test_a_failing_device_tells_everybody_and_the_next_succeeds(tiny, batcher, monkeypatch):
  jobs = [greedy([5, 9, 3], 4) for _ in range(3)]
  batcher.submit(*jobs)
  with monkeypatch.context() as patched:
    def fail(*args):
      raise MemoryError("secret")
    patched.setattr(batcher, "_step", fail)
    with pytest.raises(MemoryError):
      batcher.step()
  for job in jobs:
    last = taken(job)[-1]
    assert last.error == "the model failed (MemoryError)."
  assert (batcher.num_running, batcher.num_waiting) == (0, 0)
  again = greedy([5, 9, 3], 4)
  batcher.submit(again)
  assert_as_generated(tiny, [[5, 9, 3]], [again], finish(batcher, again))


def test_a_thread_serves_many_and_ends_when_told(tiny, batcher):
  thread = threading.Thread(target=batcher.run)
  thread.start()
  jobs = [greedy(PROMPTS[i % 4], 5) for i in range(8)]
  for job in jobs:
    batcher.submit(job)
  for job in jobs:
    while not job.pieces.get(timeout=120).is_last:
      pass
  batcher.close()
  thread.join()
  with pytest.raises(RuntimeError, match="about to end"):
    batcher.submit(greedy([5], 2))
