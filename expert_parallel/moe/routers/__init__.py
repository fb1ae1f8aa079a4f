"""Chooses the experts of each token and their weights, and computes the losses that balance the load of the experts."""
