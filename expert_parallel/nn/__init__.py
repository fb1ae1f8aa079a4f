"""Provides what the MoE layer and the model share: feed-forward networks, norms, and random numbers."""
