"""Generation with a key/value cache: greedy, sampling, beam search, streaming and stop strings.

Importing this package registers `decoding.GenerationOptions` with gin.
"""

from lmops_jax.decoding.generate import Generated, Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.text import Generation

__all__ = ["Generated", "Generation", "GenerationOptions", "Generator"]
