"""Parameters to a folder that transformers loads unchanged.

It holds config.json, safetensors, the tokenizer, and, of a model that sees, how pictures become
pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.host.whole_files import filled_folder
from lmops_jax.host.words import listed
from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained import families, importing
from lmops_jax.pretrained.families.family import ConfigReader, Family
from lmops_jax.pretrained.model import IMAGES, PretrainedModel, copy_tokenizer
from lmops_jax.pretrained.sources import write_safetensors

MAX_SHARD_BYTES = 5_000_000_000
_MAX_LISTED = 6


def export(
  directory: Path | str,
  source: PretrainedModel,
  params=None,
  *,
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a model folder for transformers; it becomes visible when it is complete.

  A model that was imported and is exported in its stored dtype is the same bit for bit.

  Args:
    directory: must not exist yet, or be empty.
    source: the model; its family's table and its original `config.json` are used.
    params: tree like `source.params()`; None reads those.
    dtype: the dtype of the tensors; None is that of the parameters.
    max_shard_bytes: the size of the largest file.

  Raises:
    ValueError: if `directory` holds something already, the dtype does not exist, or transformers
      does not have the model.
  """
  check_can_write(dtype)
  family = families.by_name(source.family)
  momentum = family.text(source.config).momentum
  if momentum:
    raise ValueError(
      f"{source.path} has momentum attention (models.TransformerConfig.momentum={momentum}), which "
      "no model of transformers has; load it with lmops_jax."
    )
  with filled_folder(Path(directory)) as partial:
    params = source.params() if params is None else params
    stored = jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype)
    config = config_json(family, source, str(stored))
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(source, partial)
    pictures = preprocessor_json(source)
    if pictures and not (partial / IMAGES).exists():
      (partial / IMAGES).write_text(json.dumps(pictures, indent=2) + "\n", encoding="utf-8")
    write_safetensors(
      partial / "model.safetensors", tensors(family, source.config, params, stored),
      max_shard_bytes=max_shard_bytes,
    )


def check_can_write(dtype: str | None) -> None:
  """Raises ValueError for a dtype that does not exist, or in a job of several processes."""
  if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
    raise ValueError(f"dtype={dtype!r} is not one of float32, bfloat16, float16.")
  if jax.process_count() > 1:
    raise ValueError("A model is exported by one process; run lmops export outside of the job.")


def preprocessor_json(source: PretrainedModel) -> dict[str, Any] | None:
  """What transformers' image processor needs to make a model's pixels; None if it does not see."""
  settings = source.image_settings()
  if settings is None:
    return None
  vision = source.config.vision
  return {
    "image_processor_type": "CLIPImageProcessor", "processor_class": "Kosmos2Processor",
    "do_convert_rgb": True, "do_resize": True, "resample": 3,  # Pillow's bicubic
    "size": {"height": settings.height, "width": settings.width}, "do_center_crop": False,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": list(vision.pixel_mean), "image_std": list(vision.pixel_std),
  }


def config_json(family: Family, source: PretrainedModel, dtype: str) -> dict[str, Any]:
  """The published `config.json` if it still describes the model, else one written anew."""
  fields, written = dict(source.original), family.write_config(source.config)
  if not fields or not _describes(family, fields, source.config):
    for name in family.schema.superseding():
      fields.pop(name, None)
    fields |= {**written, "model_type": family.name}
    if unsaid := _unsaid(family, fields, source.config):
      raise ValueError(
        f"{source.path} has parts that no {family.name} model of transformers has "
        f"({listed(unsaid, _MAX_LISTED)}); load it with lmops_jax."
      )
  fields.pop("torch_dtype", None)
  architectures = (
    fields.get("architectures") or written.get("architectures") or [family.architecture])
  return {**fields, "architectures": architectures[:1], "dtype": dtype}


def _describes(family: Family, fields: dict[str, Any], config) -> bool:
  return not _unsaid(family, fields, config)


def _unsaid(family: Family, fields: dict[str, Any], config) -> list[str]:
  """What a model has that its `config.json` does not say, as `field=value`."""
  published = family.read_config(ConfigReader(fields, "config.json"))
  return _differences(_shape(family, config), _shape(family, published))


def _shape(family: Family, config):
  """A configuration without how it runs and which head its checkpoint happens to hold."""
  config = family.explicit(config)
  if family.config is not TransformerConfig:
    return config
  return dataclasses.replace(
    config, head_transform=False, unembedding_bias=False, pooler=False, detector=False,
    tied_embeddings=True)


def _differences(config, other, at: str = "") -> list[str]:
  """The fields of a configuration that another one has otherwise."""
  if config == other:
    return []
  if not dataclasses.is_dataclass(config) or type(config) is not type(other):
    return [f"{at}={config!r}"]
  return [
    difference for field in dataclasses.fields(config)
    for difference in _differences(
      getattr(config, field.name), getattr(other, field.name), f"{at}.{field.name}".lstrip("."))
  ]


def tensors(family: Family, config, params, dtype) -> Iterator[tuple]:
  """`(name, shape, dtype, make)` of every tensor of the checkpoint, in the family's order."""
  leaves = {
    importing.joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  for rule in family.rules(config):
    own = [leaves[path] for path in rule.ours]
    for i, name in enumerate(rule.names(own[0].shape[0] if own[0].ndim else 0)):
      shape = rule.shape
      if shape is None:
        shape = own[0].shape[1:] if rule.of_layers else own[0].shape
      make = functools.partial(_make, rule, own, i if rule.of_layers else None, dtype)
      yield name, tuple(shape), dtype, make


def _make(rule, leaves, layer, dtype) -> np.ndarray:
  own = [np.asarray(leaf if layer is None else leaf[layer]) for leaf in leaves]
  return np.asarray(rule.join(own), order="C").astype(dtype)
