"""Reinforcement learning of a published model on prompts, with any reward."""

from lmops_jax.systems.reinforce.system import Reinforce

__all__ = ["Reinforce"]
