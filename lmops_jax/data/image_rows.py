"""Rows of fixed shape with pictures, on disk: tokens in arrays, pictures where they were found.

Short examples share a row (first fit in order, by tokens and by pictures): attention stays within
an example (`segment_ids`) and positions start anew. The pictures of a batch are decoded in threads
when it is asked for, or once and for all if the pictures of all rows fit into the memory given to
them. Texts longer than a row are for `packing.pack`, which cuts them into several.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lmops_jax.data import supervised
from lmops_jax.data.first_fit import first_fit
from lmops_jax.data.growing_arrays import growing
from lmops_jax.data.image_tokens import Encoded, ImageTokens, cut
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.multimodal import Picture
from lmops_jax.host.whole_files import write_text

METADATA_FILE = "rows.json"
_FIELDS = ("tokens", "targets", "loss_mask", "positions", "segment_ids", "vector_index")
_CONTENTS, _PATHS = "pictures.bin", "picture_paths.bin"
_HERE = -1  # the number of the file `_CONTENTS`


def write_rows(
  directory: Path | str, examples: Iterable[Encoded], ids: ImageTokens, *, length: int,
  pictures_per_row: int, pictures_per_example: int = 5, share: bool = True,
  too_long: str = "drop",
) -> dict[str, int]:
  """Packs examples into rows and writes them; memory does not grow with their number.

  Args:
    directory: made if needed; rows of an earlier attempt are replaced.
    examples: the examples in order, with something learned in each.
    ids: the ids that they were encoded with.
    length: S, predicted positions of a row.
    pictures_per_row: I. pictures_per_example: the most of an example, <= I (Kosmos-1 takes 5).
    share: put several examples into a row; False gives each its own.
    too_long: "drop" an example with more tokens or pictures or "cut" it in front of what is too
      much, both counted, or make it an "error". No picture is cut.

  Returns:
    Counts: `examples`, `rows`, `tokens`, `learned_tokens`, `pictures`, and examples "dropped" or
    "cut".

  Raises:
    ValueError: if an example is too long (with "error"), none is left, or a picture has no room.
  """
  _check_settings(length, pictures_per_row, pictures_per_example, too_long, ids)
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / METADATA_FILE).unlink(missing_ok=True)
  counts = Counter(dict.fromkeys(
    ("examples", "rows", "tokens", "learned_tokens", "pictures", "dropped", "cut"), 0))
  fitting = _fitting(examples, length, pictures_per_example, too_long, ids, counts)
  sized = ((example, (len(example.tokens) - 1, len(example.pictures))) for example in fitting)
  with contextlib.ExitStack() as stack:
    append = {
      name: stack.enter_context(growing(
        directory / f"{name}.npy", "|u1" if name == "loss_mask" else "<i4", (length,)))
      for name in _FIELDS
    }
    append["picture_index"] = stack.enter_context(
      growing(directory / "picture_index.npy", "<i8", (pictures_per_row,)))
    append["ids"] = stack.enter_context(growing(directory / "ids.npy"))
    store = stack.enter_context(_store(directory))
    for members in first_fit(sized, (length, pictures_per_row), share=share):
      row = arrays_of(members, length, ids)
      numbers = [store(picture) for example in members for picture in example.pictures]
      row["picture_index"] = np.array(numbers + [-1] * (pictures_per_row - len(numbers)), np.int64)
      row["ids"] = np.int64(members[0].id)
      for name, values in row.items():
        append[name](values[None])
      counts["rows"] += 1
      counts["examples"] += len(members)
      counts["tokens"] += sum(len(example.tokens) - 1 for example in members)
      counts["learned_tokens"] += int(row["loss_mask"].sum())
      counts["pictures"] += len(numbers)
  if not counts["rows"]:
    raise ValueError(
      f"no example is left for {directory}: {counts['dropped']} have more than {length} tokens or "
      f'{pictures_per_example} pictures; raise the limits, or set too_long to "cut".'
    )
  metadata = {
    "length": length, "pictures_per_row": pictures_per_row, "ids": dataclasses.asdict(ids),
    "counts": dict(counts),
  }
  write_text(directory / METADATA_FILE, json.dumps(metadata, indent=1) + "\n")
  return dict(counts)


def _check_settings(length, pictures_per_row, pictures_per_example, too_long, ids) -> None:
  if too_long not in supervised.TOO_LONG:
    raise ValueError(f"too_long={too_long!r} is not one of {', '.join(supervised.TOO_LONG)}.")
  if length < 1 or not 0 <= pictures_per_example <= pictures_per_row:
    raise ValueError(
      f"length={length} must be 1 or more, and pictures_per_example={pictures_per_example} from 0 "
      f"to pictures_per_row={pictures_per_row}."
    )
  least = len(ids.block) + 2  # <s> in front, and one token behind to learn
  if pictures_per_row and length + 1 < least:
    raise ValueError(
      f"length={length} has no room for a picture of {ids.num_slots} vectors and a word; set it to "
      f"{least - 1} or more, or pictures_per_row to 0."
    )


def _fitting(
  examples: Iterable[Encoded], length: int, num_pictures: int, too_long: str, ids: ImageTokens,
  counts: Counter[str],
) -> Iterator[Encoded]:
  """The examples that fit into a row; others are treated as `write_rows` says."""
  for example in examples:
    if len(example.tokens) - 1 > length or len(example.pictures) > num_pictures:
      if too_long == "error":
        raise ValueError(
          f"the example {example.id} has {len(example.tokens)} tokens and {len(example.pictures)} "
          f"pictures, and a row takes {length + 1} and {num_pictures}; raise them, or set too_long "
          'to "drop" or "cut".'
        )
      example = cut(example, length + 1, num_pictures, ids) if too_long == "cut" else None
      counts["dropped" if example is None else "cut"] += 1
    if example is not None:
      yield example


def arrays_of(
  examples: Iterable[Encoded], length: int, ids: ImageTokens
) -> dict[str, np.ndarray]:
  """The arrays of one row of examples that fit into it.

  Returns:
    The arrays of `supervised.place`, and `vector_index [S] int32`: -1 at a word, else the number of
    the vector among those of the row's pictures, `num_slots` each.
  """
  examples = list(examples)
  row = supervised.place(examples, length, ids.pad_id)
  index = row["vector_index"] = np.full(length, -1, np.int32)
  start = num_vectors = 0
  for example in examples:
    vectors = example.vectors[:-1]
    index[start : start + len(vectors)] = np.where(vectors < 0, -1, vectors + num_vectors)
    start += len(vectors)
    num_vectors += len(example.pictures) * ids.num_slots
  return row


@contextlib.contextmanager
def _store(directory: Path):
  """Yields the function that notes where a picture is, and returns its number."""
  num_pictures = num_files = 0
  last_path = None
  with (
    growing(directory / "picture_spans.npy", "<i8", (3,)) as spans,
    growing(directory / "picture_path_ends.npy") as path_ends,
    (directory / _CONTENTS).open("wb") as contents,
    (directory / _PATHS).open("wb") as paths,
  ):
    def store(picture: Picture) -> int:
      nonlocal num_pictures, num_files, last_path
      if picture.path:
        if picture.path != last_path:
          paths.write(picture.path.encode("utf-8", "surrogateescape"))
          path_ends(np.array([paths.tell()]))
          num_files, last_path = num_files + 1, picture.path
        size = -1 if picture.num_bytes is None else picture.num_bytes
        span = (num_files - 1, picture.offset, size)
      else:
        span = (_HERE, contents.tell(), len(picture.data))
        contents.write(picture.data)
      spans(np.array([span]))
      num_pictures += 1
      return num_pictures - 1

    yield store


class ImageRows:
  """Rows with pictures by index, as `write_rows` wrote them.

  Attributes:
    length, pictures_per_row: S and I.
    image_tokens: the ids that the rows were made with.
    counts: what `write_rows` returned.
    ids: the rows' ids, `[N] int64`, mapped; a row has the id of its first example.

  Args:
    directory: the folder that `write_rows` wrote.
    settings: how pictures become pixels.
    num_threads: number of threads that decode; no result depends on it.
    cache_bytes: pixels up to this size, of all pictures together, stay in memory once decoded.

  Raises:
    ValueError: if the folder holds no finished rows.
  """

  def __init__(
    self, directory: Path | str, settings: ImageSettings, *, num_threads: int = 8,
    cache_bytes: int = 1 << 30,
  ):
    self.directory, self.settings = Path(directory), settings
    path = self.directory / METADATA_FILE
    try:
      metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise ValueError(
        f"{self.directory} holds no finished rows ({path.name}: {error}); write them again."
      ) from error
    self.length: int = metadata["length"]
    self.pictures_per_row: int = metadata["pictures_per_row"]
    self.image_tokens = ImageTokens(**metadata["ids"])
    self.counts: dict[str, int] = metadata["counts"]
    self._arrays = {name: self._mapped(name) for name in (*_FIELDS, "picture_index")}
    self.ids = self._mapped("ids")
    self._spans, self._path_ends = self._mapped("picture_spans"), self._mapped("picture_path_ends")
    self._num_threads = num_threads
    pixel_bytes = settings.height * settings.width * 3
    self._keeps_pixels = len(self._spans) * pixel_bytes <= cache_bytes

  def _mapped(self, name: str) -> np.ndarray:
    path = self.directory / f"{name}.npy"
    try:
      return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
      raise ValueError(f"{path} cannot be read ({error}); write the rows again.") from error

  def __len__(self) -> int:
    return len(self.ids)

  def batch(self, indices) -> dict[str, np.ndarray]:
    """Rows as a batch.

    Returns:
      `tokens`, `targets`, `positions`, `segment_ids`, `vector_index [B,S] int32`, `loss_mask [B,S]
      float32`, `images [B,I,height,width,3] uint8` (0 for those that a row lacks), and `example_id
      [B] int64`. Without pictures in the rows (I = 0) there are no images and no vector_index.
    """
    batch = self.texts(indices)
    if self.pictures_per_row:
      batch["images"] = self.images(indices)
    else:
      del batch["vector_index"]
    return batch

  def texts(self, indices) -> dict[str, np.ndarray]:
    """The arrays of `batch` without images, `vector_index` always among them; decodes nothing."""
    indices = np.asarray(indices)
    batch = {name: np.asarray(self._arrays[name][indices]) for name in _FIELDS}
    batch["loss_mask"] = batch["loss_mask"].astype(np.float32)
    batch["example_id"] = np.array(self.ids[indices])
    return batch

  def num_learned(self, indices) -> np.ndarray:
    """Learned tokens of rows, `[n] int64`; decodes nothing."""
    return self._arrays["loss_mask"][np.asarray(indices)].sum(axis=1, dtype=np.int64)

  def images(self, indices) -> np.ndarray:
    """Pixels of the pictures of rows, `[n,I,height,width,3] uint8`.

    Raises:
      ValueError: if a picture cannot be read; it names the picture.
    """
    numbers = self.picture_numbers(indices)
    out = np.zeros((*numbers.shape, self.settings.height, self.settings.width, 3), np.uint8)
    there = numbers >= 0
    wanted, places = np.unique(numbers[there], return_inverse=True)
    if len(wanted):
      out[there] = np.stack(list(self._pool.map(self._pixels, wanted.tolist())))[places]
    return out

  def picture_numbers(self, indices) -> np.ndarray:
    """The numbers of the pictures of rows, `[n,I] int64`, -1 for those that a row lacks."""
    return np.asarray(self._arrays["picture_index"][np.asarray(indices)])

  @property
  def num_pictures(self) -> int:
    """Pictures of all rows."""
    return len(self._spans)

  def picture(self, number: int) -> Picture:
    """A picture of the rows by its number."""
    file, offset, size = self._spans[number].tolist()
    if file == _HERE:
      path = str(self.directory / _CONTENTS)
    else:
      start, end = self._path_ends[file - 1] if file else 0, self._path_ends[file]
      path = self._paths[start:end].tobytes().decode("utf-8", "surrogateescape")
    if size < 0:
      return Picture(path, path)
    return Picture(f"{path} bytes {offset:,} to {offset + size:,}", path, offset, size)

  @functools.cached_property
  def _paths(self) -> np.ndarray:
    path = self.directory / _PATHS
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)

  def _pixels(self, number: int) -> np.ndarray:
    if self._keeps_pixels and number in self._kept:
      return self._kept[number]
    picture = self.picture(number)
    pixels = self.settings.pixels(picture.read(), picture.where)
    if self._keeps_pixels:
      self._kept[number] = pixels
    return pixels

  @functools.cached_property
  def _kept(self) -> dict[int, np.ndarray]:
    return {}

  @functools.cached_property
  def _pool(self) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(self._num_threads, "pictures")
