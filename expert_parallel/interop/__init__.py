"""Weights of others: Hugging Face folders in and out, dense models turned into mixtures of experts."""
