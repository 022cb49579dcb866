"""Kosmos-1 and 2: language models that see (arXiv:2302.14045, arXiv:2306.14824).

Importing this package registers everything their gin files name.
"""

from lmops_jax.systems.kosmos.grit import Grit
from lmops_jax.systems.kosmos.grounding import Grounding
from lmops_jax.systems.kosmos.instructions import InstructionJsonl
from lmops_jax.systems.kosmos.pretrain import Pretrain
from lmops_jax.systems.kosmos.system import Kosmos

__all__ = ["Grit", "Grounding", "InstructionJsonl", "Kosmos", "Pretrain"]
