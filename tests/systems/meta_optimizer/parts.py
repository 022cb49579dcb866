"""A model and a task for gin files."""

import dataclasses

import gin

from lmops_jax.data.tasks import Example, Task, write_task
from lmops_jax.stages import skeleton
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

  def params(self):
    return make(self.kind)[1]

  def tokenizer(self):
    return WordTokenizer()

  def stages(self, where, partitioner):
    return []

  def reads(self, where):
    return (f"{where}.kind",)

  def opened(self):
    return self


@gin.register("Task", module="tiny")
@dataclasses.dataclass(frozen=True)
class TinyTask:
  name: str = "toy"
  seed: int = 0

  def fingerprint(self):
    return str(self.seed)

  def stage(self, where):
    return skeleton.Stage(f"task/{self.name}", self.run, reads=(f"{where}.fingerprint",))

  def run(self, context):
    made = make_task(seed=self.seed)
    rows, train = (tuple(Example(*row) for row in part) for part in (made.rows, made.train))
    write_task(context.directory, Task(self.name, rows, train, made.words))
