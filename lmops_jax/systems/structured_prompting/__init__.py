"""Structured prompting: thousands of demonstrations in groups (arXiv 2212.06713).

Importing this package registers `structured_prompting.*` with gin.
"""

from lmops_jax.systems.structured_prompting.attention import rescaled_attention, structured_logits
from lmops_jax.systems.structured_prompting.grouping import Groups, pack
from lmops_jax.systems.structured_prompting.prompting import Prompter, Prompting
from lmops_jax.systems.structured_prompting.retrieval import Retrieval
from lmops_jax.systems.structured_prompting.system import Pipeline

__all__ = [
  "Groups",
  "Pipeline",
  "Prompter",
  "Prompting",
  "Retrieval",
  "pack",
  "rescaled_attention",
  "structured_logits",
]
