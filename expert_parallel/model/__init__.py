"""The Megatron-style decoder, as single-device code, and how it is laid over ranks."""
