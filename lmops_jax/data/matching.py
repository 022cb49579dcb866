"""Which files a path stands for: itself, those of a folder, or those that fit a pattern.

Every entry that fits is taken, or named as left out, or refused: broken links, folders that cannot
be listed and special files never vanish in silence. Names that begin with a dot (checkpoints of
notebooks, caches, copies that other systems make) are left out unless the pattern begins with a dot
there too. Links to folders are followed.
"""

import collections
import fnmatch
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lmops_jax.host.foreign_files import printable, require_regular

_MAX_NAMES = 3  # the most names in a line


class Found(NamedTuple):
  """What a path stands for.

  Attributes:
    files: (name relative to the fixed part of the pattern, path), sorted by name.
    left_out: names of what is not read, by reason: "hidden" (a folder counts once), "other_ending",
      "folder" (one that a pattern for files fits), "unreadable" (a link that leads nowhere).
  """

  files: list[tuple[str, Path]]
  left_out: dict[str, list[str]]


def matching(path: str, parameter: str, endings: tuple[str, ...]) -> Found:
  """Files that a path or pattern stands for; a folder stands for its files with these endings.

  Raises:
    ValueError: if nothing fits, naming `parameter`, or if an entry cannot be read, naming it.
  """
  place = os.path.expanduser(path)
  found = Found([], {})
  if os.path.isdir(place):
    found = search(Path(place), ("**", "*"), endings=endings)
  elif glob.has_magic(place) and not os.path.lexists(place):
    parts = Path(place).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed])
    if base.is_dir():
      found = search(base, parts[fixed:])
  elif os.path.lexists(place):
    _require_readable(place)
    found = Found([(Path(place).name, Path(place))], {})
  if not found.files:
    there = "; ".join(left_out_lines(found.left_out))
    raise ValueError(
      f"{parameter}={path!r} matches no file ({' or '.join(endings)} in a folder)"
      f"{' but ' + there if there else ''}; check the path, which is relative to {os.getcwd()}."
    )
  return found


def search(
  base: Path, parts: Sequence[str], *, endings: tuple[str, ...] = ("",), keep_broken: bool = False
) -> Found:
  """Files below a folder that fit a pattern.

  Args:
    parts: the parts of the pattern, each for one name; `**` stands for any number of folders.
    endings: endings of names; files with others are named as left out.
    keep_broken: take links that lead nowhere as files, for the caller to count; False refuses them.

  Raises:
    ValueError: if a folder cannot be listed or holds itself through a link, or an entry is no
      regular file.
  """
  parts = (*parts, "*") if parts[-1] == "**" else tuple(parts)
  walk = _Walk(base, parts, endings, keep_broken)
  walk.folder("", {0}, ())
  return Found(sorted(walk.files), {reason: sorted(n) for reason, n in walk.left_out.items()})


def left_out_lines(left_out: dict[str, list[str]]) -> list[str]:
  """`Found.left_out` in words: a line for each reason, with the first names."""
  return [
    f"{len(names)} left out ({reason}): {', '.join(map(printable, names[:_MAX_NAMES]))}"
    + (", ..." if len(names) > _MAX_NAMES else "")
    for reason, names in sorted(left_out.items())
  ]


class _Walk:
  """Goes through a folder and keeps the places in the pattern that each name has reached."""

  def __init__(self, base, parts, endings, keep_broken):
    self.base, self.parts, self.endings, self.keep_broken = base, parts, endings, keep_broken
    self.files: list[tuple[str, Path]] = []
    self.left_out: dict[str, list[str]] = collections.defaultdict(list)

  def folder(self, name: str, places: set[int], above: tuple[tuple[int, int], ...]) -> None:
    path = self.base / name
    try:
      status = path.stat()
      with os.scandir(path) as listing:
        entries = list(listing)
    except OSError as error:
      raise ValueError(
        f"the folder {printable(path)} cannot be read ({error.strerror}); permit it, or give a "
        "pattern that does not lead there."
      ) from error
    itself = status.st_dev, status.st_ino
    if itself in above:
      raise ValueError(
        f"the folder {printable(path)} holds itself through a link; take the link away, or give a "
        "pattern that does not lead there."
      )
    for place in sorted(places):  # `**` also stands for no folder
      while self.parts[place] == "**":
        place += 1
        places.add(place)
    for entry in entries:
      self._entry(entry, f"{name}/{entry.name}" if name else entry.name, places, (*above, itself))

  def _entry(self, entry: os.DirEntry, name: str, places: set[int], above) -> None:
    last = len(self.parts) - 1
    fitting = [place for place in places if self._fits(entry.name, place)]
    is_match, onwards = last in fitting, self._onwards(fitting)
    is_folder, is_broken = _is_folder(entry), _is_broken(entry)
    # A link that leads nowhere may have led to a folder, unless its name has an ending.
    may_lead_on = is_folder or (is_broken and not os.path.splitext(entry.name)[1])
    if not is_match and not (may_lead_on and onwards):
      return
    if entry.name.startswith("."):
      fitting = [place for place in fitting if self.parts[place].startswith(".")]
      if not fitting:
        self.left_out["hidden"].append(name)
        return
      is_match, onwards = last in fitting, self._onwards(fitting)
    path = self.base / name
    if is_folder and onwards:
      self.folder(name, onwards, above)
    elif is_folder:
      self.left_out["folder"].append(name)
    elif not entry.name.endswith(self.endings) and not may_lead_on:
      self.left_out["other_ending"].append(name)
    elif is_broken and self.keep_broken and not is_match:
      self.left_out["unreadable"].append(name)
    else:
      if not entry.is_file(follow_symlinks=False) and not (is_broken and self.keep_broken):
        _require_readable(path)
      self.files.append((name, path))

  def _onwards(self, fitting: list[int]) -> set[int]:
    """Places in the pattern for the entries of a folder whose name fits these places."""
    ends = len(self.parts) - 1
    return {place + (self.parts[place] != "**") for place in fitting if place != ends}

  def _fits(self, name: str, place: int) -> bool:
    return self.parts[place] in ("*", "**") or fnmatch.fnmatchcase(name, self.parts[place])


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:
    return False


def _is_broken(entry: os.DirEntry) -> bool:
  """Whether an entry is a link to something of which nothing can be learnt."""
  if not entry.is_symlink():
    return False
  try:
    entry.stat()
  except OSError:
    return True
  return False


def _require_readable(path: Path | str) -> None:
  """Refuses links that lead nowhere and what is no regular file."""
  try:
    os.stat(path)
  except FileNotFoundError as error:
    raise ValueError(
      f"{printable(path)} is a link to {printable(os.readlink(path))}, which is not there; restore "
      "it, or take the link away."
    ) from error
  except OSError as error:
    raise ValueError(f"{printable(path)} cannot be read ({error.strerror}).") from error
  require_regular(path)
