"""Questions about boxes, made from GrIT's expressions (arXiv:2306.14824, section 4.1 and table 5).

"locate": the expression is given and its boxes are learned,

    <grounding> <phrase> a dog in a field </phrase>  ->  <object> ul lr </object>

"describe": a box is given and its expression is learned, in one of six forms,

    What is <phrase> it </phrase> <object> ul lr </object> ?  ->  It is a dog in a field.

`<grounding>` asks for boxes, so it stands in front of the first kind alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from lmops_jax.config.setting_types import Probability, Seed, component
from lmops_jax.data.documents import document_id
from lmops_jax.data.grit.files import GritCorpus, GritExample
from lmops_jax.data.grit.pairs import chosen, draw
from lmops_jax.data.grounded_text import GroundedText, Located
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record


class Template(NamedTuple):
  """A way to ask for an expression.

  Attributes:
    prompt: the question, or the beginning of a sentence.
    named: what of it stands for the box.
    answer: with `{}` for the expression.
  """

  prompt: str
  named: str
  answer: str


TEMPLATES = (
  Template("What is it?", "it", " It is {}."),
  Template("What is this?", "this", " This is {}."),
  Template("Describe this object.", "this object", " This object is {}."),
  Template("It is", "It", " {}."),
  Template("This is", "This", " {}."),
  Template("The object is", "The object", " {}."),
)


def locate(expression: str, boxes: tuple) -> tuple[GroundedText, GroundedText]:
  """The question where something is, and the answer; boxes are fractions of the picture."""
  asked = GroundedText(expression, [Located(0, len(expression), ())])
  return asked, GroundedText("", [Located(0, 0, tuple(boxes))], asks=False)


def describe(expression: str, box: tuple, template: Template) -> tuple[GroundedText, str]:
  """The question what is in a box, and the answer."""
  start = template.prompt.index(template.named)
  span = Located(start, start + len(template.named), (box,))
  return GroundedText(template.prompt, [span], asks=False), template.answer.format(expression)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class GroundedInstructions(ImageCorpus):
  """A question about each referring expression of GrIT's rows.

  An expression with several boxes is always located, since a question about one of them would have
  no single answer. All choices depend on (seed, id, expression) alone.

  Attributes:
    corpus: GrIT's rows.
    min_score: regions whose score is not above it are left out.
    locate_share: of questions where something is; the others ask what is in a box.
    seed: seed of the choices.
  """

  corpus: GritCorpus
  min_score: float = 0.65
  locate_share: Probability = 0.5
  seed: Seed = 0

  def fingerprint(self) -> str:
    return f"{self.corpus.fingerprint()}-{self.min_score}-{self.locate_share}-{self.seed}"

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    """The questions. `left_out` also gets regions of a "low_score", expressions "inside" others
    and those that are "crossing", and rows "without_region"."""
    for example in self.corpus.examples(left_out):
      spans = chosen(
        example.row.ref_exps, left_out, min_score=self.min_score, only_outermost=True)
      if not spans:
        left_out.add("without_region", example.source)
      for span in spans:
        yield self._question(example, span)

  def _question(self, example: GritExample, span: Located) -> Record:
    identifier = document_id(f"{example.id}:{span.start}-{span.end}")
    expression = example.row.caption[span.start : span.end].strip()
    if len(span.boxes) > 1 or draw(identifier, "locate", self.seed) < self.locate_share:
      texts = locate(expression, span.boxes)
    else:
      number = int(draw(identifier, "template", self.seed) * len(TEMPLATES))
      texts = describe(expression, span.boxes[0], TEMPLATES[number])
    return Record(identifier, (example.picture, *texts), 2, example.source)
