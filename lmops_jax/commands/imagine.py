"""`lmops imagine`: pictures of prompts with a published latent diffusion model.

The parser stands here without anything heavy. Pictures are written as they are drawn, each with all
that it depends on in its PNG file and in a line of `images.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmops_jax.commands import models, prompts
from lmops_jax.host import progress
from lmops_jax.host.hashing import digest
from lmops_jax.host.words import listed, shortened

COMMANDS = {"imagine": "draw pictures of prompts with a published diffusion model"}
EPILOG = """\
examples:
  lmops imagine --model SD --prompt "a lighthouse in a storm, oil on canvas" --to pictures
  lmops imagine --model SD --prompts prompts.jsonl --images 1 --seed 7 --to pictures
  lmops imagine --model SD --prompt "..." --sampler ddim --steps 50 --size 512x768 --to pictures

SD is a folder as Stable Diffusion 1 and 2 are published: model_index.json, text_encoder, tokenizer,
unet, vae, scheduler. A picture depends on its prompt's text, the seed and its number alone, and on
the settings; the same command gives the same files. There is no safety checker: pictures are
written as the model draws them, whatever they show. The weights of Stable Diffusion 1 come under
the CreativeML OpenRAIL-M licence.
"""
RECORDS = "images.jsonl"
_SAMPLERS = ("dpmpp2m", "ddim", "plms")
_MOST_STEPS, _MOST_IMAGES = 1000, 10_000
_SIDES = 8  # pixels of a side for one latent
_LOST = 0.01  # share of a batch's pictures that may be lost


class Picture(NamedTuple):
  """One picture to draw.

  Attributes:
    prompt: its text. of_prompt: the prompt's number. number: the picture's among the prompt's.
  """

  prompt: str
  of_prompt: int
  number: int


def add_parsers(commands, options: dict) -> None:
  """Adds the command to argparse's subparsers."""
  for name, text in COMMANDS.items():
    parser = commands.add_parser(
      name, help=text, description=f"{text[0].upper()}{text[1:]}. There is no safety checker.",
      epilog=EPILOG, **options)
    add = parser.add_argument
    add("--traceback", action="store_true", help="show where an error came from")
    add("--model", required=True, metavar="DIR", help="a folder as diffusers writes it")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts", metavar="FILE", help='further prompts: JSON lines with "prompt", or plain '
        "lines")
    add("--to", required=True, metavar="DIR", help="a new or empty folder for the pictures")
    add("--negative", default="", metavar="TEXT", help="what pictures lean away from (default: the "
        "empty text)")
    add("--images", type=int, default=4, help="pictures of each prompt (default 4)")
    add("--seed", type=int, default=0, help="default 0")
    add("--steps", type=int, default=20, help="of the sampler (default 20)")
    add("--guidance", type=float, default=7.5, help="how much pictures lean towards their prompt "
        "(default 7.5; 1 is not at all, and twice as fast)")
    add("--sampler", choices=_SAMPLERS, default=_SAMPLERS[0], help=f"default {_SAMPLERS[0]}")
    add("--size", default="512", metavar="PIXELS", help="side, or HEIGHTxWIDTH (default 512)")
    add("--batch-size", type=int, default=4, help="most pictures at a time on each device (default "
        "4)")
    add("--dtype", default="float32", help="of activations (default float32)")
    add("--param-dtype", default="float32", help="of parameters (default float32)")
    add("--mesh", metavar="AXIS=N,...", help="such as data=4; default: one device")


