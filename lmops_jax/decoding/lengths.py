"""Sizes that buffers are padded to, so that few programs serve all lengths."""

_SMALL_BUCKETS = (16, 32, 64, 128)


def bucket(length: int) -> int:
  """The size of buffer for `length` tokens: 16, 32, 64 or a multiple of 128."""
  for size in _SMALL_BUCKETS:
    if length <= size:
      return size
  return -(-length // 128) * 128


def fine_bucket(length: int, smallest: int = 16) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: few sizes, a fifth of padding on average."""
  size = smallest
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else -(-size * 4 // 3)
  return size
