"""Generation with a key/value cache, behind words and pictures, free or constrained.

Greedy search, sampling, beam search, streaming and stop strings; and scores of given options.

Importing this package registers `decoding.GenerationOptions` with gin.
"""

from lmops_jax.decoding.generate import Generated, Generator
from lmops_jax.decoding.options import GenerationOptions
from lmops_jax.decoding.prompts import Prompt
from lmops_jax.decoding.text import Generation

__all__ = ["Generated", "Generation", "GenerationOptions", "Generator", "Prompt"]
