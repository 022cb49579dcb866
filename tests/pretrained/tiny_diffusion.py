"""Tiny random Stable Diffusions, made by diffusers and transformers."""

import functools
import json

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from tests.pretrained.tiny_models import randomise

_MERGES = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "n</w>")]
_LETTERS = sorted(ByteLevel.alphabet())
VOCAB = [
  *_LETTERS, *(letter + "</w>" for letter in _LETTERS), *("".join(pair) for pair in _MERGES),
  "<|startoftext|>", "<|endoftext|>",
]
END = len(VOCAB) - 1
UNET = dict(
  sample_size=8, block_out_channels=(16, 32, 32, 32), norm_num_groups=8, attention_head_dim=4,
  cross_attention_dim=32, layers_per_block=1)
UNET_2 = dict(  # as Stable Diffusion 2 has it
  sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=[2, 4],
  cross_attention_dim=32, use_linear_projection=True, upcast_attention=True, layers_per_block=1,
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), transformer_layers_per_block=2)
VAE = dict(
  block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, layers_per_block=1, sample_size=16,
  scaling_factor=0.2)
TEXT = dict(
  vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
  intermediate_size=48, bos_token_id=END - 1, eos_token_id=END, pad_token_id=END)


@functools.cache
def unet(second=False):
  torch.manual_seed(0)
  return randomise(diffusers.UNet2DConditionModel(**(UNET_2 if second else UNET)).eval())


@functools.cache
def vae():
  torch.manual_seed(1)
  return randomise(diffusers.AutoencoderKL(**VAE).eval())


@functools.cache
def text_encoder():
  torch.manual_seed(2)
  config = transformers.CLIPTextConfig(**TEXT)
  return randomise(transformers.CLIPTextModel(config).eval())


def save(folder, second=False, **options):
  """A folder as diffusers writes it; `options` are those of `save_pretrained`."""
  unet(second).save_pretrained(folder / "unet", **options)
  vae().save_pretrained(folder / "vae", **options)
  text_encoder().save_pretrained(folder / "text_encoder")
  diffusers.PNDMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
    steps_offset=1, prediction_type="v_prediction" if second else "epsilon",
  ).save_pretrained(folder / "scheduler")
  save_tokenizer(folder / "tokenizer")
  (folder / "model_index.json").write_text(json.dumps({
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.2.2",
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None], "feature_extractor": [None, None],
  }))
  return folder


def save_tokenizer(folder):
  """The files of the first releases, which have no tokenizer.json."""
  folder.mkdir()
  (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(VOCAB)}))
  merges = "\n".join(" ".join(pair) for pair in _MERGES)
  (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
  end = "<|endoftext|>"
  (folder / "tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
    "bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end,
  }))
