"""Texts of messages, cut if they get long."""

from collections.abc import Sequence


def shortened(text: str, most: int) -> str:
  """The text, or its first `most` characters and dots."""
  return text if len(text) <= most else f"{text[:most]}..."


def listed(items: Sequence[str], most: int) -> str:
  """"a, b and 3 more": the first `most` items, and how many follow."""
  more = f" and {len(items) - most} more" if len(items) > most else ""
  return ", ".join(items[:most]) + more
