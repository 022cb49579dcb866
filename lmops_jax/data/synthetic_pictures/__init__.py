"""Pictures made on the spot, of which everything is known: functions of (seed, index) alone.

`Scenes` has pictographs on photographs, with captions, questions, referring expressions, documents
of several pictures and episodes with invented names; `Matrices` has Raven's matrices,
`RenderedTexts` words and sentences to be read, and `StyledPictures` things in styles that words of
a caption change. They stand in for photographs and benchmarks in a run without any download. Fonts
and photographs come from installed packages, so pixels may differ if Pillow's JPEG decoder or
Matplotlib's fonts do.
"""

from lmops_jax.data.synthetic_pictures.matrices import Matrices, Matrix
from lmops_jax.data.synthetic_pictures.matrix_solver import fitting_candidates
from lmops_jax.data.synthetic_pictures.rendered_text import RenderedText, RenderedTexts
from lmops_jax.data.synthetic_pictures.scene_texts import (
  Caption,
  Phrase,
  Question,
  caption,
  captions,
  description,
  question_of_text,
  questions,
  questions_in_text,
  referring_expressions,
)
from lmops_jax.data.synthetic_pictures.scenes import Pictograph, Scene, Scenes
from lmops_jax.data.synthetic_pictures.sequences import (
  Episode,
  PicturedText,
  described,
  episode,
  interleaved,
  introduction,
)
from lmops_jax.data.synthetic_pictures.styled_pictures import StyledPicture, StyledPictures

__all__ = [
  "Caption",
  "Episode",
  "Matrices",
  "Matrix",
  "Phrase",
  "Pictograph",
  "PicturedText",
  "Question",
  "RenderedText",
  "RenderedTexts",
  "Scene",
  "Scenes",
  "StyledPicture",
  "StyledPictures",
  "caption",
  "captions",
  "described",
  "description",
  "episode",
  "fitting_candidates",
  "interleaved",
  "introduction",
  "question_of_text",
  "questions",
  "questions_in_text",
  "referring_expressions",
]
