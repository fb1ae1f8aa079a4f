"""Measures ratios of implementations that are timed side by side in one run. No test depends on these times."""
