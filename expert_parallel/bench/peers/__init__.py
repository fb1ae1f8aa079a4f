"""Adapts the implementations that ours is measured against: one file each, all of them in `PEERS`."""
