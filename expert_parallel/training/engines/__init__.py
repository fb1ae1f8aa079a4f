"""What turns micro-steps into an update of the weights: PyTorch alone, or DeepSpeed."""
