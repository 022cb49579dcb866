"""Reading what a model wrote: markers, numbered lists, JSON fences, citations.

Markers are found in any case, at the beginning of a line, with or without Markdown's stars; if one
occurs more than once the last one counts, because models think aloud before they conclude. Nothing
in a reply is evaluated or opened, and every pattern here takes time linear in its length.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence

from lmops_jax.systems.socratic.problems import normalised

_DECOR = r"[ \t>*_#`-]{0,8}"
_COLON = r"[*_` \t]{0,4}:[*_` \t]{0,4}"
_LIST_ITEM = re.compile(r"^[ \t]{0,8}(\d{1,2})[.)][ \t]+(\S.*)$", re.M)
_NEEDS = re.compile(r"\(\s*needs?\b([^)]{0,80})\)", re.I)
_FENCE = "```"
_MOST_BLOCKS = 20  # of JSON that are tried, the last ones
_REFUSED = re.compile(
  r"\s{0,20}(i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t (?:help|assist|comply|do)|"
  r"i am unable|i['’]m unable|as an ai\b)", re.I)


@dataclasses.dataclass(frozen=True)
class Result:
  """What a reply says.

  Attributes:
    text: a conclusion, a new problem's statement, or an issue.
    word: a decision: SOLVE, REPHRASE, SPLIT; OK, ISSUE, CHILD.
    answer: a short value.
    bridge: of a transform.
    parts: statements and the earlier parts that each needs, from 1.
    child: number of the part that a verdict names, from 1.
    cited: numbers of the parts that the text cites as [Sk].
    claims: what tools are to check, `(tool, text)` each.
    fallback: whether markers were missing and the pattern's fallback was taken.
  """

  text: str = ""
  word: str = ""
  answer: str | None = None
  bridge: str = ""
  parts: tuple[tuple[str, tuple[int, ...]], ...] = ()
  child: int = 0
  cited: frozenset[int] = frozenset()
  claims: tuple[tuple[str, str], ...] = ()
  fallback: bool = False


@dataclasses.dataclass(frozen=True)
class Unreadable:
  """A reply that is not in the form that was asked for.

  Attributes:
    reason: what is missing.
    result: what to take if a retry is no better.
  """

  reason: str
  result: Result | None = None


def is_refusal(text: str) -> bool:
  """Whether a reply begins as refusals do."""
  return _REFUSED.match(text) is not None


def without_form(text: str, form: str) -> str:
  """A reply without the lines that say what a line of the form says, behind whatever marker.

  Case, punctuation and Markdown are folded.
  """
  def plain(text: str) -> str:
    return normalised(text).replace("*", "").replace("`", "").lstrip("-#")

  def said(line: str) -> str:
    return plain(line.rpartition(":")[2]) or plain(line)

  known = {said(line) for line in form.splitlines()} - {""}
  return "".join(line for line in text.splitlines(keepends=True) if said(line) not in known)


def fields(text: str, names: Sequence[str]) -> dict[str, str]:
  """What stands behind each marker `NAME:`, up to the next marker; the last occurrence wins.

  A JSON object in a fence, or alone, is taken too, with the names as its keys.
  """
  found = _json_fields(text, names)
  if found:
    return found
  marks = list(_marker("|".join(names)).finditer(text))
  found = {}
  for mark, following in zip(marks, [*marks[1:], None]):
    end = following.start() if following else len(text)
    found[mark[1].upper()] = text[mark.end() : end].strip().removesuffix(_FENCE).strip()
  return found


@functools.cache
def _marker(alternatives: str) -> re.Pattern:
  return re.compile(rf"^{_DECOR}({alternatives}){_COLON}", re.I | re.M)


def _json_fields(text: str, names: Sequence[str]) -> dict[str, str]:
  blocks = [text] if text.lstrip().startswith("{") else []
  pieces = text.split(_FENCE)
  fenced = [piece.removeprefix("json") for piece in pieces[1::2]]
  blocks += [block for block in fenced if block.lstrip().startswith("{")]
  for block in blocks[: -_MOST_BLOCKS - 1 : -1]:
    try:
      value = json.loads(block)
    except (ValueError, RecursionError):
      continue
    if isinstance(value, dict):
      by_name = {str(key).upper(): item for key, item in value.items()}
      found = {name: _plain(by_name[name]) for name in names if name in by_name}
      if found:
        return found
  return {}


def _plain(item) -> str:
  return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)


def word_of(text: str, words: Sequence[str]) -> str | None:
  """The one of some words that a text begins with, or the only one that it holds.

  Those in capitals, as they were offered, go before others.
  """
  first = re.match(r"[\W_]{0,20}([A-Za-z]+)", text)
  if first and first[1].upper() in words:
    return first[1].upper()
  for flags in (0, re.I):
    held = {word for word in words if re.search(rf"\b{word}\b", text, flags)}
    if held:
      return held.pop() if len(held) == 1 else None
  return None


_BEGINS = re.compile(
  rf"\s{{0,8}}{_DECOR}(CONCLUSION|ANSWER|DECISION|REASON|PROBLEM|BRIDGE|VERDICT|ISSUE|KEY|"
  rf"PART[ \t]{{1,4}}\d{{1,2}}|CLAIM[ \t]{{1,4}}[a-z]{{1,20}}){_COLON}", re.I)


def continued(text: str, more: str) -> str:
  """A reply that was cut off and what followed; a marker that follows begins a line."""
  return f"{text}\n{more}" if _BEGINS.match(more) else text + more


def parts_of(text: str, most: int) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
  """Parts from lines `PART n:`, or from a numbered list; None for fewer than 2 or more than `most`.
  """
  marker = re.compile(rf"^{_DECOR}PART[ \t]{{1,4}}(\d{{1,2}})\b([^:\n]{{0,100}}){_COLON}",
                      re.I | re.M)
  marks = list(marker.finditer(text))
  found: dict[int, str] = {}
  for mark, following in zip(marks, [*marks[1:], None]):
    end = following.start() if following else len(text)
    body = text[mark.end() : end].strip().removesuffix(_FENCE).strip()
    found[int(mark[1])] = f"{mark[2].strip(' *_')} {body}".strip()
  if not found:
    found = {int(item[1]): item[2].strip() for item in _LIST_ITEM.finditer(text)}
  numbers = sorted(found)
  if numbers != list(range(1, len(numbers) + 1)) or not 2 <= len(numbers) <= most:
    return None
  parts = []
  for number in numbers:
    needs = {int(n) for note in _NEEDS.findall(found[number]) for n in re.findall(r"\d{1,2}", note)}
    statement = " ".join(_NEEDS.sub(" ", found[number]).split())
    if not statement:
      return None
    parts.append((statement, tuple(sorted(n for n in needs if 1 <= n < number))))
  return tuple(parts)


def cited(text: str) -> frozenset[int]:
  """Numbers k of the citations [Sk], also of [S1, S2]."""
  return frozenset(int(n) for group in re.findall(r"\[([^\[\]\n]{1,80})\]", text)
                   for n in re.findall(r"\bS(\d{1,2})\b", group, re.I))


def key_span(text: str) -> tuple[tuple[int, int], ...]:
  """Where the key passage of a reply stands: behind `KEY:`, else its first and last paragraph."""
  marks = list(re.finditer(rf"^{_DECOR}KEY[*_` \t]{{0,4}}:[ \t]{{0,4}}", text, re.I | re.M))
  if marks:
    end = text.find("\n\n", marks[-1].end())
    return ((marks[-1].end(), len(text) if end < 0 else end),)
  first = re.match(r"\s*", text).end()
  end = text.find("\n\n", first)
  last = text.rstrip().rfind("\n\n")
  if end < 0:
    return ((first, len(text)),)
  return ((first, end), (last + 2, len(text.rstrip())))
