"""Exact tools that check claims for verification: arithmetic and algebra, and satisfiability.

A model writes a claim on a line of its own; `formulas` reads it, and what is checked is built from
that tree alone. No tool runs, evaluates or opens anything that a model wrote, and each ends after
counted work. Off unless a run names them. The libraries are sympy (BSD) and python-sat (MIT), of
the extra `socratic`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from lmops_jax.host.words import shortened
from lmops_jax.systems.socratic.exact_arithmetic import Arithmetic
from lmops_jax.systems.socratic.formulas import Refused
from lmops_jax.systems.socratic.satisfiability import Satisfiability

MAX_CLAIMS = 8  # of one reply that are checked
_LINE = re.compile(r"^[ \t>*_#`-]{0,8}CLAIM[ \t]{1,4}([A-Za-z]{1,20})[*_` \t]{0,4}:[*_` \t]{0,4}"
                   r"([^\n]*)$", re.I | re.M)


class Claim(NamedTuple):
  """What a tool is to check."""

  tool: str
  text: str


class Tool(Protocol):
  """Checks claims.

  Attributes:
    name: as on the command line and in claims.
    form: lines that tell a model how to write a claim, without an example, which it might claim.
  """

  name: str
  form: str

  def check(self, claim: str) -> str:
    """What is true of a claim, in a sentence without its full stop.

    Raises:
      Refused: if it is not in the grammar, or too much work.
    """


def claims_of(text: str, names: Sequence[str]) -> tuple[tuple[Claim, ...], str]:
  """The claims of a reply for tools of these names, and the reply without their lines."""
  found = []

  def taken(match: re.Match) -> str:
    name, claim = match[1].lower(), match[2].strip().strip("`").strip()
    if name not in names:
      return match[0]
    found.append(Claim(name, claim))
    return ""

  rest = _LINE.sub(taken, text)
  return tuple(found), rest


def form_of(name: str) -> str:
  """The lines that show a model how to write claims for a tool."""
  return _TOOLS[name].form


def named_tools(names: Sequence[str]) -> dict[str, Tool]:
  """The tools by name.

  Raises:
    ValueError: for a name that there is not, or a library that is not installed.
  """
  found = {}
  for name in names:
    if name not in _TOOLS:
      raise ValueError(f"there is no tool {name!r}; there are {', '.join(_TOOLS)}.")
    if name in found:
      raise ValueError(f"the tool {name} is named twice; name it once.")
    found[name] = _TOOLS[name]()
  return found


def checked(tools: Mapping[str, Tool], claims: Sequence[Claim]) -> list[str]:
  """What tools say of claims, a line each; of more than `MAX_CLAIMS` the first ones."""
  found = []
  for claim in claims[:MAX_CLAIMS]:
    try:
      said = tools[claim.tool].check(claim.text)
    except Refused as error:
      said = f"not checked: {error}"
    found.append(f"{claim.tool}: {shortened(claim.text, 200)}: {said}")
  if len(claims) > MAX_CLAIMS:
    found.append(f"{len(claims) - MAX_CLAIMS} further claims were not checked: at most "
                 f"{MAX_CLAIMS} are")
  return found


_TOOLS: Mapping[str, type[Tool]] = {
  tool.name: tool for tool in (Arithmetic, Satisfiability)}
