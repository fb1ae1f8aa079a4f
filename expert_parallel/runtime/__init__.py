"""This room starts a process among the others: what launchers say, where the ranks meet, MPI."""
