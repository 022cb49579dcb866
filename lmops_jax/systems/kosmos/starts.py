"""What training starts from: a model folder of an earlier run, or CLIP's tower.

Only configurations are read to tell whether a model fits; weights are read when training begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import jax
import numpy as np

from lmops_jax.models.docked import DockedConfig, DockedLM
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.stacks import with_top
from lmops_jax.models.vision import VisionConfig
from lmops_jax.pretrained import importing
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.families import by_name
from lmops_jax.training import loop

_EMBEDDING = "text/embedding"
_SHOWN = {
  "trunk": ("num_layers", "width", "num_heads", "mlp_width", "activation", "norm_eps"),
  "vision": ("image_size", "patch_size"),
}


def check_clip(path: str | PathLike, vision: VisionConfig) -> None:
  """Raises ValueError unless the folder holds a CLIP model whose tower has these sizes."""
  found = model_lib.load(path)
  if found.family != "clip":
    raise ValueError(
      f"kosmos.Pretrain.clip={str(path)!r} is a model of the family {found.family!r}; give a CLIP "
      "model, both towers in one folder."
    )
  theirs = found.config.vision
  for part, names in _SHOWN.items():
    for name in names:
      ours, other = (
        getattr(config.trunk if part == "trunk" else config, name) for config in (vision, theirs))
      if ours != other:
        place = "VisionConfig" if part == "vision" else "VisionConfig.trunk"
        raise ValueError(
          f"the CLIP model in kosmos.Pretrain.clip={str(path)!r} has {name}={other} and models."
          f"{place} has {ours}; give both the same."
        )


def clip_tower(path: str | PathLike, vision: VisionConfig) -> Any:
  """The tower of a CLIP model, with the top layers that are trained in a stack apart."""
  found = model_lib.load(path).params(None)["vision"]
  return with_top(found, vision.top_layers) if vision.top_layers else found


def check_folder(path: str | PathLike, model: DockedConfig, num_added: int = 0) -> None:
  """Raises ValueError unless the folder holds a docked model with parameters of these shapes.

  Args:
    num_added: words at the vocabulary's end that the folder's model may lack, all of them, as
      Kosmos-1 lacks those for boxes.
  """
  found = model_lib.load(path)
  family = by_name(found.family)
  if family.config is not DockedConfig:
    raise ValueError(
      f"kosmos.Pretrain.start={str(path)!r} is a model of the family {found.family!r}; give the "
      "folder of a docked model, such as the stage train of an earlier run."
    )
  theirs, ours = (
    dict(_shapes(unboxed(importing.abstract_params(family, config))))
    for config in (found.config, model))
  num_words, *width = ours[_EMBEDDING]
  for name in sorted({*theirs, *ours}):
    lacks_words = name == _EMBEDDING and theirs.get(name) == (num_words - num_added, *width)
    if theirs.get(name) != ours.get(name) and not lacks_words:
      there, here = (shapes.get(name, "missing") for shapes in (theirs, ours))
      raise ValueError(
        f"the parameter {name} is {there} in kosmos.Pretrain.start={str(path)!r} and {here} in "
        "kosmos.Pretrain.model; take the settings and the vocabulary that it was trained with."
      )


def folder_params(path: str | PathLike, model: DockedLM, seed: int) -> Any:
  """All parameters of a model folder; those of words that it lacks are drawn.

  Args:
    model: what is trained. seed: of its initialisation.
  """
  params = model_lib.load(path).params(None)
  found = params["text"]["embedding"]
  if len(found) == model.config.vocab_size:
    return params
  initial = loop.initializer(model)
  drawn = jax.jit(lambda key: unboxed(initial(key))["text"]["embedding"])(jax.random.key(seed))
  grown = np.concatenate([found, np.asarray(drawn)[len(found):]])
  return {**params, "text": {**params["text"], "embedding": grown}}


def _shapes(tree: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _shapes(value, f"{front}{name}/")
    else:
      yield f"{front}{name}", tuple(value.shape)
