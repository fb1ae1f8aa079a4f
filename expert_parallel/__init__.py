"""Expert Parallel: mixture-of-experts training, correct in every layout and proven so."""

__version__ = "0.1.0"
