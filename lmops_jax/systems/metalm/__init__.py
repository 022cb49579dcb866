"""MetaLM: language models as interfaces of encoders (arXiv:2206.06336).

Importing this package registers everything its gin files name.
"""

from lmops_jax.systems.metalm.picture_rows import Pairs, PlainTexts
from lmops_jax.systems.metalm.picture_start import FinishedPictureRun
from lmops_jax.systems.metalm.pretrain import Pretrain
from lmops_jax.systems.metalm.scenes import Pictures
from lmops_jax.systems.metalm.starts import FinishedRun, PublishedReader
from lmops_jax.systems.metalm.system import MetaLM
from lmops_jax.systems.metalm.task_tuning import TaskTuning
from lmops_jax.systems.metalm.vision_language import VisionLanguage

__all__ = [
  "FinishedPictureRun", "FinishedRun", "MetaLM", "Pairs", "Pictures", "PlainTexts", "Pretrain",
  "PublishedReader", "TaskTuning", "VisionLanguage"]
