"""Carriers of tensors beside torch's own: MPI."""
