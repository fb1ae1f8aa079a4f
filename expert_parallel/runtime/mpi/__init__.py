"""Provides MPI as a backend of torch.distributed, next to gloo and nccl."""
