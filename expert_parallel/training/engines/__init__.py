"""Provides the engines, which update the weights from micro-steps: PyTorch alone (native), or DeepSpeed."""
