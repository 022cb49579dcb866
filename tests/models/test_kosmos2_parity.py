"""A docked language model equals Hugging Face's port of Kosmos-2, at random weights.

Version 5.23 of transformers is the last whose generation numbers positions as the port always did;
forward passes, which are compared here, are the same in later ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.models.connectors import ResamplerConfig  # noqa: E402
from lmops_jax.models.docked import DockedConfig, DockedLM  # noqa: E402
from lmops_jax.models.stacks import with_top  # noqa: E402
from lmops_jax.models.transformer import TransformerConfig  # noqa: E402
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig  # noqa: E402
from lmops_jax.pretrained import families  # noqa: E402
from tests.pretrained import tiny_models  # noqa: E402

PARTS = dict(norm="layer", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True)
TEXT = TransformerConfig(
  vocab_size=71, num_layers=3, width=32, num_heads=4, mlp_width=48, max_length=64, **PARTS,
  activation="gelu", sub_norm=True, positions="sinusoidal", position_offset=2,
  embedding_scale=32**0.5, tied_embeddings=True)
TRUNK = TransformerConfig(
  num_layers=3, width=24, num_heads=3, mlp_width=40, max_length=64, **PARTS,
  activation="quick_gelu", positions="none", causal=False, final_norm=False)
CONFIG = DockedConfig(
  TEXT, VisionConfig(TRUNK, image_size=20, patch_size=5, any_size=True), ResamplerConfig(4))
PAD, SLOT = 1, 9
# Two images beside each other and one later; one; none. `I` is an image, `.` a word.
ROWS = ("..II...I..", ".I......", "......")


def _params(tensors):
  """The published tensors in this library's tree; every one is used."""
  tensors, tree, used = dict(tensors), {}, set()
  for rule in families.by_name("kosmos-2").rules(CONFIG):
    (path,) = rule.ours
    names = rule.names(3)
    used.update(names)
    arrays = [rule.split(np.asarray(tensors[name].detach()))[0] for name in names]
    *parents, leaf = path.split("/")
    node = functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)
    node[leaf] = np.stack(arrays) if rule.of_layers else arrays[0]
  assert used == tensors.keys() - {"text_model.lm_head.weight"}
  return tree


@pytest.fixture(scope="module")
def peer():
  return tiny_models.kosmos2()


@pytest.fixture(scope="module")
def params(peer):
  return _params(peer.state_dict())


def _batch(side="right"):
  """Tokens, which slots are images, and which positions are real; as the port takes them."""
  rng, width = np.random.default_rng(0), len(ROWS[0].replace("I", "IIII"))
  tokens, slots, real = (np.zeros((3, width), np.int64) for _ in range(3))
  for row, text in enumerate(ROWS):
    text = np.array(list(text.replace("I", "IIII")))
    place = slice(len(text)) if side == "right" else slice(width - len(text), None)
    slots[row, place], real[row, place] = text == "I", 1
    tokens[row] = PAD
    tokens[row, place] = np.where(text == "I", SLOT, rng.integers(10, 71, len(text)))
  return tokens, slots, real


def _inputs(side="right"):
  """The same as this library takes it."""
  tokens, slots, real = _batch(side)
  index = np.where(slots == 1, np.cumsum(slots, 1) - 1, -1)
  return dict(
    tokens=tokens.astype(np.int32), vector_index=index.astype(np.int32),
    positions=np.where(real == 1, np.cumsum(real, 1) - 1, -1).astype(np.int32),
    segment_ids=real.astype(np.int32))


def _images(height=20, width=20):
  rng = np.random.default_rng(1)
  return rng.normal(size=(4, height, width, NUM_CHANNELS)).astype(np.float32)


def _to_torch(images):
  return torch.tensor(images.transpose(0, 3, 1, 2))


def _row_vectors(vectors):
  """Vectors of the four images as rows have them: three, one, none."""
  flat = vectors.reshape(4, *vectors.shape[1:])
  nothing = jnp.zeros_like(flat[:1])
  rows = [flat[:3], [flat[3], *nothing, *nothing], [*nothing] * 3]
  return jnp.stack([jnp.concatenate([*row]) for row in rows])


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _apply(params, *args, config=CONFIG, method=None, **kwargs):
  return DockedLM(config).apply({"params": params}, *args, method=method, **kwargs)


