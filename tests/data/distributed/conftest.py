import itertools

import pytest


class _Here:
  """An engine without Beam: in this process, last item first."""

  def each(self, function, items, *, setup=None):
    arguments = () if setup is None else (setup(),)
    for item in reversed(list(items)):
      function(*arguments, item)

  def group(self, read, items, write):
    pairs = sorted(itertools.chain.from_iterable(map(read, items)), key=lambda pair: pair[0])
    for key, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
      write(key, [value for _, value in reversed(list(group))])


@pytest.fixture(scope="session")
def here():
  return _Here()
