"""The learning law: optimal learning policies (arXiv 2402.17759).

Importing this package registers everything its gin files name.
"""

from lmops_jax.systems.learning_law.language import Language, perturb_tokens
from lmops_jax.systems.learning_law.optimise import SavedPolicy, load_policy
from lmops_jax.systems.learning_law.system import Evaluation, Pipeline
from lmops_jax.systems.learning_law.tasks import Perceptron, Task, load_task, perceptron_data

__all__ = [
  "Evaluation",
  "Language",
  "Perceptron",
  "Pipeline",
  "SavedPolicy",
  "Task",
  "load_policy",
  "load_task",
  "perceptron_data",
  "perturb_tokens",
]
