"""Kosmos-2: the same model with places in its texts (arXiv:2306.14824)."""

from lmops_jax.systems.kosmos.grounding.system import Grounding

__all__ = ["Grounding"]
