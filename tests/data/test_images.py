"""Picture files to pixels: every kind of file, every refusal, and the numbers of resizing."""

import io
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmops_jax.data import images
from lmops_jax.data.images import ImageSettings
from lmops_jax.models.pixels import normalise


def _encoded(image, kind="PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def _noise(height, width, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, channels), np.uint8)


def _decoded(image, kind="PNG", **options):
  return np.asarray(images.decode(_encoded(image, kind, **options), "a picture"))


def _photographs():
  import matplotlib.cbook
  from sklearn.datasets import load_sample_image

  portrait = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
  named = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
  return [*named, images.read(portrait)]


@pytest.mark.parametrize("orientation, turned", [
  (1, lambda a: a),
  (2, lambda a: a[:, ::-1]),
  (3, lambda a: a[::-1, ::-1]),
  (4, lambda a: a[::-1]),
  (5, lambda a: a.transpose(1, 0, 2)),
  (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
  (6, lambda a: np.rot90(a, -1)),
  (8, lambda a: np.rot90(a)),
])
def test_the_orientation_of_exif_is_applied(orientation, turned):
  pixels = _noise(4, 7)
  exif = Image.Exif()
  exif[0x0112] = orientation
  got = _decoded(Image.fromarray(pixels), exif=exif)
  np.testing.assert_array_equal(got, turned(pixels))


def test_what_is_drawn_is_read_back_exactly():
  pixels = _noise(11, 7)
  got = ImageSettings(11, 7).pixels(images.as_png(pixels), "drawn")  # of its own size
  np.testing.assert_array_equal(got, pixels)


def test_grey_and_palettes_become_rgb():
  grey = _noise(3, 5, 1)[:, :, 0]
  np.testing.assert_array_equal(_decoded(Image.fromarray(grey)), np.stack([grey] * 3, axis=-1))
  black_and_white = Image.fromarray(grey > 127)
  assert black_and_white.mode == "1"
  want = np.stack([np.where(grey > 127, 255, 0)] * 3, axis=-1)
  np.testing.assert_array_equal(_decoded(black_and_white), want)
  few_colours = Image.fromarray(_noise(8, 8) // 128 * 128)
  paletted = few_colours.quantize(8)
  assert paletted.mode == "P"
  np.testing.assert_array_equal(_decoded(paletted), np.asarray(few_colours))


def test_what_is_transparent_lies_on_white():
  pixels = _noise(6, 6, 4)
  pixels[0, 0] = (10, 20, 30, 0)
  pixels[0, 1] = (10, 20, 30, 255)
  got = _decoded(Image.fromarray(pixels, "RGBA"))
  alpha = pixels[..., 3:] / 255
  want = pixels[..., :3] * alpha + 255 * (1 - alpha)
  assert np.abs(got - want).max() <= 1
  assert got[0, 0].tolist() == [255, 255, 255] and got[0, 1].tolist() == [10, 20, 30]
  palette = Image.new("P", (2, 1))
  palette.putpalette([200, 0, 0, 0, 0, 200])
  palette.putdata([0, 1])
  assert _decoded(palette, transparency=0).tolist() == [[[255, 255, 255], [0, 0, 200]]]
  half = _decoded(palette, transparency=bytes([255, 51])).tolist()  # an alpha of each colour
  assert half == [[[200, 0, 0], [204, 204, 244]]]
  grey = Image.merge("LA", [Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 0)])
  assert _decoded(grey).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_keep_their_upper_eight():
  values = np.array([[0, 128, 129, 32767, 65406, 65407, 65535]], np.uint16)
  want = np.rint(values / 257).astype(int)
  for kind in ("PNG", "TIFF"):
    got = _decoded(Image.fromarray(values), kind)
    assert got.shape == (1, 7, 3)
    np.testing.assert_array_equal(got[..., 0], want)
  wide = Image.fromarray(values.astype(np.int32))
  np.testing.assert_array_equal(_decoded(wide, "TIFF")[..., 2], want)


def test_cmyk_becomes_rgb():
  inks = np.zeros((1, 3, 4), np.uint8)
  inks[0, 1] = (255, 0, 0, 0)
  inks[0, 2] = (0, 0, 0, 255)
  got = _decoded(Image.fromarray(inks, "CMYK"), "TIFF")
  assert got.tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]
  photograph = Image.fromarray(np.full((16, 16, 3), (200, 30, 60), np.uint8)).convert("CMYK")
  assert np.abs(_decoded(photograph, "JPEG") - np.array([200, 30, 60.0])).max() <= 4


def test_of_an_animation_the_first_frame_is_taken_and_counted():
  frames = [Image.fromarray(np.full((4, 4, 3), 60 * i, np.uint8)) for i in range(3)]
  for kind in ("GIF", "PNG", "TIFF", "WEBP"):
    counts = Counter()
    data = _encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert not np.asarray(images.decode(data, "moving", counts=counts)).any()
    assert counts == {"animated": 1}
  counts = Counter()
  images.decode(_encoded(frames[0], "GIF"), "still", counts=counts)
  assert not counts


def _png_of_size(width, height):
  """The header of a PNG of that size, with hardly a byte of pixels."""
  def chunk(name, data):
    return (struct.pack(">I", len(data)) + name + data
            + struct.pack(">I", zlib.crc32(name + data)))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
          + chunk(b"IDAT", zlib.compress(bytes(16))) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data, message", [
  (b"", "a.png is empty, not a picture"),
  (b"hello", "a.png is not a picture in a format that Pillow knows"),
  (b"\x89PNG\r\n\x1a\n", "a.png is not a picture"),
  (_png_of_size(50_000, 50_000), "a.png has more than the 89,478,485 pixels"),
  (_png_of_size(10_000, 10_000), "a.png is 10000 x 10000 pixels, more than the 89,478,485"),
  (_png_of_size(0, 5), "a.png is not a picture"),
  (_png_of_size(100, 100), "a.png is cut off or damaged"),
  (_encoded(Image.fromarray(_noise(64, 64)), "PNG")[:3000], "a.png is cut off or damaged"),
  (_encoded(Image.fromarray(_noise(64, 64)), "JPEG")[:900], "a.png is cut off or damaged"),
  (_encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "a.png holds grey of 32-bit"),
  (_encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "from 70000 to 70000"),
])
def test_what_is_no_picture_is_named(data, message):
  with pytest.raises(ValueError, match=message) as caught:
    ImageSettings(8, 8).pixels(data, "a.png")
  assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_every_cut_of_a_file_is_told_or_read():
  """No error of Pillow's readers gets through as another exception."""
  for kind in ("PNG", "GIF", "JPEG", "TIFF", "BMP", "WEBP"):
    whole = _encoded(Image.fromarray(_noise(8, 8)), kind)
    refused = 0
    for end in range(len(whole)):
      try:
        assert images.decode(whole[:end], "cut").size == (8, 8)
      except ValueError as error:
        assert str(error).startswith("cut ")
        refused += 1
    assert refused > len(whole) // 4


