"""Stable Diffusion as diffusers keeps it: a folder with a folder for each part, in and out.

`model_index.json` names the class of each part: `unet`, `vae`, `text_encoder`, `tokenizer` and
`scheduler`. A safety checker and what belongs to it are left alone. Weights are safetensors or
PyTorch's `.bin`; where there are none, those of `.fp16.` files. All parts are compared with their
configurations before a weight is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmops_jax.host.foreign_files import checked, read_json, require_regular, shown
from lmops_jax.host.whole_files import filled_folder
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.diffusion.autoencoder import AutoencoderConfig
from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.models.diffusion.unet import UNetConfig
from lmops_jax.pretrained import exporting, importing
from lmops_jax.pretrained.families import clip, diffusion, published_diffusion
from lmops_jax.pretrained.families.family import ConfigReader, Family
from lmops_jax.pretrained.model import naming
from lmops_jax.pretrained.noise_schedules import noise_schedule
from lmops_jax.pretrained.sources import TensorSource, open_source, write_safetensors
from lmops_jax.text.tokenizer import Tokenizer, load_tokenizer

INDEX, CLASS = "model_index.json", "_class_name"
PIPELINE = "StableDiffusionPipeline"
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_SCHEDULER = "PNDMScheduler"  # Stable Diffusion's own, which knows both kinds of prediction
_SCHEDULERS = (  # whose files mean the same by betas
  _SCHEDULER, "DDIMScheduler", "DDPMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
  "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
  "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
  "DEISMultistepScheduler", "UniPCMultistepScheduler",
)
_EVERY_NAME = 1 << 20  # of tensors that do not fit


class Pipeline(NamedTuple):
  """The parts of Stable Diffusion.

  Attributes:
    unet, autoencoder, text: configurations; `text` is that of a `Transformer` without output
      matrix, whose final states at all positions are the UNet's context.
    params: the parameters of each, under these names.
    tokenizer: rows of it are padded with its `pad_id`, which the UNet sees.
    schedule: the noise.
  """

  unet: UNetConfig
  autoencoder: AutoencoderConfig
  text: TransformerConfig
  params: dict[str, Any]
  tokenizer: Tokenizer
  schedule: NoiseSchedule


class _Part(NamedTuple):
  """A part with weights: its folder, its name here, and how its files are called."""

  folder: str
  name: str
  family: Family
  library: str
  safetensors: str
  torch: str

  def files(self) -> list[str]:
    """Files that may hold its weights, those to be preferred first."""
    return [
      name for variant in ("", ".fp16") for name in (
        f"{self.safetensors}{variant}.safetensors",
        f"{self.safetensors}.safetensors.index{variant}.json",
        f"{self.torch}{variant}.bin", f"{self.torch}.bin.index{variant}.json")
    ]


_OF_DIFFUSERS = ("diffusers", "diffusion_pytorch_model", "diffusion_pytorch_model")
_PARTS = (
  _Part("unet", "unet", diffusion.UNET, *_OF_DIFFUSERS),
  _Part("vae", "autoencoder", diffusion.AUTOENCODER, *_OF_DIFFUSERS),
  _Part("text_encoder", "text", clip.TEXT, "transformers", "model", "pytorch_model"),
)


def load_pipeline(
  path: str | os.PathLike, *, dtype: str = "float32", param_dtype: str = "float32",
  attention: str = "chunked", remat: str = "none", partitioner=None,
) -> Pipeline:
  """Reads Stable Diffusion from a folder of diffusers.

  Args:
    path: the folder that holds `model_index.json`.
    dtype, param_dtype: of all three networks.
    attention, remat: of the UNet and the autoencoder.
    partitioner: a `mesh.meshes.Partitioner` whose mesh the parameters are placed on; None is this
      process's first device.

  Raises:
    ValueError: if a file is missing or damaged; if a part has another class, or a configuration
      that is not modelled; or if the parts, or weights and their configurations, do not fit. The
      last lists every tensor that is missing, left over or of another shape, of all parts.
  """
  folder = Path(path).expanduser()
  _check_classes(folder)
  own = dict(dtype=dtype, param_dtype=param_dtype)
  choices = {
    "unet": own | dict(attention=attention, remat=remat),
    "autoencoder": own | dict(attention=attention, remat=remat), "text": own,
  }
  configs = {
    part.name: part.family.with_choices(_config(folder / part.folder, part), **choices[part.name])
    for part in _PARTS
  }
  _check_together(folder, configs)
  schedule = _schedule(folder / "scheduler" / "scheduler_config.json")
  tokenizer = load_tokenizer(folder / "tokenizer")
  tokenizer.check_fits(configs["text"].vocab_size)
  fitting, faults = {}, []
  for part in _PARTS:
    config = configs[part.name]
    source = _Squeezed(open_source(folder / part.folder, names=part.files()))
    try:
      names = importing.named(source, part.family, config)
      where = str(folder / part.folder / "config.json")
      importing.check_sizes(names, source, part.family, config, where)
      fitting[part.name] = importing.matched(
        source, part.family, config, most_listed=_EVERY_NAME)
    except ValueError as error:
      faults.append(str(error))
  if faults:
    raise ValueError(" ".join(faults))
  params = {name: importing.place(*found, partitioner) for name, found in fitting.items()}
  return Pipeline(**configs, params=params, tokenizer=tokenizer, schedule=schedule)


def export_pipeline(
  directory: str | os.PathLike, pipeline: Pipeline, *, dtype: str | None = None
) -> None:
  """Writes a folder that diffusers loads; it becomes visible when it is complete.

  Weights that were imported and are exported in the stored dtype are the same bit for bit. The
  scheduler is Stable Diffusion's own with the pipeline's noise; there is no safety checker.

  Args:
    directory: must not exist yet, or be empty.
    pipeline: what to write.
    dtype: the dtype of the tensors; None is that of the parameters.

  Raises:
    ValueError: if `directory` holds something already or the dtype does not exist.
  """
  exporting.check_can_write(dtype)
  configs = pipeline._asdict()
  with filled_folder(Path(directory)) as partial:
    for part in _PARTS:
      config, params = configs[part.name], pipeline.params[part.name]
      stored = jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype)
      inner = partial / part.folder
      inner.mkdir()
      own = {CLASS: part.family.architecture}
      if part.library == "transformers":
        own = {"architectures": [part.family.architecture], "model_type": part.family.name}
        own |= {f"{name}_token_id": getattr(pipeline.tokenizer, f"{name}_id")
                for name in ("bos", "eos", "pad")}
      _write_json(inner / "config.json", own | part.family.write_config(config))
      write_safetensors(
        inner / f"{part.safetensors}.safetensors",
        exporting.tensors(part.family, config, params, stored))
    pipeline.tokenizer.save(partial / "tokenizer")
    (partial / "scheduler").mkdir()
    _write_json(
      partial / "scheduler" / "scheduler_config.json", _written_schedule(pipeline.schedule))
    classes = {part.folder: [part.library, part.family.architecture] for part in _PARTS}
    _write_json(partial / INDEX, {
      CLASS: PIPELINE, **classes, "tokenizer": ["transformers", _TOKENIZERS[0]],
      "scheduler": ["diffusers", _SCHEDULER], "safety_checker": [None, None],
      "feature_extractor": [None, None], "requires_safety_checker": False,
    })


class _Squeezed(TensorSource):
  """Tensors of which attention's matrices may have been stored as convolutions of 1 x 1."""

  def __init__(self, source: TensorSource):
    super().__init__(source.where, {name: source for name in source.names()})

  def shape(self, name: str) -> tuple[int, ...]:
    shape = self._find(name).shape(name)
    return shape[:2] if _is_matrix(name) and shape[2:] == (1, 1) else shape

  def dtype(self, name: str):
    return self._find(name).dtype(name)

  def read(self, name: str):
    return self._find(name).read(name).reshape(self.shape(name))


