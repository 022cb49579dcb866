"""Words of captions, as the evaluation of COCO captions takes them, without Java.

The COCO evaluation runs Stanford's Penn Treebank tokeniser on lower-cased captions and drops
punctuation. These rules give the same words wherever captions were compared with it (a file of
golden values beside the tests). They are:

- contractions and possessives are parted: "ca n't", "it 's", "dog 's"; so are "can not", "gon na",
  "got ta", "wan na", "'t is";
- numbers with commas, points, colons or slashes, words with hyphens, slashes, underscores or
  apostrophes inside ("o'clock"), addresses and tags stay whole, abbreviations keep their point
  ("u.s.", "mr.", "etc.");
- other signs are words ("$", "%", "&"), brackets are "-lrb-", "-rrb-" and so on, and are kept, as
  they are by the COCO evaluation;
- points, commas, colons, semicolons, dashes, quotes, question and exclamation marks are dropped.

Rare abbreviations, joined ones ("Mon.-Fri.") and emoticons are left out.
"""

from __future__ import annotations

import re

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PARTED = {
  "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me",
  "lemme": "lem me", "'tis": "'t is", "'twas": "'t was",
}
_DROPPED = frozenset(["'", "`", ".", "?", "!", ",", ":", ";", "-", "--", "..."])
_ABBREVIATIONS = (
  "mr|mrs|ms|dr|prof|st|ave|blvd|rd|jr|sr|inc|co|corp|ltd|vs|etc|mt|ft|gen|gov|lt|sgt|capt|rev|"
  "jan|feb|aug|sept|sep|oct|nov|dec|mon|tue|wed|thu|fri|fla|calif|mass|mo|va|pa|bros|dept|est"
)
_QUOTES = str.maketrans({
  "\u2018": "'", "\u2019": "'", "\u201c": " ", "\u201d": " ", '"': " ", "`": " ", "\u2026": " ",
  "\u2013": " -- ", "\u2014": " -- ",
})
_ENDING = r"(?:n't|'(?:s|m|re|ve|ll|d))(?!\w)"
_TOKEN = re.compile(
  rf"""
    (?:https?://|www\.)\S+
  | </?[a-z][^<>]*>
  | (?:[a-z]\.){{2,}}                          # u.s., e.g., p.m.
  | (?:{_ABBREVIATIONS})\.(?!\w)
  | no\.(?=\s*\d)
  | \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?!\w|-\w)
  | '(?:tis|twas)(?!\w) | 'n'
  | {_ENDING}
  | o'clock | [A-Z]+&[A-Z]+(?!\w) | y'(?=all)
  | \w+?(?={_ENDING})
  | \w+(?:[-/_]+\w+|[.]\w+)*?(?={_ENDING})
  | \w+(?:[-/]\w+|[.]\w+)*
  | -{{1,}} | \.{{2,}} | \S
  """,
  re.VERBOSE | re.IGNORECASE,
)


def tokenised(caption: str) -> str:
  """The words of a caption in lower case, one blank between them; see the module's rules."""
  found = []
  for match in _TOKEN.finditer(caption.translate(_QUOTES)):
    token = match.group()
    word = token.lower()
    if "&" in word and len(word) > 1 and not token.isupper():
      word = word.replace("&", " & ")
    word = _PARTED.get(word, _BRACKETS.get(word, word))
    if word not in _DROPPED and set(word) not in ({"-"}, {"."}):
      found.append(word)
  return " ".join(found)
