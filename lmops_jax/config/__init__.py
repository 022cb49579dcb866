"""Gin files and bindings as one checked tree of settings."""
