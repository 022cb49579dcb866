"""Scores of continuations equal those of a full forward pass on each context and option alone."""

import functools

import jax
import numpy as np
import pytest

from lmops_jax.decoding import scoring
from lmops_jax.decoding.scoring import OptionScorer, Request
from lmops_jax.mesh.meshes import MeshConfig

_LONGEST = 48  # of all contexts with their options


@functools.partial(jax.jit, static_argnames="model")
def _log_probs(model, params, ids):
  return jax.nn.log_softmax(model.apply({"params": params}, ids[None], method="logits")[0])


def _naive(tiny, request):
  out = []
  for option in request.options:
    ids = [*request.context, *option]
    # One shape for all: a causal model sees nothing of what follows.
    ids = np.pad(np.array(ids, np.int32), (0, _LONGEST - len(ids)))
    log_probs = np.asarray(_log_probs(tiny.model, tiny.params, ids))
    start = len(request.context)
    out.append([log_probs[start + i - 1, token] for i, token in enumerate(option)])
  return out


def _requests(prefix=0, seed=0):
  rng = np.random.default_rng(seed)
  front = rng.integers(3, 32, prefix).tolist()

  def ids(n):
    return rng.integers(3, 32, n).tolist()

  return [
    Request(front + ids(rng.integers(1, 9)), [ids(n) for n in lengths])
    for lengths in ((1, 1), (2, 3, 1), (1,), (4, 1), (1, 1), (3, 3), (1, 2))
  ]


def _same(got, want):
  for row, wanted in zip(got, want, strict=True):
    for a, b in zip(row, wanted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("changes", [
  {}, *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
    {"positions": "alibi"}, {"sliding_window": 3}, {"momentum": 0.6})),
])
@pytest.mark.parametrize("prefix", [0, 20])
def test_equals_each_option_alone(make_tiny, prefix, changes):
  tiny = make_tiny(**changes)
  requests = _requests(prefix)
  got = OptionScorer(tiny.model, tiny.params, batch_tokens=64).score(requests)
  _same(got, [_naive(tiny, request) for request in requests])


def test_a_common_beginning_is_read_once(make_tiny, monkeypatch):
  tiny = make_tiny()
  scorer = OptionScorer(tiny.model, tiny.params)
  widths, run = [], OptionScorer._run

  def watched(self, prefix, rows, width, targets):
    widths.append((width, 0 if prefix is None else int(prefix.end)))
    return run(self, prefix, rows, width, targets)

  monkeypatch.setattr(OptionScorer, "_run", watched)
  scorer.score(_requests(20))
  assert all(width <= 16 and shared == 20 for width, shared in widths)
  widths.clear()
  scorer.score(_requests(20)[:1])  # nothing to share
  assert widths == [(24, 0)] or widths == [(32, 0)]


