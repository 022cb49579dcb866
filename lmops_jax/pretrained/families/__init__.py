"""One table a family of published models: its configuration and the names of its tensors.

Import and export look a model up in `FAMILIES`.
"""

import dataclasses

from lmops_jax.host.foreign_files import checked
from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.families import bert, bloom, clip, gpt2, gptj, llama, opt, xglm
from lmops_jax.pretrained.families.family import PLAIN, ConfigReader, Family
from lmops_jax.pretrained.families.published import AnyModel

FAMILIES: tuple[Family, ...] = (
  gpt2.FAMILY, opt.FAMILY, xglm.FAMILY, bloom.FAMILY, gptj.FAMILY, llama.LLAMA, llama.MISTRAL,
  llama.QWEN2, bert.BERT, bert.ROBERTA, clip.FAMILY,
)

__all__ = ["FAMILIES", "ConfigReader", "Family", "by_name", "explicit", "find", "matching"]


def by_name(name: str) -> Family:
  """The family called `name`, for example "llama"."""
  return next(family for family in FAMILIES if family.name == name)


def matching(config: TransformerConfig) -> Family | None:
  """A family whose `config.json` says all that `config` does; Llama's is tried first.

  Momentum attention is left aside: it has no tensors, and an export refuses it.
  """
  wanted = explicit(config)
  for family in sorted(FAMILIES, key=lambda family: family is not llama.LLAMA):
    try:
      written = {**family.write_config(config), "model_type": family.name}
      read = family.read_config(ConfigReader(written, "config.json"))
    except (ValueError, AttributeError):  # parts that it cannot say
      continue
    if isinstance(read, TransformerConfig) and explicit(read) == wanted:
      return family
  return None


def explicit(config: TransformerConfig) -> TransformerConfig:
  """The same model, with every width written out and no choice of how it runs."""
  scaling = config.rope_scaling
  if scaling is not None:
    scaling = dataclasses.replace(scaling, attention_factor=scaling.amplitude)
  return dataclasses.replace(
    config, **PLAIN, attention_chunk=1, num_kv_heads=config.key_heads, head_dim=config.head_width,
    embedding_width=config.token_width, momentum=None,
    rotary_dim=config.rotary_width if config.positions == "rotary" else None,
    rope_scaling=scaling, max_length=llama.stretched_length(config.max_length, config.rope_scaling),
  )


def find(config: dict, where: str) -> Family:
  """The family of a `config.json`, by its `model_type`.

  Raises:
    ValueError: if there is none; the sentence lists the known families.
  """
  kind = config.get("model_type")
  for family in FAMILIES:
    if family.name == kind:
      return family
  architectures = ", ".join(checked(AnyModel, config, where).architectures or ())
  architectures = architectures or "no architecture"
  raise ValueError(
    f"{where} has model_type {kind!r} ({architectures}), which lmops_jax cannot read; the families "
    f"that it can read are {', '.join(family.name for family in FAMILIES)}."
  )
