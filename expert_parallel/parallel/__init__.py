"""Provides process groups, collectives and sharding. Nothing here depends on a model."""
