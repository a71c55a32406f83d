"""Reinforcement: rewards, and the answers that are sampled for them."""
