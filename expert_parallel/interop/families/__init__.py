"""Holds the families of Hugging Face models, one file for families that share most of their rules."""
