"""Fine-tuning of a published model on texts, prompts with completions, or conversations."""

from lmops_jax.systems.finetune.system import Finetune

__all__ = ["Finetune"]
