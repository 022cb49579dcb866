"""Promptist (arXiv 2212.09611): a language model that rewrites prompts for an image model."""