def run(arguments: argparse.Namespace) -> int:
  """Draws all pictures; returns the exit code."""
  texts = _texts(arguments)
  size, folder = size_of(arguments.size), Path(arguments.to).expanduser()
  sampler = _sampler(arguments)
  _check(arguments, folder)
  from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer, image_keys
  from lmops_jax.pretrained.pipelines import load_pipeline
  from lmops_jax.text.clip import clip_texts

  partitioner = models.partitioner_of(arguments.mesh)
  loaded = load_pipeline(
    arguments.model, dtype=arguments.dtype, param_dtype=arguments.param_dtype)
  length = loaded.text.max_length
  read = clip_texts(loaded.tokenizer, [arguments.negative, *texts], length)
  _warn_of_cuts(read.cut, texts, length)
  imaginer = Imaginer(
    DiffusionModels.of(loaded.text, loaded.unet, loaded.autoencoder, loaded.schedule),
    loaded.params, sampler, arguments.guidance, size, partitioner,
    batch_size=arguments.batch_size)
  folder.mkdir(parents=True, exist_ok=True)
  pictures = [Picture(text, i, j) for i, text in enumerate(texts) for j in range(arguments.images)]
  tokens = read.tokens[1:].repeat(arguments.images, axis=0)
  settings = _settings(arguments, size)
  keys = image_keys(texts, arguments.images, arguments.seed)
  done, lost = 0, 0
  with progress.Progress(len(pictures), "pictures", "imagine") as bar, \
       (folder / RECORDS).open("w", encoding="utf-8") as records:
    for drawn in imaginer.batches(tokens, keys, read.tokens[0]):
      batch = pictures[done : done + len(drawn.images)]
      for picture, pixels, is_finite in zip(batch, drawn.images, drawn.finite, strict=True):
        cut = read.cut[1 + picture.of_prompt]
        record = _record(picture, settings, cut, bool(is_finite))
        if is_finite:
          _write(folder / record["file"], pixels, record)
        print(json.dumps(record, ensure_ascii=False), file=records, flush=True)
      lost += _check_finite(batch, drawn.finite, arguments)
      done += len(batch)
      bar.update(len(batch))
  print(f"{done - lost} pictures of {len(texts)} prompts: {folder}")
  return 0


def _texts(arguments) -> list[str]:
  """The prompts, each once.

  Raises:
    ValueError: no prompt, or one that cannot be drawn, by its number.
  """
  rows = [prompts.PromptRow(text) for text in arguments.prompt]
  if arguments.prompts:
    rows += prompts.rows_of(Path(arguments.prompts).expanduser())
  if not rows:
    raise ValueError("there is nothing to draw; give --prompt TEXT or --prompts FILE.")
  for i, row in enumerate(rows):
    if row.pictures or row.boxes is not None:
      raise ValueError(
        f"prompt {i} has pictures or boxes, and lmops imagine draws from texts alone; leave them "
        "out."
      )
    if not row.text.strip():
      raise ValueError(f"prompt {i} is empty; write what to draw, or leave it out.")
    _check_text(row.text, f"prompt {i}")
  _check_text(arguments.negative, "--negative")
  texts = list(dict.fromkeys(row.text for row in rows))
  if len(texts) < len(rows):
    print(f"lmops: {len(rows) - len(texts)} of {len(rows)} prompts are given twice; each is drawn "
          "once.", file=sys.stderr)
  return texts


def _check_text(text: str, name: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name} holds {text[error.start]!r}, half a character; write the text in UTF-8.") from error
  if "\0" in text:
    raise ValueError(f"{name} holds a NUL character; leave it out.")


def size_of(text: str) -> tuple[int, int]:
  """Height and width of pictures that `--size` names.

  Raises:
    ValueError: for another form.
  """
  match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
  if match is None:
    raise ValueError(
      f"--size {text} is neither a side nor HEIGHTxWIDTH in pixels; write for example 512 or "
      "512x768."
    )
  size = int(match[1]), int(match[2] or match[1])
  if not all(size) or any(side % _SIDES for side in size):
    raise ValueError(
      f"--size {text} has a side that is not a multiple of {_SIDES} pixels; take for example "
      f"{max(1, round(size[0] / _SIDES)) * _SIDES}x{max(1, round(size[1] / _SIDES)) * _SIDES}."
    )
  return size


def _sampler(arguments):
  """One of `decoding.diffusion.samplers`.

  Raises:
    ValueError: for a number of steps out of range.
  """
  if not 1 <= arguments.steps <= _MOST_STEPS:
    raise ValueError(
      f"--steps {arguments.steps} should be 1 to {_MOST_STEPS}; 20 is usual for dpmpp2m, 50 for "
      "the others."
    )
  from lmops_jax.decoding.diffusion import samplers
  from lmops_jax.models.diffusion.noise import NoiseSchedule

  kinds = dict(zip(_SAMPLERS, (samplers.DpmSolver, samplers.Ddim, samplers.Plms), strict=True))
  sampler = kinds[arguments.sampler](arguments.steps)
  sampler.plan(NoiseSchedule())  # refuses what published schedules have no times for
  return sampler


