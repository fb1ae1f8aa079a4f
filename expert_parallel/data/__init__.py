"""Turns text into the micro-batches of each data-parallel rank: preparing, blending, sampling, sharding."""
