"""Engines update the weights from micro-steps: PyTorch alone (native), or DeepSpeed."""
