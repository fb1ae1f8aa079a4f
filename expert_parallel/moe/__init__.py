"""Provides the mixture-of-experts layer. Nothing here depends on models, training or files."""
