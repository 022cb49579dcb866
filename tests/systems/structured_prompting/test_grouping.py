"""Groups of demonstrations: worked by hand, and against the published rules read once more."""

import itertools

import numpy as np
import pytest

from lmops_jax.systems.structured_prompting import grouping

BOS = 1


def _demos(*lengths):
  """Demonstrations whose tokens say where they come from: 100 * number + place."""
  return [[100 * i + j for j in range(n)] for i, n in enumerate(lengths, 1)]


def _rows(groups):
  return [ids[mask].tolist() for ids, mask in zip(groups.ids, groups.mask)]


def _joined(demos):
  return list(itertools.chain.from_iterable(demos))


def _counts(groups):
  return groups.drawn, groups.used, groups.skipped


# ------------------------------------------------------------------------------------ by hand


def test_groups_stand_at_the_ends_of_their_rows():
  groups = grouping.pack(_demos(3, 2, 2), 5, "mask")
  np.testing.assert_array_equal(groups.ids, [[100, 101, 102, 200, 201]])
  groups = grouping.pack(_demos(3, 2, 2, 4, 5), 5, "mask")
  np.testing.assert_array_equal(
    groups.ids, [[100, 101, 102, 200, 201], [0, 0, 0, 300, 301], [0, 400, 401, 402, 403]])
  np.testing.assert_array_equal(
    groups.mask, [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
  assert groups.ids.dtype == np.int32 and groups.mask.dtype == bool
  assert (groups.num_groups, groups.num_tokens, *_counts(groups)) == (3, 11, 5, 4, 0)


def test_blooms_truncation_keeps_the_demonstration_that_did_not_fit():
  groups = grouping.pack(_demos(3, 3, 3, 2, 5), 5, "truncate")
  # 3 + 3 is above 5: the last five; then again 3 + 2 fits and the five overflow.
  assert _rows(groups) == [[101, 102, 200, 201, 202], [500, 501, 502, 503, 504]]
  assert _counts(groups) == (5, 2, 0)  # the second and the last
  one = grouping.pack(_demos(3, 3, 3, 2, 5), 5, "truncate", chunk_num=1)
  assert _rows(one) == [[101, 102, 200, 201, 202]] and _counts(one) == (2, 1, 0)
  assert _rows(grouping.pack(_demos(2, 2), 5, "truncate")) == [[100, 101, 200, 201]]


def test_the_dense_models_truncation_overflows_by_one():
  # Room for four and BOS. 3 + 3 overflows and is cut when the third comes.
  groups = grouping.pack(_demos(3, 3, 2, 1, 2, 1), 5, "truncate", bos_id=BOS)
  assert _rows(groups) == [[102, 200, 201, 202], [301, 400, 500, 501]]
  assert _counts(groups) == (6, 3, 0)  # the last one's group is unfinished
  # Nothing follows the second, full group, so the script drops it.
  groups = grouping.pack(_demos(3, 3, 2, 1, 2), 5, "truncate", bos_id=BOS)
  assert _rows(groups) == [[102, 200, 201, 202]]


@pytest.mark.parametrize("lengths, want", [
  ((20,), 20), ((3, 17), 20),  # 20 of 24: the script's negative slice left 3
  ((24,), 24), ((20, 8), 24), ((25,), 24),
])
def test_a_single_group_of_the_dense_models_is_cut_only_if_too_long(lengths, want):
  demos = _demos(*lengths)
  groups = grouping.pack(demos, 25, "truncate", bos_id=BOS)
  assert _rows(groups) == [_joined(demos)[-want:]]
  assert groups.used == len(lengths) - (sum(lengths) > 24)


def test_demonstrations_beyond_the_group_are_skipped_and_counted():
  demos = _demos(6, 3, 7, 2, 1, 1, 1)
  for bos, strategy, skipped in [
    (None, "truncate", 2), (None, "mask", 2),
    (BOS, "truncate", 1),  # six tokens are as long as a group with BOS, and are cut
    (BOS, "mask", 2), (BOS, "space", 2),
  ]:
    groups = grouping.pack(
      demos, 6 if bos else 5, strategy, bos_id=bos, space_id=9 if strategy == "space" else None)
    assert groups.skipped == skipped and groups.drawn == 7, (bos, strategy)


@pytest.mark.parametrize("strategy, bos, budget, want", [
  ("mask", None, 5, [[100, 101, 300, 301, 302]]),
  ("truncate", None, 5, [[302, 400, 401, 402, 403]]),
  ("truncate", BOS, 5, [[101, 300, 301, 302]]),
])
def test_what_comes_after_the_last_group_is_not_counted(strategy, bos, budget, want):
  groups = grouping.pack(_demos(2, 9, 3, 4, 9, 9), budget, strategy, chunk_num=1, bos_id=bos)
  assert _rows(groups) == want
  assert (groups.drawn, groups.skipped) == (4, 1)  # the fourth closes the group


def test_blanks_fill_shorter_groups_in_front():
  groups = grouping.pack(_demos(3, 2, 2, 4, 5), 6, "space", bos_id=BOS, space_id=9)
  np.testing.assert_array_equal(
    groups.ids, [[100, 101, 102, 200, 201], [9, 9, 9, 300, 301], [9, 400, 401, 402, 403]])
  assert groups.mask.all() and groups.used == 4


def test_even_groups_by_hand():
  assert _rows(grouping.pack(_demos(2, 2, 2, 2), 8)) == [_joined(_demos(2, 2, 2, 2))]
  assert [len(r) for r in _rows(grouping.pack(_demos(2, 2, 2, 2), 7))] == [4, 4]
  assert [len(r) for r in _rows(grouping.pack(_demos(2, 2, 2, 2), 8, bos_id=BOS))] == [4, 4]
  assert [len(r) for r in _rows(grouping.pack(_demos(2, 2, 2, 2), 8, chunk_num=3))] in (
    [2, 2, 4], [2, 4, 2], [4, 2, 2])
  # Shares alone would put 9 and 2 together, above the budget, or leave a group short.
  assert [len(r) for r in _rows(grouping.pack(_demos(1, 1, 1, 9), 10, chunk_num=3))] in (
    [1, 2, 9], [2, 1, 9])


def test_nothing_gives_no_groups():
  for strategy in grouping.STRATEGIES:
    groups = grouping.pack([], 5, strategy, space_id=9)
    assert groups.ids.shape == groups.mask.shape == (0, 0)
    assert (groups.num_groups, groups.num_tokens, *_counts(groups)) == (0, 0, 0, 0, 0)


# ---------------------------------------------------------------- the published rules, read again


def _bloom(demos, max_length, strategy, chunk_num):
  """R-hf: `group` is what the script calls the open input."""
  demos = [d for d in demos if len(d) <= max_length]
  finished, group = [], []
  for demo in demos:
    if len(group) + len(demo) <= max_length:
      group = group + demo
    elif strategy == "truncate":
      finished.append((group + demo)[-max_length:])
      group = []
    else:
      finished.append(group)
      group = demo
    if len(finished) == chunk_num:
      return finished
  return finished or ([group] if group else [])


def _dense(demos, chunk_len, strategy):
  """R-fs: groups as lists that begin with BOS."""
  if strategy == "truncate":
    groups = [[BOS]]
    for demo in demos:
      if len(demo) > chunk_len:
        continue
      if len(groups[-1]) <= chunk_len:
        groups[-1] = groups[-1] + demo
      else:
        groups[-1] = [BOS] + groups[-1][-(chunk_len - 1):]
        groups.append([BOS] + demo)
    if len(groups) == 1:
      if len(groups[0]) > chunk_len:
        groups[0] = [BOS] + groups[0][-(chunk_len - 1):]
    else:
      groups = groups[:-1]
  else:
    groups = [[BOS]]
    for demo in demos:
      if 1 + len(demo) > chunk_len:
        continue
      if len(groups[-1]) + len(demo) > chunk_len:
        groups.append([BOS])
      groups[-1] = groups[-1] + demo
    if len(groups) > 1:
      groups = groups[:-1]
  return [group[1:] for group in groups if len(group) > 1]


def _random_demos(rng, longest):
  return _demos(*rng.integers(1, longest + 1, rng.integers(1, 14)))


def _whole_ones(rows, demos):
  """How many demonstrations stand in a row in full; every token exists once."""
  places = {token: (m, j) for m, row in enumerate(rows) for j, token in enumerate(row)}
  return sum(
    all(token in places for token in demo) and len({places[token][0] for token in demo}) == 1
    for demo in demos)


@pytest.mark.parametrize("strategy", ["truncate", "mask"])
def test_random_groups_without_bos_follow_blooms_script(strategy):
  rng = np.random.default_rng(0)
  for _ in range(400):
    budget = int(rng.integers(1, 16))
    demos = _random_demos(rng, int(rng.integers(1, 20)))
    chunk_num = [None, 1, 2, 3][rng.integers(4)]
    want = _bloom(demos, budget, strategy, chunk_num)
    if chunk_num is not None and len(want) < chunk_num:
      with pytest.raises(ValueError, match=f"make {len(want)} groups .* {chunk_num} are asked for"):
        grouping.pack(demos, budget, strategy, chunk_num)
      continue
    got = grouping.pack(demos, budget, strategy, chunk_num)
    assert _rows(got) == want
    assert got.used == _whole_ones(want, demos)
    assert got.ids.shape[1] == max(map(len, want), default=0) <= budget
    if chunk_num is None:
      assert got.drawn == len(demos)
      assert got.skipped == sum(len(demo) > budget for demo in demos)


@pytest.mark.parametrize("strategy", ["truncate", "mask", "space"])
def test_random_groups_with_bos_follow_the_dense_models_script(strategy):
  rng = np.random.default_rng(1)
  for _ in range(400):
    chunk_len = int(rng.integers(2, 16))
    demos = _random_demos(rng, int(rng.integers(1, 20)))
    want = _dense(demos, chunk_len, strategy)
    got = grouping.pack(demos, chunk_len, strategy, bos_id=BOS, space_id=9)
    if strategy == "space":
      width = max(map(len, want), default=0)
      assert got.ids.tolist() == [[9] * (width - len(row)) + row for row in want]
    else:
      assert _rows(got) == want
    assert got.used == _whole_ones(want, demos) and got.drawn == len(demos)
    limit = chunk_len if strategy == "truncate" else chunk_len - 1
    assert got.skipped == sum(len(demo) > limit for demo in demos)


def _partitions(lengths, count):
  """All ways to cut into `count` runs, as the runs' lengths."""
  for cuts in itertools.combinations(range(1, len(lengths)), count - 1):
    ends = (0, *cuts, len(lengths))
    yield [sum(lengths[a:b]) for a, b in zip(ends, ends[1:])]


@pytest.mark.parametrize("bos", [None, BOS])
def test_random_even_groups_are_few_and_alike(bos):
  rng = np.random.default_rng(2)
  for _ in range(300):
    longest = int(rng.integers(1, 12))
    demos = _demos(*rng.integers(1, longest + 1, rng.integers(1, 10)))
    budget = int(rng.integers(longest, 30))
    chunk_num = [None, None, 1, 2, 3][rng.integers(5)]
    lengths = [len(demo) for demo in demos]
    fewest = next(
      m for m in itertools.count(1)
      if any(max(part) <= budget for part in _partitions(lengths, m)))
    count = max(fewest, chunk_num or 1)
    arguments = demos, budget + bool(bos), "even", chunk_num, bos
    if count > len(demos):
      with pytest.raises(ValueError, match=f"{len(demos)} demonstrations make {len(demos)} groups"):
        grouping.pack(*arguments)
      continue
    got = grouping.pack(*arguments)
    rows = _rows(got)
    assert _joined(rows) == _joined(demos)
    assert _counts(got) == (len(demos), len(demos), 0)
    assert _whole_ones(rows, demos) == len(demos)
    assert len(rows) == count
    # The longest group, which all others are aligned to, is as short as it can be.
    assert max(map(len, rows)) == min(max(part) for part in _partitions(lengths, count))


def test_even_groups_of_many_demonstrations_differ_by_less_than_two_of_them():
  rng = np.random.default_rng(3)
  for seed in range(20):
    demos = _demos(*rng.integers(5, 41, 1000))
    lengths = [len(row) for row in _rows(grouping.pack(demos, 2000))]
    fewest, filled = 1, 0
    for demo in demos:
      fewest, filled = (fewest + 1, len(demo)) if filled + len(demo) > 2000 else (
        fewest, filled + len(demo))
    assert len(lengths) == fewest, seed
    assert max(lengths) - min(lengths) < 80 and max(lengths) <= 2000, seed


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, kwargs, match", [
  ((_demos(3), 5, "blank"), {}, "'blank' is not one of even, truncate, mask, space"),
  ((_demos(3), 0), {}, "room for 0 tokens"),
  ((_demos(3), -4), {}, "room for -4 tokens"),
  ((_demos(3), 1), {"bos_id": BOS}, "room for 0 tokens"),
  ((_demos(3, 0, 2), 5), {}, "demonstration 1 has no tokens"),
  ((_demos(3, 6), 5), {}, "demonstration 1 has 6 tokens and a group room for 5"),
  ((_demos(3, 5), 5), {"bos_id": BOS}, "demonstration 1 has 5 tokens and a group room for 4"),
  ((_demos(3, 6), 5, "space"), {"space_id": 9}, "demonstration 1 has 6 tokens"),
  ((_demos(3), 5, "space"), {}, "no single token for"),
  ((_demos(3, 3), 5, "mask", 2), {}, "2 demonstrations make 1 groups of 5 tokens, and 2 are asked"),
  ((_demos(3, 3), 5, "truncate", 2), {}, "make 1 groups"),
  ((_demos(3, 3), 5, "truncate", 2), {"bos_id": BOS}, "make 1 groups"),
  ((_demos(3, 3), 5, "even", 3), {}, "make 2 groups"),
  (([], 5, "even", 1), {}, "0 demonstrations make 0 groups"),
  ((_demos(3), 5, "even", 0), {}, "chunk_num=0 must be at least 1"),
  ((_demos(3), 5, "mask", -1), {}, "chunk_num=-1 must be at least 1"),
])
def test_bad_input_is_one_sentence(arguments, kwargs, match):
  with pytest.raises(ValueError, match=match):
    grouping.pack(*arguments, **kwargs)
