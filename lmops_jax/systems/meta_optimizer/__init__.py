"""In-context learning as meta-optimisation, implicit gradient descent (arXiv 2212.10559)."""
