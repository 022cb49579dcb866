"""Logits, losses and gradients of small random models equal those of Hugging Face in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.config import RopeScaling
from lmops_jax.models.positions import rotary_angles, rotary_frequencies
from lmops_jax.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")

CONFIG = TransformerConfig(
  vocab_size=61, num_layers=3, width=24, num_heads=4, num_kv_heads=2, mlp_width=40, max_length=64,
  rope_base=500.0, norm_eps=1e-4,
)


def _torch_model(kind, config):
  torch.manual_seed(0)
  family = {"mistral": transformers.MistralConfig, "llama": transformers.LlamaConfig}[kind]
  options = {"sliding_window": None} if kind == "mistral" else {}
  hf = family(
    vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads, num_key_value_heads=config.key_heads,
    intermediate_size=config.mlp_width, max_position_embeddings=config.max_length,
    rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied_embeddings,
    rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
    initializer_range=0.1, attn_implementation="eager", **options,
  )
  model = transformers.AutoModelForCausalLM.from_config(hf).float().eval()
  with torch.no_grad():  # a scale of one would hide a scale in the wrong place
    for name, parameter in model.named_parameters():
      if "norm" in name:
        parameter.uniform_(0.5, 1.5)
  return model


def _params(state, config):
  """The same weights in this library's tree; torch keeps matrices output first."""
  state = {name: np.asarray(tensor.detach()) for name, tensor in state.items()}
  d, h, k, e = config.width, config.num_heads, config.key_heads, config.head_width

  def stack(name, convert):
    return np.stack([
      convert(state[f"model.layers.{i}.{name}.weight"]) for i in range(config.num_layers)
    ])

  def linear(name, *shape):
    return {"kernel": stack(name, lambda w: w.T.reshape(shape))}

  params = {
    "embedding": state["model.embed_tokens.weight"],
    "final_norm": {"scale": state["model.norm.weight"]},
    "layers": {
      "attention_norm": {"scale": stack("input_layernorm", np.asarray)},
      "mlp_norm": {"scale": stack("post_attention_layernorm", np.asarray)},
      "attention": {
        "query": linear("self_attn.q_proj", d, h, e),
        "key": linear("self_attn.k_proj", d, k, e),
        "value": linear("self_attn.v_proj", d, k, e),
        "out": linear("self_attn.o_proj", h, e, d),
      },
      "mlp": {
        "gate": linear("mlp.gate_proj", d, -1),
        "up": linear("mlp.up_proj", d, -1),
        "down": linear("mlp.down_proj", -1, d),
      },
    },
  }
  if not config.tied_embeddings:
    params["unembedding"] = state["lm_head.weight"].T
  return params


@pytest.mark.parametrize("kind,tied", [("mistral", False), ("llama", True)])
def test_logits_and_gradients_equal_torch(kind, tied):
  config = dataclasses.replace(CONFIG, tied_embeddings=tied)
  peer = _torch_model(kind, config)
  params = _params(peer.state_dict(), config)
  tokens = np.random.default_rng(0).integers(0, 61, (3, 17))

  logits = peer(torch.tensor(tokens)).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten()
  )
  loss.backward()
  want_grads = _params({name: p.grad for name, p in peer.named_parameters()}, config)

  def value(params):
    logits = Transformer(config).apply({"params": params}, jnp.asarray(tokens), method="logits")
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)), logits

  (got_loss, got_logits), got_grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
  np.testing.assert_allclose(got_logits, logits.detach(), rtol=1e-4, atol=2e-5)
  assert float(got_loss) == pytest.approx(float(loss.detach()), rel=1e-5)
  assert jax.tree.structure(got_grads) == jax.tree.structure(want_grads)
  for (path, got), want in zip(
    jax.tree_util.tree_leaves_with_path(got_grads), jax.tree.leaves(want_grads), strict=True
  ):
    np.testing.assert_allclose(
      got, want, rtol=1e-3, atol=2e-6, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize("scaling,theirs", [
  (RopeScaling("linear", 4.0), {"factor": 4.0}),
  (RopeScaling("dynamic", 4.0, original_max_length=64), {"factor": 4.0}),
  (RopeScaling("llama3", 8.0, original_max_length=16), {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16}),
  (RopeScaling("yarn", 4.0, original_max_length=16),
   {"factor": 4.0, "original_max_position_embeddings": 16}),
  (RopeScaling("yarn", 16.0, original_max_length=64, beta_fast=9.0, beta_slow=0.3, truncate=False,
               attention_factor=0.7), {
    "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 9.0, "beta_slow": 0.3,
    "truncate": False, "attention_factor": 0.7}),
  (RopeScaling("yarn", 1.0, original_max_length=4096),
   {"factor": 1.0, "original_max_position_embeddings": 4096}),
  (RopeScaling("factors", factors=tuple(range(1, 13)), attention_factor=1.5), {
    "rope_type": "longrope", "factor": 1.0, "short_factor": list(range(1, 13)),
    "long_factor": list(range(1, 13)), "original_max_position_embeddings": 16,
    "attention_factor": 1.5}),
])
def test_stretched_frequencies_equal_torch(scaling, theirs):
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  rope = {"rope_type": scaling.kind, "rope_theta": 500.0, **theirs}
  config = transformers.LlamaConfig(
    hidden_size=24, num_attention_heads=1, max_position_embeddings=64, rope_parameters=rope
  )
  want, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
  got = rotary_frequencies(24, 500.0, scaling)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert scaling.amplitude == pytest.approx(amplitude)
  cos, sin = rotary_angles(np.array([[3]], np.int32), got, scaling.amplitude)
  np.testing.assert_allclose(cos[0, 0, 0], np.cos(3 * np.asarray(want)) * amplitude, atol=1e-6)
  np.testing.assert_allclose(sin[0, 0, 0], np.sin(3 * np.asarray(want)) * amplitude, atol=1e-6)


@pytest.mark.parametrize("fields,message", [
  ({"kind": "su"}, "kind='su' must be 'linear', 'dynamic', 'llama3', 'yarn' or 'fac"),
  ({"factor": 0.5}, "factor=0.5 must be a number of at least 1"),
  ({"factor": float("nan")}, "factor=nan must be a number of at least 1"),
  ({"kind": "yarn", "beta_slow": 40.0}, "beta_slow=40.0 and beta_fast=32.0"),
  ({"attention_factor": 0.0}, "attention_factor=0.0 must be a number above 0"),
  ({"kind": "factors"}, "factors belong to kind='factors'"),
  ({"factors": (2.0,)}, "factors belong to kind='factors'"),
  ({"kind": "factors", "factors": (2.0, 0.0)}, r"factors\[1\]=0.0 must be a number above 0"),
  ({"original_max_length": 0}, "original_max_length=0 must be an integer of at least 1"),
])
def test_stretches_that_are_none_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    RopeScaling(**fields)


@pytest.mark.parametrize("fields,message", [
  ({"rope_scaling": RopeScaling("factors", factors=[1.0, 2.0])}, "2 factors for the 3 pairs"),
  ({"rope_scaling": RopeScaling("dynamic", 2.0, original_max_length=32)}, "max_length=64 exceeds"),
  ({"rope_scaling": RopeScaling("yarn", 2.0), "rope_base": 1.0}, "rope_base=1.0 must exceed 1"),
])
def test_a_stretch_must_fit_its_model(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **fields)
