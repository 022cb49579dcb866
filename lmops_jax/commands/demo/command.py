"""The command `lmops demo NAME`. The parser stands here without anything heavy."""

from __future__ import annotations

import argparse
import sys

from lmops_jax.commands import local_server, models

COMMANDS = {"demo": "try a published model on a page in the browser"}
EPILOG = """\
examples:
  lmops demo kosmos --model KOSMOS
  lmops demo kosmos --model KOSMOS --port 8000 --dtype bfloat16
  lmops demo promptist --model POLICY --images SD

KOSMOS is a folder of a model that reads pictures; with one such as Kosmos-2's the page shows
phrases with their boxes. POLICY is a folder of a model that rewrites prompts, SD one as Stable
Diffusion 1 and 2 are published, whose pictures no safety checker sees; without it prompts are
rewritten alone. The page is served to this machine only, and asks no other machine for
anything. From another machine, forward the port: ssh -L 7860:127.0.0.1:7860 MACHINE. Ctrl-C ends
it.
"""
_DEMOS = ("kosmos", "promptist")


def add_parsers(commands, options: dict) -> None:
  """Adds the command to argparse's subparsers."""
  for name, text in COMMANDS.items():
    parser = commands.add_parser(
      name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG, **options)
    add = parser.add_argument
    add("--traceback", action="store_true", help="show where an error came from")
    add("demo", choices=_DEMOS, metavar="NAME", help=f"one of {', '.join(_DEMOS)}")
    models.running_options(parser)
    add("--images", metavar="DIR", help="promptist: the model that draws; default: no pictures")
    add("--size", default="512", metavar="PIXELS", help="promptist: side of pictures, or "
        "HEIGHTxWIDTH (default 512)")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1, this machine "
        "only; 0.0.0.0 lets everybody in who reaches the machine)")
    add("--port", type=int, default=7860, help="default 7860; 0 takes a free one")


def run(arguments: argparse.Namespace) -> int:
  """Reads the model and answers until Ctrl-C; returns the exit code."""
  from lmops_jax.commands.demo.server import DemoServer

  with DemoServer(arguments.host, arguments.port) as server:  # a taken port is told at once
    demo = _load(arguments)
    local_server.warn_if_open(arguments.host)
    print(f"lmops: {server.address} shows {arguments.model}; Ctrl-C ends it.", file=sys.stderr,
          flush=True)
    try:
      server.serve(demo)
    except KeyboardInterrupt:
      print("lmops: the demo ends, once the answer that is under way, if any, is made.",
            file=sys.stderr, flush=True)
  return 0


def _load(arguments: argparse.Namespace):
  """The demo that the command line names.

  Raises:
    ValueError: a model that cannot be used, or options of another demo.
  """
  if arguments.demo == "promptist":
    from lmops_jax.commands.demo.promptist import PromptistDemo

    return PromptistDemo.load(arguments)
  if arguments.images is not None:
    raise ValueError("--images is a model that draws for lmops demo promptist; leave it out.")
  from lmops_jax.commands.demo.kosmos import KosmosDemo

  return KosmosDemo.load(arguments)
