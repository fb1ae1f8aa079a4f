"""Trains dense models and mixtures of experts alike, and compares the cost of reaching the same loss."""
