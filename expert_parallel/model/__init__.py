"""Holds the Megatron-style decoder as single-device code, and applies every form of parallelism to it from outside."""
