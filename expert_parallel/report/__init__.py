"""Reports what the experts of a run learned, as one HTML page."""
