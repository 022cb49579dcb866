"""The three Beam transforms that `Engine` is made of. Imported only if Beam is installed."""

from __future__ import annotations

import copy

import apache_beam as beam


class _Apply(beam.DoFn):
  def __init__(self, function, setup):
    self._function, self._setup = function, setup

  def setup(self):
    self._arguments = () if self._setup is None else (self._setup(),)

  def process(self, item):
    self._function(*self._arguments, item)


class _Sum(beam.CombineFn):
  def __init__(self, function, zero):
    self._function, self._zero = function, zero

  def create_accumulator(self):
    return copy.deepcopy(self._zero)

  def add_input(self, total, item):
    return total + self._function(item)

  def merge_accumulators(self, totals):
    return sum(totals, start=self.create_accumulator())

  def extract_output(self, total):
    return total


def apply(function, setup=None):
  """Calls the function for every element."""
  return "apply" >> beam.ParDo(_Apply(function, setup))


def total(function, zero):
  """The sum of the function over all elements; `zero` if there are none."""
  return "total" >> beam.CombineGlobally(_Sum(function, zero))


def group(read, write):
  """Reads (key, value) pairs out of elements and writes the values of each key together."""
  return (
    "read" >> beam.FlatMap(read)
    | "group" >> beam.GroupByKey()
    | "write" >> beam.ParDo(_Apply(lambda pair: write(*pair), None))
  )
