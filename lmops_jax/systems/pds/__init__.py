"""PDS: pre-training data selection by optimal control (arXiv 2410.07064).

Importing this package registers everything its gin files name.
"""

from lmops_jax.systems.pds.system import Pipeline

__all__ = ["Pipeline"]
