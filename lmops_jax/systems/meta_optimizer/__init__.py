"""In-context learning as meta-optimisation (arXiv 2212.10559)."""