def _is_matrix(name: str) -> bool:
  return ".mid_block.attentions.0." in name and name.endswith(".weight")


def _check_classes(folder: Path) -> None:
  """Checks `model_index.json`."""
  require_regular(folder)
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder; give that of a {PIPELINE}, with {INDEX} in it.")
  path = folder / INDEX
  fields = checked(dict[str, Any], read_json(path), path)
  _check_class(path, fields, (PIPELINE,))
  index = checked(published_diffusion.PipelineIndex, fields, path)
  known = {part.folder: (part.family.architecture,) for part in _PARTS}
  known |= {"tokenizer": _TOKENIZERS, "scheduler": _SCHEDULERS}
  for name, classes in known.items():
    found = getattr(index, name)[1]
    if found not in classes:
      raise ValueError(
        f"{path} has the {name} {shown(found)}, which lmops_jax cannot read; it reads "
        f"{' or '.join(classes)}."
      )


def _check_class(path: Path, fields: dict[str, Any], classes: tuple[str, ...]) -> None:
  found = fields.get(CLASS)
  if found not in classes:
    raise ValueError(
      f"{path} has {CLASS}={shown(found)}, which lmops_jax cannot read; it reads "
      f"{' or '.join(classes)}."
    )


def _config(folder: Path, part: _Part):
  """The configuration in a part's folder."""
  path = folder / "config.json"
  fields = checked(dict[str, Any], read_json(path), path)
  if part.library == "diffusers":
    _check_class(path, fields, (part.family.architecture,))
  elif fields.get("model_type", part.family.name) != part.family.name:
    raise ValueError(
      f"{path} has model_type={shown(fields['model_type'])} and should have {part.family.name!r}."
    )
  with naming(path):
    return part.family.read_config(ConfigReader(fields, str(path)))


def _check_together(folder: Path, configs: dict[str, Any]) -> None:
  """Raises ValueError if a part does not take what another gives."""
  unet, autoencoder, text = (configs[name] for name in ("unet", "autoencoder", "text"))
  for field, found, wanted, source in (
    ("in_channels", unet.in_channels, autoencoder.latent_channels, "vae's latent_channels"),
    ("out_channels", unet.out_channels, autoencoder.latent_channels, "vae's latent_channels"),
    ("cross_attention_dim", unet.context_width, text.width, "text_encoder's hidden_size"),
  ):
    if found != wanted:
      raise ValueError(
        f"{folder / 'unet' / 'config.json'}: {field}={found} should be {wanted}, the {source}; "
        "take the parts of one model."
      )


def _schedule(path: Path) -> NoiseSchedule:
  fields = checked(dict[str, Any], read_json(path), path)
  _check_class(path, fields, _SCHEDULERS)
  return noise_schedule(fields, str(path))


def _written_schedule(schedule: NoiseSchedule) -> dict[str, Any]:
  return {
    CLASS: _SCHEDULER, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end,
    "beta_schedule": schedule.kind, "num_train_timesteps": schedule.num_times,
    "prediction_type": schedule.prediction, "trained_betas": None, "skip_prk_steps": True,
    "set_alpha_to_one": False, "steps_offset": 1,
  }


def _write_json(path: Path, fields: dict[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
