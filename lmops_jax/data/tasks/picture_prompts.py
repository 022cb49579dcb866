"""Prompts of evaluations with pictures: Kosmos-1's, word for word (arXiv:2302.14045, section 4).

Kosmos-2's and MetaLM's are told apart below.

`IMAGE` stands where a picture goes. The paper's misspellings and missing blanks are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmops_jax.data.boxes import GROUNDING
from lmops_jax.data.multimodal import IMAGE

CAPTION = f"{IMAGE} An image of"
QUESTION = f"{IMAGE} Question: {{question}} Answer:"
SENTIMENT = f"{IMAGE} Question: what is the sentiment of the opinion? Answer:"
HATE = f"{IMAGE} Question: does this picture contain real hate speech? Answer:"
PHOTO = f"{IMAGE} The photo of the"
WEB_PAGE = (
  "Given the context below from web page, extract the answer from the given text like this: "
  "Qusestion: Who is the publisher of this book? Answer: Penguin Books Ltd. Context: {text} Q: "
  "{question} A:"
)
INTRODUCE = f"{IMAGE} Introduce this picture in detail:"
# Of Kosmos-2's evaluation (arXiv:2306.14824, section 4) and its model card.
GROUNDED_CAPTION = f"{IMAGE}{GROUNDING} An image of"
GROUNDED_QUESTION = f"{IMAGE}{GROUNDING} Question: {{question}} Answer:"
PHRASE = f"{IMAGE}{GROUNDING}{{before}}<phrase> {{phrase}}</phrase>"
EXPRESSION = f"{IMAGE}{GROUNDING}<phrase> {{phrase}}</phrase>"
DESCRIBE = f"{IMAGE}{GROUNDING}<phrase> It</phrase>{{boxes}} is"
# Of MetaLM's evaluation (arXiv:2206.06336, sections 4.2 to 4.4). Two pictures are read with the
# sentence each, and what is encoded stands side by side.
SUMMARIZE = f"{IMAGE} Summarize this image:"
CAPTION_OF = f"{IMAGE} caption:"
ASKED = f"{IMAGE} question: {{question}} answer:"
OF_PAIR = f"{IMAGE} {{sentence}} {IMAGE} {{sentence}} it is"
ENTAILED = f"{IMAGE} {{hypothesis}} it is"
YES = " Yes"  # its likelihood ranks the candidates of a matrix

_NUMBERS = {3: "three", 4: "four", 8: "eight"}


def matrix_prompt(num_context: int) -> str:
  """The prompt of Raven's matrices, with the candidate as the last picture.

  Raises:
    ValueError: for other than 3, 4 or 8 pictures of context.
  """
  if num_context not in _NUMBERS:
    raise ValueError(
      f"a matrix has {num_context} pictures of context; it has 3 (2x2), 4 (a row) or 8 (3x3)."
    )
  pictures = " ".join([IMAGE] * num_context)
  return (f"Here are {_NUMBERS[num_context]} images: {pictures} The following image is: {IMAGE} Is "
          "it correct?")


def after_rationale(rationale: str, prompt: str = SENTIMENT) -> str:
  """The second stage of a chain of thought: the picture, its rationale, then the question.

  Args:
    rationale: the model's text behind `INTRODUCE`; an empty one gives `prompt` itself.
    prompt: a prompt that starts with a picture.
  """
  said = rationale.strip()
  return f"{IMAGE} {said}{prompt.removeprefix(IMAGE)}" if said else prompt


def described_prompt(
  category: str, names: Sequence[str], descriptions: Sequence[str] | None = None
) -> str:
  """Classification with descriptions of the classes, or with their names in the question alone.

  Args:
    category: the category of all classes, such as "woodpecker".
    names: names of the classes.
    descriptions: one for each class; None: the paper's baseline, which names the options instead.
  """
  question = f"{IMAGE} Question:what is the name of the {category} in the picture"
  if descriptions is None:
    return f"{question}, {' or '.join(names)}? Answer:"
  told = " ".join(
    f"Description of {name}: {text}" for name, text in zip(names, descriptions, strict=True))
  return f"{told} {question}? Answer:"
