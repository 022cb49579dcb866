"""Meta-optimisers: in-context learning seen as implicit gradient descent (arXiv 2212.10559)."""
