"""Computes what the MoE layer must, slowly and with none of its code: the reference for tests."""
