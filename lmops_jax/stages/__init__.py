"""Runs as stages that are fingerprinted, resumable and visible only when complete."""
