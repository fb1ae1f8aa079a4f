"""Capacity bounds how many choices an expert or a rank takes, and says what becomes of the rest."""
