"""Dispatchers carry rows to their experts' ranks and back; a ledger counts every exchange."""
