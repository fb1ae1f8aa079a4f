"""Measurements that ship: ratios of things timed side by side in one run. Never part of the tests."""
