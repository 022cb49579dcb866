"""`lmops generate`, `score`, `convert` and `export`: what a user does with one published model.

The parsers stand here without anything heavy; jax and the model code are imported when a command
runs. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from lmops_jax.commands import grounding, prompts, score
from lmops_jax.host import progress

COMMANDS = {
  "generate": "continue prompts with a published model",
  "score": "measure a published model on a labelled task by scoring its answer options",
  "convert": "write a published model as parameters that any gin file can start from",
  "export": "write a model trained or converted here as a folder that transformers loads",
}
EPILOG = """\
examples:
  lmops generate --model MODEL --prompt "The capital of France is" --max-new-tokens 16
  lmops generate --model MODEL --prompt "..." --temperature 0.8 --top-p 0.9 --seed 1
  lmops generate --model MODEL --chat --prompt "Name three rivers." --beams 4
  lmops generate --model KOSMOS --image photo.png --prompt "An image of" --beams 5
  lmops generate --model KOSMOS --image photo.png --prompt "<grounding> An image of" \\
      --draw found.png
  lmops score --model MODEL --task sst2.jsonl --labels negative,positive --shots 8 \\
      --template "Review: {text}\\nSentiment:{label}"
  lmops score --model MODEL --task copa --data COPA_FOLDER --shots 8 --normalise auto
  lmops score --model KOSMOS --task vqa.jsonl --shots 4
  lmops score --model KOSMOS --task imagenet --data IMAGENET --only-names
  lmops convert --model MODEL --to CONVERTED
  lmops export --checkpoint WORKDIR/train --to EXPORTED

MODEL is a folder with config.json, weights and tokenizer, a .gguf file, or what lmops wrote; KOSMOS
one of a model that reads pictures.
"""


def add_parsers(commands, options: dict) -> None:
  """Adds the four commands to argparse's subparsers."""
  for name, text in COMMANDS.items():
    parser = commands.add_parser(
      name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG, **options
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    {"generate": _generate_parser, "score": _score_parser, "convert": _convert_parser,
     "export": _export_parser}[name](parser)


def run(arguments: argparse.Namespace) -> int:
  """Runs one of the commands and returns the exit code."""
  {"generate": _generate, "score": _score, "convert": _convert, "export": _export}[
    arguments.command
  ](arguments)
  return 0


def _model_options(parser) -> None:
  parser.add_argument("--model", required=True, metavar="PATH", help="folder, .gguf file, or file "
                      "of weights beside their config.json")
  _inert_option(parser)
  parser.add_argument("--dtype", default="float32", help="of activations (default float32)")
  parser.add_argument("--param-dtype", default="float32", help="of parameters (default float32)")


def _inert_option(parser) -> None:
  parser.add_argument("--inert-objects", action="store_true", help="pass over what a PyTorch file "
                      "holds beside tensors, such as fairseq's settings; nothing of it is run")


def running_options(parser) -> None:
  """The options of every command that runs a model."""
  _model_options(parser)
  parser.add_argument("--attention", default="xla", help="xla, chunked, cudnn or splash")
  parser.add_argument("--mesh", metavar="AXIS=N,...", help="such as data=2,tensor=4; default: one "
                      "device")


def _generate_parser(parser) -> None:
  running_options(parser)
  add = parser.add_argument
  add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
  add("--image", action="append", default=[], metavar="FILE", help="a picture in each --prompt, "
      "where it has <image>; a single one without a place stands in front; may be given several "
      "times")
  add("--prompts", metavar="FILE", help='further prompts: JSON lines with "prompt" and perhaps '
      '"images": [paths], "boxes" with their "box_unit", or plain lines')
  grounding.add_options(parser)
  add("--chat", action="store_true", help="put each prompt into the model's chat template")
  add("--system", metavar="TEXT", help="system message in front of a chat")
  add("--max-new-tokens", type=int, default=64)
  add("--temperature", type=float, help="sample; default: greedy")
  add("--top-k", type=int)
  add("--top-p", type=float)
  add("--min-p", type=float)
  add("--repetition-penalty", type=float)
  add("--no-repeat-ngram", type=int)
  add("--beams", type=int, dest="num_beams", help="beam search")
  add("--beam-groups", type=int, dest="num_beam_groups", help="diverse beam search")
  add("--diversity-penalty", type=float)
  add("--length-penalty", type=float)
  add("--num-return", type=int, dest="num_return_sequences", help="answers a prompt")
  add("--seed", type=int)
  add("--count-padding", action="store_true", help="count padding into positions, as the port of "
      "Kosmos-2 in transformers does with a batch padded on the left")
  add("--stop", action="append", default=[], metavar="TEXT", help="end at this text")
  add("--json", action="store_true", help="a JSON object a text, with tokens and log-probabilities")


def _score_parser(parser) -> None:
  running_options(parser)
  score.add_options(parser)


def _convert_parser(parser) -> None:
  _model_options(parser)
  parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")


def _export_parser(parser) -> None:
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="PATH", help="a model that lmops wrote, or any other")
  _inert_option(parser)
  add("--to", required=True, metavar="DIR", help="a new folder")
  add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")


