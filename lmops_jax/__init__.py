"""JAX/Flax implementations of ten systems that study how language models learn and are used."""

import importlib.util  # noqa: F401  gin 0.5.0 uses it without importing it

__version__ = "0.1.0"
