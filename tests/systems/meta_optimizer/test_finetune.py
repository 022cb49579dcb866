"""Finetuning of keys and values against whole-tree gradients and transformers."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.transformer import Transformer, unstack_layers
from lmops_jax.pretrained import families, importing
from lmops_jax.systems.meta_optimizer.finetune import kv_finetune

KINDS = ("llama", "gpt2", "alibi", "scaled")
LENGTHS, WIDTH = (5, 8, 3), 8


@pytest.fixture(scope="module")
def demonstrations():
  ids = np.random.default_rng(0).integers(3, 31, (len(LENGTHS), WIDTH)).astype(np.int32)
  ids[:, 0] = 1
  mask = np.arange(WIDTH) < np.array(LENGTHS)[:, None]
  return np.where(mask, ids, 0), mask


def _loop(model, params, ids, mask, lr):
  """The same with whole-tree gradients of unpadded, uncached examples."""

  @jax.jit
  @jax.value_and_grad
  def loss(params, row):
    logits = model.apply({"params": params}, row[None, :-1], method="logits")[0]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), row[1:, None], 1))

  losses, key_bias_grads = [], []
  for row, of in zip(ids, mask):
    value, grads = loss(params, row[of])
    losses.append(value)
    attention = grads["layers"]["attention"]
    key_bias_grads.append(attention["key"].get("bias"))
    new = {kind: jax.tree.map(lambda p, g: p - lr * g, params["layers"]["attention"][kind],
                              attention[kind]) for kind in ("key", "value")}
    layers = params["layers"]
    params = {**params, "layers": {**layers, "attention": {**layers["attention"], **new}}}
  return params, np.array(losses), key_bias_grads


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_gradients_of_the_whole_tree(tiny, demonstrations, kind):
  model, params = tiny(kind)
  want, losses, key_bias_grads = _loop(model, params, *demonstrations, 0.05)
  found = kv_finetune(model, params, *demonstrations, 0.05)
  np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
  for (path, a), b, c in zip(jax.tree_util.tree_leaves_with_path(found.params),
                             jax.tree.leaves(want), jax.tree.leaves(params)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))
    trained = "attention/key" in (name := "/".join(p.key for p in path)) or (
      "attention/value" in name)
    assert trained or a is c, name
    if trained and "key/bias" not in name:
      assert np.abs(a - c).max() > 1e-4, name
  if kind == "gpt2":  # a shift of all keys alike cancels in the softmax
    assert max(float(np.abs(g).max()) for g in key_bias_grads) < 1e-5


def test_stacked_and_unstacked_layers_agree(tiny, demonstrations):
  model, params = tiny("llama")
  stacked = kv_finetune(model, params, *demonstrations, 0.05)
  unstacked = kv_finetune(model, unstack_layers(params), *demonstrations, 0.05)
  assert isinstance(unstacked.params["layers"], tuple)
  want = unstack_layers(stacked.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
               unstacked.params, want)
  np.testing.assert_allclose(unstacked.train_q, stacked.train_q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_queries_are_those_of_each_examples_own_forward_pass(tiny, demonstrations, kind):
  model, params = tiny(kind)
  ids, mask = demonstrations
  found = kv_finetune(model, params, ids, mask, 0.05)
  assert found.train_q.shape == (3, WIDTH, 2, 16)
  for i in range(len(ids)):
    before = kv_finetune(model, params, ids[:i], mask[:i], 0.05).params
    alone = kv_finetune(model, before, ids[i : i + 1], mask[i : i + 1], 0.0)
    of = mask[i]
    np.testing.assert_allclose(
      found.train_q[i][of], alone.train_q[0][of], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.losses[i], alone.losses[0], rtol=1e-5)


def test_padding_changes_nothing(tiny, demonstrations):
  model, params = tiny("llama")
  ids, mask = demonstrations
  more = [np.pad(x, ((0, 0), (0, 3)), constant_values=fill)
          for x, fill in ((ids, 9), (mask, False))]
  a, b = kv_finetune(model, params, ids, mask, 0.05), kv_finetune(model, params, *more, 0.05)
  np.testing.assert_allclose(a.losses, b.losses, rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.params, b.params)


def test_rates_in_a_batch_equal_rates_one_by_one(tiny, demonstrations):
  model, params = tiny("llama")
  rates = np.array([0.0, 0.01, 0.1], np.float32)
  losses = jax.vmap(lambda lr: kv_finetune(model, params, *demonstrations, lr).losses)(rates)
  for rate, row in zip(rates, losses):
    want = kv_finetune(model, params, *demonstrations, float(rate)).losses
    np.testing.assert_allclose(row, want, rtol=1e-5)


def test_no_rate_and_no_demonstration_change_nothing(tiny, demonstrations):
  model, params = tiny("gpt2")
  ids, mask = demonstrations
  for found in (kv_finetune(model, params, ids, mask, 0.0),
                kv_finetune(model, params, ids[:0], mask[:0], 0.1)):
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
  assert found.losses.shape == (0,) and found.train_q.shape == (0, WIDTH, 2, 16)


def test_the_front_is_not_predicted(tiny, demonstrations):
  model, params = tiny("llama")
  ids, mask = demonstrations
  one, three = (kv_finetune(model, params, ids[1:2], mask[1:2], 0.0, num_front=n) for n in (1, 3))
  logits = model.apply({"params": params}, ids[1:2, :-1], method="logits")[0]
  nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[1, 1:, None], 1)[:, 0]
  np.testing.assert_allclose(one.losses[0], nats.mean(), rtol=1e-5)
  np.testing.assert_allclose(three.losses[0], nats[2:].mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_layer_causal_objective_trains_each_layer_by_its_own_loss(
    tiny, demonstrations, kind):
  model, params = tiny(kind)
  found = kv_finetune(model, params, *demonstrations, 0.05, objective="layer_causal")
  # The first layer knows of no other, and in a model of one layer without MLP its loss is the
  # model's own.
  one = Transformer(dataclasses.replace(model.config, num_layers=1))
  first = {**params, "layers": jax.tree.map(lambda p: p[:1], params["layers"])}
  mlp = first["layers"]["mlp"]
  without = {**first, "layers": {
    **first["layers"], "mlp": {**mlp, "down": jax.tree.map(jnp.zeros_like, mlp["down"])}}}
  want = kv_finetune(one, without, *demonstrations, 0.05).params["layers"]["attention"]
  got = found.params["layers"]["attention"]
  for name in ("key", "value"):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-5),
                 got[name], want[name])
    start = params["layers"]["attention"][name]["kernel"]
    assert np.abs(got[name]["kernel"] - start).max(axis=(1, 2, 3)).min() > 1e-5
  assert got["query"]["kernel"] is params["layers"]["attention"]["query"]["kernel"]
  lm = kv_finetune(model, params, *(x[:1] for x in demonstrations), 0.05)
  np.testing.assert_allclose(found.train_q[0], lm.train_q[0], rtol=1e-5, atol=1e-6)
  assert found.losses.shape == (3,) and np.isfinite(found.losses).all()
  with pytest.raises(ValueError, match="objective='sum' is not one of lm, layer_causal"):
    kv_finetune(model, params, *demonstrations, 0.05, objective="sum")


@pytest.mark.parity
@pytest.mark.parametrize("family, variant", [("gpt2", 0), ("llama", 1), ("xglm", 0)])
def test_equals_transformers(family, variant):
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
  pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  torch.set_num_threads(1)
  from tests.pretrained import tiny_models

  peer = copy.deepcopy(tiny_models.make(family, variant))
  table = families.by_name(family)
  config = table.read_config(families.ConfigReader(peer.config.to_dict(), "config.json"))

  def imported():
    return importing.load_params(tiny_models.DictSource(peer), table, config)

  model, params = Transformer(config), imported()
  rows = [np.random.default_rng(i).integers(3, 61, n) for i, n in enumerate((6, 4, 9))]
  ids, mask = np.zeros((3, 9), np.int32), np.zeros((3, 9), bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  found = kv_finetune(model, params, ids, mask, 0.1)

  losses = []
  for row in rows:
    tokens = torch.tensor(row)[None]
    peer.zero_grad()
    loss = peer(tokens, labels=tokens).loss
    loss.backward()
    losses.append(loss.item())
    with torch.no_grad():
      for name, parameter in peer.named_parameters():
        if "c_attn" in name:  # fused: queries, keys, values
          parameter.grad[..., : parameter.shape[-1] // 3] = 0
        elif not any(part in name for part in ("k_proj", "v_proj")):
          continue
        parameter -= 0.1 * parameter.grad
  np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.params, imported())


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_bad_rates_are_refused(tiny, demonstrations, lr):
  model, params = tiny("llama")
  with pytest.raises(ValueError, match="must be finite and at least 0"):
    kv_finetune(model, params, *demonstrations, lr)


def test_divergence_names_the_step(tiny, demonstrations):
  model, params = tiny("llama")
  with pytest.raises(FloatingPointError, match=r"lr=1e\+38 is (nan|inf) in step 1 of 3"):
    kv_finetune(model, params, *demonstrations, 1e38)
  ids, mask = demonstrations
  bad = jax.tree.map(lambda p: p * np.nan, params)
  with pytest.raises(FloatingPointError, match="in step 0 of 1"):
    kv_finetune(model, bad, ids[:1], mask[:1], 0.1)


def test_bad_demonstrations_are_refused(tiny, demonstrations):
  model, params = tiny("llama")
  ids, mask = demonstrations
  with pytest.raises(ValueError, match=r"demo_mask \(3, 7\)"):
    kv_finetune(model, params, ids, mask[:, 1:], 0.1)
  empty = mask.copy()
  empty[2, 1:] = False
  with pytest.raises(ValueError, match="demonstration 2 has 1 tokens"):
    kv_finetune(model, params, ids, empty, 0.1)
  with pytest.raises(ValueError, match="demonstration 0 is padded in front"):
    kv_finetune(model, params, ids, mask[:, ::-1], 0.1)
