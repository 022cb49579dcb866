"""MetaLM: language models as interfaces of encoders (arXiv:2206.06336).

Importing this package registers everything its gin files name.
"""

from lmops_jax.systems.metalm.pretrain import Pretrain
from lmops_jax.systems.metalm.starts import PublishedReader
from lmops_jax.systems.metalm.system import MetaLM

__all__ = ["MetaLM", "Pretrain", "PublishedReader"]
