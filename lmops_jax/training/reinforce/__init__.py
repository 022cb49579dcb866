"""Reinforcement learning of language models: rollouts, rewards, PPO and GRPO.

`rollouts.Rollouts` is a source of batches that reads the parameters; `algorithms.PPO` and
`algorithms.GRPO` make learners; `training.loop` runs them as it runs every other learner.
"""
