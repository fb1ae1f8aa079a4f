"""Imports and exports Hugging Face models, upcycles dense models, and adds, removes and merges experts."""
