"""Training: data, step, gradients, optimizer, checkpoints, metrics, the loop."""
