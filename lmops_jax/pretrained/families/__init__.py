"""One table a family of published models: its configuration and the names of its tensors.

`FAMILIES` is what import and export look a model up in.
"""

from lmops_jax.pretrained.families import bert, bloom, clip, gpt2, gptj, llama, opt, xglm
from lmops_jax.pretrained.families.family import ConfigReader, Family

FAMILIES: tuple[Family, ...] = (
  gpt2.FAMILY, opt.FAMILY, xglm.FAMILY, bloom.FAMILY, gptj.FAMILY, llama.LLAMA, llama.MISTRAL,
  llama.QWEN2, bert.BERT, bert.ROBERTA, clip.FAMILY,
)

__all__ = ["FAMILIES", "ConfigReader", "Family", "by_name", "find"]


def by_name(name: str) -> Family:
  """The family called `name`, for example "llama"."""
  return next(family for family in FAMILIES if family.name == name)


def find(config: dict, where: str) -> Family:
  """The family of a `config.json`, by its `model_type`.

  Raises:
    ValueError: there is none; the sentence lists those that there are.
  """
  kind = config.get("model_type")
  for family in FAMILIES:
    if family.name == kind:
      return family
  architectures = ", ".join(config.get("architectures") or ()) or "no architecture"
  raise ValueError(
    f"{where} has model_type {kind!r} ({architectures}), which lmops_jax cannot read; the families "
    f"that it can read are {', '.join(family.name for family in FAMILIES)}."
  )
