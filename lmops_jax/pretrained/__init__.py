"""Published models: import, tokenizers, export.

Importing this package registers `pretrained.load` and `pretrained.text_encoder` with gin.
"""

from lmops_jax.pretrained.model import PretrainedModel, load
from lmops_jax.pretrained.text_encoders import text_encoder

__all__ = ["PretrainedModel", "load", "text_encoder"]
