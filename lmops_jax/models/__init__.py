"""Flax Linen modules: frozen configuration in, module out."""
