"""BERT and RoBERTa (arXiv:1810.04805, 1907.11692): encoders that norm after each part."""

import functools

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families.family import ConfigReader, Family, written_activation
from lmops_jax.pretrained.rules import Rule, attention_rules, linear, mlp_rules, norm_rules, same


def _read(r: ConfigReader, offset: int) -> TransformerConfig:
  r.refuse("position_embedding_type", "absolute")
  r.refuse("is_decoder", False)
  r.refuse("add_cross_attention", False)
  if offset:
    r.refuse("pad_token_id", offset - 1)  # the first position is the row after the padding's
  return TransformerConfig(
    vocab_size=r.need("vocab_size"), num_layers=r.need("num_hidden_layers"),
    width=r.need("hidden_size"), num_heads=r.need("num_attention_heads"),
    mlp_width=r.need("intermediate_size"),
    max_length=r.need("max_position_embeddings") - offset,
    tied_embeddings=r.get("tie_word_embeddings", True), norm_eps=r.get("layer_norm_eps", 1e-12),
    norm="layer", norm_placement="post", final_norm=False, positions="learned",
    position_offset=offset, activation=r.activation("hidden_act", "gelu"), gated_mlp=False,
    qkv_bias=True, out_bias=True, mlp_bias=True, embedding_norm=True,
    num_token_types=r.get("type_vocab_size", 2), causal=False, unembedding_bias=True,
    head_transform=True, pooler=True,
  )


def _write(c: TransformerConfig) -> dict:
  return {
    "vocab_size": c.vocab_size, "num_hidden_layers": c.num_layers, "hidden_size": c.width,
    "num_attention_heads": c.num_heads, "intermediate_size": c.mlp_width,
    "max_position_embeddings": c.max_length + c.position_offset,
    "tie_word_embeddings": c.tied_embeddings, "layer_norm_eps": c.norm_eps,
    "hidden_act": written_activation(c.activation), "type_vocab_size": c.num_token_types,
    "pad_token_id": max(c.position_offset - 1, 0),
  }


def _rules(c: TransformerConfig, prefix: str, transform: str, norm: str, head: str) -> list[Rule]:
  embeddings, layer = f"{prefix}embeddings", prefix + "encoder.layer.{i}"
  attention = f"{layer}.attention"
  width = (c.width,)
  rules = [
    same(f"{embeddings}.word_embeddings.weight", "embedding"),
    same(f"{embeddings}.position_embeddings.weight", "position_embedding"),
    *norm_rules(c, f"{embeddings}.LayerNorm", "embedding_norm"),
    *attention_rules(
      c, *(f"{attention}.self.{part}" for part in ("query", "key", "value")),
      f"{attention}.output.dense",
    ),
    *norm_rules(c, f"{attention}.output.LayerNorm", "layers/attention_norm"),
    *mlp_rules(c, f"{layer}.intermediate.dense", f"{layer}.output.dense"),
    *norm_rules(c, f"{layer}.output.LayerNorm", "layers/mlp_norm"),
  ]
  if c.num_token_types:
    rules.append(same(f"{embeddings}.token_type_embeddings.weight", "token_type_embedding"))
  if c.pooler:
    rules.append(linear(f"{prefix}pooler.dense.weight", "pooler/kernel", width, width))
    rules.append(same(f"{prefix}pooler.dense.bias", "pooler/bias"))
  if c.head_transform:
    rules.append(linear(f"{transform}.weight", "head_transform/kernel", width, width))
    rules.append(same(f"{transform}.bias", "head_transform/bias"))
    rules += norm_rules(c, norm, "head_norm")
    if c.tied_embeddings:
      rules.append(same(f"{head}.bias", "unembedding_bias"))
    else:  # an untied head has its own bias too, and an unused one beside it
      rules.append(same(f"{head}.decoder.bias", "unembedding_bias"))
      rules.append(linear(f"{head}.decoder.weight", "unembedding", width, (c.vocab_size,)))
  return rules


BERT = Family(
  name="bert", architecture="BertForMaskedLM", prefix="bert.",
  read_config=functools.partial(_read, offset=0), write_config=_write,
  rules=functools.partial(
    _rules, prefix="bert.", transform="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm", head="cls.predictions",
  ),
  tied=("cls.predictions.decoder.weight",), head=(r"cls\.predictions\.",),
  ignored=(
    r"embeddings\.position_ids", r"cls\.seq_relationship\..*",
    r"cls\.predictions\.(decoder\.)?bias",
  ),
)
ROBERTA = Family(
  name="roberta", architecture="RobertaForMaskedLM", prefix="roberta.",
  read_config=functools.partial(_read, offset=2), write_config=_write,
  rules=functools.partial(
    _rules, prefix="roberta.", transform="lm_head.dense", norm="lm_head.layer_norm",
    head="lm_head",
  ),
  tied=("lm_head.decoder.weight",),
  ignored=(r"embeddings\.position_ids", r"lm_head\.(decoder\.)?bias"),
)
