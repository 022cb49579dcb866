"""ELECTRA (arXiv:2003.10555): BERTs with narrow embeddings, as generator and as discriminator.

A generator predicts masked tokens (`ElectraForMaskedLM`); a discriminator tells which tokens were
replaced (`ElectraForPreTraining`). `architectures` says which head a folder has; without it, the
heads that are stored count.
"""

from __future__ import annotations

from typing import Any

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families import bert, published
from lmops_jax.pretrained.families.family import ConfigReader, Family, Sizes
from lmops_jax.pretrained.rules import Rule, norm_rules, unembedding_rules

_PREFIX, _GENERATOR = "electra.", "ElectraForMaskedLM"
_DISCRIMINATOR, _BODY = "ElectraForPreTraining", "ElectraModel"


def _read(r: ConfigReader) -> TransformerConfig:
  p = r.read(published.Electra)
  is_narrow = p.embedding_size != p.hidden_size
  heads = p.architectures or (_GENERATOR, _DISCRIMINATOR)
  predicts = _GENERATOR in heads
  if predicts and r.activation("hidden_act", p.hidden_act) != "gelu":
    raise r.error(
      f"hidden_act={p.hidden_act!r}, of a generator, whose head has gelu all the same; the two "
      "are modelled as one."
    )
  return bert.body(
    r, p, embedding_width=p.embedding_size if is_narrow else None, narrow_embeddings=is_narrow,
    head_transform=predicts, unembedding_bias=predicts, detector=_DISCRIMINATOR in heads,
  )


def _write(c: TransformerConfig) -> dict[str, Any]:
  return {
    **bert.write(c), "embedding_size": c.token_width,
    "architectures": [
      _GENERATOR if c.head_transform else _DISCRIMINATOR if c.detector else _BODY],
  }


def _sizes(c: TransformerConfig) -> tuple[Sizes, ...]:
  return bert.sizes(c, embedding_size=c.token_width)


def _rules(c: TransformerConfig) -> list[Rule]:
  rules, head = bert.body_rules(c, _PREFIX), "generator_predictions"
  if c.token_width != c.width:
    rules += bert.biased(f"{_PREFIX}embeddings_project", "embedding_in", c.token_width, c.width)
  if c.head_transform:
    rules += bert.biased(f"{head}.dense", "head_transform", c.width, c.token_width)
    rules += norm_rules(c, f"{head}.LayerNorm", "head_norm")
    rules += unembedding_rules(c, "generator_lm_head")
  if c.detector:
    detector = "discriminator_predictions"
    rules += bert.biased(f"{detector}.dense", "detector/transform", c.width, c.width)
    rules += bert.biased(f"{detector}.dense_prediction", "detector/out", c.width, 1)
  return rules


FAMILY = Family(
  name="electra", architecture=_DISCRIMINATOR, prefix=_PREFIX, schema=published.Electra,
  read_config=_read, write_config=_write, rules=_rules, sizes=_sizes,
  tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
  head=(r"generator_(predictions|lm_head)\.",), ignored=(r"embeddings\.position_ids",),
)
