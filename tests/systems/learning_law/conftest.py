"""A small perceptron task, a mesh of one device, and a stage context."""

import optax
import pytest

from lmops_jax.mesh.meshes import single_device
from lmops_jax.stages import pipeline
from lmops_jax.systems.learning_law import Perceptron
from lmops_jax.systems.learning_law.inner import Training

NUM_STEPS = 8


@pytest.fixture(scope="session")
def task():
  return Perceptron(dim=4, num_train=18, num_desired=40, num_select=20, label_flip=0.25).make(0)


@pytest.fixture(scope="session")
def training():
  return Training(NUM_STEPS, optax.sgd(0.3))


@pytest.fixture(scope="session")
def device():
  return single_device()


@pytest.fixture
def context_at():
  def make(folder, **inputs):
    folder.mkdir(parents=True, exist_ok=True)
    return pipeline.StageContext("stage", folder, inputs, lambda text: None)

  return make
