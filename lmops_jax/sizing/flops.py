"""Analytic arithmetic of a transformer, for cost accounting and MFU.

Counts as MaxText and Chinchilla do: two operations a matmul parameter and token, and causal
attention once, that is half of the full score matrix, which attention in both directions has whole.
Rematerialisation is not counted. XLA's own count is not used because it counts the body of a scan
once.
"""

from __future__ import annotations

from lmops_jax.models.transformer import TransformerConfig


def matmul_params(config: TransformerConfig, *, unembedding: bool = True) -> int:
  """Parameters that multiply every token: no looked-up ones; the output matrix if asked for."""
  attention = config.width * config.head_width * 2 * (config.num_heads + config.key_heads)
  mlp = (3 if config.gated_mlp else 2) * config.width * config.mlp_width
  blocks = config.num_layers * (attention + mlp)
  return blocks + (config.token_width * config.vocab_size if unembedding else 0)


def forward_flops_per_token(
  config: TransformerConfig, length: int, *, unembedding: bool = True
) -> float:
  """Operations of a forward pass for each token of a sequence; a gradient takes 3 times as many."""
  attention = (4 - 2 * config.causal) * (
    config.num_layers * length * config.num_heads * config.head_width)
  return 2.0 * matmul_params(config, unembedding=unembedding) + attention
