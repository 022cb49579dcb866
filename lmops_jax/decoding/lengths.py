"""Sizes that buffers are padded to, so that few programs serve all lengths."""


def bucket(length: int) -> int:
  """The size of buffer for `length` tokens.

  Every column is computed, so that padding costs what tokens do: sizes are multiples of 16 up to
  128, of 32 up to 256, of 64 up to 512, and of 128 beyond.
  """
  step = min(max((1 << (length - 1).bit_length()) // 8, 16), 128)
  return -(-max(length, 1) // step) * step


def fine_bucket(length: int, smallest: int = 16) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: few sizes, a fifth of padding on average."""
  size = smallest
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else -(-size * 4 // 3)
  return size
