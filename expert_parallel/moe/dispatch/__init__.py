"""Sends rows to the ranks of their experts and back; a ledger accounts for every exchange."""
