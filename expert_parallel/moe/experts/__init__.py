"""Experts compute the rows that have arrived, whoever sent them."""
