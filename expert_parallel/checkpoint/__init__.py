"""Saves and loads checkpoints: folders of safetensors and JSON, independent of the layout, without pickle."""