@pytest.mark.parametrize("changes", [
  {}, *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
    {"positions": "alibi"}, {"sliding_window": 3}, {"momentum": 0.6})),
])
def test_requests_with_options_of_one_token_lie_side_by_side(make_tiny, changes, monkeypatch):
  tiny = make_tiny(max_length=160, **changes)
  rng = np.random.default_rng(2)
  requests = [
    Request(rng.integers(3, 32, n).tolist(), [[3], [5], [7]][: 1 + n % 3])
    for n in rng.integers(1, 40, 30)
  ]
  shapes, run = [], OptionScorer._run

  def watched(self, prefix, rows, width, targets):
    shapes.append((len(rows), width))
    return run(self, prefix, rows, width, targets)

  monkeypatch.setattr(OptionScorer, "_run", watched)
  got = OptionScorer(tiny.model, tiny.params).score(requests)
  _same(got, [_naive(tiny, request) for request in requests])
  tokens = sum(len(request.context) for request in requests)
  (num_rows, width), = shapes
  assert width == 128 and num_rows <= -(-tokens // 128) + 1


def test_order_and_batch_size_do_not_matter(tiny):
  requests = _requests(20, seed=1)
  want = OptionScorer(tiny.model, tiny.params).score(requests)
  done = []
  got = OptionScorer(tiny.model, tiny.params, batch_tokens=16).score(
    requests[::-1], progress=done.append
  )
  _same(got[::-1], want)
  assert sum(done) == len(requests)


@pytest.mark.parametrize("prefix", [0, 20])
def test_a_mesh_gives_the_same_scores(tiny, prefix):
  requests = _requests(prefix)
  partitioner = MeshConfig(data=2, fsdp=2, tensor=2).build()
  got = OptionScorer(tiny.model, tiny.params, partitioner).score(requests)
  _same(got, OptionScorer(tiny.model, tiny.params).score(requests))


def test_rolling_windows_score_every_token_once(tiny):
  ids = np.random.default_rng(3).integers(3, 32, 23).tolist()
  for limit in (6, 7, 23, 24, 40):
    windows = scoring.rolling_requests(ids, first=1, max_length=limit)
    assert [t for w in windows for t in w.options[0]] == ids
    read = [len(w.context) + len(w.options[0]) - 1 for w in windows]
    assert all(n == limit for n in read[:-1]) and read[-1] == min(limit, len(ids))
  whole, = scoring.rolling_requests(ids, first=1, max_length=40)
  assert whole.context == [1]
  scores = OptionScorer(tiny.model, tiny.params).score([whole])
  _same(scores, [_naive(tiny, whole)])
  assert scoring.total(scores[0])[0] == pytest.approx(float(np.sum(scores[0][0])), rel=1e-5)


def test_scores_of_options_by_each_rule(tiny):
  request = Request([3, 5], [[4, 9, 6], [7]])
  found, = OptionScorer(tiny.model, tiny.params).score([request])
  want = [[float(x) for x in option] for option in _naive(tiny, request)]
  for rule, of_option in [
    (scoring.total, sum), (scoring.mean, lambda x: sum(x) / len(x)), (scoring.first, lambda x: x[0])
  ]:
    np.testing.assert_allclose(rule(found), [of_option(x) for x in want], rtol=1e-4, atol=1e-4)


def test_the_last_token_needs_no_position(make_tiny):
  tiny = make_tiny(positions="learned")
  rng = np.random.default_rng(4)
  for lengths in ((48, 1), (40, 9), (1, 48)):
    context, option = (rng.integers(3, 32, n).tolist() for n in lengths)
    (found,) = OptionScorer(tiny.model, tiny.params).score([Request(context, [option])])
    logits = tiny.model.apply(
      {"params": tiny.params}, np.array([[*context, *option[:-1]]]), method="logits")
    log_probs = np.asarray(jax.nn.log_softmax(logits[0]))
    want = [log_probs[lengths[0] - 1 + i, token] for i, token in enumerate(option)]
    _same([found], [[want]])


def test_of_equally_probable_tokens_greedy_search_takes_the_first(make_tiny):
  tiny = make_tiny(tied_embeddings=False)
  greedy = int(tiny.log_probs([3, 5]).argmax())
  twin = greedy - 1 if greedy else 1
  head = np.array(tiny.params["unembedding"])
  head[:, twin] = head[:, greedy]
  params = {**tiny.params, "unembedding": head}
  first, second = sorted((greedy, twin))
  ((_, one), (_, other)), = OptionScorer(tiny.model, params).score_and_rank(
    [Request([3, 5], [[first], [second]])])
  assert one.tolist() == [True] and other.tolist() == [False]


@pytest.mark.parametrize(
  "request_,message",
  [
    (Request([], [[3]]), "request 0 has an empty context or option"),
    (Request([3], [[4], []]), "request 0 has an empty context or option"),
    (Request([3] * 48, [[4], [4, 5]]), "has 50 tokens with its longest option, the model 48"),
    (Request([3], [[32]]), "holds id 32, outside of the model's vocabulary of 32"),
  ],
)
def test_bad_requests_are_named(tiny, request_, message):
  with pytest.raises(ValueError, match=message):
    OptionScorer(tiny.model, tiny.params).score([request_])


def test_encoders_are_refused(make_tiny):
  tiny = make_tiny(causal=False)
  with pytest.raises(ValueError, match="causal is False"):
    OptionScorer(tiny.model, tiny.params)
