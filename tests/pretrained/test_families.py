"""Every family equals PyTorch on tiny random models: logits, states, gradients, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.models.transformer import Transformer  # noqa: E402
from lmops_jax.models.vision import VisionTransformer  # noqa: E402
from lmops_jax.pretrained import families, importing  # noqa: E402
from tests.pretrained.tiny_models import (  # noqa: E402
  CASES,
  CAUSAL,
  ENCODERS,
  DictSource,
  imported,
  make,
  randomise,
)


def _tokens(batch=3, length=17, seed=0):
  return np.random.default_rng(seed).integers(3, 61, (batch, length)).astype(np.int32)


def _close(got, want, **tolerance):
  np.testing.assert_allclose(np.asarray(got), np.asarray(want.detach()), **tolerance)


@pytest.mark.parametrize("family,variant", CASES)
def test_logits_and_gradients_equal_torch(family, variant):
  peer, table, config, params = imported(family, variant)
  tokens = _tokens()
  model = Transformer(config)
  peer.zero_grad()
  logits = peer(torch.tensor(tokens.astype(np.int64))).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:].astype(np.int64)).flatten()
  )
  loss.backward()

  def value(params):
    logits = model.apply({"params": params}, tokens, method="logits")
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)), logits

  (got_loss, got_logits), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
  _close(got_logits, logits, rtol=0, atol=2e-5)
  assert float(got_loss) == pytest.approx(float(loss.detach()), rel=1e-5)
  _check_gradients(peer, table.rules(config), grads)


@pytest.mark.parametrize("family,variant", CASES)
def test_hidden_states_equal_torch(family, variant):
  peer, _, config, params = imported(family, variant)
  tokens = _tokens(2, 9, seed=1)
  want = peer(torch.tensor(tokens.astype(np.int64)), output_hidden_states=True).hidden_states
  got = jax.jit(
    lambda p, t: Transformer(config).apply({"params": p}, t, method="all_hidden")
  )(params, tokens)
  assert len(want) == config.num_layers + 1
  for layer, state in enumerate(want):
    if state.shape[-1] != config.width:  # OPT-350m's last one is projected already
      continue
    _close(got[layer], state, rtol=0, atol=2e-5, err_msg=f"layer {layer}")


@pytest.mark.parametrize("family,variant", [case for case in CASES if case[0] in CAUSAL])
def test_ragged_rows_equal_torch_alone(family, variant):
  """Padding on either side, by segments and positions, changes nothing at real tokens."""
  peer, _, config, params = imported(family, variant)
  lengths, width = (4, 7), 7
  rows = [_tokens(1, n, seed=n)[0] for n in lengths]
  wanted = [peer(torch.tensor(ids[None].astype(np.int64))).logits[0] for ids in rows]
  forward = jax.jit(
    lambda p, *inputs: Transformer(config).apply({"params": p}, *inputs, method="logits")
  )
  for side in ("left", "right"):
    tokens, valid = np.full((2, width), 1, np.int32), np.zeros((2, width), bool)
    for row, ids in enumerate(rows):
      place = slice(width - len(ids), None) if side == "left" else slice(len(ids))
      tokens[row, place], valid[row, place] = ids, True
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0).astype(np.int32)
    got = forward(params, tokens, positions, valid.astype(np.int32))
    for row, want in enumerate(wanted):
      _close(got[row][valid[row]], want, rtol=0, atol=2e-5, err_msg=side)


@pytest.mark.parametrize("family,variant", [case for case in CASES if case[0] in ENCODERS])
def test_encoders_ignore_padding_and_know_token_types(family, variant):
  peer, _, config, params = imported(family, variant)
  tokens, mask = _tokens(2, 8, seed=3), np.ones((2, 8), np.int32)
  tokens[0, 5:], mask[0, 5:] = 1, 0  # the padding id, which RoBERTa's positions go by
  types = np.random.default_rng(0).integers(0, config.num_token_types, (2, 8)).astype(np.int32)
  want = peer(
    torch.tensor(tokens.astype(np.int64)), attention_mask=torch.tensor(mask.astype(np.int64)),
    token_type_ids=torch.tensor(types.astype(np.int64)),
  ).logits
  got = Transformer(config).apply(
    {"params": params}, tokens, None, mask, types, method="logits"
  )
  _close(got[0, :5], want[0, :5], rtol=0, atol=2e-5)
  _close(got[1], want[1], rtol=0, atol=2e-5)


def test_bare_body_with_pooler_equals_torch():
  config = transformers.BertConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=40,
  )
  torch.manual_seed(0)
  peer = randomise(transformers.BertModel(config))
  ours = families.by_name("bert").read_config(
    families.ConfigReader(config.to_dict(), "config.json")
  )
  ours = dataclasses.replace(
    ours, tied_embeddings=True, head_transform=False, unembedding_bias=False
  )
  params = importing.load_params(DictSource(peer), families.by_name("bert"), ours)
  tokens = _tokens(2, 6)
  want = peer(torch.tensor(tokens.astype(np.int64)))
  model = Transformer(ours)
  hidden = model.apply({"params": params}, tokens)
  _close(hidden, want.last_hidden_state, rtol=0, atol=2e-5)
  _close(
    model.apply({"params": params}, hidden, method="pooled"), want.pooler_output, rtol=1e-4,
    atol=2e-5,
  )


_TOWER = dict(
  hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
  projection_dim=10,
)


@pytest.mark.parametrize("text,vision,eos_id", [
  ({}, {}, 2),  # the first checkpoints, which are read at the largest id
  ({}, {"hidden_act": "gelu", "patch_size": 6, "num_hidden_layers": 1}, 7),
  ({"hidden_size": 18, "num_attention_heads": 3, "hidden_act": "gelu", "intermediate_size": 37},
   {"num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 8}, 7),
])
def test_clip_towers_equal_torch(text, vision, eos_id):
  config = transformers.CLIPConfig(
    text_config={
      **_TOWER, "vocab_size": 61, "max_position_embeddings": 16, "eos_token_id": eos_id,
      "bos_token_id": 1, "pad_token_id": 1, **text,
    },
    vision_config={**_TOWER, "image_size": 12, "patch_size": 4, **vision}, projection_dim=10,
    attn_implementation="eager",
  )
  torch.manual_seed(0)
  peer = randomise(transformers.CLIPModel(config))
  family = families.by_name("clip")
  ours = family.read_config(families.ConfigReader(config.to_dict(), "config.json"))
  params = importing.load_params(DictSource(peer), family, ours)
  rng = np.random.default_rng(0)
  tokens = rng.integers(8, 60, (3, 9)).astype(np.int32)
  last = 60 if eos_id == 2 else eos_id
  tokens[0, 4:], tokens[1, 8], tokens[2, 2] = last, last, last
  size = config.vision_config.image_size
  images = rng.normal(size=(3, size, size, 3)).astype(np.float32)
  want = peer(
    input_ids=torch.tensor(tokens.astype(np.int64)),
    pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)), return_loss=True,
    output_hidden_states=True,
  )
  model = family.module(ours)

  def loss(params):
    logits = model.apply({"params": params}, tokens, images)
    own = jnp.arange(3)
    sides = [jax.nn.log_softmax(logits, axis)[own, own] for axis in (0, 1)]
    return -jnp.mean(jnp.stack(sides)), logits

  (got_loss, got), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  _close(got, want.logits_per_image, rtol=0, atol=2e-5)
  assert float(got_loss) == pytest.approx(float(want.loss.detach()), rel=1e-5)
  for features, theirs in (
    (model.apply({"params": params}, tokens, method="text_features"), want.text_embeds),
    (model.apply({"params": params}, images, method="image_features"), want.image_embeds),
  ):
    _close(features, theirs, rtol=0, atol=1e-5)
  states = Transformer(ours.text, with_unembedding=False).apply(
    {"params": params["text"]}, tokens, method="all_hidden"
  )
  theirs = want.text_model_output
  for state, wanted in zip(states[:-1], theirs.hidden_states[:-1], strict=True):
    _close(state, wanted, rtol=0, atol=2e-5)
  _close(states[-1], theirs.last_hidden_state, rtol=0, atol=2e-5)
  _close(
    VisionTransformer(ours.vision).apply({"params": params["vision"]}, images),
    want.vision_model_output.last_hidden_state, rtol=0, atol=2e-5,
  )
  want.loss.backward()
  _check_gradients(peer, family.rules(ours), grads)


def _check_gradients(peer, rules, grads):
  """Gradients go through the table in the direction of export, tensor by tensor."""
  leaves = {
    importing.joined(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
  }
  theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
  floor = 1e-3 * max(float(g.abs().max()) for g in theirs.values())
  checked = set()
  for rule in rules:
    own = [leaves[path] for path in rule.ours]
    for i, name in enumerate(rule.names(own[0].shape[0] if rule.of_layers else 0)):
      want = theirs[name].numpy()
      got = rule.join([leaf[i] for leaf in own] if rule.of_layers else own)
      scale = np.abs(want).max() + floor  # of a key's bias the exact gradient is 0
      np.testing.assert_allclose(got / scale, want / scale, atol=1e-4, err_msg=name)
      checked.add(name)
  assert checked == theirs.keys()


def test_a_misfit_lists_both_sides_by_name_and_shape():
  peer = make("llama", 0)
  family = families.by_name("llama")
  config = family.read_config(families.ConfigReader(peer.config.to_dict(), "config.json"))
  source = DictSource(peer)
  source.tensors["model.norm.scale"] = source.tensors.pop("model.norm.weight")
  source.tensors["model.embed_tokens.weight"] = np.zeros((60, 24), np.float32)
  with pytest.raises(ValueError) as error:
    importing.load_params(source, family, config)
  for part in (
    "it lacks model.norm.weight [24]", "model.embed_tokens.weight is [60, 24] and should be [61, 2",
    "no place for its model.norm.scale [24]",
  ):
    assert part in str(error.value), error.value
