"""Verifies that every layout computes the same model: see README.md."""