def _check(arguments, folder: Path) -> None:
  """What can be told before a model is looked at.

  Raises:
    ValueError: numbers out of range, options that do not go together, or a folder that is in use.
  """
  if not 0 < arguments.guidance < float("inf"):
    raise ValueError(
      f"--guidance {arguments.guidance} should be a number above 0; 1 does not lean at all, 7.5 is "
      "usual."
    )
  if arguments.guidance == 1 and arguments.negative:
    raise ValueError("--guidance 1 does not read --negative; leave one of them out.")
  for option, value, most in (("--images", arguments.images, _MOST_IMAGES),
                              ("--batch-size", arguments.batch_size, _MOST_IMAGES)):
    if not 1 <= value <= most:
      raise ValueError(f"{option} {value} should be 1 to {most}.")
  if not 0 <= arguments.seed < 2**32:
    raise ValueError(f"--seed {arguments.seed} should be 0 to 4294967295.")
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"--to {arguments.to} exists and is not empty; choose a new folder.")


def _warn_of_cuts(cut: Sequence[str], texts: Sequence[str], length: int) -> None:
  """Tells of each text its end that is not read."""
  for i, end in enumerate(cut):
    if end:
      name = "--negative" if i == 0 else f"prompt {i - 1} ({shortened(texts[i - 1], 30)!r})"
      print(f"lmops: warning: {name} is longer than the {length} tokens that the text encoder "
            f"reads; this end of it is not read: {end!r}", file=sys.stderr)
  num = sum(map(bool, cut[1:]))
  if num and len(texts) > 1:
    print(f"lmops: warning: {num} of {len(texts)} prompts are cut.", file=sys.stderr)


def _settings(arguments, size: tuple[int, int]) -> dict[str, Any]:
  """All that pictures depend on besides prompt and number."""
  import lmops_jax

  return {
    "model": str(arguments.model), "sampler": arguments.sampler, "steps": arguments.steps,
    "guidance": arguments.guidance, "negative": arguments.negative, "seed": arguments.seed,
    "height": size[0], "width": size[1], "dtype": arguments.dtype,
    "param_dtype": arguments.param_dtype, "lmops_jax": lmops_jax.__version__,
  }


def _record(picture: Picture, settings: dict[str, Any], cut: str, is_finite: bool) -> dict:
  """The line of a picture in `images.jsonl`; one that is lost has no file."""
  file = file_name(picture.prompt, settings["seed"], picture.number) if is_finite else None
  record = {"file": file, "prompt": picture.prompt, "image": picture.number, **settings}
  return record | ({"cut": cut} if cut else {})


def file_name(prompt: str, seed: int, number: int) -> str:
  """A picture's name: the prompt's first letters and a hash of it, seed and number."""
  letters = re.sub(r"[^a-z0-9]+", "-", prompt.lower()[:48]).strip("-")
  return f"{letters or 'prompt'}-{digest([prompt])[:8]}-seed{seed}-{number}.png"


def _write(path: Path, pixels, record: dict[str, Any]) -> None:
  """The PNG file; its texts are the prompt, the program, and the record as JSON."""
  from PIL import Image, PngImagePlugin

  from lmops_jax.host.whole_files import replacing

  texts = PngImagePlugin.PngInfo()
  texts.add_itxt("Description", record["prompt"])
  texts.add_text("Software", f"lmops_jax {record['lmops_jax']}")
  texts.add_itxt("Comment", json.dumps(record, ensure_ascii=False))
  with replacing(path) as partial:
    Image.fromarray(pixels).save(partial, format="PNG", pnginfo=texts)


def _check_finite(batch: Sequence[Picture], finite, arguments) -> int:
  """Names the pictures that are lost, and counts them.

  Raises:
    RuntimeError: if they are more than a hundredth of the batch.
  """
  names = [f"image {picture.number} of prompt {picture.of_prompt}"
           for picture, is_finite in zip(batch, finite, strict=True) if not is_finite]
  if not names:
    return 0
  text = f"{listed(names, 8)} with seed {arguments.seed} came out with numbers that are not finite"
  if len(names) > _LOST * len(batch):
    raise RuntimeError(
      f"{text}, {len(names)} of {len(batch)} in a batch; check the weights, or take --dtype "
      "float32."
    )
  print(f"lmops: warning: {text} and are left out.", file=sys.stderr)
  return len(names)