def _tower(model, images):
  return model.vision(images), model.image_vectors(images)


@pytest.mark.parametrize("height, width", [
  (20, 20), (15, 40), pytest.param(10, 10, marks=pytest.mark.slow)])
def test_image_vectors_of_any_size_equal_torch(peer, params, height, width):
  images = _images(height, width)
  with torch.no_grad():
    out = peer.get_image_features(
      _to_torch(images), interpolate_pos_encoding=(height, width) != (20, 20), return_dict=True)
  states, vectors = _apply(params, images, method=_tower)
  np.testing.assert_allclose(states, out.last_hidden_state, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(vectors, out.pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_and_logits_of_ragged_rows_equal_torch(peer, params, side):
  tokens, slots, real = _batch(side)
  images = _images()
  with torch.no_grad():
    vectors = peer.get_image_features(_to_torch(images), return_dict=True).pooler_output
    shared = dict(input_ids=torch.tensor(tokens), image_embeds=vectors)
    embedded = peer.text_model.model.forward_embedding(
      img_input_mask=torch.tensor(slots), **shared)
    logits = peer(
      pixel_values=_to_torch(images), input_ids=shared["input_ids"],
      image_embeds_position_mask=torch.tensor(slots), attention_mask=torch.tensor(real),
      use_cache=False).logits

  def both(model, images, tokens, **where):
    vectors = _row_vectors(model.image_vectors(images))
    inputs = {key: where[key] for key in ("positions", "vector_index")}
    return (model.text.embed(tokens, vectors=vectors, **inputs),
            model.logits(tokens, vectors=vectors, **where))

  got_embedded, got_logits = _apply(params, images, **_inputs(side), method=both)
  is_real = real == 1
  np.testing.assert_allclose(got_embedded[is_real], embedded[is_real], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got_logits[is_real], logits[is_real], rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_text_without_images_equals_torch(peer, params):
  tokens = np.random.default_rng(3).integers(10, 71, (2, 12))
  with torch.no_grad():
    out = peer.text_model(
      input_ids=torch.tensor(tokens), use_cache=False, output_hidden_states=True)
  states, logits = _apply(
    params, tokens.astype(np.int32),
    method=lambda model, tokens: (model.text.all_hidden(tokens), model.logits(tokens)))
  for got, want in zip(states, out.hidden_states, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(logits, out.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_layers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_loss_and_gradients_equal_torch(peer, params, top_layers):
  """Of the whole model, also where the tower's last layer is a stack of its own."""
  tokens, slots, real = _batch()
  images = _images()
  scored = (real[:, 1:] == 1) & (slots[:, 1:] == 0)
  labels = np.where(scored, tokens[:, 1:], -100)
  peer.zero_grad()
  logits = peer(
    pixel_values=_to_torch(images), input_ids=torch.tensor(tokens),
    image_embeds_position_mask=torch.tensor(slots), attention_mask=torch.tensor(real),
    use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), torch.tensor(labels).flatten())
  loss.backward()
  want = _params({name: p.grad for name, p in peer.named_parameters()})

  vision = dataclasses.replace(CONFIG.vision, top_layers=top_layers)
  model = DockedLM(dataclasses.replace(CONFIG, vision=vision))
  if top_layers:
    params, want = (
      {**tree, "vision": with_top(tree["vision"], top_layers)} for tree in (params, want))
  inputs = _inputs()

  @jax.jit
  @jax.value_and_grad
  def value(params):
    vectors = model.apply({"params": params}, images, method="image_vectors")
    logits = model.apply(
      {"params": params}, **inputs, vectors=_row_vectors(vectors), method="logits")
    nats = -jnp.take_along_axis(
      jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=2)[..., 0]
    return jnp.sum(nats * scored) / scored.sum()

  got_loss, got = value(params)
  assert float(got_loss) == pytest.approx(float(loss.detach()), rel=1e-5)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))
