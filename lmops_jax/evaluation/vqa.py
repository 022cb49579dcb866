"""Accuracy of answers to questions about pictures, as VQAv2 and VizWiz compute it.

An answer is right by as many of ten people's answers as equal it, up to three, each left out in
turn (arXiv:1505.00468, section 4). Normalisation is that of the official script of 2017 with its
oddities, which published figures were measured with; a correction of 2021 normalises articles and
numbers of people's answers too, and nothing at all when these agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")
_MOST_POINTS = 32  # re.UNICODE, which the script gives in the place of a count
_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {
  word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
# With one apostrophe left out, a word is read as one of these. Capital letters never come to it.
_CONTRACTIONS = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
  haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
  might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
  shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
  someone's something'd something'd've something'll that's there'd there'd've there're there's
  they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
  what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
  won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_READ_AS = {
  word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, sign in enumerate(word)
  if sign == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the script


def normalised(answer: str) -> str:
  """An answer as it is compared: without punctuation and articles, digits for numbers.

  Punctuation next to a blank is dropped, other punctuation becomes a blank; but in an answer with a
  comma between digits ("1,000") all of it is dropped. Points stay in front of digits only.
  """
  answer = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
  words = (_NUMBERS.get(word, word) for word in answer.lower().split())
  return " ".join(_READ_AS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
  drops_all = _COMMA_IN_NUMBER.search(text) is not None
  found = text
  for sign in _PUNCTUATION:
    drops = drops_all or f"{sign} " in text or f" {sign}" in text
    found = found.replace(sign, "" if drops else " ")
  return _POINT.sub("", found, count=_MOST_POINTS)


def accuracy(answer: str, golds: Sequence[str]) -> float:
  """How right an answer is, 0 to 1.

  Args:
    answer: as it was generated.
    golds: the people's answers, ten in VQAv2 and VizWiz. They are released in normalised form; of
      theirs punctuation alone is normalised, and only when they do not all agree, as the script
      does.

  Returns:
    The mean, over each gold answer left out, of min(equal others / 3, 1).

  Raises:
    ValueError: fewer than two gold answers.
  """
  if len(golds) < 2:
    raise ValueError(
      f"the VQA accuracy compares with several people's answers, and {len(golds)} are given "
      f"({', '.join(map(repr, golds)) or 'none'}); give all of a question, or measure exact_match."
    )
  given = normalised(answer)
  agree = len(set(golds)) == 1
  equal = np.array([(gold if agree else _without_punctuation(gold)) == given for gold in golds])
  return float(np.minimum((equal.sum() - equal) / 3, 1).mean())
