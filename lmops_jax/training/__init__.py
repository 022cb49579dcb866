"""Losses, optimizers, mesh, train state, step, loop and checkpoints."""
