"""Reinforcement learning: sample answers, and score them with a reward function."""
