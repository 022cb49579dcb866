"""A published model as a user names it: a folder, a file, or a model written here.

A file is a GGUF, or weights with `config.json` beside them; without it, weights under the names of
their authors' own file (Kosmos-2's `.pt`) are the published model. `load` reads configurations and
headers only, so that a bad path is found before any work; `PretrainedModel.params` then reads the
weights. A model written here is a folder with `model.json` (what the model is), a parameter tree,
and the tokenizer's files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import numpy as np
import pydantic
from pydantic import Field

from lmops_jax.config.setting_types import ByteCount, Text, component
from lmops_jax.data.images import ImageSettings
from lmops_jax.host.foreign_files import checked, read_json, require_regular
from lmops_jax.host.manifests import verify_read
from lmops_jax.host.whole_files import filled_folder, replacing, write_text
from lmops_jax.models.attention import ATTENTION_KINDS
from lmops_jax.models.config import DTYPES, REMAT_POLICIES, TransformerConfig
from lmops_jax.models.partitioning import unboxed
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained import config_fields, families, importing
from lmops_jax.pretrained.families.gguf import read_gguf
from lmops_jax.pretrained.sources import MAX_INFLATED_BYTES, WEIGHTS, open_source
from lmops_jax.text import tokenizer, tokenizer_folder

DESCRIPTION = "model.json"
PARAMS_FOLDER, TOKENIZER_FOLDER = "params", tokenizer.NESTED
_CONFIG = "config.json"
_WITH_HEAD = ("CausalLM", "LMHead", "MaskedLM")  # architectures that predict tokens
_FORMAT = 1
IMAGES = "preprocessor_config.json"
_PROCESSOR = "processor_config.json"  # where transformers 5 keeps the same
_HASHED_BYTES = 1 << 20  # of each end of a large file


class _Described(pydantic.BaseModel):
  """What `model.json` holds."""

  format: Literal[_FORMAT]
  family: Literal[tuple(family.name for family in families.FAMILIES)]
  config: dict[str, Any]
  params: str
  tokenizer: str
  original: dict[str, Any]


class _Normalisation(pydantic.BaseModel):
  """What is read of `preprocessor_config.json`."""

  image_processor: _Normalisation | None = None  # of `processor_config.json`
  image_mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
  image_std: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
  """A model on disk whose weights have not been read yet.

  Attributes:
    path: as given: a folder, or a file of weights.
    family: name of its family ("gpt2", "llama", ...).
    config: its family's configuration, execution choices included: a `ClipConfig` for "clip", a
      `DockedConfig` for "kosmos-2", a `TransformerConfig` for the others.
    original: the `config.json` that it was published with, {} if there is none.
    ignore: patterns of tensor names to leave out.
    max_inflated_bytes, inert_objects: see `load`.
  """

  path: Path
  family: str
  config: Any
  original: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
  ignore: tuple[str, ...] = ()
  max_inflated_bytes: int = dataclasses.field(default=MAX_INFLATED_BYTES, compare=False)
  inert_objects: bool = dataclasses.field(default=False, compare=False)

  @property
  def model(self) -> nn.Module:
    """The module that the parameters belong to: a `Transformer`, a `Clip` or a `DockedLM`."""
    return families.by_name(self.family).module(self.config)

  @property
  def vocab_size(self) -> int:
    """V, the number of token ids."""
    return families.by_name(self.family).text(self.config).vocab_size

  @property
  def decoder(self) -> Transformer | None:
    """The module that continues a text, with the parameters `of_decoder`; None for an encoder."""
    config = families.by_name(self.family).decoder(self.config)
    return None if config is None else Transformer(config)

  def of_decoder(self, params):
    """The part of the model's parameters that `decoder` has."""
    part = families.by_name(self.family).decoder_part
    return params[part] if part else params

  def image_settings(self) -> ImageSettings | None:
    """How pictures that stand among the words become pixels; None if no picture can.

    Raises:
      ValueError: the folder's `preprocessor_config.json` or `processor_config.json` normalises
        pixels otherwise.
    """
    size = families.by_name(self.family).image_size(self.config)
    if size is None:
      return None
    for path in (self.tokenizer_path / name for name in (_PROCESSOR, IMAGES)):
      if not path.is_file():
        continue
      found = checked(_Normalisation, read_json(path), path)
      found = found.image_processor or found
      vision = self.config.vision
      for name, ours in (("image_mean", vision.pixel_mean), ("image_std", vision.pixel_std)):
        theirs = getattr(found, name)
        if theirs is not None and not np.allclose(theirs, ours, rtol=0, atol=1e-6):
          raise ValueError(
            f"{path}: {name}={theirs} differs from the {list(ours)} that pictures are normalised "
            f"with here; set it to these, or train the model with models.VisionConfig."
            f"{name.replace('image', 'pixel')}."
          )
    return ImageSettings(height=size, width=size)

  def params(self, partitioner=None):
    """Reads the weights, in `config.param_dtype`, straight onto the mesh.

    Args:
      partitioner: a `mesh.meshes.Partitioner`; None is this process's first device.

    Raises:
      ValueError: if the weights do not fit the configuration, or a file is damaged.
    """
    if (self.path / DESCRIPTION).is_file():
      from lmops_jax.mesh import checkpoints

      folder = self.path / _description(self.path)["params"]
      verify_read(folder)
      family = families.by_name(self.family)
      return checkpoints.load_params(folder, _abstract(family, self.config, partitioner))
    with open_source(self.path, self.max_inflated_bytes, self.inert_objects) as source:
      family = families.by_name(self.family)
      if self.path.suffix == ".gguf":
        family, _ = _gguf(source)
      return importing.load_params(
        source, family, self.config, partitioner=partitioner, ignore=self.ignore
      )

  def tokenizer(self):
    """The model's tokenizer; raises ValueError if it has ids that the model has not."""
    found = tokenizer.load_tokenizer(self.tokenizer_path)
    found.check_fits(self.vocab_size)
    return found

  @property
  def tokenizer_path(self) -> Path:
    """The folder or file that the tokenizer is read from."""
    if self.path.is_file() and self.path.suffix in WEIGHTS:
      return self.path.parent
    if not (self.path / DESCRIPTION).is_file():
      return self.path
    path = self.path / _description(self.path)["tokenizer"]
    verify_read(path)
    return path

  def fingerprint(self) -> str:
    """A hash of the configuration and of the files' names, sizes and contents (or their ends)."""
    state = hashlib.blake2b(repr((self.config, self.ignore)).encode(), digest_size=16)
    files = [self.path] if self.path.is_file() else sorted(
      path for path in self.path.rglob("*") if path.is_file()
    )
    for path in files:
      size = path.stat().st_size
      state.update(f"{path.name} {size} ".encode())
      with path.open("rb") as file:
        state.update(file.read(_HASHED_BYTES))
        if size > _HASHED_BYTES:
          file.seek(max(_HASHED_BYTES, size - _HASHED_BYTES))
          state.update(file.read())
    return state.hexdigest()