def test_limits_are_settings():
  data = _encoded(Image.fromarray(_noise(10, 20)))
  assert ImageSettings(4, 4, max_pixels=200, min_side=10).pixels(data, "a").shape == (4, 4, 3)
  with pytest.raises(ValueError, match="a is 20 x 10 pixels, more than the 199 of"):
    ImageSettings(4, 4, max_pixels=199).pixels(data, "a")
  with pytest.raises(ValueError, match="a is 20 x 10 pixels and a side must have at least 11"):
    ImageSettings(4, 4, min_side=11).pixels(data, "a")
  with pytest.raises(ValueError, match="max_pixels=0 must be"):
    ImageSettings(max_pixels=0)
  with pytest.raises(ValueError, match="'crop' cuts a square and the size is 4 x 5"):
    ImageSettings(4, 5, fit="crop")


def test_a_line_of_pixels_is_squashed_and_not_blown_up():
  line = _encoded(Image.fromarray(_noise(1, 30_000)))
  assert ImageSettings(6, 4).pixels(line, "line.png").shape == (6, 4, 3)
  with pytest.raises(ValueError, match="line.png is 30000 x 1 pixels; .* has 1,505,280,000"):
    ImageSettings(fit="crop").pixels(line, "line.png")


def test_a_file_is_read_by_its_path(tmp_path):
  pixels = _noise(3, 4)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  np.testing.assert_array_equal(np.asarray(images.read(tmp_path / "a.png")), pixels)
  with pytest.raises(ValueError, match="b.png cannot be read"):
    images.read(tmp_path / "b.png")


