"""Tasks with pictures: readers of the formats that data sets come in, and of JSON lines.

Rows are those of `Task`, with `<image>` in the prompt for each of `Example.images`, which are
paths. Of pictures nothing is read here but the size of those whose boxes a user gives in pixels.
"""

from lmops_jax.data.tasks.pictures.choice import PictureTaskChoice
from lmops_jax.data.tasks.pictures.named import picture_rows_task, picture_task
from lmops_jax.data.tasks.pictures.registry import PICTURE_ENTRIES

__all__ = ["PICTURE_ENTRIES", "PictureTaskChoice", "picture_rows_task", "picture_task"]
