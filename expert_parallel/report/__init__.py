"""Pages about a run, for people: what its experts learned."""
