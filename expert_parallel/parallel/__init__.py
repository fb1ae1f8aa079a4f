"""This room places the ranks in groups and exchanges rows between them. It knows no model."""