def _bicubic(line, size):
  """Cubic convolution with a = -0.5, wider when the picture shrinks, of `[n,...]` on axis 0."""
  num = len(line)
  scale = num / size
  widened = max(scale, 1)
  out = []
  for i in range(size):
    centre = (i + 0.5) * scale
    low = max(int(centre - 2 * widened + 0.5), 0)
    high = min(int(centre + 2 * widened + 0.5), num)
    x = np.abs((np.arange(low, high) + 0.5 - centre) / widened)
    weight = np.where(
      x < 1, 1.5 * x**3 - 2.5 * x**2 + 1,
      np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    out.append(np.tensordot(weight / weight.sum(), line[low:high].astype(np.float64), 1))
  return np.clip(np.array(out), 0, 255)


# Of these sizes no number lies half-way between two levels, where Pillow rounds by its fixed point.
@pytest.mark.parametrize("shape, size", [((13, 29), (8, 8)), ((5, 4), (17, 13))])
def test_resizing_is_the_cubic_convolution_of_two_rounded_passes(shape, size):
  pixels = _noise(*shape)
  rows = np.floor(_bicubic(pixels.transpose(1, 0, 2), size[1]).transpose(1, 0, 2) + 0.5)
  want = _bicubic(rows, size[0])
  got = images.squash(Image.fromarray(pixels), *size)
  assert got.dtype == np.uint8 and got.shape == (*size, 3)
  assert np.abs(got - want).max() <= 0.5 + 1e-3


def test_pinned_pixels():
  """A ramp and a checkerboard, so that a release of Pillow with another filter is noticed."""
  ramp = (np.arange(7 * 9 * 3) * 5 % 251).reshape(7, 9, 3).astype(np.uint8)
  data = _encoded(Image.fromarray(ramp))
  squashed = ImageSettings(2, 3).pixels(data, "ramp")
  assert squashed[:, :, 0].tolist() == [[87, 135, 129], [119, 156, 109]]
  cut = ImageSettings(4, 4, fit="crop").pixels(data, "ramp")
  assert cut[:, :, 1].tolist() == [
    [69, 94, 121, 155], [94, 119, 150, 171], [112, 138, 155, 128], [118, 147, 145, 82]]


@pytest.mark.parametrize("width, height, size, want", [
  (640, 427, 224, (335, 224, 55, 0)),
  (427, 640, 224, (224, 335, 0, 55)),
  (100, 100, 224, (224, 224, 0, 0)),
  (3, 2, 5, (7, 5, 1, 0)),
])
def test_where_the_middle_begins(width, height, size, want):
  assert images.cropped(width, height, size) == want
  middle = images.crop(Image.fromarray(_noise(height, width)), size)
  assert middle.shape == (size, size, 3)


def _processors():
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  clip = transformers.CLIPImageProcessor
  squashing = clip(
    size={"height": 224, "width": 224}, do_center_crop=False, resample=Image.Resampling.BICUBIC)
  return {"crop": clip(), "squash": squashing}


@pytest.mark.parity
@pytest.mark.parametrize("fit", images.FITS)
def test_photographs_equal_those_of_transformers(fit):
  """Kosmos-2's processor is CLIP's with both sides given; see its converter and model card."""
  processor = _processors()[fit]
  for photograph in [*_photographs(), Image.fromarray(_noise(50, 333))]:
    want = processor(photograph, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    pixels = ImageSettings(fit=fit).pixels(_encoded(photograph), "a photograph")
    np.testing.assert_allclose(np.asarray(normalise(pixels)), want, atol=3e-7, rtol=0)


def test_real_files_are_read():
  import matplotlib

  folder = Path(matplotlib.get_data_path()) / "images"
  files = sorted(folder.glob("*.png"))
  assert len(files) > 10
  for file in files:
    assert ImageSettings(8, 8).pixels(file.read_bytes(), str(file)).shape == (8, 8, 3)
