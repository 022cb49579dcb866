"""Spans: both worked examples, the sampler against a second one and by its properties, refusals."""

import numpy as np
import pytest

from lmops_jax.data.spans import NoSpans, PrefixSpan, RandomSpans, check_spans, semi_causal_mask

NAMES = "<s> a b c d e f g h i j k l".split()


def _predicted(spans, length):
  """The names of the targets of a row of `length` inputs, "-" where nothing is learned."""
  mask = semi_causal_mask(np.array(spans), length)
  return " ".join(NAMES[p + 1] if mask[p] else "-" for p in range(length))


def test_the_figure_of_the_paper():
  assert _predicted([(2, 4), (7, 10)], 12) == "a b - d e f g - - j k l"


def test_spans_beside_each_other():
  assert semi_causal_mask([(3, 5), (5, 8)], 8).astype(int).tolist() == [1, 1, 1, 0, 1, 0, 0, 1]
  assert _predicted([(3, 5), (5, 8)], 8) == "a b c - e - - h"


@pytest.mark.parametrize("spans, want", [
  ([], "a b c d"), ([(2, 3)], "a b c d"), ([(1, 4)], "a - - d"), ([(1, 2), (2, 4)], "a b - d"),
])
def test_other_masks(spans, want):
  """No span is causal; a span of one token hides nothing; a prefix is learned from its end on."""
  assert _predicted(np.array(spans).reshape(-1, 2), 4) == want


