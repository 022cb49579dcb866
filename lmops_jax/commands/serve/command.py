"""The command `lmops serve`. The parser stands here without anything heavy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lmops_jax.commands import local_server, models

COMMANDS = {"serve": "serve a published model to clients of OpenAI's protocol"}
EPILOG = """\
examples:
  lmops serve --model MODEL
  lmops serve --model MODEL.gguf --port 8000 --slots 16 --max-length 4096
  curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{"model": "MODEL", "messages": [{"role": "user", "content": "Name three rivers."}]}'

/v1/chat/completions, /v1/completions, /v1/models and /health, for this machine only unless --host
says otherwise. From another machine, forward the port: ssh -L 8080:127.0.0.1:8080 MACHINE. Ctrl-C
ends it.
"""


def add_parsers(commands, options: dict) -> None:
  """Adds the command to argparse's subparsers."""
  for name, text in COMMANDS.items():
    parser = commands.add_parser(
      name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG, **options)
    add = parser.add_argument
    add("--traceback", action="store_true", help="show where an error came from")
    models.running_options(parser)
    add("--name", help="what requests call the model (default: the name of its folder or file)")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1, this machine "
        "only; 0.0.0.0 lets everybody in who reaches the machine)")
    add("--port", type=int, default=8080, help="default 8080; 0 takes a free one")
    add("--slots", type=int, default=8, help="answers that are made at the same time (default 8)")
    add("--max-waiting", type=int, default=64, help="answers that wait for a slot; more are told "
        "to come again (default 64)")
    add("--max-length", type=int, help="most tokens of a prompt and its answer together (default: "
        "the model's)")


def run(arguments: argparse.Namespace) -> int:
  """Reads the model and answers until Ctrl-C; returns the exit code."""
  from lmops_jax.commands.serve.server import ModelServer
  from lmops_jax.decoding.serving import Batcher

  with ModelServer(arguments.host, arguments.port) as server:  # a taken port is told at once
    source, tokenizer, partitioner = models.load(arguments)
    batcher = Batcher(
      source.decoder, source.of_decoder(source.params(partitioner)), tokenizer, partitioner,
      num_slots=arguments.slots, max_waiting=arguments.max_waiting,
      max_length=arguments.max_length)
    path = Path(arguments.model)
    name = arguments.name or (path.stem if path.suffix == ".gguf" else path.resolve().name)
    local_server.warn_if_open(arguments.host)
    print(f"lmops: {server.address}/v1 serves {name}; Ctrl-C ends it.", file=sys.stderr, flush=True)
    try:
      server.serve(name, tokenizer, batcher)
    except KeyboardInterrupt:
      print("lmops: the server has ended.", file=sys.stderr, flush=True)
  return 0
