"""A tiny CLIP of random weights and an aesthetic predictor for it, as published files."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lmops_jax.models.clip import Clip, ClipConfig
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.vision import VisionConfig
from lmops_jax.pretrained import exporting, families
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.pretrained.safetensors_files import write_safetensors
from tests import model_folders

WIDTH, SIZE, CONTEXT = 12, 16, 20
_TOWER = dict(num_layers=2, width=16, num_heads=2, mlp_width=32, activation="quick_gelu",
              norm="layer", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True)


def config() -> ClipConfig:
  tokenizer = model_folders.byte_tokenizer()
  text = TransformerConfig(**_TOWER, vocab_size=tokenizer.get_vocab_size(), positions="learned",
                           max_length=CONTEXT, tied_embeddings=True)
  trunk = TransformerConfig(**_TOWER, positions="none", causal=False, final_norm=False,
                            max_length=(SIZE // 8) ** 2 + 1)
  return ClipConfig(text, VisionConfig(trunk, SIZE, 8), WIDTH, eos_id=1)


def write(folder: Path) -> Path:
  """A folder that `pretrained.load` opens, with a tokenizer of bytes between BOS and EOS."""
  c = config()
  inputs = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, SIZE, SIZE, 3))
  params = nn.unbox(jax.jit(Clip(c).init)(jax.random.key(0), *inputs)["params"])
  spread = lambda x: np.asarray(x) * (8.0 if np.std(x) > 0 else 1.0)  # noqa: E731
  params = jax.tree.map(spread, params)
  folder.mkdir(parents=True)
  family = families.by_name("clip")
  fields = exporting.config_json(family, PretrainedModel(folder, "clip", c), "float32")
  (folder / "config.json").write_text(json.dumps(fields))
  write_safetensors(
    folder / "model.safetensors", exporting.tensors(family, c, params, np.dtype("float32")))
  tokenizer = model_folders.byte_tokenizer()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{model_folders.BOS} $A {model_folders.EOS}",
    special_tokens=[(model_folders.BOS, 0), (model_folders.EOS, 1)])
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": model_folders.BOS,
    "eos_token": model_folders.EOS}))
  return folder


def write_aesthetic(path: Path) -> Path:
  rng = np.random.default_rng(3)
  sizes, tensors = (WIDTH, 8, 6, 4, 3, 1), []
  for key, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
    for part, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
      x = rng.normal(size=shape).astype(np.float32)
      tensors.append((f"layers.{key}.{part}", shape, x.dtype, lambda x=x: x))
  write_safetensors(path, tensors)
  return path
