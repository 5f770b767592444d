"""Rewards and advantages of Refine-RL: pure functions of tensors."""
