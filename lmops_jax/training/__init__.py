"""Losses, optimizers, learners, sources of batches, the training loop, and its metrics."""
