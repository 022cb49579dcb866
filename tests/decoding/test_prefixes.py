"""Groups in front of rows: against PyTorch with dense masks, and by what must not matter."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding import GenerationOptions, Generator, prefixes
from lmops_jax.decoding.group_store import GroupStore
from lmops_jax.decoding.scoring import OptionScorer, Request
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.cache import empty_cache
from lmops_jax.models.positions import alibi_slopes

BOS = 1


def _groups(*lengths, width=None, seed=0):
  """Ids and mask of groups of these lengths."""
  rng, width = np.random.default_rng(seed), width or max(lengths)
  ids, mask = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
  for row, length in enumerate(lengths):
    ids[row, width - length :] = rng.integers(3, 30, length)
    mask[row, width - length :] = True
  return ids, mask


def _logits(tiny, prefix, tokens):
  """`[B,S,V]` of rows behind a prefix."""
  positions = int(prefix.end) + np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = tiny.model.apply(
    {"params": tiny.params}, tokens, empty_cache(tiny.model.config, *tokens.shape),
    positions=positions, shared=prefix, method="extend")
  return np.asarray(tiny.model.apply({"params": tiny.params}, hidden, method="unembed"))


def _read(tiny, *groups, **kwargs):
  return prefixes.read_groups(tiny.model, tiny.params, *groups, **kwargs)


TEST = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
KINDS = [{}, {"positions": "alibi"}, {"positions": "learned"}, {"positions": "sinusoidal"}]


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("bos", [None, BOS])
def test_one_group_is_an_ordinary_context(make_tiny, changes, bos):
  tiny = make_tiny(**changes)
  ids, mask = _groups(6)
  got = _logits(tiny, _read(tiny, ids, mask, bos_id=bos), TEST)
  front = np.concatenate([[bos] if bos else [], ids[0]]).astype(np.int32)
  whole = np.concatenate([np.tile(front, (2, 1)), TEST], axis=1)
  want = tiny.model.apply({"params": tiny.params}, whole, method="logits")
  np.testing.assert_allclose(got, want[:, len(front) :], rtol=1e-4, atol=1e-4)


def test_the_order_of_groups_does_not_matter_that_of_demonstrations_does(tiny):
  ids, mask = _groups(7, 5, 4)
  got = _logits(tiny, _read(tiny, ids, mask), TEST)
  order = [2, 0, 1]
  np.testing.assert_allclose(
    got, _logits(tiny, _read(tiny, ids[order], mask[order]), TEST), rtol=1e-4, atol=1e-4)
  turned = ids.copy()
  turned[0] = turned[0, ::-1]
  assert np.abs(got - _logits(tiny, _read(tiny, turned, mask), TEST)).max() > 1e-2


def test_copies_of_a_group_are_the_group_alone_without_bos(tiny):
  ids, mask = _groups(6)
  copies = [np.repeat(x, 3, axis=0) for x in (ids, mask)]
  alone, three = (_logits(tiny, _read(tiny, *x), TEST) for x in ((ids, mask), copies))
  np.testing.assert_allclose(three, alone, rtol=1e-4, atol=1e-4)
  alone, three = (
    _logits(tiny, _read(tiny, *x, bos_id=BOS), TEST) for x in ((ids, mask), copies))
  assert np.abs(three - alone).max() > 1e-3  # BOS keeps the weight of one token


def test_the_scale_weighs_own_tokens(tiny):
  ids, mask = _groups(6, 4)
  plain = _logits(tiny, _read(tiny, ids, mask, scale=1.0), TEST)
  three = _logits(tiny, _read(tiny, ids, mask, scale=3.0), TEST)
  assert np.abs(plain - three).max() > 1e-2
  wide = _logits(tiny, _read(tiny, ids, mask, scale=1e9), TEST)
  whole = tiny.model.apply(  # own tokens only, at their positions
    {"params": tiny.params}, TEST, np.broadcast_to(6 + np.arange(4), TEST.shape), method="logits")
  np.testing.assert_allclose(wide, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature, group_scale", [(0.6, 0.8), (1.5, 1.0)])
@pytest.mark.parametrize("changes, front", [({}, [BOS, 2]), ({"positions": "alibi"}, [])])
def test_temperature_and_scale_are_the_published_equation(
    make_tiny, changes, front, temperature, group_scale):
  """One layer: attention of the last token, by hand from the keys and values of each text alone."""
  tiny = make_tiny(num_layers=1, **changes)
  ids, mask = _groups(6, 4)
  kwargs = dict(front=front, scale=1.0)
  read = functools.partial(_read, tiny, ids, mask, **kwargs)
  adaptive = read(temperature=temperature, group_scale=group_scale)
  own = np.array([[5, 6, 7]], np.int32)
  c, length = tiny.model.config, int(adaptive.end)
  positions = (length + np.arange(3))[None]
  _, cache, found = tiny.model.apply(
    {"params": tiny.params}, own, empty_cache(c, 1, 3), positions=positions, shared=adaptive,
    readout=np.array([[2]]), method="extend")
  plain = read().cache  # holds the front once, in front of the first group
  keys, values, at, of_front = [], [], [], []
  for part, is_prefix in ((plain, True), (cache, False)):
    seen = np.asarray(part.valid[0])
    keys.append(np.asarray(part.keys[0])[0][:, seen])
    values.append(np.asarray(part.values[0])[0][:, seen])
    at.append(np.asarray(part.positions[0])[seen])
    of_front.append((at[-1] < len(front)) if is_prefix else np.ones(seen.sum(), bool))
  keys, values = (np.concatenate(x, 1).astype(np.float64) for x in (keys, values))
  at, apart = np.concatenate(at), ~np.concatenate(of_front)
  assert apart.sum() == mask.sum()
  q = np.asarray(found.queries[0, 0, 0], np.float64)  # [H,E]
  heads = q.shape[0] // len(keys)
  scores = np.einsum("he,hme->hm", q, np.repeat(keys, heads, 0)) * q.shape[1] ** -0.5
  if c.positions == "alibi":
    scores += np.asarray(alibi_slopes(c.num_heads))[:, None] * (at - (length + 2))
  values = np.repeat(values, heads, 0)
  cooled = np.exp(scores[:, apart] / temperature)
  texts = np.einsum("hm,hme->he", cooled, values[:, apart]) / cooled.sum(1, keepdims=True)
  weight = cooled.sum(1, keepdims=True) ** (group_scale * temperature)
  others = np.exp(scores[:, ~apart])
  want = (weight * texts + np.einsum("hm,hme->he", others, values[:, ~apart])) / (
    weight + others.sum(1, keepdims=True))
  layer = nn.unbox(tiny.params)["layers"]["attention"]["out"]
  want = np.einsum("he,hed->d", want, np.asarray(layer["kernel"][0], np.float64))
  np.testing.assert_allclose(found.attention[0, 0, 0], want, rtol=2e-4, atol=2e-5)


def test_temperature_and_scale_of_one_are_parallel_windows(tiny):
  ids, mask = _groups(6, 4)
  plain = _read(tiny, ids, mask, bos_id=BOS, front=[2], scale=1.0)
  ones = _read(tiny, ids, mask, front=[BOS, 2], scale=1.0, temperature=1.0, group_scale=1.0)
  np.testing.assert_array_equal(_logits(tiny, plain, TEST), _logits(tiny, ones, TEST))
  nearly = _read(tiny, ids, mask, front=[BOS, 2], scale=1.0, temperature=1 + 1e-6)
  assert nearly.adaptive is not None
  np.testing.assert_allclose(
    _logits(tiny, nearly, TEST), _logits(tiny, ones, TEST), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_reads_no_group_twice(make_tiny, tmp_path, dtype, monkeypatch):
  tiny = make_tiny(dtype=dtype)
  ids, mask = _groups(7, 5, 4, width=8)
  kwargs = dict(front=[BOS, 2], temperature=0.9, scale=1.0, window=9)
  want = _read(tiny, ids, mask, **kwargs)
  read, place = [], prefixes._held
  monkeypatch.setattr(prefixes, "_held", lambda model, params, arrays, **rest: (
    read.append(len(arrays["valid"])), place(model, params, arrays, **rest))[1])

  def stored(ids, mask, tiny=tiny, **changes):
    store = GroupStore(tmp_path, tiny.model, tiny.params)
    return _read(tiny, ids, mask, store=store, **kwargs | changes)

  def same(got, want):
    for a, b in zip(jax.tree.leaves(got.adaptive), jax.tree.leaves(want.adaptive), strict=True):
      np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(_logits(tiny, got, TEST), _logits(tiny, want, TEST))

  same(stored(ids[:2], mask[:2]), _read(tiny, ids[:2], mask[:2], **kwargs))
  assert read.pop(0) == 2
  read.clear()
  same(stored(ids, mask), want)
  assert read == [1]  # the third one alone
  same(stored(ids[::-1], mask[::-1], temperature=1.0), _read(
    tiny, ids[::-1], mask[::-1], **kwargs | {"temperature": 1.0}))
  assert read == [1, 3]  # that of the comparison
  for changes in ({"window": 10}, {"front": [BOS, 3]}, {"front": [BOS]}):
    stored(ids, mask, **changes)
    assert read.pop() == 3
  stored(ids, mask, make_tiny(seed=2, dtype=dtype))
  assert read.pop() == 3
  file = sorted(tmp_path.iterdir())[0]
  file.write_bytes(file.read_bytes()[:-8])
  with pytest.raises(ValueError, match="does not hold keys and values of .* delete it"):
    for changes in ({}, {"window": 10}, {"front": [BOS, 3]}, {"front": [BOS]}):
      stored(ids, mask, **changes)
    stored(ids, mask, make_tiny(seed=2, dtype=dtype))
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="file cannot be a folder"):
    GroupStore(tmp_path / "file", tiny.model, tiny.params)


@pytest.mark.parametrize("changes", KINDS)
def test_a_wider_window_matters_only_to_absolute_positions(make_tiny, changes):
  tiny = make_tiny(**changes)
  ids, mask = _groups(6, 4)
  near = _logits(tiny, _read(tiny, ids, mask), TEST)
  far = _logits(tiny, _read(tiny, ids, mask, window=9), TEST)
  if changes in ({}, {"positions": "alibi"}):
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-4)
  else:
    assert np.abs(near - far).max() > 1e-2


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("bos", [None, BOS])
def test_padding_and_calls_do_not_matter(make_tiny, changes, bos, monkeypatch):
  tiny = make_tiny(**changes)
  ids, mask = _groups(6, 3, 5)
  want = _logits(tiny, _read(tiny, ids, mask, bos_id=bos), TEST)
  other = np.where(mask, ids, 17)  # any token in front
  monkeypatch.setattr(prefixes, "_TOKENS_AT_ONCE", 16)  # one group a call
  monkeypatch.setattr(prefixes, "bucket", lambda n: n + 5)
  np.testing.assert_allclose(
    _logits(tiny, _read(tiny, other, mask, bos_id=bos), TEST), want, rtol=1e-4, atol=1e-4)


def test_what_the_programs_read_is_not_changed_behind_them(tiny, monkeypatch):
  """They run later than they are called, and may read the host's arrays themselves."""
  read, seen = prefixes._read, []

  def watched(model, params, tokens, positions, valid, *others):
    seen.append([(x, x.copy()) for x in (tokens, positions, valid)])
    return read(model, params, tokens, positions, valid, *others)

  monkeypatch.setattr(prefixes, "_read", watched)
  _read(tiny, *_groups(7, 5, 4), bos_id=BOS)
  for given, before in (pair for call in seen for pair in call):
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_keys_and_values_are_in_memory_once(tiny, on_mesh, monkeypatch):
  read, rooms = prefixes._read, []

  def watched(*args):
    rooms.append(args[5])
    return read(*args)

  monkeypatch.setattr(prefixes, "_read", watched)
  monkeypatch.setattr(prefixes, "_TOKENS_AT_ONCE", 16)  # one group a call
  partitioner = MeshConfig(data=2, fsdp=2, tensor=2).build() if on_mesh else None
  kept = _read(tiny, *_groups(7, 5, 4, 6), partitioner=partitioner).cache
  assert len(rooms) == (2 if on_mesh else 4)
  assert all(x.is_deleted() for x in jax.tree.leaves(rooms))
  assert not any(x.is_deleted() for x in kept.keys)


