"""One table a family of published models: its configuration and the names of its tensors.

Import and export look a model up in `FAMILIES`.
"""

from collections.abc import Iterable

from lmops_jax.host.foreign_files import checked
from lmops_jax.pretrained.families import (
  bert,
  bloom,
  clip,
  electra,
  gpt2,
  gptj,
  kosmos2,
  llama,
  opt,
  xglm,
)
from lmops_jax.pretrained.families.family import ConfigReader, Family
from lmops_jax.pretrained.families.published import AnyModel

FAMILIES: tuple[Family, ...] = (
  gpt2.FAMILY, opt.FAMILY, xglm.FAMILY, bloom.FAMILY, gptj.FAMILY, llama.LLAMA, llama.MISTRAL,
  llama.QWEN2, bert.BERT, bert.ROBERTA, electra.FAMILY, clip.FAMILY, kosmos2.FAMILY,
)

__all__ = ["FAMILIES", "ConfigReader", "Family", "by_name", "find", "matching", "of_originals"]


def by_name(name: str) -> Family:
  """The family called `name`, for example "llama"."""
  return next(family for family in FAMILIES if family.name == name)


def matching(config) -> Family | None:
  """A family whose `config.json` says all that `config` does; Llama's is tried first.

  How the model runs or starts is left aside, and momentum attention (see `explicit`). A
  configuration of a class that only one family has is that family's, whatever its file can say.
  """
  own = [family for family in FAMILIES if family.config is type(config)]
  if len(own) == 1:
    return own[0]
  for family in sorted(own, key=lambda family: family is not llama.LLAMA):
    try:
      written = {**family.write_config(config), "model_type": family.name}
      read = family.read_config(ConfigReader(written, "config.json"))
    except (ValueError, AttributeError):  # parts that it cannot say
      continue
    if family.explicit(read) == family.explicit(config):
      return family
  return None


def of_originals(names: Iterable[str]) -> Family | None:
  """The family whose authors' own names tensors have; None for published names."""
  names = list(names)
  for family in FAMILIES:
    if any(family.published_name(name) != name for name in names):
      return family
  return None


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
