"""Starts torch.distributed under every launcher: reads the environment, runs the rendezvous, provides MPI."""
