"""Kosmos-1: a language model that sees (arXiv:2302.14045).

Importing this package registers everything its gin files name.
"""

from lmops_jax.systems.kosmos.grit import Grit
from lmops_jax.systems.kosmos.instructions import InstructionJsonl
from lmops_jax.systems.kosmos.pretrain import Pretrain
from lmops_jax.systems.kosmos.system import Kosmos

__all__ = ["Grit", "InstructionJsonl", "Kosmos", "Pretrain"]
