"""Analytic arithmetic of a transformer, for cost accounting and MFU.

Counts as MaxText and Chinchilla do: two operations a matmul parameter and token, and causal
attention once, that is half of the full score matrix. Rematerialisation is not counted. XLA's own
count is not used because it counts the body of a scan once.
"""

from __future__ import annotations

from lmops_jax.models.transformer import TransformerConfig


def matmul_params(config: TransformerConfig) -> int:
  """Parameters that take part in a matrix product for every token (embedding lookup excluded)."""
  attention = config.width * config.head_width * 2 * (config.num_heads + config.key_heads)
  return config.num_layers * (attention + 3 * config.width * config.mlp_width) + (
    config.width * config.vocab_size
  )


def forward_flops_per_token(config: TransformerConfig, length: int) -> float:
  """Operations of one forward pass, a token of a sequence of `length`. A gradient costs 3 times it."""
  attention = 2 * config.num_layers * length * config.num_heads * config.head_width
  return 2.0 * matmul_params(config) + attention