@component(module="pretrained")
def load(
  path: Text | os.PathLike,
  dtype: Literal[DTYPES] = "float32",
  param_dtype: Literal[DTYPES] = "float32",
  attention: Literal[ATTENTION_KINDS] = "xla",
  scan_layers: bool = True,
  remat: Literal[REMAT_POLICIES] = "none",
  ignore: Sequence[Text] = (),
  max_inflated_bytes: ByteCount = MAX_INFLATED_BYTES,
  inert_objects: bool = False,
) -> PretrainedModel:
  """Opens a published model; see the module's docstring for what `path` may be.

  Args:
    path: a folder with config.json and weights (safetensors or PyTorch `.bin`), a `.gguf` file, a
      file of weights (see the module), or a model that `lmops convert` or a training run wrote.
    dtype, param_dtype, attention, scan_layers, remat: execution choices of
      `models.TransformerConfig`.
    ignore: regular expressions for names of tensors to leave out, such as "classifier.*".
    max_inflated_bytes: the most that a PyTorch file's pickle and its compressed entries may hold
      (torch itself compresses nothing); a few megabytes could fill any memory.
    inert_objects: pass over what a PyTorch file holds beside tensors, such as fairseq's settings,
      instead of refusing the file; nothing of it is run in either case.

  Raises:
    ValueError: if nothing there can be read, or the kind of model is not modelled.
  """
  folder = Path(path).expanduser()
  choices = dict(
    dtype=dtype, param_dtype=param_dtype, attention=attention, scan_layers=scan_layers, remat=remat
  )
  reading = dict(max_inflated_bytes=max_inflated_bytes, inert_objects=inert_objects)

  def make(family, config, original) -> PretrainedModel:
    config = family.with_choices(config, **choices)
    return PretrainedModel(folder, family.name, config, original, tuple(ignore), **reading)

  require_regular(folder)
  if folder.suffix == ".gguf" and folder.is_file():
    with open_source(folder) as source:
      family, config = _gguf(source)
    return make(family, config, {})
  is_weights = folder.suffix in WEIGHTS and folder.is_file()
  if not folder.is_dir() and not is_weights:
    raise ValueError(
      f"pretrained.load.path={str(path)!r} is neither a folder nor a .gguf file; give a folder "
      "with config.json and weights, a GGUF file, or what lmops convert wrote."
    )
  if (folder / DESCRIPTION).is_file():
    described = _description(folder)
    return make(
      families.by_name(described["family"]), described["config"], described["original"]
    )
  path = (folder.parent if is_weights else folder) / _CONFIG
  original = _read_object(path) if path.exists() else _unsaid(folder, path, reading)
  family = families.find(original, str(path))
  with naming(path):
    config = family.read_config(families.ConfigReader(original, str(path)))
  with open_source(folder, **reading) as source:
    names = importing.named(source, family, config)
    importing.check_sizes(names, source, family, config, str(path))
    config = _as_stored(config, family, names, original.get("architectures") or ())
  return make(family, config, original)