@pytest.mark.parametrize("bos", [None, BOS])
def test_no_group_is_no_context(tiny, bos):
  nothing = np.zeros((0, 0), np.int32), np.zeros((0, 0), bool)
  got = _logits(tiny, _read(tiny, *nothing, bos_id=bos), TEST)
  front = np.full((2, 1 if bos else 0), BOS, np.int32)
  want = tiny.model.apply(
    {"params": tiny.params}, np.concatenate([front, TEST], axis=1), method="logits")
  np.testing.assert_allclose(got, want[:, front.shape[1] :], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_options_and_generation_behind_groups(tiny):
  ids, mask = _groups(7, 5, 4)
  prefix = _read(tiny, ids, mask)
  scorer = OptionScorer(tiny.model, tiny.params)
  contexts, options = [[5, 6, 7], [9, 4]], [[8], [10, 11], [12, 13, 14]]
  got = scorer.score([Request(c, options) for c in contexts], prefix=prefix)
  for context, of_row in zip(contexts, got):
    for option, scores in zip(options, of_row):
      logits = _logits(tiny, prefix, np.array([context + option], np.int32))[0]
      every = np.asarray(jax.nn.log_softmax(logits))
      want = [every[len(context) - 1 + i, token] for i, token in enumerate(option)]
      np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)

  choices = GenerationOptions(max_new_tokens=5, eos_ids=())
  for padding in ("left", "right"):
    generator = Generator(tiny.model, tiny.params, padding=padding)
    for prompt, found in zip(contexts, generator.generate_ids(contexts, choices, prefix=prefix)):
      row = list(prompt)
      for token in found.ids:
        logits = _logits(tiny, prefix, np.array([row], np.int32))[0, -1]
        assert token == int(np.argmax(logits))
        row.append(token)
  beams = GenerationOptions(max_new_tokens=4, num_beams=3, eos_ids=())
  one, = generator.generate_ids([contexts[0]], beams, prefix=prefix)
  both = generator.generate_ids(contexts, beams, prefix=prefix)
  assert both[0].ids == one.ids


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("bos", [None, BOS])
def test_a_mesh_gives_the_same(tiny, spread, bos):
  ids, mask = _groups(7, 5, 4, 6, 3)
  requests = [Request([5, 6, 7], [[8], [9, 10]]), Request([11, 12], [[13], [14]])]
  want = OptionScorer(tiny.model, tiny.params).score(
    requests, prefix=_read(tiny, ids, mask, bos_id=bos))
  partitioner = MeshConfig(data=2, fsdp=2, tensor=2).build()
  prefix = _read(tiny, ids, mask, bos_id=bos, partitioner=partitioner, spread=spread)
  if spread:
    shards = {s.data.shape[2] for s in prefix.cache.keys[0].addressable_shards}
    assert shards == {prefix.cache.num_slots // 2}
  rows = prefixes.rows_partitioner(partitioner, spread)
  got = OptionScorer(tiny.model, tiny.params, rows).score(requests, prefix=prefix)
  for a, b in zip(got, want):
    for x, y in zip(a, b):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  generator = Generator(tiny.model, tiny.params, partitioner=rows)
  choices = GenerationOptions(max_new_tokens=4, eos_ids=())
  alone = Generator(tiny.model, tiny.params)
  reference = _read(tiny, ids, mask, bos_id=bos)
  prompts = [[5, 6, 7], [11, 12]]
  assert [g.ids for g in generator.generate_ids(prompts, choices, prefix=prefix)] == [
    g.ids for g in alone.generate_ids(prompts, choices, prefix=reference)]


def test_refuses_what_cannot_be_aligned(make_tiny, tiny):
  ids, mask = _groups(6, 4)
  holes = mask.copy()
  holes[0, 2] = False
  right = mask[:, ::-1]
  for kwargs, text in [
    (dict(mask=holes), "group 0 is not at the end"),
    (dict(mask=right), "group 1 is not at the end"),
    (dict(mask=mask & np.array([[True], [False]])), "group 1 is empty"),
    (dict(window=5), "window=5 is shorter"),
    (dict(scale=0.0), "scale=0.0 must be"),
    (dict(scale=math.inf), "scale=inf must be"),
    (dict(temperature=0.0), "temperature=0.0 must be"),
    (dict(group_scale=math.nan), "group_scale=nan must be"),
    (dict(front=[40]), "id 40, outside of the model's vocabulary of 32"),
    (dict(mask=mask[:1]), r"ids \(2, 6\) and mask \(1, 6\)"),
    (dict(bos_id=32), "id 32, outside of the model's vocabulary of 32"),
    (dict(ids=ids + 30), "outside of the model's vocabulary"),
  ]:
    with pytest.raises(ValueError, match=text):
      _read(tiny, **{"ids": ids, "mask": mask, **kwargs})
  with pytest.raises(ValueError, match="without any group"):
    _read(tiny, ids[:0], mask[:0], scale=2.0)
  with pytest.raises(ValueError, match="latest 5 .*sliding_window"):
    _read(make_tiny(sliding_window=5), ids, mask)
  with pytest.raises(ValueError, match="momentum=0.5.* 2 groups side by side"):
    _read(make_tiny(momentum=0.5), ids, mask)
  with pytest.raises(ValueError, match="temperature=0.5 .*momentum=0.5.* leave them out"):
    _read(make_tiny(momentum=0.5), ids[1:], mask[1:], temperature=0.5)
  with pytest.raises(ValueError, match="causal is False"):
    _read(make_tiny(causal=False), ids, mask)
  learned = make_tiny(positions="learned")
  with pytest.raises(ValueError, match="ends at position 50.*learned positions end at 48"):
    _read(learned, ids, mask, window=50)
  late = _read(learned, ids, mask, window=46)
  with pytest.raises(ValueError, match="request 0 has 5 tokens .* position 46.* end at 48"):
    OptionScorer(learned.model, learned.params).score([Request([5] * 4, [[9, 9]])], prefix=late)
  with pytest.raises(ValueError, match="prompt 0 has 3 tokens .* position 46.* end at 48"):
    Generator(learned.model, learned.params).generate_ids(
      [[5, 6]], GenerationOptions(max_new_tokens=2), prefix=late)
  deeper = make_tiny(num_layers=3)
  with pytest.raises(ValueError, match="prefix has 2 layers .* model 3"):
    OptionScorer(deeper.model, deeper.params).score(
      [Request([5], [[9]])], prefix=_read(tiny, ids, mask))


def test_a_readout_is_what_attention_computed(make_tiny):
  for changes in ({}, {"positions": "alibi"}, {"qkv_bias": True, "out_bias": True}):
    tiny = make_tiny(**changes)
    ids, mask = _groups(6, 4)
    prefix = _read(tiny, ids, mask)
    config = tiny.model.config
    positions = int(prefix.end) + np.broadcast_to(np.arange(4), TEST.shape)
    index = np.array([[3, 0], [2, 1]], np.int32)
    hidden, cache, found = tiny.model.apply(
      {"params": tiny.params}, TEST, empty_cache(config, 2, 4), positions=positions, shared=prefix,
      readout=index, method="extend")
    assert found.attention.shape == (config.num_layers, 2, 2, config.width)
    # The queries give the scores, and with the values the same attention output again.
    keys = np.concatenate(
      [np.repeat(prefix.cache.keys[0], 2, 0), np.asarray(cache.keys[0])], axis=2)
    values = np.concatenate(
      [np.repeat(prefix.cache.values[0], 2, 0), np.asarray(cache.values[0])], axis=2)
    repeats = config.num_heads // config.key_heads
    keys, values = (np.repeat(x, repeats, axis=1) for x in (keys, values))
    scores = np.einsum("brhe,bhme->brhm", found.queries[0], keys) * config.head_width**-0.5
    slots = prefix.cache.num_slots
    places = np.concatenate([np.tile(prefix.cache.positions, (2, 1)), positions], axis=1)
    if changes.get("positions") == "alibi":
      from lmops_jax.models.positions import alibi_slopes
      own = np.take_along_axis(positions, index, axis=1)
      scores = scores - alibi_slopes(config.num_heads)[None, None, :, None] * (
        own[:, :, None, None] - places[:, None, None, :])
    seen = np.concatenate([
      np.broadcast_to(prefix.cache.valid[:, None], (2, 2, slots)),
      np.arange(4)[None, None] <= index[:, :, None]], axis=2)
    scores[..., slots:] += math.log(2)
    shares = np.asarray(jax.nn.softmax(np.where(seen[:, :, None], scores, -np.inf), axis=-1))
    heads = np.einsum("brhm,bhme->brhe", shares, values)
    out = jax.tree.map(lambda p: p[0], tiny.params["layers"])["attention"]["out"]
    want = np.einsum("brhe,hed->brd", heads, out["kernel"]) + out.get("bias", 0)
    np.testing.assert_allclose(found.attention[0], want, rtol=2e-4, atol=2e-4)


def test_wide_numbers_stay_exact(make_tiny):
  """In float64 one group equals the concatenation to rounding (rotary angles are float32)."""
  tiny = make_tiny(positions="alibi")
  with jax.enable_x64(True):
    config = dataclasses.replace(tiny.model.config, dtype="float64", param_dtype="float64")
    wide = type(tiny)(
      tiny.model.clone(config=config),
      jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), tiny.params))
    ids, mask = _groups(6)
    got = _logits(wide, _read(wide, ids, mask), TEST)
    whole = np.concatenate([np.tile(ids[0], (2, 1)), TEST], axis=1)
    want = wide.model.apply({"params": wide.params}, whole, method="logits")[:, 6:]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * np.abs(want).max())
