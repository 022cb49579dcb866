"""Files that commands write at their end."""

from pathlib import Path


def check_writable(option: str, path: str) -> None:
  """Opens a file that is written at the end, so that hours of work are not lost then.

  Args:
    option: what it was named with, for errors.

  Raises:
    ValueError: the folder does not exist, or the file cannot be written.
  """
  file = Path(path).expanduser()
  if not file.parent.is_dir():
    raise ValueError(f"{option} {path} lies in a folder that does not exist; make it first.")
  try:
    file.open("a").close()
  except OSError as error:
    raise ValueError(f"{option} {path} cannot be written ({error.strerror}).") from error
