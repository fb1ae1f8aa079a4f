"""Limits how many choices an expert or a rank computes, and drops or reroutes the others."""
