"""This room carries torch.distributed over MPI, as one more backend beside gloo and nccl."""
