"""The mixture-of-experts layer. Knows nothing of models, training or files."""
