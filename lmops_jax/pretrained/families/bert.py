"""BERT and RoBERTa (arXiv:1810.04805, 1907.11692): encoders that norm after each part."""

import functools
from typing import Any

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families import published
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes, written_activation
from lmops_jax.pretrained.rules import Rule, attention_rules, linear, mlp_rules, norm_rules, same


def _read(r: ConfigReader, schema: type[published.Bert], offset: int) -> TransformerConfig:
  return body(
    r, r.read(schema), offset, head_transform=True, unembedding_bias=True, pooler=True)


def body(r: ConfigReader, p: published.Bert, offset: int = 0, **parts: Any) -> TransformerConfig:
  """The blocks of a BERT.

  Args:
    p: what the file says.
    offset: rows of the position table in front of position 0.
    parts: what is added or otherwise.

  Raises:
    ValueError: the file's position table has no more rows than that.
  """
  if p.max_position_embeddings <= offset:
    raise r.error(f"max_position_embeddings={p.max_position_embeddings}, of which the first "
                  f"{offset} are no positions; it should be more.")
  return TransformerConfig(
    vocab_size=p.vocab_size, num_layers=p.num_hidden_layers, width=p.hidden_size,
    num_heads=p.num_attention_heads, mlp_width=p.intermediate_size,
    max_length=p.max_position_embeddings - offset, tied_embeddings=p.tie_word_embeddings,
    norm_eps=p.layer_norm_eps, norm="layer", norm_placement="post", final_norm=False,
    positions="learned", position_offset=offset,
    activation=r.activation("hidden_act", p.hidden_act), gated_mlp=False, qkv_bias=True,
    out_bias=True, mlp_bias=True, embedding_norm=True, num_token_types=p.type_vocab_size,
    causal=False, **parts,
  )


def write(c: TransformerConfig) -> dict[str, Any]:
  """The fields of `config.json` that `body` reads."""
  return {
    "vocab_size": c.vocab_size, "num_hidden_layers": c.num_layers, "hidden_size": c.width,
    "num_attention_heads": c.num_heads, "intermediate_size": c.mlp_width,
    "max_position_embeddings": c.max_length + c.position_offset,
    "tie_word_embeddings": c.tied_embeddings, "layer_norm_eps": c.norm_eps,
    "hidden_act": written_activation(c.activation), "type_vocab_size": c.num_token_types,
    "pad_token_id": max(c.position_offset - 1, 0),
  }


def sizes(c: TransformerConfig, **axes: int) -> tuple[Sizes, ...]:
  """What a file declares: what all have, and `axes`."""
  return Sizes("num_hidden_layers", c.num_layers, {
    "hidden_size": c.width, "vocab_size": c.vocab_size, "intermediate_size": c.mlp_width,
    "max_position_embeddings": c.max_length + c.position_offset,
    "type_vocab_size": c.num_token_types, **axes,
  }),


def body_rules(c: TransformerConfig, prefix: str) -> list[Rule]:
  """The tensors of embeddings, blocks and pooler."""
  embeddings, layer = f"{prefix}embeddings", prefix + "encoder.layer.{i}"
  attention = f"{layer}.attention"
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
    rules += biased(f"{prefix}pooler.dense", "pooler", c.width, c.width)
  return rules


def biased(theirs: str, ours: str, inputs: int, outputs: int) -> list[Rule]:
  """A torch matrix and its bias, given by name without `.weight`."""
  return [
    linear(f"{theirs}.weight", f"{ours}/kernel", (inputs,), (outputs,)),
    same(f"{theirs}.bias", f"{ours}/bias"),
  ]


def _rules(c: TransformerConfig, prefix: str, transform: str, norm: str, head: str) -> list[Rule]:
  rules = body_rules(c, prefix)
  if c.head_transform:
    rules += biased(transform, "head_transform", c.width, c.width)
    rules += norm_rules(c, norm, "head_norm")
    if c.tied_embeddings:
      rules.append(same(f"{head}.bias", "unembedding_bias"))
    else:  # an untied head has its own bias too, and an unused one beside it
      rules.append(same(f"{head}.decoder.bias", "unembedding_bias"))
      rules.append(linear(f"{head}.decoder.weight", "unembedding", (c.width,), (c.vocab_size,)))
  return rules


BERT = Family(
  name="bert", architecture="BertForMaskedLM", prefix="bert.",
  schema=published.Bert, read_config=functools.partial(_read, schema=published.Bert, offset=0),
  write_config=write,
  rules=functools.partial(
    _rules, prefix="bert.", transform="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm", head="cls.predictions",
  ),
  sizes=sizes,
  tied={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
  same={"cls.predictions.decoder.bias": "cls.predictions.bias"}, head=(r"cls\.predictions\.",),
  ignored=(
    r"embeddings\.position_ids", r"cls\.seq_relationship\..*",
    r"cls\.predictions\.(decoder\.)?bias",
  ),
)
ROBERTA = Family(
  name="roberta", architecture="RobertaForMaskedLM", prefix="roberta.",
  schema=published.Roberta,
  read_config=functools.partial(_read, schema=published.Roberta, offset=2), write_config=write,
  rules=functools.partial(
    _rules, prefix="roberta.", transform="lm_head.dense", norm="lm_head.layer_norm",
    head="lm_head",
  ),
  sizes=sizes, tied={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
  same={"lm_head.decoder.bias": "lm_head.bias"},
  ignored=(r"embeddings\.position_ids", r"lm_head\.(decoder\.)?bias"),
)