def _unsaid(weights: Path, path: Path, reading: dict[str, Any]) -> dict[str, Any]:
  """The `config.json` of a file of its authors, who published one model and no such file."""
  if weights.is_file():
    with open_source(weights, **reading) as source:
      family = families.of_originals(source.names())
    if family is not None:
      return {"model_type": family.name, "architectures": [family.architecture]}
  raise ValueError(
    f"{path} cannot be read (it is not there); a model folder holds config.json beside its weights."
  )


def _gguf(source) -> tuple[families.Family, TransformerConfig]:
  with naming(source.where):
    family, config = read_gguf(source)
  names = importing.named(source, family, config)
  importing.check_sizes(names, source, family, config, source.where)
  return family, config


@contextlib.contextmanager
def naming(path: Path | str):
  """An error about a configuration that makes no model names the file that holds it."""
  try:
    yield
  except ValueError as error:
    if str(path) in str(error):
      raise
    raise ValueError(f"{path} makes no model: {error}") from error


def _as_stored(config, family, names, architectures):
  """Drops parts that a checkpoint of the bare body, or of one head only, does not hold."""
  if family.config is not TransformerConfig:
    return config
  changes: dict[str, Any] = {}
  is_body = not any(kind in name for name in architectures for kind in _WITH_HEAD)
  if not names.has(family.head) and (is_body or config.tied_embeddings):
    changes |= dict(tied_embeddings=True, head_transform=False, unembedding_bias=False)
  if config.pooler and not names.has((r"pooler\.",)):
    changes["pooler"] = False
  if config.detector and not architectures and not names.has((r"discriminator_predictions\.",)):
    changes["detector"] = False
  if config.final_norm and family.name == "opt" and not names.has((r"decoder\.final_layer_norm",)):
    changes["final_norm"] = False
  return dataclasses.replace(config, **changes)


def _read_object(path: Path) -> dict[str, Any]:
  return checked(dict[str, Any], read_json(path), path)


def _description(folder: Path) -> dict[str, Any]:
  """`model.json`, with its configuration as its family's class."""
  path = folder / DESCRIPTION
  verify_read(path)
  described = checked(_Described, read_json(path), path).model_dump()
  try:
    kind = families.by_name(described["family"]).config
    return {**described, "config": config_fields.from_fields(kind, described["config"])}
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{path} does not describe a model of this version ({error}); write it again with lmops "
      "convert."
    ) from error


def _abstract(family, config, partitioner):
  boxed = importing.abstract_params(family, config)
  if partitioner is None:
    return unboxed(boxed)
  return partitioner.placed_shapes(boxed, uneven="whole")


def describe(
  directory: Path, config, *, family: str = "llama", params: str = PARAMS_FOLDER,
  tokenizer: str = TOKENIZER_FOLDER, original: dict[str, Any] | None = None,
) -> None:
  """Writes `model.json`, which makes a folder with parameters a model that `load` opens.

  Args:
    directory: the model's folder.
    config: the model's configuration.
    family: the family whose parts the configuration uses, for export.
    params, tokenizer: where they lie, relative to `directory`.
    original: the published `config.json`, which an export starts from.
  """
  write_text(directory / DESCRIPTION, json.dumps({
    "format": _FORMAT, "family": family, "config": config_fields.to_fields(config),
    "params": params, "tokenizer": tokenizer, "original": original or {},
  }, indent=1) + "\n")


def save_model(directory: Path, source: PretrainedModel, params) -> None:
  """Writes a model folder: parameters, tokenizer and description; visible when complete.

  Args:
    directory: must not exist yet, or be empty.
    source: the model that the parameters belong to; its tokenizer's files are copied.
    params: tree like `source.params()`.

  Raises:
    ValueError: `directory` holds something already.
  """
  from lmops_jax.mesh import checkpoints

  with filled_folder(Path(directory)) as partial:
    checkpoints.save_params(partial / PARAMS_FOLDER, params)
    copy_tokenizer(source, partial / TOKENIZER_FOLDER)
    describe(partial, source.config, family=source.family, original=source.original)


def copy_tokenizer(source: PretrainedModel, directory: Path) -> None:
  """Copies the files that tokenise, end and format text for a model into a folder, made if needed.

  A model folder gives the files themselves; a GGUF file gives a `tokenizer.json` and a
  `tokenizer_config.json` that say the same as its vocabulary. A model without tokenizer gives none.
  """
  directory.mkdir(parents=True, exist_ok=True)
  folder = source.tokenizer_path
  if folder.is_file():
    tokenizer.load_tokenizer(folder).save(directory)
    return
  for name in (*tokenizer_folder.FILES, IMAGES):
    if (folder / name).is_file() and not (directory / name).exists():
      with replacing(directory / name) as partial:
        shutil.copyfile(folder / name, partial)
