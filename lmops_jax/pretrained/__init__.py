"""Published models: import, tokenizers, export.

Importing this package registers `pretrained.load`, `pretrained.text_encoder` and
`pretrained.aesthetic` with gin.
"""

from lmops_jax.pretrained.aesthetic import AestheticFile
from lmops_jax.pretrained.model import PretrainedModel, load
from lmops_jax.pretrained.text_encoders import text_encoder

__all__ = ["AestheticFile", "PretrainedModel", "load", "text_encoder"]
