"""Sizes and offsets of pictures whose middle is cut out; plain integers, without jax."""

from __future__ import annotations


def cropped(width: int, height: int, size: int) -> tuple[int, int, int, int]:
  """How the shorter side of a picture becomes `size` and the middle is cut out.

  The longer side is `size * long / short`, rounded down, and the middle begins at half of the
  excess, rounded down, as in transformers. Boxes in the picture have to follow it.

  Args:
    width, height: the picture's. size: the square's side.

  Returns:
    Width and height after resizing; left and top of the square within the resized picture.
  """
  shorter = min(width, height)
  width, height = (
    size if side == shorter else int(size * side / shorter) for side in (width, height))
  return width, height, (width - size) // 2, (height - size) // 2