def load(arguments):
  """The model, its tokenizer, and the mesh: all checks that need no weights.

  Args:
    arguments: with `running_options` and the command's name.

  Raises:
    ValueError: a model or a mesh that cannot be used.
  """
  from lmops_jax.pretrained import model as model_lib

  partitioner = partitioner_of(arguments.mesh)
  source = model_lib.load(
    arguments.model, dtype=arguments.dtype, param_dtype=arguments.param_dtype,
    attention=arguments.attention, inert_objects=arguments.inert_objects,
  )
  if source.decoder is None:
    raise ValueError(
      f"{arguments.model} is a model of the family {source.family} that does not continue a text; "
      f"lmops {arguments.command} needs a decoder."
    )
  return source, source.tokenizer(), partitioner


def partitioner_of(text: str | None):
  """The mesh that `--mesh` names; None is one device.

  Raises:
    ValueError: for another form, or a mesh that does not fit the devices.
  """
  from lmops_jax.mesh.meshes import AXES, MeshConfig

  if text is None:
    return None
  sizes = {"data": 1}
  for part in text.split(","):
    axis, _, size = part.partition("=")
    if axis not in AXES or not size.lstrip("-").isdigit():
      raise ValueError(
        f"--mesh {text!r}: {part!r} is not AXIS=N with an axis of {', '.join(AXES)}; write for "
        "example data=2,tensor=4."
      )
    sizes[axis] = int(size)
  return MeshConfig(**sizes).build()


def _generate(arguments) -> None:
  rows = prompts.given(
    arguments.prompt, arguments.image, arguments.prompts, arguments.box, arguments.box_unit)
  if arguments.system is not None and not arguments.chat:
    raise ValueError("--system is a message in front of a chat; add --chat, or leave it out.")
  if arguments.chat and any(row.pictures or row.boxes for row in rows):
    raise ValueError("--chat formats texts only; leave it out for prompts with pictures or boxes.")
  grounding.check(arguments, rows)
  from lmops_jax.data.supervised import encode_behind, front_ids
  from lmops_jax.decoding import GenerationOptions, Generator, image_prompts
  from lmops_jax.decoding.generate import checked_prompts
  from lmops_jax.decoding.text import check_stop

  check_stop(arguments.stop)
  names = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "no_repeat_ngram", "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty",
    "num_return_sequences", "seed",
  )
  given = {name: getattr(arguments, name) for name in names}
  options = GenerationOptions(**{k: v for k, v in given.items() if v is not None})
  source, tokenizer, partitioner = load(arguments)
  settings = source.image_settings()
  words = grounding.find(arguments, rows, tokenizer)
  sizes = {}
  if words is not None:
    sizes = grounding.sizes(picture for row in rows for picture in row.pictures)
    rows = grounding.inserted(rows, words, sizes)
  texts = [row.text for row in rows]
  if arguments.chat:
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    texts = [
      tokenizer.apply_chat_template([*system, {"role": "user", "content": text}])
      for text in texts
    ]
  laid_out = lay_out(rows, source, tokenizer, settings is not None)
  front = [] if arguments.chat else front_ids(tokenizer)
  ids = [
    encode_behind(front, tokenizer, text) if row is None else row.tokens.tolist()
    for text, row in zip(texts, laid_out)
  ]
  checked_prompts(source.decoder.config, ids, options, tokenizer.bos_id)
  pictures = [picture for row in rows for picture in row.pictures]
  image_prompts.check_pictures(pictures, settings)
  params = source.params(partitioner)
  begun = time.perf_counter()
  if pictures:
    encoder = image_prompts.PictureEncoder(source.model, params, settings, partitioner)
    seen = iter(encoder.prompts([row for row in laid_out if row is not None]))
    texts = [text if row is None else next(seen) for text, row in zip(texts, laid_out)]
    del encoder
  generator = Generator(
    source.decoder, source.of_decoder(params), tokenizer, partitioner,
    count_padding=arguments.count_padding)
  del params  # the generator has its own copy of the layers
  single = len(texts) == 1 and options.num_beams == options.num_return_sequences == 1
  if single and words is None and not arguments.json:
    _stream(generator, texts, options, arguments)
  else:
    answers = grounding.generate(arguments, generator, texts, options, words, ids)
    _show(arguments, rows, answers, grounding.read(words, rows, ids, answers, arguments, sizes))
  if pictures:
    seconds = time.perf_counter() - begun
    print(f"lmops: {len(pictures)} pictures in {seconds:.1f} s, compilation included: "
          f"{len(pictures) / seconds:.3g} pictures/s", file=sys.stderr)


