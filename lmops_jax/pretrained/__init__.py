"""Published models: import, tokenizers, export.

Importing this package registers `pretrained.load` with gin.
"""

from lmops_jax.pretrained.model import PretrainedModel, load

__all__ = ["PretrainedModel", "load"]
