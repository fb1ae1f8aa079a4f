"""Computes the local experts on the rows that this rank received."""