def test_number_of_targets_and_what_they_are():
  """n - sum(len - 1) targets: the tokens outside of spans, and the first one of each."""
  for seed in range(300):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 30))
    cuts = np.sort(rng.choice(np.arange(1, n + 2), min(n, int(rng.integers(0, 5)) * 2), False))
    spans = cuts[: len(cuts) // 2 * 2].reshape(-1, 2)
    mask = semi_causal_mask(spans, n)
    inner = {t for start, end in spans for t in range(start + 1, end)}
    assert {p + 1 for p in np.flatnonzero(mask)} == set(range(1, n + 1)) - inner
    assert mask.sum() == n - (spans[:, 1] - spans[:, 0] - 1).sum()


def _slow_spans(n, ends, w, r, least_tail, rng):
  """The sampler of section 3.1 step by step, with the same chance."""
  starts = []
  if n > 2.5 * w + 1:
    start = 1
    while start < n - 1.5 * w:
      starts.append(start)
      start += w
  if not starts:
    return []
  order, places = rng.permutation(len(starts)), rng.integers(0, w, len(starts))
  spans, total = [], 0
  for window in order:
    start = starts[window]
    inside = [p for p in range(start, start + w) if ends[p]]
    if len(inside) >= 2:
      continue
    if inside:
      if start + w - inside[0] < least_tail:
        continue
      span = (inside[0] + 1, start + w)
    else:
      c = places[window]
      span = (start, start + c + 1) if c >= w / 2 else (start + c, start + w)
    spans.append(span)
    total += span[1] - span[0]
    if total > r * (n - 1):
      break
  return sorted(spans)


@pytest.mark.parametrize("w, r, least_tail", [(2, 0.9, 2), (5, 0.5, 3), (8, 0.25, 4), (7, 0.3, 9)])
def test_against_a_second_implementation(w, r, least_tail):
  sampler = RandomSpans(w, r, least_tail)
  for seed in range(500):
    draws = np.random.default_rng((seed, 1))
    n = int(draws.integers(1, 12 * w))
    ends = draws.random(n) < draws.choice([0, 0.02, 0.2])
    got = sampler.spans(np.zeros(n, np.int32), ends, np.random.default_rng(seed))
    want = _slow_spans(n, ends, w, r, least_tail, np.random.default_rng(seed))
    assert got.dtype == np.int32 and got.tolist() == [list(span) for span in want]


def test_properties_over_many_seeds():
  """Section 9.5, for rows of the paper with 0 to 12 documents' ends."""
  sampler, n, most, lengths = RandomSpans(), 2048, 0, set()
  tokens = np.zeros(n, np.int32)
  for seed in range(10_000):
    ends = np.zeros(n, bool)
    ends[np.random.default_rng((seed, 1)).integers(1, n, seed % 13)] = True
    spans = sampler.spans(tokens, ends, np.random.default_rng(seed))
    start, end = spans.T
    sizes = end - start
    assert start[0] >= 1 and end[-1] < n and (start[1:] >= end[:-1]).all()
    behind_an_end = ends[start - 1]
    assert (sizes <= 128).all() and (sizes[~behind_an_end] >= 65).all() and (sizes >= 19).all()
    cumulative = np.concatenate([[0], np.cumsum(ends)])
    assert (cumulative[end] == cumulative[start]).all()
    # Some span is the last one that was drawn, and the others do not exceed the share.
    assert sizes.sum() - sizes.max() <= 0.25 * (n - 1)
    if not ends.any():
      assert sizes.sum() > 0.25 * (n - 1)
      lengths |= set(sizes.tolist())
    most = max(most, int(sizes.sum()) + len(sizes))
  assert lengths == set(range(65, 129))
  assert 511 + 5 < most <= sampler.encoder_length(n) == 511 + 128 + 15


def test_the_bound_of_the_encoder_is_reached():
  """Windows of 4 of which three have a tail of 1 token: 3 x 1 within the share, then 4 more."""
  sampler, n = RandomSpans(4, 0.2, 2), 20
  ends = np.zeros(n, bool)
  ends[[3, 7, 11]] = True  # the third token of the first three windows
  got = [sampler.spans(np.zeros(n, np.int32), ends, np.random.default_rng(s)) for s in range(200)]
  used = [len(spans) + int((spans[:, 1] - spans[:, 0]).sum()) for spans in got]
  assert max(used) == sampler.encoder_length(n) == 3 + 4 + 4


def test_short_rows_have_no_span_and_short_lengths_are_refused():
  sampler, n = RandomSpans(8, 0.5), 21
  assert len(sampler.spans(np.zeros(n, np.int32), np.zeros(n, bool), _chance())) == 0
  assert len(sampler.spans(np.zeros(n + 1, np.int32), np.zeros(n + 1, bool), _chance())) > 0
  with pytest.raises(ValueError, match="window=8 needs rows of more than 21 tokens"):
    sampler.encoder_length(n)
  with pytest.raises(ValueError, match="share=0.5 of a row of 2 tokens"):
    PrefixSpan().encoder_length(2)


def _chance(seed=0):
  return np.random.default_rng(seed)


def test_prefixes():
  sampler, n = PrefixSpan(longest=6, share=0.5), 21
  got = [sampler.spans(np.zeros(n), np.zeros(n, bool), _chance(s)).tolist() for s in range(300)]
  assert sorted(map(tuple, {tuple(*spans) for spans in got})) == [(1, 1 + k) for k in range(1, 7)]
  assert sampler.encoder_length(n) == 7
  ends = np.zeros(n, bool)
  ends[4] = True
  stops = {sampler.spans(np.zeros(n), ends, _chance(s))[0, 1] for s in range(100)}
  assert stops == {2, 3, 4}  # never the end itself
  ends[1] = True
  assert not len(sampler.spans(np.zeros(n), ends, _chance()))
  assert not len(sampler.spans(np.zeros(2), np.zeros(2, bool), _chance()))
  short = PrefixSpan(longest=100, share=0.5)
  assert {short.spans(np.zeros(9), np.zeros(9, bool), _chance(s))[0, 1] for s in range(99)} == {
    2, 3, 4, 5}


def test_no_spans():
  assert NoSpans().spans(np.zeros(9), np.zeros(9, bool), _chance()).shape == (0, 2)
  assert NoSpans().encoder_length(9) == NoSpans().longest_span(9) == 0


@pytest.mark.parametrize("spans, fault", [
  ([(3, 3)], r"the span \[3, 3\), which is empty"),
  ([(4, 3)], r"the span \[4, 3\), which is empty or ends before it starts"),
  ([(0, 3)], r"the span \[0, 3\), which starts at the start token"),
  ([(2, 4), (9, 11)], r"the span \[9, 11\), which ends behind the row's 10 tokens"),
  ([(2, 4), (3, 5)], r"the span \[3, 5\), which overlaps"),
  ([(5, 7), (2, 4)], r"the span \[2, 4\), which overlaps with the span in front of it, or stands"),
  ([(1, 2), (3, 8)], r"the span \[3, 8\), which is longer than the 4 tokens"),
  ([(5, 8)], r"the span \[5, 8\), which crosses the end of a document"),
  ([(1.0, 2.0)], "type float64"),
  ([(1, 2, 3)], r"shape \(1, 3\)"),
])
def test_refused_spans(spans, fault):
  ends = np.arange(10) == 6
  with pytest.raises(ValueError, match=f"^the row r has .*{fault}"):
    check_spans(np.array(spans), 10, "the row r", longest=4, document_ends=ends)


def test_sound_spans_pass():
  check_spans(np.array([(1, 5), (5, 6), (7, 10)]), 10, "r", longest=4,
              document_ends=np.arange(10) == 6)
  check_spans(np.zeros((0, 2), np.int32), 10, "r")


@pytest.mark.parametrize("settings, fault", [
  ({"window": 1}, r"data\.RandomSpans\.window=1"),
  ({"proportion": 0.0}, r"data\.RandomSpans\.proportion=0"),
  ({"proportion": 1.0}, r"data\.RandomSpans\.proportion=1"),
  ({"least_tail": 1}, r"data\.RandomSpans\.least_tail=1"),
])
def test_refused_settings(settings, fault):
  with pytest.raises(ValueError, match=fault):
    RandomSpans(**settings)
