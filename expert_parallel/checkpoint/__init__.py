"""Checkpoints: folders of safetensors and JSON, in logical names, the same in every layout. Nothing is pickled."""
