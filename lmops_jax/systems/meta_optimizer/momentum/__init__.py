"""Language models with and without momentum attention (arXiv 2212.10559, section 5).

Importing this package registers everything its gin files name.
"""

from lmops_jax.systems.meta_optimizer.momentum.pairs import Pairs

__all__ = ["Pairs"]
