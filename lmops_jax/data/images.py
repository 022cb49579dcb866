"""Picture files to pixels: any file that Pillow reads becomes `[height,width,3] uint8`.

How a file becomes RGB of 8 bits:

- EXIF's orientation is applied; colour profiles are not.
- Of an animation or of several pages the first is taken, and the file counted ("animated").
- What is transparent (an alpha channel, a transparent colour of a palette) lies on white.
- 16-bit grey keeps its 8 upper bits, rounded to the nearest; Pillow itself would clip it at 255.
- Palettes, grey, CMYK, YCbCr, Lab and HSV are converted by Pillow. Grey of 32-bit floats has no
  agreed range and is refused.

Files are resized on the host, by Pillow, with whose bicubic filter on 8-bit numbers CLIP was
trained. `models.pixels` does the rest on the device, where it also resizes what was drawn there.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import annotated_types as at
import numpy as np

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.host.foreign_files import printable, read_bytes
from lmops_jax.models.crops import cropped

if TYPE_CHECKING:
  from PIL import Image

FITS = ("squash", "crop")
LARGEST_PICTURE = 89_478_485  # pixels; beyond it Pillow takes a file for a decompression bomb
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's field, and its values for a quarter turn
_OF_16_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@component(module="data")
@dataclasses.dataclass(frozen=True)
class ImageSettings:
  """How a picture becomes pixels of one size.

  Attributes:
    height, width: the size in pixels.
    fit: "squash" to the size whatever the shape, as Kosmos does at inference; or "crop": the
      shorter side is resized and the middle cut out, as Kosmos and CLIP do in training.
    min_side: a picture with a shorter side is refused (Kosmos-1 leaves out those under 64).
    max_pixels: a picture with more, before or after resizing, is refused without decoding it.

  Raises:
    ValueError: for "crop" to a size that is no square.
  """

  height: PositiveInt = 224
  width: PositiveInt = 224
  fit: Literal[FITS] = "squash"
  min_side: PositiveInt = 1
  max_pixels: Annotated[int, at.Ge(1), at.Le(LARGEST_PICTURE)] = LARGEST_PICTURE

  def __post_init__(self):
    if self.fit == "crop" and self.height != self.width:
      raise ValueError(
        f"data.ImageSettings.fit='crop' cuts a square and the size is {self.height} x {self.width};"
        " set height and width to one number, or fit to 'squash'."
      )

  def pixels(self, data: bytes, where: str, counts: Counter[str] | None = None) -> np.ndarray:
    """Pixels of a picture file's contents, `[height,width,3] uint8`; arguments as for `decode`."""
    image = decode(
      data, where, max_pixels=self.max_pixels, min_side=self.min_side, counts=counts)
    if self.fit == "squash":
      return squash(image, self.height, self.width)
    width, height = cropped(*image.size, self.height)[:2]
    if width * height > self.max_pixels:
      raise ValueError(
        f"{printable(where)} is {image.width} x {image.height} pixels; with its shorter side "
        f"resized to {self.height} it has {width * height:,} and data.ImageSettings.max_pixels is "
        f"{self.max_pixels:,}; leave so long a picture out, or set fit to 'squash'."
      )
    return crop(image, self.height)


def read(path: Path | str, **options) -> Image.Image:
  """A picture from a file; options and errors as for `decode`."""
  return decode(read_bytes(path), str(path), **options)


