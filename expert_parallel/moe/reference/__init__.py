"""The reference layer computes what the fast one must, slowly and without any of its code."""
