"""A model and a task for gin files."""

import dataclasses

import gin

from tests.systems.meta_optimizer.conftest import make
from tests.systems.meta_optimizer.examples import WordTokenizer, make_task


@gin.register(module="tiny")
@dataclasses.dataclass(frozen=True)
class Model:
  kind: str = "gpt2"

  @property
  def model(self):
    return make(self.kind)[0]

  @property
  def config(self):
    return self.model.config

  def params(self, partitioner):
    return make(self.kind)[1]

  def tokenizer(self):
    return WordTokenizer()

  def fingerprint(self):
    return self.kind


@gin.register(module="tiny")
@dataclasses.dataclass(frozen=True)
class Task:
  name: str = "toy"
  seed: int = 0

  def load(self):
    return dataclasses.replace(make_task(seed=self.seed), name=self.name)

  def fingerprint(self):
    return str(self.seed)
