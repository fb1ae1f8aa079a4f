"""The proof that any layout computes the same model: see README.md."""
