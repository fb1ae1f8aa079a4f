"""The implementations that ours is measured beside: one file a peer, all of them in `peers.PEERS`."""
