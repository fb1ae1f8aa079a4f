"""Provides the engines, which compute gradients and update the weights: one in plain PyTorch (native), one with
DeepSpeed."""
