"""`lmops promptist rewrite`: prompts for an image model, rewritten by a policy.

It is an action of the system `promptist` that has options of its own instead of a gin file.
"""

from __future__ import annotations

import argparse
import json
import sys

from lmops_jax.commands import models, prompts

SYSTEM = "promptist"
_TEXT = "rewrite prompts for an image model with a policy that was tuned to"
_EPILOG = """\
examples:
  lmops promptist rewrite --model POLICY --prompt "a cat in the rain"
  lmops promptist rewrite --model POLICY --prompts prompts.txt --beams 16 --groups 16 --return 4
  lmops promptist rewrite --model POLICY --prompt "a cat" --json

POLICY is a folder with config.json, weights and tokenizer, or the stage train of a run of
gin/promptist/sft.gin. By default it is decoded as published: 8 beams, length penalty -1, at most 75
new tokens.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options of the action."""
  add = parser.add_argument
  parser.description, parser.epilog = f"{_TEXT[0].upper()}{_TEXT[1:]}.", _EPILOG
  models.running_options(parser)
  add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
  add("--prompts", metavar="FILE", help='further prompts: JSON lines with "prompt", or plain lines')
  add("--beams", type=int, default=8, metavar="N", help="hypotheses kept (default 8)")
  add("--groups", type=int, default=1, metavar="N", help="groups of beams that avoid each other's "
      "words (default 1, plain beam search)")
  add("--diversity", type=float, default=1.0, help="penalty between groups (default 1)")
  add("--return", type=int, default=1, metavar="N", dest="num_return", help="answers a prompt")
  add("--length-penalty", type=float, default=-1.0, help="above 0 favours longer ones (default -1)")
  add("--length-basis", default="generated", help="generated (default), or total_unpadded, which "
      "counts the prompt too, as the library of the released model did")
  add("--max-new-tokens", type=int, default=75)
  add("--json", action="store_true", help="a JSON object an answer")


def run(arguments: argparse.Namespace) -> int:
  """Rewrites the prompts, prints the answers, and returns the exit code."""
  rows = prompts.given(arguments.prompt, [], arguments.prompts)
  from lmops_jax.decoding import Generator
  from lmops_jax.systems.promptist.rewriting import beam_options, rewrite

  options = beam_options(
    arguments.beams, arguments.groups, arguments.num_return, diversity=arguments.diversity,
    length_penalty=arguments.length_penalty, length_basis=arguments.length_basis,
    max_new_tokens=arguments.max_new_tokens)
  source, tokenizer, partitioner = models.load(arguments)
  texts = [row.text for row in rows]
  generator = Generator(
    source.decoder, source.of_decoder(source.params(partitioner)), tokenizer, partitioner)
  answers = rewrite(generator, texts, options)
  is_single = len(texts) == options.num_return_sequences == 1
  for i, (text, own) in enumerate(zip(texts, answers)):
    for answer in own:
      if arguments.json:
        print(json.dumps({"prompt": text, **answer._asdict()}))
      else:
        print(answer.text if is_single else f"[{i}] {answer.text}")
    empty = sum(answer.is_unchanged for answer in own)
    if empty:
      print(f"lmops: prompt {i}: the policy wrote nothing in {empty} of {len(own)} answers; they "
            "are the prompt as it was.", file=sys.stderr)
  return 0


ACTIONS = {"rewrite": (add_options, run)}
