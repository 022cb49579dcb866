"""Logits, losses and gradients of small random models equal those of Hugging Face in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