def decode(
  data: bytes, where: str, *, max_pixels: int = LARGEST_PICTURE, min_side: int = 1,
  counts: Counter[str] | None = None,
) -> Image.Image:
  """A picture from a file's contents, as 8-bit RGB by the rules of the module.

  Args:
    where: names the picture in errors.
    max_pixels: the most pixels, by the header, before anything is decoded.
    min_side: the least length of the shorter side, in pixels.
    counts: gets "animated".

  Raises:
    ValueError: for a file that is empty, no picture, cut off, damaged, too large or too small.
  """
  from PIL import Image, ImageOps

  where = printable(where)
  if not data:
    raise ValueError(f"{where} is empty, not a picture; fetch it again or leave it out.")
  try:
    image = Image.open(io.BytesIO(data))
    width, height = image.size
  except Image.UnidentifiedImageError:
    raise ValueError(
      f"{where} is not a picture in a format that Pillow knows; give PNG, JPEG, WebP or the like."
    ) from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise ValueError(
      f"{where} has more than the {max_pixels:,} pixels of data.ImageSettings.max_pixels "
      f"({_first_line(error)}); make it smaller or leave it out."
    ) from error
  except Exception as error:  # a damaged header: each of Pillow's readers has errors of its own
    raise ValueError(
      f"{where} is a damaged picture ({_first_line(error)}); fetch it again or leave it out."
    ) from error
  if width * height > max_pixels:
    raise ValueError(
      f"{where} is {width} x {height} pixels, more than the {max_pixels:,} of "
      "data.ImageSettings.max_pixels; make it smaller, leave it out, or raise the limit."
    )
  if min(width, height) < min_side:
    raise ValueError(
      f"{where} is {width} x {height} pixels and a side must have at least {min_side}; leave it "
      "out, or lower data.ImageSettings.min_side."
    )
  try:
    if getattr(image, "is_animated", False) and counts is not None:  # not of every format
      counts["animated"] += 1
    image.load()
    image = ImageOps.exif_transpose(image)
  except Exception as error:  # as above
    raise ValueError(
      f"{where} is cut off or damaged ({_first_line(error)}); fetch it again or leave it out."
    ) from error
  return to_rgb(image, where)


def to_rgb(image: Image.Image, where: str = "the picture") -> Image.Image:
  """A decoded picture as 8-bit RGB by the rules of the module.

  Raises:
    ValueError: for grey of floats, or of whole numbers that do not fit into 16 bits.
  """
  from PIL import Image

  if image.mode == "F":
    raise ValueError(
      f"{printable(where)} holds grey of 32-bit floats, which has no agreed range; save it with 8 "
      "or 16 bits."
    )
  if image.mode in _OF_16_BITS:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
      raise ValueError(
        f"{printable(where)} holds grey from {values.min()} to {values.max()}, outside of 16 bits; "
        "save it with 8 or 16 bits."
      )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def squash(image: Image.Image, height: int, width: int) -> np.ndarray:
  """An RGB picture at another size, its shape not kept: bicubic, `[height,width,3] uint8`."""
  return np.asarray(image.resize((width, height), _bicubic()))


def crop(image: Image.Image, size: int) -> np.ndarray:
  """The middle of an RGB picture whose shorter side is resized: bicubic, `[size,size,3] uint8`."""
  width, height, left, top = cropped(*image.size, size)
  image = image.resize((width, height), _bicubic())
  return np.asarray(image.crop((left, top, left + size, top + size)))


def upright_size(data: bytes, where: str) -> tuple[int, int]:
  """Width and height of the picture that `decode` would make, from the file's header alone.

  Raises:
    ValueError: for a file that is no picture, or whose header is damaged.
  """
  from PIL import Image

  try:
    image = Image.open(io.BytesIO(data))
    is_turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
  except Exception as error:  # a damaged header: each of Pillow's readers has errors of its own
    raise ValueError(
      f"{printable(where)} is no picture, or a damaged one ({_first_line(error)}); fetch it again "
      "or leave it out."
    ) from error
  return image.size[::-1] if is_turned else image.size


def as_png(pixels: np.ndarray) -> bytes:
  """A file with exactly these pixels, `[height,width,3] uint8`, for pictures that are drawn."""
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def _bicubic() -> Image.Resampling:
  from PIL import Image

  return Image.Resampling.BICUBIC


def _first_line(error: Exception) -> str:
  return printable(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