def _show(arguments, rows, answers, read) -> None:
  """Prints answers, and writes what they locate.

  Args:
    read: for each answer what it says about boxes, or None.
  """
  for i, (answer, grounded) in enumerate(zip(answers, read, strict=True)):
    row = rows[i // (len(answers) // len(rows))]
    if arguments.json:
      images = {"images": [picture.where for picture in row.pictures]} if row.pictures else {}
      located = {} if grounded is None else grounded.record()
      print(json.dumps({"prompt": row.text, **images, **answer._asdict(), **located}))
      continue
    lines = [answer.text] if grounded is None else grounded.lines()
    number = f"[{i // (len(answers) // len(rows))}] " if len(answers) > 1 else ""
    print(number + "\n".join(lines))
  if arguments.boxes or arguments.draw:
    grounding.write(arguments, read)


def lay_out(rows, source, tokenizer, sees: bool) -> list:
  """The tokens of each prompt with pictures, None of others; all checks that need no pixels.

  Args:
    rows: of `prompts.PromptRow`.
    source, tokenizer: of `load`.
    sees: whether the model reads pictures.

  Raises:
    ValueError: pictures that have no place in the prompt or the model, by the prompt's number.
  """
  from lmops_jax.decoding import image_prompts

  if not sees:
    for i, row in enumerate(rows):
      if row.pictures:
        raise ValueError(
          f"prompt {i} has the picture {row.pictures[0].where}, and {source.path} is a language "
          f"model of the family {source.family}, which reads texts only; leave the picture out, or "
          f"{score.SEEING}."
        )
    return [None] * len(rows)
  found = []
  for i, parts in enumerate(prompts.parts(rows)):
    if parts is not None:
      ids = image_prompts.image_tokens(tokenizer, source.config.vectors_per_image)
      parts = image_prompts.laid_out(parts, tokenizer, ids)
      image_prompts.check_fits(parts, ids, source.decoder.config.max_length, f"prompt {i}")
    found.append(parts)
  return found


def _stream(generator, texts, options, arguments) -> None:
  def show(row: int, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

  generator.generate(
    texts, options, stop=arguments.stop, callback=show, add_special=not arguments.chat
  )
  print()


def _score(arguments) -> None:
  score.run(arguments, load)


def _convert(arguments) -> None:
  from lmops_jax.pretrained import model as model_lib

  source = model_lib.load(
    arguments.model, dtype=arguments.dtype, param_dtype=arguments.param_dtype,
    inert_objects=arguments.inert_objects,
  )
  model_lib.save_model(Path(arguments.to), source, source.params())
  print(f"{source.family}, {_count(source)} parameters: {arguments.to}")


def _export(arguments) -> None:
  from lmops_jax.pretrained import exporting
  from lmops_jax.pretrained import model as model_lib

  source = model_lib.load(arguments.checkpoint, inert_objects=arguments.inert_objects)
  exporting.export(arguments.to, source, dtype=arguments.dtype)
  print(f"{source.family}, {_count(source)} parameters: {arguments.to}")


def _count(source) -> str:
  import math

  import flax.linen as nn
  import jax

  from lmops_jax.pretrained import families, importing

  shapes = nn.unbox(importing.abstract_params(families.by_name(source.family), source.config))
  return progress.format_count(sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)))
